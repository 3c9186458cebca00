"""What `depthwise_conv2d` accepts, which implementation runs where, and what graphs see of it."""

import logging

import pytest
import torch
from helpers.depthwise import own, stock

from mmconv2former.ops import DepthwiseConv, depthwise, depthwise_conv2d, triton_support
from mmconv2former.ops.depthwise import VARIABLE, choice_for, choose, implementations

CUDA = torch.device('cuda', 0)
DEVICE = 'cuda' if torch.cuda.is_available() else 'cpu'  # for graphs
needs_triton = pytest.mark.skipif(
    not triton_support.is_interpreted(), reason='no Triton from 3.3 on in its interpreter'
)
BY_TRITON = pytest.param('triton', marks=needs_triton)


@pytest.fixture(autouse=True)
def fresh_choices(monkeypatch):
    monkeypatch.setattr(depthwise, 'setting', 'auto')
    choice_for.cache_clear()
    depthwise.log_once.cache_clear()
    yield
    triton_support.failures.clear()
    choice_for.cache_clear()


def normal(*shape):
    generator = torch.Generator().manual_seed(len(shape))
    return torch.randn(shape, generator=generator, dtype=torch.double)


def operands(dtype=torch.double, device='cpu', channels=8, kernel_size=3):
    """Input and gradient (2, 6, 5, C), weight and bias."""
    x, grad = normal(2, 2, 6, 5, channels)
    values = x, grad, normal(channels, 1, kernel_size, kernel_size), normal(channels)
    return [value.to(device, dtype) for value in values]


# ---------------------------------------------------------------------------------------- arguments
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


# ------------------------------------------------------------------------------------------- choice
@pytest.fixture
def log(monkeypatch):
    lines = []
    for module in (depthwise, triton_support):
        monkeypatch.setattr(
            module, 'print_log', lambda text, logger, level: lines.append((level, text))
        )
    return lines


@pytest.fixture
def gpu(monkeypatch):
    """Fakes a GPU: `gpu(setting, dtype, kernel_size, **machine)` is the choice there."""

    def choice(
        setting, dtype=torch.bfloat16, kernel_size=11,
        capability=(9, 0), triton='3.6.0', hip=None, device=CUDA,
    ):  # fmt: skip
        monkeypatch.setattr(triton_support, 'triton_version', lambda: triton)
        monkeypatch.setattr(torch.cuda, 'get_device_capability', lambda device: capability)
        monkeypatch.setattr(torch.cuda, 'get_device_name', lambda device: 'NVIDIA Test')
        monkeypatch.setattr(torch.version, 'hip', hip)
        choice_for.cache_clear()
        return choice_for(setting, device, dtype, kernel_size, False)

    return choice


def test_the_choice_on_gpus(gpu, log):
    for dtype in triton_support.DTYPES:
        for kernel_size in (3, 7, 11, 31):
            assert gpu('auto', dtype, kernel_size) == 'triton'
    assert gpu('auto', capability=(9, 4), hip='6.4') == 'triton'  # ROCm counts otherwise
    assert gpu('auto', torch.complex64) == 'native'
    assert gpu('auto', kernel_size=1) == 'cudnn'
    assert gpu('auto', device=torch.device('xpu')) == 'stock'
    assert gpu('native', kernel_size=3) == 'native'
    assert gpu('cudnn', kernel_size=31) == 'cudnn'
    assert f'({VARIABLE}=cudnn)' in log[-1][1]
    with pytest.raises(ValueError, match=rf'{VARIABLE} must be one of auto, .* got .fast.'):
        gpu('fast')


@pytest.mark.parametrize(
    ('machine', 'problem'),
    [
        (dict(triton=None), 'Triton is not installed'),
        (dict(triton='3.1.0'), r'Triton 3.1.0 is older than 3.3, which comes with torch 2.7'),
        (dict(capability=(7, 5)), r'NVIDIA Test has compute capability 7.5, below 8.0'),
    ],
)
def test_without_triton(gpu, log, machine, problem):
    """cuDNN up to kernel 7 and torch's own kernels above; with the reason, once."""
    for _ in range(2):
        assert gpu('auto', kernel_size=7, **machine) == 'cudnn'
        assert gpu('auto', kernel_size=9, **machine) == 'native'
    assert [text for _, text in log] == [
        f'Depthwise convolutions, kernel 7, torch.bfloat16: cudnn ({problem}).',
        f'Depthwise convolutions, kernel 9, torch.bfloat16: native ({problem}).',
    ]
    with pytest.raises(RuntimeError, match=rf'{VARIABLE}=triton: {problem}'):
        gpu('triton', **machine)


