"""The Triton kernels against stock operators in float64: on a GPU, or in Triton's interpreter."""

import itertools
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F

triton = pytest.importorskip('triton', minversion='3.3', reason='no Triton from 3.3 on')

# ruff: noqa: E402
from mmconv2former.ops import DepthwiseConv, depthwise, depthwise_conv2d, launch
from mmconv2former.ops.depthwise_triton import (
    Blocks,
    CompilationError,
    Launcher,
    blocks_for,
    depthwise_forward,
    depthwise_weight_gradient,
    lay_out,
    lay_out_together,
    split_evenly,
    weight_gradient_launchers,
)

ON_GPU = torch.cuda.is_available()
DEVICE = 'cuda' if ON_GPU else 'cpu'
# Of results in the dtype; the interpreter rounds bfloat16 towards zero.
TOLERANCE = {torch.float64: 1e-13, torch.float32: 1e-6, torch.float16: 5e-4, torch.bfloat16: 4e-3}

# N, H, W, C, K: channel counts that are multiples of 8 or not, blocks that end in the middle of a
# row, single rows, columns and pixels, kernels larger than the image, kernels split by rows.
CASES = [
    (2, 9, 7, 24, 3),
    (1, 1, 1, 1, 3),
    (3, 17, 70, 8, 3),
    (2, 6, 5, 75, 5),
    (1, 12, 11, 20, 7),
    (2, 9, 5, 24, 11),
    (1, 4, 1, 40, 11),
    (1, 1, 30, 7, 9),
    (1, 5, 6, 16, 13),
    (1, 6, 9, 8, 15),
    (1, 2, 3, 8, 31),
]
if ON_GPU:
    CASES += [
        (2, 200, 320, 72, 11),
        (2, 50, 83, 288, 11),
        (2, 25, 40, 576, 11),
        (2, 50, 80, 1152, 3),
        (8, 56, 56, 128, 31),
        (4, 28, 28, 257, 21),
    ]


@pytest.fixture(autouse=True)
def by_triton(monkeypatch):
    monkeypatch.setattr(depthwise, 'setting', 'triton')


def make(n, h, w, c, k, dtype):
    """Input, gradient, weight and bias; all values are exact in the dtype."""
    generator = torch.Generator().manual_seed(0)

    def normal(*shape):
        return torch.randn(shape, generator=generator, dtype=torch.double).to(DEVICE, dtype)

    return normal(n, h, w, c), normal(n, h, w, c), normal(c, 1, k, k), normal(c)


def expected(x, grad, weight, bias):
    """Output and gradients for input, weight and bias by the stock operator in float64."""
    leaves = [value.detach().double().clone().requires_grad_() for value in (x, weight, bias)]
    padding, groups = weight.shape[-1] // 2, weight.shape[0]
    out = F.conv2d(leaves[0].permute(0, 3, 1, 2), *leaves[1:], padding=padding, groups=groups)
    out = out.permute(0, 2, 3, 1)
    out.backward(grad.double())
    return [out.detach(), *(leaf.grad for leaf in leaves)]


def relative_error(value, reference):
    return ((value.double() - reference).norm() / reference.norm()).item()


# The interpreter takes seconds for a large kernel.
ALL = [
    (case, dtype)
    for case, dtype in itertools.product(CASES, TOLERANCE)
    if ON_GPU or case[-1] < 11 or dtype in (torch.float64, torch.bfloat16)
]


@pytest.mark.parametrize(('case', 'dtype'), ALL, ids=str)
def test_values_and_gradients(case, dtype):
    x, grad, weight, bias = make(*case, dtype)
    leaves = [value.clone().requires_grad_() for value in (x, weight, bias)]
    out = depthwise_conv2d(*leaves)
    out.backward(grad)
    results = [out, *(leaf.grad for leaf in leaves)]
    for result, leaf, reference in zip(results, (x, *leaves), expected(x, grad, weight, bias)):
        assert result.dtype == dtype
        assert result.shape == leaf.shape
        assert result.is_contiguous()
        assert relative_error(result, reference) < TOLERANCE[dtype]


@pytest.mark.parametrize('dtype', [torch.float16, torch.bfloat16])
def test_sums_are_of_float32(dtype):
    """Gradients of the weight for float32 parameters carry no rounding to half precision."""
    x, grad, weight, bias = make(2, 40, 9, 24, 3, dtype)
    _, _, weight_grad, bias_grad = expected(x, grad, weight, bias)
    found = depthwise_weight_gradient(x, grad, 3, torch.float32, has_bias=True)
    assert [value.dtype for value in found] == [torch.float32] * 2
    assert relative_error(found[0], weight_grad) < 1e-6
    assert relative_error(found[1], bias_grad) < 1e-6


