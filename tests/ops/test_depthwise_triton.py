"""The Triton kernels against stock operators in float64: on a GPU, or in Triton's interpreter."""

import itertools
from types import SimpleNamespace

import pytest
import torch
from common.launches import replaced
from helpers.comparisons import relative_error
from helpers.depthwise import own, stock
from torch import nn

triton = pytest.importorskip('triton', minversion='3.3', reason='no Triton from 3.3 on')

# ruff: noqa: E402
from mmconv2former.ops import DepthwiseConv, depthwise, depthwise_conv2d, depthwise_triton, launch
from mmconv2former.ops.depthwise_triton import (
    Blocks,
    blocks_for,
    depthwise_forward,
    depthwise_weight_gradient,
    lay_out,
    lay_out_together,
    shares_launcher,
    split_evenly,
)
from mmconv2former.ops.launch import Launcher
from mmconv2former.ops.triton_support import CompilationError

ON_GPU = torch.cuda.is_available()
DEVICE = 'cuda' if ON_GPU else 'cpu'
# Of results in the dtype; the interpreter rounds bfloat16 towards zero.
TOLERANCE = {torch.float64: 1e-13, torch.float32: 1e-6, torch.float16: 5e-4, torch.bfloat16: 4e-3}

# N, H, W, C, K and a dtype, not all of them, as the interpreter takes seconds for a large kernel:
# channel counts that are multiples of 8 or not, blocks that end in the middle of a row, single
# rows, columns and pixels, kernels larger than the image, kernels split by rows.
SMALL = [(2, 9, 7, 24, 3), (1, 1, 1, 1, 3), (2, 6, 5, 75, 5)]
CASES = [
    *itertools.product(SMALL, TOLERANCE),
    ((2, 17, 40, 8, 3), torch.float64),
    ((1, 12, 11, 20, 7), torch.float32),
    ((1, 1, 30, 7, 9), torch.float64),
    ((1, 9, 5, 24, 11), torch.bfloat16),
    ((1, 4, 1, 40, 11), torch.float64),
    ((1, 5, 6, 8, 13), torch.float64),
]
if ON_GPU:
    large = [(2, 200, 320, 72, 11), (2, 50, 83, 288, 11), (2, 25, 40, 576, 11),
             (2, 50, 80, 1152, 3), (8, 56, 56, 128, 31), (4, 28, 28, 257, 21)]  # fmt: skip
    CASES = list(itertools.product({case for case, _ in CASES} | set(large), TOLERANCE))


@pytest.fixture(autouse=True)
def by_triton(monkeypatch):
    monkeypatch.setattr(depthwise, 'setting', 'triton')


def make(n, h, w, c, k, dtype):
    """Input, gradient, weight and bias; all values are exact in the dtype."""
    generator = torch.Generator().manual_seed(0)

    def normal(*shape):
        return torch.randn(shape, generator=generator, dtype=torch.double).to(DEVICE, dtype)

    return normal(n, h, w, c), normal(n, h, w, c), normal(c, 1, k, k), normal(c)


def exact(*operands):
    """Output and gradients for input, weight and bias by the stock operator in float64."""
    return stock(*(operand.double() for operand in operands))


@pytest.mark.parametrize(('case', 'dtype'), CASES, ids=str)
def test_values_and_gradients(case, dtype):
    operands = make(*case, dtype)
    for value, reference in zip(own(depthwise_conv2d, *operands), exact(*operands)):
        assert value.dtype == dtype
        assert value.shape == reference.shape
        assert value.is_contiguous()
        assert relative_error(value, reference) < TOLERANCE[dtype]


@pytest.mark.parametrize('dtype', [torch.float16, torch.bfloat16])
def test_sums_are_of_float32(dtype):
    """Gradients of the weight for float32 parameters carry no rounding to half precision."""
    x, grad, weight, bias = make(2, 20, 9, 24, 3, dtype)
    results = depthwise_weight_gradient(x, grad, 3, torch.float32, has_bias=True)
    for value, reference in zip(results, exact(x, grad, weight, bias)[2:]):
        assert value.dtype == torch.float32
        assert relative_error(value, reference) < 1e-6


@pytest.mark.parametrize('kernel_size', [3, 5])
def test_divisions_of_the_work(kernel_size):
    """Any division gives the same: rows and columns in groups, blocks of any size."""
    x, grad, weight, bias = make(2, 5, 5, 12, kernel_size, torch.float64)
    results = exact(x, grad, weight, bias)
    ready = lay_out(weight, x.dtype)
    for taps, rows, columns, block in [(kernel_size, 1, 1, 64), (2, 5, 3, 32)]:
        blocks = Blocks(taps, rows, block, columns, block)
        with replaced(depthwise_triton, blocks_for=lambda kernel_size, b=blocks: b):
            values = [
                depthwise_forward(x, ready, bias),
                depthwise_forward(grad, ready, None, flip=True),
                *depthwise_weight_gradient(x, grad, kernel_size, x.dtype, True),
            ]
        assert all(relative_error(*pair) < 1e-13 for pair in zip(values, results))