@needs_triton
def test_the_choice_on_a_cpu(monkeypatch):
    x, weight = torch.zeros(1, 64, 64, 72), torch.nn.Parameter(torch.zeros(72, 1, 11, 11))
    for setting, expected in [
        *((name, 'matmul') for name in ('auto', 'cudnn', 'native', 'matmul')),
        ('stock', 'stock'), ('triton', 'triton'),
    ]:  # fmt: skip
        monkeypatch.setattr(depthwise, 'setting', setting)
        assert choose(x, weight) == expected
    choice_for.cache_clear()
    for module in (depthwise, triton_support):
        monkeypatch.setattr(module, 'is_interpreted', lambda: False)
    with pytest.raises(RuntimeError, match='TRITON_INTERPRET=1 before Python starts'):
        choose(x, weight)
    assert implementations(x, weight) == ['stock', 'matmul']


@needs_triton
def test_what_triton_cannot_take_goes_elsewhere(monkeypatch):
    """No images, and rows whose offsets would not fit into 32 bits."""
    monkeypatch.setattr(depthwise, 'setting', 'triton')
    weight = torch.zeros(8, 1, 3, 3)
    assert choose(torch.zeros(1, 4, 4, 8), weight) == 'triton'
    for shape in [(0, 4, 4, 8), (1, 0, 4, 8), (1, 4, 0, 8), (1, 1, 2**26, 8)]:
        assert choose(torch.zeros(1, 1, 1, 1).expand(shape), weight) == 'native', shape
    large = torch.zeros(1, 1, 1, 1).expand(2**9, 2**8, 2**8, 8)
    assert choose(large, weight) == 'triton'
    monkeypatch.setattr(torch.version, 'hip', '6.4')
    assert choose(large, weight) == 'native'


@needs_triton
@pytest.mark.parametrize('function', ['depthwise_forward', 'depthwise_weight_gradient'])
def test_a_failure_of_the_compiler_does_not_end_a_run(function, monkeypatch, log):
    """In the forward pass or later: one warning, and the same results by stock operators."""

    def fail(*args, **kwargs):
        raise triton_support.CompilationError('FileNotFoundError: gcc')

    monkeypatch.setattr(depthwise, 'setting', 'triton')
    monkeypatch.setattr(triton_support.load('depthwise_triton'), function, fail)
    for _ in range(2):
        torch.testing.assert_close(own(depthwise_conv2d, *operands()), stock(*operands()))
    ((level, text),) = log
    assert level == logging.WARNING
    assert 'FileNotFoundError: gcc' in text
    assert 'Continuing without Triton' in text


# ---------------------------------------------------------------------------------- implementations
@pytest.mark.parametrize('implementation', ['native', 'cudnn', 'stock', 'matmul', BY_TRITON])
def test_all_implementations_agree(implementation):
    x, grad, weight, bias = operands(kernel_size=5)
    expected = stock(x, grad, weight, bias)
    out = depthwise.depthwise_conv(x, weight, bias, implementation)
    assert out.is_contiguous()
    grads = depthwise.depthwise_conv_backward(grad, x, weight, implementation=implementation)
    torch.testing.assert_close([out, *grads], expected)


@pytest.mark.parametrize('implementation', ['stock', 'matmul'])
def test_the_gradient_has_the_strides_of_the_weight(implementation, monkeypatch):
    """DDP would copy it otherwise, and warn."""
    monkeypatch.setattr(depthwise, 'setting', implementation)
    conv = DepthwiseConv(64, 3)
    conv(torch.rand(2, 8, 8, 64)).sum().backward()
    assert conv.weight.grad.stride() == conv.weight.stride()


@pytest.mark.parametrize('implementation', ['stock', 'matmul', BY_TRITON])
def test_gradients_of_gradients(implementation, monkeypatch):
    monkeypatch.setattr(depthwise, 'setting', implementation)
    x, weight, bias = (
        normal(*shape).requires_grad_() for shape in [(1, 2, 2, 1), (1, 1, 3, 3), (1,)]
    )
    assert choose(x, weight) == implementation
    assert torch.autograd.gradgradcheck(depthwise_conv2d, (x, weight, bias))
    weight.requires_grad_(False)
    assert torch.autograd.gradgradcheck(lambda x: depthwise_conv2d(x, weight), (x,))


@pytest.mark.parametrize('name', ['stock', BY_TRITON])
def test_autocast(name, monkeypatch):
    """Computes in autocast's dtype, with gradients in those of the parameters; not in float64."""
    monkeypatch.setattr(depthwise, 'setting', name)
    x, grad, weight, bias = operands(torch.float32)
    with torch.autocast('cpu', torch.bfloat16):
        assert depthwise_conv2d(x, weight, bias).dtype == torch.bfloat16
        found = own(depthwise_conv2d, x, grad.bfloat16(), weight, bias)
        exact = own(depthwise_conv2d, *operands())
    expected = stock(*operands())
    torch.testing.assert_close(exact, expected)
    for value, reference in zip(found, expected):
        assert (value - reference).norm() < 2e-2 * reference.norm()
    assert [value.dtype for value in found[1:]] == [torch.float32] * 3