@pytest.mark.parametrize('kernel_size', [3, 5, 7])
def test_divisions_of_the_work(kernel_size):
    """Any division gives the same: rows and columns in groups, blocks of any size."""
    x, grad, weight, bias = make(2, 5, 5, 12, kernel_size, torch.float64)
    out, grad_x, weight_grad, bias_grad = expected(x, grad, weight, bias)
    ready = lay_out(weight, x.dtype)
    for taps, rows, columns, block in [(kernel_size, 1, 1, 64), (2, 5, 3, 32)]:
        blocks = Blocks(taps, rows, block, columns, block)
        assert relative_error(depthwise_forward(x, ready, bias, blocks=blocks), out) < 1e-13
        found = depthwise_forward(grad, ready, None, flip=True, blocks=blocks)
        assert relative_error(found, grad_x) < 1e-13
        found = depthwise_weight_gradient(x, grad, kernel_size, x.dtype, True, blocks=blocks)
        assert relative_error(found[0], weight_grad) < 1e-13
        assert relative_error(found[1], bias_grad) < 1e-13


@pytest.mark.parametrize('shares', [1, 2, 3, 7, 50])
def test_rows_divided_among_programs(shares):
    """Shares that begin and end in the middle of an image, and several periods of f."""
    x, grad, weight, bias = make(3, 11, 70, 8, 3, torch.float64)
    _, _, weight_grad, bias_grad = expected(x, grad, weight, bias)
    blocks = Blocks(3, 8, 64, 3, 128)
    launcher, _ = weight_gradient_launchers(x.get_device(), x.dtype, x.dtype, 8, 3, True, blocks)
    depthwise_weight_gradient(x, grad, 3, x.dtype, True, blocks=blocks)  # compiles it on a GPU
    launcher.at_once = shares
    found = depthwise_weight_gradient(x, grad, 3, x.dtype, True, blocks=blocks)
    assert relative_error(found[0], weight_grad) < 1e-13
    assert relative_error(found[1], bias_grad) < 1e-13


def test_blocks():
    assert [split_evenly(k, 12) for k in (3, 11, 13, 15, 21, 31, 51)] == [3, 11, 7, 8, 11, 11, 11]
    for kernel_size in range(3, 52, 2):
        blocks = blocks_for(kernel_size)
        assert blocks.taps <= 12
        assert blocks.taps * blocks.columns <= 28


class CompiledKernel:
    """What Triton compiles, as far as `Launcher` uses it."""

    function, packed_metadata, n_regs = 'function', 'metadata', 150

    def __init__(self):
        self.calls = []

    def run(self, *args):
        self.calls.append(args)


class Array:
    """A tensor on a GPU, as far as `Launcher` uses it."""

    def __init__(self, address, device='cuda'):
        self.address = address
        self.device = torch.device(device)

    def data_ptr(self):
        return self.address

    def get_device(self):
        return 3


def test_launches_go_to_the_compiled_kernel(monkeypatch):
    """With addresses and constants in the order of the kernel's arguments, on the right stream."""
    monkeypatch.setattr(launch, 'limits', lambda device: (100, 65536))
    streams = SimpleNamespace(get_current_stream=lambda device: 100 + device)
    monkeypatch.setattr(triton.runtime, 'driver', SimpleNamespace(active=streams))
    compiled, first = CompiledKernel(), []

    class Kernel:
        arg_names = ('x', 'bias', 'y', 'H', 'W', 'C', 'K')

        def warmup(self, *args, **kwargs):
            first.append((args, kwargs))
            return compiled

    launcher = Launcher(Kernel(), dict(K=3, C=8), num_warps=2)
    tensors = (Array(16), None, Array(32))
    launcher(7, tensors, (5, 6))
    launcher(9, tensors, (1, 2))
    assert first == [((*tensors, 5, 6), dict(C=8, K=3, num_warps=2, grid=(1,)))]
    common = (1, 1, 103, 'function', 'metadata', None, None, None, 16, None, 32)
    assert compiled.calls == [(7, *common, 5, 6, 8, 3), (9, *common, 1, 2, 8, 3)]
    # 150 registers are given as 152 to each of 64 threads, so that 6 programs fit.
    assert launcher.at_once == 600


