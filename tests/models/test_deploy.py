"""The form for inference gives the same, for any size and in any precision."""

import copy

import pytest
import torch
from helpers.comparisons import SMALL_ARCHS, SMALL_ISOTROPIC_ARCH, randomized, relative_error
from torch import nn

from mmconv2former import Conv2Former, Conv2FormerIsotropic
from mmconv2former.models.fusion import FUSIONS

X = torch.randn(2, 3, 75, 70, generator=torch.Generator().manual_seed(0))
NETWORKS = {
    'nano': lambda: Conv2Former('nano'),
    'kernels': lambda: Conv2Former(SMALL_ARCHS['kernels']),
    **{name: lambda f=name: Conv2Former(SMALL_ARCHS['narrow'], fusion=f) for name in FUSIONS},
    'isotropic': lambda: Conv2FormerIsotropic(SMALL_ISOTROPIC_ARCH, out_indices=(1, 3)),
    'patches': lambda: Conv2FormerIsotropic(SMALL_ISOTROPIC_ARCH, patch_embedding='conv'),
}


def build(name='hadamard'):
    return randomized(NETWORKS[name]()).eval()


@pytest.mark.parametrize('name', NETWORKS)
def test_same_outputs(name):
    """Also on a CPU in float64, where nothing is fused; calling it again changes nothing."""
    model = build(name)
    with torch.no_grad():
        expected, exact = model(X), copy.deepcopy(model).double()(X.double())
        deployed = copy.deepcopy(model).switch_to_deploy()
        for outputs in (deployed(X), deployed.switch_to_deploy()(X)):
            for output, reference in zip(outputs, expected, strict=True):
                assert output.shape == reference.shape
                assert output.is_contiguous()
                assert relative_error(output, reference) < 1e-5
        for output, reference in zip(model.double().switch_to_deploy()(X.double()), exact):
            assert relative_error(output, reference) < 1e-12


def test_nothing_is_left_to_train():
    model = build()
    names = [*model.switch_to_deploy().state_dict()]
    assert not model.training
    assert not any(parameter.requires_grad for parameter in model.parameters())
    assert not any('layer_scale' in name or 'norm_1' in name for name in names)
    assert 'stages.0.0.gate.weight' in names
    assert 'downsample_layers.1.0.weight' not in names  # folded
    assert 'downsample_layers.0.5.bias' in names  # the stem's last convolution


def fold_a_hook(model):
    model.stages[1][0].mlp.fc2.register_forward_hook(lambda *_: None)


def fold_another_layer(model):
    model.stages[1][0].mlp.fc1 = nn.Sequential(model.stages[1][0].mlp.fc1)


def fold_another_activation(model):
    model.stages[1][0].mlp.act = nn.GELU('tanh')


def fold_an_added_layer(model):
    model.stages[1][0].attn.att.append(nn.Tanh())


def fold_another_eps(model):
    model.stages[1][0].mlp.norm.eps = 0.1


@pytest.mark.parametrize(
    'attach',
    [
        fold_a_hook,
        fold_another_layer,
        fold_another_activation,
        fold_an_added_layer,
        fold_another_eps,
    ],
)
def test_what_would_be_lost_is_refused(attach):
    model = build()
    attach(model)
    expected = model(X)[0]
    with pytest.raises(RuntimeError, match=r'switch_to_deploy .* stages\.1\.0, but (mlp|attn)\.'):
        model.switch_to_deploy()
    assert not model.is_deployed
    assert torch.equal(model(X)[0], expected)  # nothing was changed


def test_gradients_of_the_input():
    """As attribution methods need; the fused operators have none."""
    model = build().double()
    x = X.double().requires_grad_()
    (expected,) = torch.autograd.grad(model(x)[-1].square().sum(), x)
    (found,) = torch.autograd.grad(model.switch_to_deploy()(x)[-1].square().sum(), x)
    assert relative_error(found, expected) < 1e-10


def test_half_precision_and_tracing():
    model = build().switch_to_deploy()
    expected = model(X)
    with torch.autocast('cpu', torch.bfloat16):
        outputs = model(X)
    for output, reference in zip(outputs, expected):
        assert relative_error(output.float(), reference) < 0.05
    for output, reference in zip(torch.jit.trace(model, X)(X), expected):
        torch.testing.assert_close(output, reference)
