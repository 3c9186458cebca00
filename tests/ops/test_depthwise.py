"""Which implementation runs where, what overrides it, and what happens if Triton fails."""

import logging

import pytest
import torch
import torch.nn.functional as F

from mmconv2former import Conv2Former
from mmconv2former.ops import DepthwiseConv, block, depthwise, depthwise_conv2d
from mmconv2former.ops.depthwise import VARIABLE, choice_for, choose, implementations

CUDA = torch.device('cuda', 0)
needs_triton = pytest.mark.skipif(
    not depthwise.is_interpreted(), reason='no Triton from 3.3 on in its interpreter'
)


@pytest.fixture(autouse=True)
def fresh_choices(monkeypatch):
    monkeypatch.setattr(depthwise, 'failures', [])
    monkeypatch.setattr(depthwise, 'setting', 'auto')
    depthwise.choice_for.cache_clear()
    depthwise.log_once.cache_clear()
    yield
    depthwise.choice_for.cache_clear()


@pytest.fixture
def log(monkeypatch):
    lines = []
    monkeypatch.setattr(
        depthwise, 'print_log', lambda text, logger, level: lines.append((level, text))
    )
    return lines


@pytest.fixture
def gpu(monkeypatch):
    """A stand-in for a GPU: `gpu(capability, triton)` says what torch tells of the machine."""

    def describe(capability=(9, 0), triton='3.6.0', hip=None):
        monkeypatch.setattr(depthwise, 'triton_version', lambda: triton)
        monkeypatch.setattr(torch.cuda, 'get_device_capability', lambda device: capability)
        monkeypatch.setattr(torch.cuda, 'get_device_name', lambda device: 'NVIDIA Test')
        monkeypatch.setattr(torch.version, 'hip', hip)
        choice_for.cache_clear()

    describe()
    return describe


def test_triton_where_it_runs(gpu):
    for dtype in (torch.float32, torch.float16, torch.bfloat16):
        for kernel_size in (3, 7, 11, 31):
            assert choice_for('auto', CUDA, dtype, kernel_size) == 'triton'
    gpu(capability=(9, 4), hip='6.4')  # ROCm counts otherwise
    assert choice_for('auto', CUDA, torch.float32, 11) == 'triton'


@pytest.mark.parametrize(
    ('machine', 'problem'),
    [
        (dict(triton=None), 'Triton is not installed'),
        (dict(triton='3.1.0'), r'Triton 3.1.0 is older than 3.3, which comes with torch 2.7'),
        (dict(capability=(7, 5)), r'NVIDIA Test has compute capability 7.5, below 8.0'),
    ],
)
def test_order_of_fallbacks(gpu, log, machine, problem):
    """Without Triton, cuDNN up to kernel 7 and torch's own kernels above; with the reason, once."""
    gpu(**machine)
    for _ in range(2):
        assert choice_for('auto', CUDA, torch.bfloat16, 7) == 'cudnn'
        assert choice_for('auto', CUDA, torch.bfloat16, 9) == 'native'
        choice_for.cache_clear()
    assert [text for _, text in log] == [
        f'Depthwise convolutions, kernel 7, torch.bfloat16: cudnn ({problem}).',
        f'Depthwise convolutions, kernel 9, torch.bfloat16: native ({problem}).',
    ]
    with pytest.raises(RuntimeError, match=rf'{VARIABLE}=triton: {problem}'):
        choice_for('triton', CUDA, torch.bfloat16, 9)


def test_other_dtypes_and_sizes(gpu):
    assert choice_for('auto', CUDA, torch.complex64, 11) == 'native'
    assert choice_for('auto', CUDA, torch.float32, 1) == 'cudnn'
    assert choice_for('auto', torch.device('xpu'), torch.float32, 11) == 'stock'


def test_the_variable_overrides_it(gpu, log):
    assert choice_for('native', CUDA, torch.float32, 3) == 'native'
    assert choice_for('cudnn', CUDA, torch.float32, 31) == 'cudnn'
    assert f'({VARIABLE}=cudnn)' in log[1][1]
    with pytest.raises(ValueError, match=rf'{VARIABLE} must be one of auto, .* got .fast.'):
        choice_for('fast', CUDA, torch.float32, 3)


