"""Activation recomputation: the same values and gradients, less saved, in any precision."""

import copy

import pytest
import torch
from common.counting import count_bytes_kept
from common.plain_conv2former import plain_conv2former
from helpers.comparisons import compare_with_plain, leaves, loss_of, randomized, relative_error
from helpers.half_precision import HALF_DTYPES, needs_float16
from torch import nn
from torch.fx.experimental.proxy_tensor import make_fx

from mmconv2former import Conv2Former
from mmconv2former.models import blocks as blocks_module
from mmconv2former.ops import depthwise, depthwise_matmul
from mmconv2former.ops.block import RECOMPUTE
from mmconv2former.registry import MODELS

ARCH = dict(channels=(8, 12), depths=(1, 2), kernel_size=(11, 5))


def build(**options):
    return randomized(Conv2Former(ARCH, out_indices=(0, 1), **options))


def normal(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def gradients(model, x, autocast=None, scale=1.0):
    model.zero_grad()
    x = x.clone().requires_grad_()
    with torch.autocast('cpu', autocast or torch.bfloat16, enabled=autocast is not None):
        outputs = model(x)
    (scale * loss_of([output.float() if autocast else output for output in outputs])).backward()
    return outputs, {'x': x.grad} | {n: p.grad.clone() for n, p in model.named_parameters()}


@pytest.mark.parametrize('recompute', RECOMPUTE)
def test_equals_the_plain_implementation(recompute):
    model = build(recompute=recompute).double()
    compare_with_plain(model, normal(2, 3, 20, 27).double(), 1e-12, 1e-10)


def test_less_and_less_is_saved():
    x, arch = normal(1, 3, 64, 64), dict(channels=(32, 64), depths=(2, 2), kernel_size=5)
    nothing, elementwise, expansion, checkpointed = (
        count_bytes_kept(Conv2Former(arch, out_indices=1, **options), x)
        for options in [*(dict(recompute=name) for name in RECOMPUTE), dict(with_cp=True)]
    )
    assert elementwise < 0.65 * nothing
    assert expansion < 0.8 * elementwise
    assert checkpointed < 0.5 * elementwise
    with torch.no_grad():
        assert count_bytes_kept(Conv2Former(arch, out_indices=1), x) == 0


@pytest.mark.parametrize('dtype', HALF_DTYPES)
def test_half_precision(dtype):
    """As close to float64 as stock autograd under the same autocast, within a factor of two."""
    x, model = normal(2, 3, 24, 32), build(recompute='nothing')
    _, exact = gradients(copy.deepcopy(model).double(), x.double())
    _, stock = gradients(model, x, dtype)
    for recompute in RECOMPUTE[1:]:
        outputs, found = gradients(build(recompute=recompute), x, dtype)
        assert all(output.dtype == torch.float32 for output in outputs)
        for name, reference in exact.items():
            allowed = 2 * relative_error(stock[name].double(), reference) + 2e-3
            assert relative_error(found[name].double(), reference) < allowed, name
            assert found[name].dtype == torch.float32


@needs_float16
@pytest.mark.parametrize('recompute', RECOMPUTE)
def test_float16_neither_overflows_nor_vanishes(recompute):
    """With large inputs; and with the initial layer scale, if the loss is scaled as usual."""
    model = Conv2Former(ARCH, out_indices=(0, 1), recompute=recompute, layer_scale_init_value=1.0)
    outputs, found = gradients(model, 1e4 * normal(2, 3, 24, 32), torch.float16)
    assert all(value.isfinite().all() for value in [*outputs, *found.values()])
    model = build(recompute=recompute)
    for name, parameter in model.named_parameters():
        if 'layer_scale' in name:
            nn.init.constant_(parameter, 1e-6)
    _, found = gradients(model, normal(2, 3, 24, 32), torch.float16, 2.0**4)
    for name, gradient in found.items():
        assert gradient.isfinite().all(), name
        assert gradient.abs().max() > 0, name


def test_double_use_of_a_module():
    model = build(recompute='expansion').double().eval()
    x, y = (normal(1, 3, 24, 20, seed=seed).double() for seed in range(2))
    _, first = gradients(model, x)
    _, second = gradients(model, y)
    model.zero_grad()
    (loss_of(model(x)) + loss_of(model(y))).backward()
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(parameter.grad, first[name] + second[name])


def test_frozen_parts_get_no_gradient():
    model = build(frozen_stages=1, recompute='expansion').double().eval()
    for name in ('1.0.attn.proj.weight', '1.0.layer_scale_1', '1.1.mlp.fc1.bias'):
        model.get_parameter(f'stages.{name}').requires_grad_(False)
    state = leaves(model)
    x = normal(1, 3, 24, 20).double()
    loss_of(model(x)).backward()
    loss_of(plain_conv2former(x, state, model.depths)).backward()
    for name, parameter in model.named_parameters():
        assert (parameter.grad is None) == (not parameter.requires_grad), name
        if parameter.requires_grad:
            assert relative_error(parameter.grad, state[name].grad) < 1e-10, name


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
    model = build(depthwise_conv='OtherDepthwiseConv').double()
    compare_with_plain(model, normal(1, 3, 24, 20).double(), 1e-12, 1e-10)
    assert OtherDepthwiseConv.calls == sum(model.depths)
    with pytest.raises(ValueError, match=r'depthwise_conv must be a registered .* got .NoSuchConv'):
        build(depthwise_conv='NoSuchConv')


def test_the_weight_gradient_by_matrix_products(monkeypatch):
    """If a user asks for it, and by the rule in the dtype that autocast computes in."""
    calls = []
    real = depthwise_matmul.weight_gradient
    monkeypatch.setattr(
        depthwise_matmul, 'weight_gradient', lambda *args: calls.append(1) or real(*args)
    )
    x, count = normal(1, 3, 24, 20), 2 * sum(ARCH['depths'])
    for method, expected in [('stock', 0), ('matmul', count)]:
        monkeypatch.setattr(depthwise, 'setting', method)
        compare_with_plain(build().double(), x.double(), 1e-12, 1e-10)
        assert len(calls) == expected
    monkeypatch.setattr(depthwise, 'setting', 'auto')
    monkeypatch.setattr(depthwise_matmul, 'is_faster', lambda x, weight: True)
    for autocast, expected in [(torch.bfloat16, 0), (None, count)]:
        calls.clear()
        gradients(build(), x, autocast)
        assert len(calls) == expected


@pytest.mark.parametrize('dtype', [None, torch.bfloat16])
def test_tensors_without_memory(dtype):
    """The stock steps do not ask where a tensor is stored, so that `make_fx` can trace them."""
    model, x = build(recompute='elementwise'), normal(1, 3, 32, 32)

    def run(x):
        with torch.autocast('cpu', dtype, enabled=dtype is not None):
            return model(x)

    traced = make_fx(run, tracing_mode='fake', _allow_non_fake_inputs=True)(x)
    torch.testing.assert_close(traced(x), run(x))


def test_where_the_function_is_worth_it(monkeypatch):
    """On a CPU in float32 only where less is saved; otherwise always."""
    calls = []
    real = blocks_module.compute_blocks
    monkeypatch.setattr(
        blocks_module, 'compute_blocks', lambda *args: calls.append(1) or real(*args)
    )
    x, blocks = normal(1, 3, 16, 16), sum(ARCH['depths'])
    for recompute, grad, half, expected in [
        ('elementwise', True, False, blocks),
        ('elementwise', False, False, 0),
        ('nothing', True, False, 0),
        ('nothing', True, True, blocks),
        ('elementwise', False, True, blocks),
    ]:
        calls.clear()
        with torch.set_grad_enabled(grad), torch.autocast('cpu', torch.bfloat16, enabled=half):
            build(recompute=recompute)(x)
        assert len(calls) == expected, (recompute, grad, half)
