"""Training steps of whole recipes: the same losses in any memory format, and what is timed."""

import re
import sys
from functools import partial

import benchmark_recipe
import pytest
import torch
from benchmark_recipe import build_layout, detection_batch, loss, read_recipe, segmentation_batch
from common.measuring import Setting
from helpers import ROOT
from helpers.in_process import write_tiny_config

from mmconv2former import Conv2Former

SETTING = Setting((64, 64), batch=2)


@pytest.fixture
def channels_last_features(monkeypatch):
    """`out_channels_last` as it works on CUDA."""
    stock_init, stock_forward = Conv2Former.__init__, Conv2Former.forward

    def init(self, *args, out_channels_last=False, **kwargs):
        stock_init(self, *args, **kwargs)
        self.out_channels_last = out_channels_last

    def forward(self, x):
        outputs = stock_forward(self, x)
        if self.out_channels_last:
            outputs = tuple(y.contiguous(memory_format=torch.channels_last) for y in outputs)
        return outputs

    monkeypatch.setattr(Conv2Former, '__init__', init)
    monkeypatch.setattr(Conv2Former, 'forward', forward)


@pytest.fixture
def run(tmp_path, monkeypatch, capsys):
    """Runs the tool on a tiny recipe and returns what it printed."""
    recipe = write_tiny_config(tmp_path / 'tiny.py')

    def run(*options):
        monkeypatch.setattr(sys, 'argv', ['benchmark_recipe.py', *map(str, (recipe, *options))])
        benchmark_recipe.main()
        return capsys.readouterr().out

    return run


@pytest.mark.parametrize(
    ('recipe', 'make_batch'),
    [
        ('detection/mask_rcnn_conv2former_n', detection_batch),
        ('segmentation/upernet_conv2former_n', segmentation_batch),
    ],
)
def test_losses_are_those_of_any_layout(recipe, make_batch, channels_last_features):
    config = read_recipe(ROOT / f'configs/{recipe}.py', SETTING)
    losses = []
    for features in (False, True):
        for weights in (False, True):
            model = build_layout(config, features, weights)
            with torch.no_grad():
                losses.append(loss(model, make_batch(2, (64, 64)), SETTING))
            (output, *_) = model.backbone(torch.zeros(1, 3, 64, 64))
            assert output.is_contiguous() != features
            formats = {
                parameter.is_contiguous(memory_format=torch.channels_last)
                for name, parameter in model.named_parameters()
                if not name.startswith('backbone.') and is_spatial(parameter)
            }
            assert formats == {weights}
    torch.testing.assert_close(torch.stack(losses), losses[0].expand(4), rtol=1e-4, atol=1e-4)


def is_spatial(parameter):
    """Whether the two memory formats differ."""
    return parameter.ndim == 4 and min(parameter.shape[1], parameter.shape[2]) > 1


@pytest.mark.parametrize('with_optimizer', [True, False])
def test_step_of_a_recipe(with_optimizer, monkeypatch):
    """Gradients are there when the optimizer steps, and gone when the step ends."""
    stepped = []

    def step(optimizer):
        stepped.extend(p.grad.clone() for group in optimizer.param_groups for p in group['params'])

    monkeypatch.setattr(torch.optim.AdamW, 'step', step)
    monkeypatch.setattr(benchmark_recipe, 'loss', lambda model, batch, setting: model(batch).sum())
    build_model = partial(torch.nn.Linear, 2, 1)
    case = benchmark_recipe.make_case(build_model, Setting((1, 1)), with_optimizer)
    case.step(torch.tensor([[3.0, 4.0]]))
    assert [grad.tolist() for grad in stepped] == ([[[3, 4]], [1]] if with_optimizer else [])
    assert all(parameter.grad is None for parameter in case.model.parameters())


def test_layouts_are_compared(run, channels_last_features):
    output = run('--layout', '--size', 64, 64, '--rounds', 2)
    for features in ('contiguous', 'channels_last'):
        for weights in ('contiguous', 'channels_last'):
            assert re.search(rf'\| `{features} features, {weights} weights` \| \d+', output)


def test_whole_recipes_and_their_data(run, sample, tmp_path, monkeypatch):
    page = tmp_path / 'page.md'
    page.write_text('<!-- table data tiny -->\n<!-- end -->\n')
    monkeypatch.setattr(benchmark_recipe, 'PAGE', page)
    monkeypatch.setattr(torch, 'set_num_threads', lambda threads: None)
    output = run('--size', 64, 64, '--rounds', 2)
    assert '2x3x64x64, float32, cpu; medians of 2 rounds' in output
    for name in ('Conv2Former', 'published code', 'ConvNeXt-T', 'Swin-T'):
        assert re.search(
            rf'\| `{name}` \| \d+\.\d \(.*\| \d\.\d\d \| [\d,]+ \| \d\.\d\d \|', output
        )
    data = ['--data-root', sample / 'ade/ADEChallengeData2016', '--images', 4, '--page']
    output = run(*data)
    assert re.search(r'\d images per second with one worker', output)
    assert '| RandomCrop |' in page.read_text()