@needs_triton
def test_on_a_cpu(monkeypatch):
    x, weight = torch.zeros(1, 64, 64, 72), torch.nn.Parameter(torch.zeros(72, 1, 11, 11))
    for setting in ('auto', 'cudnn', 'native', 'products'):
        monkeypatch.setattr(depthwise, 'setting', setting)
        assert choose(x, weight) == 'products'
    monkeypatch.setattr(depthwise, 'setting', 'stock')
    assert choose(x, weight) == 'stock'
    monkeypatch.setattr(depthwise, 'setting', 'triton')
    assert choose(x, weight) == 'triton'
    choice_for.cache_clear()
    monkeypatch.setattr(depthwise, 'is_interpreted', lambda: False)
    with pytest.raises(RuntimeError, match='TRITON_INTERPRET=1 before Python starts'):
        choose(x, weight)
    assert implementations(x, weight) == ['stock', 'products']


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


@pytest.mark.parametrize(
    'implementation',
    ['native', 'cudnn', 'stock', 'products', pytest.param('triton', marks=needs_triton)],
)
def test_all_implementations_agree(implementation):
    generator = torch.Generator().manual_seed(0)
    x, grad = torch.randn(2, 2, 6, 7, 8, generator=generator, dtype=torch.double)
    weight = torch.randn(8, 1, 5, 5, generator=generator, dtype=torch.double)
    bias = torch.randn(8, generator=generator, dtype=torch.double)
    leaves = [value.clone().requires_grad_() for value in (x, weight, bias)]
    out = F.conv2d(leaves[0].permute(0, 3, 1, 2), *leaves[1:], padding=2, groups=8)
    out.backward(grad.permute(0, 3, 1, 2))
    found = depthwise.depthwise_conv(x, weight, bias, implementation)
    assert found.is_contiguous()
    torch.testing.assert_close(found, out.permute(0, 2, 3, 1))
    grads = depthwise.depthwise_conv_backward(grad, x, weight, implementation=implementation)
    for value, leaf in zip(grads, leaves):
        torch.testing.assert_close(value, leaf.grad)


@pytest.mark.parametrize(
    'implementation', ['stock', 'products', pytest.param('triton', marks=needs_triton)]
)
def test_gradients_of_gradients(implementation, monkeypatch):
    monkeypatch.setattr(depthwise, 'setting', implementation)
    generator = torch.Generator().manual_seed(0)
    shapes = (1, 2, 3, 2), (2, 1, 3, 3), (2,)
    x, weight, bias = (
        torch.randn(shape, generator=generator, dtype=torch.double, requires_grad=True)
        for shape in shapes
    )
    assert choose(x, weight) == implementation
    assert torch.autograd.gradgradcheck(depthwise_conv2d, (x, weight, bias))
    assert torch.autograd.gradgradcheck(depthwise_conv2d, (x, weight))
    weight.requires_grad_(False)
    assert torch.autograd.gradgradcheck(lambda x: depthwise_conv2d(x, weight, bias), (x,))


@needs_triton
@pytest.mark.parametrize('function', ['depthwise_forward', 'depthwise_weight_gradient'])
def test_a_failure_of_the_compiler_does_not_end_a_run(function, monkeypatch, log):
    """In the forward pass or later: one warning, and the same results by stock operators."""
    monkeypatch.setattr(depthwise, 'setting', 'triton')
    kernels = depthwise.triton_kernels()

    def fail(*args, **kwargs):
        raise kernels.CompilationError('FileNotFoundError: gcc')

    monkeypatch.setattr(kernels, function, fail)
    torch.manual_seed(0)
    conv = DepthwiseConv(8, 3)
    x, grad = torch.randn(2, 1, 5, 6, 8)
    for _ in range(2):
        conv.zero_grad()
        out = conv(x)
        out.backward(grad)
        reference = torch.nn.Conv2d.forward(conv, x.permute(0, 3, 1, 2)).permute(0, 2, 3, 1)
        torch.testing.assert_close(out, reference)
        expected = torch.autograd.grad(reference, list(conv.parameters()), grad)
        for parameter, value in zip(conv.parameters(), expected):
            torch.testing.assert_close(parameter.grad, value)
    (line,) = log
    assert line[0] == logging.WARNING
    assert 'FileNotFoundError: gcc' in line[1]
    assert 'Continuing without Triton' in line[1]


