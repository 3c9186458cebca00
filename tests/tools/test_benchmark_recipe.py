"""Training steps of whole recipes: what is timed, and how it is shown."""

import re
import sys
from functools import partial

import benchmark_recipe
import pytest
import torch
from benchmark_recipe import build, detection_batch, loss, read_recipe
from common.measuring import Setting
from helpers import ROOT
from helpers.in_process import write_tiny_config

SETTING = Setting((64, 64), batch=2)


@pytest.fixture
def run(tmp_path, monkeypatch, capsys):
    """Runs the tool on a tiny recipe and returns what it printed."""
    recipe = write_tiny_config(tmp_path / 'tiny.py')

    def run(*options):
        monkeypatch.setattr(sys, 'argv', ['benchmark_recipe.py', *map(str, (recipe, *options))])
        benchmark_recipe.main()
        return capsys.readouterr().out

    return run


def test_loss_of_a_detector():
    config = read_recipe(ROOT / 'configs/detection/mask_rcnn_conv2former_n.py', SETTING)
    with torch.no_grad():
        value = loss(build(config), detection_batch(2, (64, 64)), SETTING)
    assert 0 < value < 100


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


def test_one_round_is_refused(run, capsys):
    """Before the measurement, which is shown with quartiles."""
    with pytest.raises(SystemExit):
        run('--size', 64, 64, '--rounds', 1)
    assert '--rounds: must be at least 2, got 1' in capsys.readouterr().err


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