def test_failures_of_the_compiler_are_told_apart():
    class Kernel:
        arg_names = ('x',)

        def warmup(self, *args, **kwargs):
            raise FileNotFoundError('gcc')

    with pytest.raises(CompilationError, match='FileNotFoundError: gcc'):
        Launcher(Kernel(), {})(1, (Array(16),), ())


def test_results_are_the_same_in_every_run():
    x, grad, weight, bias = make(2, 12, 10, 24, 5, torch.float32)
    runs = []
    for _ in range(3):
        leaves = [value.clone().requires_grad_() for value in (x, weight, bias)]
        out = depthwise_conv2d(*leaves)
        out.backward(grad)
        runs.append([out, *(leaf.grad for leaf in leaves)])
    for run in runs[1:]:
        assert all(torch.equal(value, first) for value, first in zip(run, runs[0]))


def test_gradcheck():
    x, _, weight, bias = make(1, 2, 2, 1, 3, torch.float64)
    leaves = [value.requires_grad_() for value in (x, weight, bias)]
    assert torch.autograd.gradcheck(depthwise_conv2d, leaves)
    assert torch.autograd.gradcheck(lambda x, w: depthwise_conv2d(x, w), leaves[:2])


@pytest.mark.parametrize('needs', itertools.product([False, True], repeat=3), ids=str)
def test_only_the_gradients_that_are_needed(needs):
    x, grad, weight, bias = make(2, 6, 5, 8, 3, torch.float64)
    leaves = [value.clone().requires_grad_(need) for value, need in zip((x, weight, bias), needs)]
    out = depthwise_conv2d(*leaves)
    assert out.requires_grad == any(needs)
    if any(needs):
        out.backward(grad)
    for leaf, need, reference in zip(leaves, needs, expected(x, grad, weight, bias)[1:]):
        assert (leaf.grad is not None) == need
        if need:
            assert relative_error(leaf.grad, reference) < 1e-13


def test_any_memory_layout():
    """Inputs, weights and gradients that are not contiguous or do not begin at 16 bytes."""
    x, grad, weight, bias = make(2, 6, 5, 12, 3, torch.float64)
    results = expected(x, grad, weight, bias)
    shifted = torch.empty(x.numel() + 1, dtype=x.dtype, device=DEVICE)[1:].view(x.shape).copy_(x)
    wide = torch.cat([weight[:1], weight, weight[:3]])
    shifted_weight = lay_out(wide, x.dtype)[1:13]
    variants = {
        'channels first': (x.permute(0, 3, 1, 2).contiguous().permute(0, 2, 3, 1), weight, grad),
        'shifted': (shifted, weight, grad),
        'every other weight': (x, torch.stack([weight, weight], -1)[..., 0], grad),
        'transposed weight': (x, weight.mT.contiguous().mT, grad),
        'channels inside, transposed': (x, lay_out(weight.mT, x.dtype).mT, grad),
        'channels inside, shifted': (x, shifted_weight, grad),
        'half of the gradient': (x, weight, torch.cat([grad, grad], -1)[..., :12]),
        'every other bias': (x, weight, grad),
        'expanded gradient': (x, weight, grad[:1, :1, :1].expand_as(grad)),
    }
    for name, (x_, weight_, grad_) in variants.items():
        bias_ = torch.stack([bias, grad[0, 0, 0]], 1)[:, 0] if name == 'every other bias' else bias
        leaves = [value.detach().requires_grad_() for value in (x_, weight_, bias_)]
        out = depthwise_conv2d(*leaves)
        out.backward(grad_)
        found = [out, *(leaf.grad for leaf in leaves)]
        if name == 'expanded gradient':
            results = expected(x, grad_.contiguous(), weight, bias)
        for value, reference in zip(found, results):
            assert relative_error(value, reference) < 1e-13, name


def test_no_image():
    leaves = [value.requires_grad_() for value in make(0, 4, 4, 8, 3, torch.float32)]
    x, _, weight, bias = leaves
    out = depthwise_conv2d(x, weight, bias)
    assert out.shape == (0, 4, 4, 8)
    out.sum().backward()
    assert x.grad.shape == x.shape
    assert not weight.grad.any()
    assert not bias.grad.any()