# ------------------------------------------------------------------------------------------- graphs
@pytest.fixture
def registered(monkeypatch):
    """The registered operator is used on the CPU, too."""
    if not depthwise.HAS_OPERATORS:
        pytest.skip('torch < 2.5 has no registered operators that count FLOPs')
    monkeypatch.setattr(depthwise, 'OPERATOR_DEVICES', ('cpu', 'cuda'))
    if triton_support.is_interpreted():
        monkeypatch.setattr(depthwise, 'setting', 'triton')
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def test_registered_operators(registered):
    tests = ['test_schema', 'test_faketensor', 'test_aot_dispatch_dynamic']
    for dtype, needs in [
        (torch.float64, [True, True, True]),
        (torch.bfloat16, [True, True, False]),
        (torch.float16, [False, True, True]),
    ]:
        x, grad, weight, bias = operands(dtype, DEVICE, channels=4)
        torch.library.opcheck(
            torch.ops.mmconv2former.depthwise_conv2d_backward, (grad, x, weight, needs),
            test_utils=tests,
        )  # fmt: skip
    leaves = [value.double().requires_grad_() for value in (x, weight, bias)]
    torch.library.opcheck(torch.ops.mmconv2former.depthwise_conv2d, leaves)
    torch.library.opcheck(torch.ops.mmconv2former.depthwise_conv2d, (*leaves[:2], None))


def test_compile_takes_it_as_one_node(registered):
    graphs = []

    def backend(graph, _):
        graphs.append(graph)
        return graph.forward

    x, _, weight, bias = operands(device=DEVICE)
    torch.compile(depthwise_conv2d, backend=backend, fullgraph=True, dynamic=True)(x, weight, bias)
    targets = [str(node.target) for node in graphs[0].graph.nodes if node.op == 'call_function']
    assert sum('depthwise_conv2d' in target for target in targets) == 1
    assert not any('conv' in target for target in targets if 'depthwise_conv2d' not in target)
    torch._dynamo.reset()
    compiled = torch.compile(depthwise_conv2d, backend='aot_eager', fullgraph=True)
    torch.testing.assert_close(
        own(compiled, *operands(device=DEVICE)), stock(*operands(device=DEVICE))
    )


def test_compiled_gradients_under_autocast(registered):
    """By inductor, which trusts the dtypes and strides that the operators promise."""
    x, grad, weight, bias = operands(torch.float32, DEVICE)
    with torch.autocast(DEVICE, torch.bfloat16):
        found, expected = (
            own(function, x, grad.bfloat16(), weight, bias)
            for function in (torch.compile(depthwise_conv2d, fullgraph=True), depthwise_conv2d)
        )
    assert [value.dtype for value in found] == [torch.bfloat16] + [torch.float32] * 3
    for value, reference in zip(found, expected):
        assert (value - reference).norm() < 1e-2 * reference.norm()


def test_export(registered):
    conv, x = DepthwiseConv(8, 3).to(DEVICE), torch.rand(2, 6, 5, 8, device=DEVICE)
    height = torch.export.Dim('height', min=2, max=64)
    program = torch.export.export(conv, (x,), dynamic_shapes=({1: height},))
    assert 'mmconv2former.depthwise_conv2d' in str(program.graph)
    other = torch.rand(2, 9, 5, 8, device=DEVICE)
    torch.testing.assert_close(program.module()(other), conv(other))


def test_operator_keeps_its_dtype_under_autocast(registered, monkeypatch):
    """A program compiled in float32 reads as much memory as the fake version promises."""
    x, _, weight, bias = operands(torch.float32, DEVICE)
    operator = torch.ops.mmconv2former.depthwise_conv2d
    for name in depthwise.implementations(x, weight):
        monkeypatch.setattr(depthwise, 'setting', name)
        expected = operator(x, weight, bias)
        with torch.autocast(DEVICE, torch.bfloat16):
            torch.testing.assert_close(operator(x, weight, bias), expected)


def test_flops_are_counted(registered):
    """As torch counts the stock operator: twice the multiply-adds, three times in training."""
    x, grad, weight, bias = operands(device=DEVICE)
    with torch.utils.flop_counter.FlopCounterMode(display=False) as counter:
        own(depthwise_conv2d, x, grad, weight, bias)
    assert counter.get_total_flops() == 3 * 2 * 9 * x.numel()


def test_transforms_and_traces_keep_the_stock_operator(registered):
    x, grad, weight, bias = operands(device=DEVICE)
    found = torch.func.grad(lambda w: (depthwise_conv2d(x, w, bias) * grad).sum())(weight)
    torch.testing.assert_close(found, stock(x, grad, weight, bias)[2])
    traced = torch.jit.trace(DepthwiseConv(8, 3).to(DEVICE), torch.rand(1, 5, 6, 8, device=DEVICE))
    assert 'aten::_convolution' in str(traced.inlined_graph)
    assert 'mmconv2former::' not in str(traced.inlined_graph)
