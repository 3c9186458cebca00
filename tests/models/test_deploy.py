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


def fold_a_missing_bias(model):
    model.stages[1][0].mlp.fc1.bias = None


def fold_a_hook_of_a_block(model):
    model.stages[1][0].register_forward_hook(lambda *_: None)


def fold_a_hook_of_the_stem(model):
    model.downsample_layers[0].register_forward_hook(lambda *_: None)


def fold_another_norm_of_the_stem(model):
    model.downsample_layers[0][5] = nn.GroupNorm(1, model.downsample_layers[0][5].num_features)


def fold_a_normalised_downsampling(model):
    nn.utils.parametrizations.weight_norm(model.downsample_layers[1][1])


def fold_a_hook_of_a_downsampling(model):
    model.downsample_layers[1][0].register_forward_hook(lambda _, __, out: 2 * out)


def fold_an_added_layer_of_a_downsampling(model):
    model.downsample_layers[1].append(nn.Tanh())


def fold_the_padding_of_the_stem(model):
    conv = model.downsample_layers[0][6]
    conv.padding = (1, 1)


def fold_a_grouped_downsampling(model):
    conv = model.downsample_layers[1][1]
    model.downsample_layers[1][1] = nn.Conv2d(
        conv.in_channels, conv.out_channels, 2, stride=2, groups=2
    )


@pytest.mark.parametrize(
    'attach', [value for name, value in list(globals().items()) if name.startswith('fold_')]
)
def test_what_would_be_lost_is_refused(attach):
    model = build()
    attach(model)
    expected = model(X)[-1]
    place = r'stages\.1\.0, but (mlp|attn|it)|downsample_layers\.[01],'
    with pytest.raises(RuntimeError, match=f'switch_to_deploy .* ({place})'):
        model.switch_to_deploy()
    assert not model.is_deployed
    assert torch.equal(model(X)[-1], expected)  # nothing was changed


@pytest.mark.parametrize('precision', ['float32', 'bfloat16'])
def test_hook_of_the_depthwise_convolution(precision):
    model, seen = build(), []
    model.stages[1][0].attn.att[2].register_forward_hook(lambda *_: seen.append(1))
    model.switch_to_deploy()
    with torch.no_grad(), torch.autocast('cpu', torch.bfloat16, precision == 'bfloat16'):
        model(X)
    assert seen == [1]


def test_loaded_weights_are_used():
    model = build().switch_to_deploy()
    with torch.no_grad():
        before = model(X)[-1]
        state = {n: 2 * v if 'fc2' in n else v for n, v in model.state_dict().items()}
        model.load_state_dict(state)
        after = model(X)[-1]
        assert relative_error(after, before) > 0.01
        torch.testing.assert_close(after, copy.deepcopy(model)(X)[-1])


def test_forward_mode_without_gradients():
    model, tangent = build(), torch.randn_like(X)
    deployed = copy.deepcopy(model).switch_to_deploy()
    (_, expected), (_, found) = (
        torch.func.jvp(lambda x, m=m: m(x)[-1], (X,), (tangent,)) for m in (model, deployed)
    )
    with torch.no_grad():
        _, without = torch.func.jvp(lambda x: deployed(x)[-1], (X,), (tangent,))
    assert expected.norm() > 0
    for value in (found, without):
        assert relative_error(value, expected) < 1e-4


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


def test_depthwise_convolution_without_bias():
    model = build()
    model.stages[0][0].attn.att[2].bias = None
    with torch.no_grad(), torch.autocast('cpu', torch.bfloat16):
        expected = model(X)[-1]
        assert relative_error(model.switch_to_deploy()(X)[-1], expected) < 0.05