def test_weights_laid_out_together():
    """As one by one; of weights that share kernel size or not, and of odd channel counts."""
    generator = torch.Generator().manual_seed(0)
    for sizes in ([(16, 3), (8, 5), (24, 3), (8, 5)], [(16, 3), (7, 3)]):
        weights = [torch.randn(c, 1, k, k, generator=generator) for c, k in sizes]
        weights = [weight.to(DEVICE).requires_grad_() for weight in weights]
        for dtype in (torch.float32, torch.bfloat16):
            for weight, ready in zip(weights, lay_out_together(weights, dtype)):
                assert torch.equal(ready, weight.to(dtype))
                assert not ready.requires_grad  # else autograd would run through all layers
                assert ready.stride(0) == 1
                assert ready.stride(2) == weight.shape[-1] * ready.stride(3)
                x = torch.randn(1, 5, 6, weight.shape[0], generator=generator).to(DEVICE, dtype)
                out = depthwise_forward(x, ready, None)
                assert torch.equal(out, depthwise_forward(x, lay_out(weight, dtype), None))


def test_laid_out_weights_are_not_laid_out_again():
    weight = make(1, 1, 1, 8, 3, torch.float32)[2]
    ready = lay_out(weight, torch.float32)
    assert lay_out(ready, torch.float32) is ready
    assert lay_out(ready, torch.float16) is not ready


def test_autocast():
    """Computes in autocast's dtype, and returns gradients in the dtypes of the parameters."""
    x, grad, weight, bias = make(2, 6, 5, 16, 3, torch.float32)
    results = expected(x, grad, weight, bias)
    leaves = [value.clone().requires_grad_() for value in (x, weight, bias)]
    with torch.autocast(DEVICE, torch.bfloat16):
        out = depthwise_conv2d(*leaves)
    assert out.dtype == torch.bfloat16
    out.backward(grad.bfloat16())
    for value, reference in zip([out, *(leaf.grad for leaf in leaves)], results):
        assert relative_error(value, reference) < 2e-2
    assert [leaf.grad.dtype for leaf in leaves] == [torch.float32] * 3


def test_module_outside_of_this_network():
    """The example of the docstring, smaller; with a bias and without."""
    for bias in (True, False):
        conv = DepthwiseConv(channels=8, kernel_size=5, bias=bias).to(DEVICE, torch.float64)
        x = torch.rand(2, 8, 6, 7, device=DEVICE, dtype=torch.float64)
        y = conv(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)
        reference = F.conv2d(x, conv.weight, conv.bias, padding=2, groups=8)
        torch.testing.assert_close(y, reference)


@pytest.fixture
def registered(monkeypatch):
    """The registered operator is taken on the CPU too."""
    monkeypatch.setattr(depthwise, 'OPERATOR_DEVICES', ('cpu', 'cuda'))
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def test_registered_operators():
    tests = ['test_schema', 'test_faketensor', 'test_aot_dispatch_dynamic']
    for dtype, needs in [
        (torch.float64, [True, True, True]),
        (torch.bfloat16, [True, True, False]),
        (torch.float16, [False, True, True]),
    ]:
        x, grad, weight, bias = make(1, 2, 3, 4, 3, dtype)
        torch.library.opcheck(
            torch.ops.mmconv2former.depthwise_conv2d_backward, (grad, x, weight, needs),
            test_utils=tests,
        )  # fmt: skip
    leaves = [value.double().requires_grad_() for value in (x, weight, bias)]
    torch.library.opcheck(torch.ops.mmconv2former.depthwise_conv2d, leaves)
    torch.library.opcheck(torch.ops.mmconv2former.depthwise_conv2d, (*leaves[:2], None))


def test_compile_takes_it_as_one_node(registered):
    x, grad, weight, bias = make(2, 6, 5, 8, 3, torch.float64)
    results = expected(x, grad, weight, bias)
    graphs = []

    def backend(graph, _):
        graphs.append(graph)
        return graph.forward

    compiled = torch.compile(depthwise_conv2d, backend=backend, fullgraph=True, dynamic=True)
    compiled(x, weight, bias)
    targets = [str(node.target) for node in graphs[0].graph.nodes if node.op == 'call_function']
    assert sum('depthwise_conv2d' in target for target in targets) == 1
    assert not any('conv' in target for target in targets if 'depthwise_conv2d' not in target)

    torch._dynamo.reset()
    compiled = torch.compile(depthwise_conv2d, backend='aot_eager', fullgraph=True)
    leaves = [value.clone().requires_grad_() for value in (x, weight, bias)]
    out = compiled(*leaves)
    out.backward(grad)
    for value, reference in zip([out, *(leaf.grad for leaf in leaves)], results):
        assert relative_error(value, reference) < 1e-13


