"""What the backward pass computes anew: same values and gradients, less kept, any precision."""

import pytest
import torch
from common.counting import count_bytes_kept
from common.plain_conv2former import plain_conv2former
from helpers.comparisons import SMALL_ARCHS, compare_with_plain, loss_of, randomized, relative_error
from helpers.half_precision import HALF_DTYPES, needs_float16
from torch import nn

from mmconv2former import Conv2Former
from mmconv2former.models import blocks as blocks_module
from mmconv2former.ops import depthwise, depthwise_products
from mmconv2former.ops.block import RECOMPUTE
from mmconv2former.registry import MODELS

ARCH = SMALL_ARCHS['kernels']


def gradients(model, x, autocast=None, scaler=1.0):
    model.zero_grad()
    x = x.clone().requires_grad_()
    with torch.autocast('cpu', autocast or torch.bfloat16, enabled=autocast is not None):
        outputs = model(x)
    (scaler * loss_of([output.float() if autocast else output for output in outputs])).backward()
    return outputs, {'x': x.grad} | {n: p.grad for n, p in model.named_parameters()}


@pytest.mark.parametrize('recompute', RECOMPUTE)
@pytest.mark.parametrize('arch', ['narrow', 'kernels'])
def test_equals_the_plain_implementation(arch, recompute):
    model = randomized(Conv2Former(SMALL_ARCHS[arch], recompute=recompute).double())
    compare_with_plain(model, torch.randn(2, 3, 68, 75, dtype=torch.double), 1e-12, 1e-10)


def test_less_and_less_is_kept():
    x = torch.randn(1, 3, 64, 96)
    nothing, elementwise, expansion = (
        count_bytes_kept(Conv2Former('tiny', recompute=name), x) for name in RECOMPUTE
    )
    assert elementwise < 0.65 * nothing
    assert expansion < 0.8 * elementwise


@pytest.mark.parametrize('recompute', RECOMPUTE[1:])
@pytest.mark.parametrize('dtype', HALF_DTYPES)
def test_half_precision(recompute, dtype):
    """As close to float64 as stock autograd under the same autocast, within a factor of two."""
    torch.manual_seed(0)
    x = torch.randn(2, 3, 64, 64)
    model = randomized(Conv2Former(ARCH, recompute=recompute))
    stock = randomized(Conv2Former(ARCH, recompute='nothing'))
    _, exact = gradients(randomized(Conv2Former(ARCH, recompute='nothing')).double(), x.double())
    _, expected = gradients(stock, x, dtype)
    outputs, found = gradients(model, x, dtype)
    assert all(output.dtype == torch.float32 for output in outputs)
    for name, reference in exact.items():
        allowed = 2 * relative_error(expected[name].double(), reference) + 2e-3
        assert relative_error(found[name].double(), reference) < allowed, name
        assert found[name].dtype == torch.float32


@needs_float16
@pytest.mark.parametrize('recompute', RECOMPUTE)
def test_float16_does_not_overflow_with_large_inputs(recompute):
    model = Conv2Former(ARCH, recompute=recompute, layer_scale_init_value=1.0)
    outputs, found = gradients(model, 1e4 * torch.randn(2, 3, 64, 64), torch.float16)
    assert all(torch.isfinite(output).all() for output in outputs)
    assert all(torch.isfinite(gradient).all() for gradient in found.values())


@needs_float16
@pytest.mark.parametrize('recompute', RECOMPUTE)
def test_float16_does_not_vanish_with_the_initial_layer_scale(recompute):
    """With the loss scaled as GradScaler does, all parameters get a gradient through the 1e-6."""
    torch.manual_seed(0)
    model = randomized(Conv2Former(ARCH, recompute=recompute))
    for name, parameter in model.named_parameters():
        if 'layer_scale' in name:
            nn.init.constant_(parameter, 1e-6)
    _, found = gradients(model, torch.randn(2, 3, 64, 64), torch.float16, 2.0**8)
    for name, gradient in found.items():
        assert torch.isfinite(gradient).all(), name
        assert gradient.abs().max() > 0, name


def test_double_use_of_a_module():
    torch.manual_seed(0)
    model = randomized(Conv2Former(ARCH, recompute='expansion').double())
    x, y = torch.randn(2, 1, 3, 64, 64, dtype=torch.double)
    model.eval()
    _, both = gradients(lambda_model(model, lambda m, z: [*m(z[0]), *m(z[1])]), torch.stack([x, y]))
    _, first = gradients(model, x)
    _, second = gradients(model, y)
    # `loss_of` weighs outputs by their place in each, so the sums are the same
    for name in first:
        if name != 'x':
            torch.testing.assert_close(both[f'model.{name}'], first[name] + second[name])


def lambda_model(model, forward):
    class Wrapper(nn.Module):
        def __init__(self):
            super().__init__()
            self.model = model

        def forward(self, x):
            return forward(self.model, x)

    return Wrapper()