@pytest.mark.parametrize('shares', [1, 3, 50])
def test_rows_divided_among_programs(shares):
    """Shares that begin and end in the middle of an image, and several periods of f."""
    x, grad, weight, bias = make(3, 11, 40, 8, 3, torch.float64)
    small = dict(blocks_for=lambda _: Blocks(3, 8, 64, 3, 128))
    if ON_GPU:
        with replaced(depthwise_triton, **small):
            depthwise_weight_gradient(x, grad, 3, x.dtype, True)  # compiles it

    def launcher(*args, **constants):
        found = shares_launcher(*args, **constants)
        found.at_once = shares
        return found

    with replaced(depthwise_triton, **small, shares_launcher=launcher):
        results = depthwise_weight_gradient(x, grad, 3, x.dtype, True)
    for value, reference in zip(results, exact(x, grad, weight, bias)[2:]):
        assert relative_error(value, reference) < 1e-13


def test_blocks():
    assert [split_evenly(k, 12) for k in (3, 11, 13, 15, 21, 31, 51)] == [3, 11, 7, 8, 11, 11, 11]
    for kernel_size in range(3, 52, 2):
        blocks = blocks_for(kernel_size)
        assert blocks.taps <= 12
        assert blocks.taps * blocks.columns <= 28


class Array:
    """A tensor on a GPU, as far as `Launcher` uses it."""

    device = torch.device('cuda')

    def __init__(self, address):
        self.address = address

    def data_ptr(self):
        return self.address

    def get_device(self):
        return 3


def test_launches_go_to_the_compiled_kernel(monkeypatch):
    """With addresses and constants in the order of the kernel's arguments, on the right stream."""
    monkeypatch.setattr(launch, 'limits', lambda device: (100, 65536))
    streams = SimpleNamespace(get_current_stream=lambda device: 100 + device)
    monkeypatch.setattr(triton.runtime, 'driver', SimpleNamespace(active=streams))
    calls, compilations = [], []
    compiled = SimpleNamespace(
        function='function', packed_metadata='metadata', n_regs=150,
        run=lambda *args: calls.append(args),
    )  # fmt: skip
    kernel = SimpleNamespace(
        arg_names=('x', 'bias', 'y', 'H', 'W', 'C', 'K'),
        warmup=lambda *args, **kwargs: compilations.append((args, kwargs)) or compiled,
    )
    launcher = Launcher(kernel, dict(K=3, C=8), num_warps=2)
    tensors = (Array(16), None, Array(32))
    launcher(7, tensors, (5, 6))
    launcher(9, tensors, (1, 2))
    assert compilations == [((*tensors, 5, 6), dict(C=8, K=3, num_warps=2, grid=(1,)))]
    common = (1, 1, 103, 'function', 'metadata', None, None, None, 16, None, 32)
    assert calls == [(7, *common, 5, 6, 8, 3), (9, *common, 1, 2, 8, 3)]
    # 150 registers are allocated as 152 to each of 64 threads, so that 6 programs fit.
    assert launcher.at_once == 600


class Run:
    """Triton's Python around its launch function in C, as in releases that want a tuple or not."""

    size = 0  # of memory that each launch allocates

    def __init__(self, as_tuple):
        self.as_tuple = as_tuple
        self.calls = []
        self.launch = self.record

    def record(self, *args):
        self.calls.append(args)

    def __call__(self, x, y, z, stream, function, *args):
        scratch = 'scratch' if self.size and x * y * z * self.size else None
        metadata, arguments = args[:4], args[4:]
        arguments = (arguments,) if self.as_tuple else arguments
        self.launch(x, y, z, stream, function, False, *metadata, scratch, *arguments)


class OtherOrder(Run):
    """The grid is not at the front, as in ROCm's version."""

    def __call__(self, *args):
        self.launch('cooperative', *args)


@pytest.mark.parametrize('as_tuple', [False, True])
def test_launches_skip_tritons_python(as_tuple):
    """And pass to its C function what that would pass."""
    run = Run(as_tuple)
    fixed = 'function', 'metadata', None, None, None
    direct, constant, takes_tuple = launch.without_python(run, fixed, 3)
    assert direct == run.record
    assert takes_tuple == as_tuple
    assert run.calls == []
    run(7, 1, 1, 103, *fixed, 16, None, 5)
    direct(7, 1, 1, 103, *constant, *([(16, None, 5)] if as_tuple else (16, None, 5)))
    assert run.calls[0] == run.calls[1]


def test_launches_go_through_tritons_python_where_it_matters():
    """If each launch allocates memory, and for launchers of another form."""
    allocating = Run(False)
    allocating.size = 8
    for run in (allocating, OtherOrder(False), print):
        found = launch.without_python(run, ('function', 'metadata', None, None, None), 3)
        assert found == (run, ('function', 'metadata', None, None, None), False)
    assert allocating.launch == allocating.record