@needs_triton
def test_a_network_prepares_its_weights_once_a_pass(monkeypatch):
    """Together at the start, used by every layer, and forgotten at the end, also of a failure."""
    monkeypatch.setattr(depthwise, 'setting', 'triton')
    kernels = depthwise.triton_kernels()
    prepared, alone = [], []
    together, one = kernels.lay_out_together, kernels.lay_out
    monkeypatch.setattr(
        block.block_triton(), 'lay_out_together',
        lambda *args: prepared.append(together(*args)) or prepared[-1],
    )  # fmt: skip

    def lay_out(weight, dtype):
        alone.append(one(weight, dtype) is not weight)
        return one(weight, dtype)

    monkeypatch.setattr(kernels, 'lay_out', lay_out)
    arch = dict(channels=(8, 16), depths=(1, 1), kernel_size=3)
    x = torch.randn(1, 3, 16, 16)
    for recompute in ('nothing', 'elementwise'):
        model = Conv2Former(arch, out_indices=(0, 1), recompute=recompute)
        blocks = [part for stage in model.stages for part in stage]
        prepared.clear()
        with torch.autocast('cpu', torch.bfloat16):
            outputs = model(x)
        assert len(prepared) == 1
        assert len(prepared[0]) == 4
        assert all(part.ready is None for part in blocks)
        alone.clear()  # those that made the four
        sum(output.sum() for output in outputs).backward()
        assert len(prepared) == 1, 'weights were prepared again for the backward pass'
        assert not any(alone), 'a weight was laid out again'
    monkeypatch.setattr(model, '_forward', lambda x: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        model(x)
    assert all(part.ready is None for part in blocks)


@needs_triton
def test_a_deployed_network_prepares_its_weights_once(monkeypatch):
    """They do not change any more: for each dtype at the first pass alone."""
    monkeypatch.setattr(depthwise, 'setting', 'triton')
    kernels = depthwise.triton_kernels()
    made = []
    one = kernels.lay_out

    def lay_out(weight, dtype):
        ready = one(weight, dtype)
        made.extend([dtype] * (ready is not weight))
        return ready

    monkeypatch.setattr(kernels, 'lay_out', lay_out)
    arch = dict(channels=(8, 16), depths=(1, 1), kernel_size=3)
    model = Conv2Former(arch, out_indices=(0, 1)).switch_to_deploy()
    x = torch.randn(1, 3, 16, 16)
    with torch.autocast('cpu', torch.bfloat16):
        for _ in range(2):
            model(x)
    assert made == [torch.bfloat16] * 4
    model.double()
    for _ in range(2):
        model(x.double())
    assert made == [torch.bfloat16] * 4 + [torch.float64] * 4


@pytest.mark.parametrize('name', ['stock', pytest.param('triton', marks=needs_triton)])
def test_autocast_spares_float64(name, monkeypatch):
    """As it does with all of torch's operators."""
    monkeypatch.setattr(depthwise, 'setting', name)
    conv = DepthwiseConv(8, 3).double()
    x = torch.randn(1, 4, 5, 8, dtype=torch.double)
    expected = conv(x)
    with torch.autocast('cpu', torch.bfloat16):
        torch.testing.assert_close(conv(x), expected)


@needs_triton
def test_frozen_stages_keep_nothing(monkeypatch):
    """Though the weights of frozen and trained layers are prepared together."""
    monkeypatch.setattr(depthwise, 'setting', 'triton')
    arch = dict(channels=(8, 16), depths=(1, 1), kernel_size=3)
    model = Conv2Former(arch, out_indices=(0, 1), frozen_stages=1, out_norm=False)
    first, last = model(torch.randn(1, 3, 16, 16))
    assert not first.requires_grad
    last.sum().backward()
    for name, parameter in model.named_parameters():
        assert (parameter.grad is None) == (not parameter.requires_grad), name


@needs_triton
def test_weights_may_change_between_passes(monkeypatch):
    """Also in place and behind autograd's back, as averages of weights are swapped in."""
    monkeypatch.setattr(depthwise, 'setting', 'triton')
    arch = dict(channels=(8, 16), depths=(1, 1), kernel_size=3)
    model = Conv2Former(arch, out_indices=1, layer_scale_init_value=1.0).double().eval()
    x = torch.randn(1, 3, 16, 16, dtype=torch.double)
    for _ in range(2):
        monkeypatch.setattr(depthwise, 'setting', 'triton')
        (found,) = model(x)
        monkeypatch.setattr(depthwise, 'setting', 'stock')
        torch.testing.assert_close(found, model(x)[0])
        for parameter in model.parameters():
            parameter.data.add_(torch.randn_like(parameter), alpha=0.1)
