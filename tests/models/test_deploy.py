"""The form for inference gives the same, on any size and in any precision."""

import copy

import pytest
import torch
from helpers.comparisons import SMALL_ARCHS, randomized, relative_error
from torch import nn

from mmconv2former import Conv2Former


@pytest.mark.parametrize('arch', ['narrow', 'kernels', 'nano', 'tiny'])
@pytest.mark.parametrize('size', [(64, 64), (75, 70)])
def test_same_outputs(arch, size):
    model = randomized(Conv2Former(SMALL_ARCHS.get(arch, arch))).eval()
    x = torch.randn(2, 3, *size)
    with torch.no_grad():
        expected = model(x)
        outputs = copy.deepcopy(model).switch_to_deploy()(x)
    for output, reference in zip(outputs, expected):
        assert output.shape == reference.shape
        assert output.is_contiguous()
        assert relative_error(output, reference) < 1e-5


def test_exact_in_double_precision():
    model = randomized(Conv2Former(SMALL_ARCHS['kernels']).double()).eval()
    x = torch.randn(1, 3, 97, 64, dtype=torch.double)
    with torch.no_grad():
        expected = model(x)
        for output, reference in zip(model.switch_to_deploy()(x), expected):
            assert relative_error(output, reference) < 1e-12


def test_twice_is_as_once_and_nothing_is_left_to_train():
    model = randomized(Conv2Former('nano'))
    assert model.switch_to_deploy() is model
    state = copy.deepcopy(model.state_dict())
    model.switch_to_deploy()
    assert not model.training
    assert state.keys() == model.state_dict().keys()
    assert not any(parameter.requires_grad for parameter in model.parameters())


def test_checkpoint_of_the_training_form_stays_loadable(tmp_path):
    model = randomized(Conv2Former('nano')).eval()
    torch.save(model.state_dict(), tmp_path / 'nano.pth')
    x = torch.randn(1, 3, 64, 64)
    with torch.no_grad():
        expected = copy.deepcopy(model).switch_to_deploy()(x)
        other = Conv2Former(
            'nano', init_cfg=dict(type='Pretrained', checkpoint=str(tmp_path / 'nano.pth'))
        )
        other.init_weights()
        for output, reference in zip(other.switch_to_deploy()(x), expected):
            torch.testing.assert_close(output, reference)


def fold_a_hook(model):
    model.stages[1][0].mlp.fc2.register_forward_hook(lambda *_: None)


def fold_another_layer(model):
    model.stages[1][0].mlp.fc1 = nn.Sequential(model.stages[1][0].mlp.fc1)


def fold_another_activation(model):
    model.stages[1][0].mlp.act = nn.GELU('tanh')


@pytest.mark.parametrize('attach', [fold_a_hook, fold_another_layer, fold_another_activation])
def test_what_would_be_lost_is_refused(attach):
    model = randomized(Conv2Former(SMALL_ARCHS['narrow'])).eval()
    attach(model)
    x = torch.randn(1, 3, 64, 64)
    expected = model(x)[0]
    with pytest.raises(RuntimeError, match=r'switch_to_deploy .* stages\.1\.0, but mlp\.(fc|act)'):
        model.switch_to_deploy()
    assert not model.is_deployed
    assert torch.equal(model(x)[0], expected)  # nothing was changed


def test_gradients_of_the_input():
    """Without an operator that lacks them, as attribution methods need."""
    model = randomized(Conv2Former(SMALL_ARCHS['narrow']).double()).eval()
    x = torch.randn(1, 3, 64, 64, dtype=torch.double, requires_grad=True)
    expected = torch.autograd.grad(model(x)[-1].square().sum(), x)[0]
    found = torch.autograd.grad(model.switch_to_deploy()(x)[-1].square().sum(), x)[0]
    assert relative_error(found, expected) < 1e-10


def test_half_precision_and_tracing():
    model = randomized(Conv2Former(SMALL_ARCHS['narrow'])).switch_to_deploy()
    x = torch.randn(1, 3, 64, 64)
    expected = model(x)
    with torch.autocast('cpu', torch.bfloat16):
        outputs = model(x)
    for output, reference in zip(outputs, expected):
        assert relative_error(output.float(), reference) < 0.05
    traced = torch.jit.trace(model, x)
    for output, reference in zip(traced(x), expected):
        torch.testing.assert_close(output, reference)