def test_frozen_parts_get_no_gradient():
    model = randomized(Conv2Former(ARCH, frozen_stages=1, recompute='expansion').double())
    model.stages[2][0].attn.proj.weight.requires_grad_(False)
    model.stages[2][0].layer_scale_1.requires_grad_(False)
    model.stages[3][0].mlp.fc1.bias.requires_grad_(False)
    state = {name: value.clone() for name, value in model.state_dict().items()}
    for name, parameter in model.named_parameters():
        state[name].requires_grad_(parameter.requires_grad)
    x = torch.randn(1, 3, 64, 64, dtype=torch.double)
    model.eval()
    loss_of(model(x)).backward()
    loss_of(plain_conv2former(x, state, model.depths)).backward()
    for name, parameter in model.named_parameters():
        assert (parameter.grad is None) == (not parameter.requires_grad), name
        if parameter.requires_grad:
            assert relative_error(parameter.grad, state[name].grad) < 1e-10, name


def test_nothing_is_kept_without_gradients():
    model, x = Conv2Former(ARCH, recompute='expansion'), torch.randn(1, 3, 64, 64)
    with torch.no_grad():
        outputs = model(x)
        assert count_bytes_kept(model, x) == 0
    assert all(output.grad_fn is None for output in outputs)


def test_checkpointing_keeps_least():
    x = torch.randn(1, 3, 64, 96)
    plain = count_bytes_kept(Conv2Former('tiny'), x)
    assert count_bytes_kept(Conv2Former('tiny', with_cp=True), x) < 0.5 * plain


def test_bad_argument():
    with pytest.raises(ValueError, match=r'recompute must be one of nothing, .* got .all.'):
        Conv2Former('nano', recompute='all')


class OtherDepthwiseConv(nn.Conv2d):
    """Another implementation, as a user would register it."""

    calls = 0

    def __init__(self, channels, kernel_size):
        super().__init__(channels, channels, kernel_size, padding=kernel_size // 2, groups=channels)

    def forward(self, x):
        type(self).calls += 1
        return super().forward(x.permute(0, 3, 1, 2)).permute(0, 2, 3, 1)


def test_other_depthwise_convolution_by_name():
    MODELS.register_module(module=OtherDepthwiseConv, force=True)
    model = randomized(Conv2Former(ARCH, depthwise_conv='OtherDepthwiseConv').double())
    compare_with_plain(model, torch.randn(1, 3, 64, 64, dtype=torch.double), 1e-12, 1e-10)
    assert OtherDepthwiseConv.calls == sum(model.depths)
    with pytest.raises(ValueError, match=r'depthwise_conv must be a registered .* got .NoSuchConv'):
        Conv2Former(ARCH, depthwise_conv='NoSuchConv')


@pytest.mark.parametrize('method', ['stock', 'products'])
def test_the_weight_gradient_can_be_chosen(method, monkeypatch):
    calls = []
    real = depthwise_products.weight_gradient
    monkeypatch.setattr(
        depthwise_products, 'weight_gradient', lambda *a: calls.append(a) or real(*a)
    )
    monkeypatch.setattr(depthwise, 'setting', method)
    model = randomized(Conv2Former(ARCH).double())
    compare_with_plain(model, torch.randn(1, 3, 64, 64, dtype=torch.double), 1e-12, 1e-10)
    assert len(calls) == (2 * sum(model.depths) if method == 'products' else 0)


def test_mixed_precision_has_no_matrix_products_of_float32(monkeypatch):
    """The rule for the weight gradient is asked for the dtype that autocast computes in."""
    monkeypatch.setattr(depthwise_products, 'is_faster', lambda x, weight: True)
    calls = []
    real = depthwise_products.weight_gradient
    monkeypatch.setattr(
        depthwise_products, 'weight_gradient', lambda *a: calls.append(a) or real(*a)
    )
    model = randomized(Conv2Former(ARCH))
    gradients(model, torch.randn(1, 3, 64, 64), torch.bfloat16)
    assert not calls
    gradients(model, torch.randn(1, 3, 64, 64))
    assert len(calls) == 2 * sum(model.depths)


def test_where_the_function_is_worth_it(monkeypatch):
    """On a CPU in float32 only where less is kept; otherwise always."""
    calls = []
    real = blocks_module.compute_block
    monkeypatch.setattr(
        blocks_module, 'compute_block', lambda *args: calls.append(1) or real(*args)
    )
    x, blocks = torch.randn(1, 3, 64, 64), sum(Conv2Former(ARCH).depths)
    for recompute, grad, half, expected in [
        ('elementwise', True, False, blocks),
        ('elementwise', False, False, 0),
        ('nothing', True, False, 0),
        ('nothing', True, True, blocks),
        ('elementwise', False, True, blocks),
    ]:
        calls.clear()
        with torch.set_grad_enabled(grad), torch.autocast('cpu', torch.bfloat16, enabled=half):
            Conv2Former(ARCH, recompute=recompute)(x)
        assert len(calls) == expected, (recompute, grad, half)