def test_compiled_gradients_under_autocast(registered):
    """By inductor, which trusts the dtypes and strides that the operators promise."""
    x, grad, weight, bias = make(1, 4, 5, 8, 3, torch.float32)

    def train(function):
        leaves = [value.clone().requires_grad_() for value in (x, weight, bias)]
        with torch.autocast(DEVICE, torch.bfloat16):
            out = function(*leaves)
        (out.float() * grad).sum().backward()
        return [leaf.grad for leaf in leaves]

    compiled = torch.compile(depthwise_conv2d, fullgraph=True)
    for value, reference in zip(train(compiled), train(depthwise_conv2d)):
        assert value.dtype == torch.float32
        assert relative_error(value, reference.double()) < 1e-2


def test_export(registered):
    conv = DepthwiseConv(8, 3).to(DEVICE)
    x = torch.rand(2, 6, 5, 8, device=DEVICE)
    height = torch.export.Dim('height', min=2, max=64)
    program = torch.export.export(conv, (x,), dynamic_shapes=({1: height},))
    assert 'mmconv2former.depthwise_conv2d' in str(program.graph)
    other = torch.rand(2, 9, 5, 8, device=DEVICE)
    torch.testing.assert_close(program.module()(other), conv(other))


def test_functional_transforms():
    """By the stock operator, which alone they know."""
    x, grad, weight, bias = make(1, 4, 5, 8, 3, torch.float64)
    weight_grad = torch.func.grad(lambda w: (depthwise_conv2d(x, w, bias) * grad).sum())(weight)
    assert relative_error(weight_grad, expected(x, grad, weight, bias)[2]) < 1e-13


def test_flops_are_counted(registered):
    """As torch counts the stock operator: twice the multiply-adds, three times in training."""
    x, grad, weight, bias = make(2, 6, 5, 8, 3, torch.float32)
    leaves = [value.requires_grad_() for value in (x, weight, bias)]
    with torch.utils.flop_counter.FlopCounterMode(display=False) as counter:
        out = depthwise_conv2d(*leaves)
    assert counter.get_total_flops() == 2 * 9 * x.numel()
    with torch.utils.flop_counter.FlopCounterMode(display=False) as counter:
        out.backward(grad)
    assert counter.get_total_flops() == 2 * 2 * 9 * x.numel()
    with torch.utils.flop_counter.FlopCounterMode(display=False) as counter:
        depthwise_conv2d(*leaves).backward(grad)
    assert counter.get_total_flops() == 3 * 2 * 9 * x.numel()


def test_tracing_keeps_the_stock_operator():
    conv = DepthwiseConv(8, 3).to(DEVICE)
    traced = torch.jit.trace(conv, torch.rand(1, 5, 6, 8, device=DEVICE))
    assert 'aten::_convolution' in str(traced.inlined_graph)
    assert 'mmconv2former::' not in str(traced.inlined_graph)


@pytest.mark.parametrize(
    ('x', 'weight', 'bias', 'message'),
    [
        ((1, 8, 8), (8, 1, 3, 3), None, r'x must have shape \(N, H, W, C=8\), got \(1, 8, 8\)'),
        ((1, 4, 4, 6), (8, 1, 3, 3), None, r'x must have shape .*C=8\), got \(1, 4, 4, 6\)'),
        ((1, 4, 4, 8), (8, 1, 4, 4), None, 'odd kernel size, got 4'),
        ((1, 4, 4, 8), (8, 1, 3, 5), None, r'\(C, 1, K, K\), got \(8, 1, 3, 5\)'),
        ((1, 4, 4, 8), (8, 8, 3, 3), None, r'\(C, 1, K, K\), got \(8, 8, 3, 3\)'),
        ((1, 4, 4, 8), (8, 1, 3, 3), (4,), r'bias must have shape \(C=8,\), got \(4,\)'),
    ],
)
def test_wrong_shapes(x, weight, bias, message):
    arguments = [torch.zeros(shape) for shape in (x, weight, bias) if shape is not None]
    with pytest.raises(ValueError, match=message):
        depthwise_conv2d(*arguments)


def test_wrong_values():
    with pytest.raises(ValueError, match=r'one dtype, got torch.float16 and torch.float32'):
        depthwise_conv2d(torch.zeros(1, 4, 4, 8).half(), torch.zeros(8, 1, 3, 3))
    with pytest.raises(ValueError, match='kernel_size must be odd, got 4'):
        DepthwiseConv(8, 4)