def test_failures_of_the_compiler_are_told_apart():
    def warmup(*args, **kwargs):
        raise FileNotFoundError('gcc')

    with pytest.raises(CompilationError, match='FileNotFoundError: gcc'):
        Launcher(SimpleNamespace(arg_names=('x',), warmup=warmup), {})(1, (Array(16),), ())


def test_results_are_the_same_in_every_run():
    operands = make(2, 12, 10, 24, 5, torch.float32)
    assert all(map(torch.equal, *(own(depthwise_conv2d, *operands) for _ in range(2))))


@pytest.mark.parametrize('needs', itertools.product([False, True], repeat=3), ids=str)
def test_only_the_gradients_that_are_needed(needs):
    x, grad, weight, bias = make(1, 4, 3, 8, 3, torch.float64)
    leaves = [value.clone().requires_grad_(need) for value, need in zip((x, weight, bias), needs)]
    out = depthwise_conv2d(*leaves)
    assert out.requires_grad == any(needs)
    if any(needs):
        out.backward(grad)
    for leaf, need, reference in zip(leaves, needs, exact(x, grad, weight, bias)[1:]):
        assert (leaf.grad is not None) == need
        assert not need or relative_error(leaf.grad, reference) < 1e-13


def test_any_memory_layout():
    """Inputs, weights and gradients that are not contiguous or do not begin at 16 bytes."""
    x, grad, weight, bias = make(2, 4, 5, 12, 3, torch.float64)
    shifted = torch.empty(x.numel() + 1, dtype=x.dtype, device=DEVICE)[1:].view(x.shape).copy_(x)
    shifted_weight = lay_out(torch.cat([weight[:1], weight, weight[:3]]), x.dtype)[1:13]
    channels_first = x.permute(0, 3, 1, 2).contiguous().permute(0, 2, 3, 1)
    variants = {
        'channels first': (channels_first, grad, weight, bias),
        'shifted': (shifted, grad, weight, bias),
        'every other weight': (x, grad, torch.stack([weight, weight], -1)[..., 0], bias),
        'transposed weight': (x, grad, weight.mT.contiguous().mT, bias),
        'channels inside, transposed': (x, grad, lay_out(weight.mT, x.dtype).mT, bias),
        'channels inside, shifted': (x, grad, shifted_weight, bias),
        'half of the gradient': (x, torch.cat([grad, grad], -1)[..., :12], weight, bias),
        'every other bias': (x, grad, weight, torch.stack([bias, grad[0, 0, 0]], 1)[:, 0]),
        'expanded gradient': (x, grad[:1, :1, :1].expand_as(grad), weight, bias),
    }
    for name, operands in variants.items():
        for value, reference in zip(own(depthwise_conv2d, *operands), exact(*operands)):
            assert relative_error(value, reference) < 1e-13, name


def test_single_pixels_with_strides_of_another_layout():
    operands = make(3, 1, 1, 8, 3, torch.float64)
    x = operands[0].permute(0, 3, 1, 2).contiguous().permute(0, 2, 3, 1)
    x = x.as_strided(x.shape, (8, 1, 1, 1))  # contiguous, but not as x.contiguous() would be
    for value, reference in zip(own(depthwise_conv2d, x, *operands[1:]), exact(*operands)):
        assert relative_error(value, reference) < 1e-13


def test_no_image():
    out, grad_x, *others = own(depthwise_conv2d, *make(0, 4, 4, 8, 3, torch.float32))
    assert out.shape == grad_x.shape == (0, 4, 4, 8)
    assert not any(value.any() for value in others)


def test_weights_laid_out_together():
    """As one by one; of weights that share kernel size or not, and of odd channel counts."""
    for sizes in ([(16, 3), (8, 5), (24, 3), (8, 5)], [(16, 3), (7, 3)]):
        weights = [make(1, 1, 1, c, k, torch.float32)[2] for c, k in sizes]
        for dtype in (torch.float32, torch.bfloat16):
            for weight, ready in zip(weights, lay_out_together(weights, dtype)):
                assert torch.equal(ready, weight.to(dtype))
                assert ready.stride(0) == 1
                assert ready.stride(2) == weight.shape[-1] * ready.stride(3)
                x = make(1, 3, 2, *weight.shape[::3], dtype)[0]
                out = depthwise_forward(x, ready, None)
                assert torch.equal(out, depthwise_forward(x, lay_out(weight, dtype), None))
                assert lay_out(ready, dtype) is ready or ready.data_ptr() % 16


def test_module_outside_of_this_network():
    """The example of the docstring, smaller; with a bias and without."""
    for bias in (True, False):
        conv = DepthwiseConv(channels=8, kernel_size=5, bias=bias).to(DEVICE, torch.float64)
        x = torch.rand(2, 8, 6, 7, device=DEVICE, dtype=torch.float64)
        y = conv(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)
        reference = nn.Conv2d.forward(conv, x)
        torch.testing.assert_close(y, reference)
