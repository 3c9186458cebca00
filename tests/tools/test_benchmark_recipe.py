"""`benchmark_recipe.py --layout`: the same losses whatever the memory format."""

import re
import sys

import benchmark_recipe
import pytest
import torch
from benchmark import Setting
from benchmark_recipe import build_layout, detection_batch, loss, segmentation_batch, with_crop
from helpers import ROOT
from helpers.in_process import write_tiny_config
from mmengine.config import Config

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


@pytest.mark.parametrize(
    ('recipe', 'make_batch'),
    [
        ('detection/mask_rcnn_conv2former_n', detection_batch),
        ('segmentation/upernet_conv2former_n', segmentation_batch),
    ],
)
def test_losses_are_those_of_any_layout(recipe, make_batch, channels_last_features, monkeypatch):
    config = with_crop(Config.fromfile(ROOT / f'configs/{recipe}.py'), SETTING)
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


def test_command(channels_last_features, tmp_path, monkeypatch, capsys):
    recipe = write_tiny_config(tmp_path / 'tiny.py')
    options = ['--layout', '--size', '64', '64', '--rounds', '2']
    monkeypatch.setattr(sys, 'argv', ['benchmark_recipe.py', str(recipe), *options])
    benchmark_recipe.main()
    output = capsys.readouterr().out
    assert '| layout | training step, ms | first to it |' in output
    for features in ('contiguous', 'channels_last'):
        for weights in ('contiguous', 'channels_last'):
            assert re.search(rf'\| {features} features, {weights} weights \| \d+ ', output)
