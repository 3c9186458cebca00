"""The learning rates of a whole run, without its model."""

from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
from helpers import ROOT
from helpers.in_process import refusal_of, with_data, write_tiny_config
from helpers.tiny import WITHOUT_WORKERS
from mmengine.config import Config
from mmengine.registry import PARAM_SCHEDULERS, DefaultScope
from mmseg.engine.schedulers import PolyLRRatio
from torch.optim import SGD

from mmconv2former.engine.schedule import ScheduleError, play, table, unusual

WARM_UP = dict(type='LinearLR', start_factor=0.001, by_epoch=False, begin=0, end=60)
STEPS = dict(type='MultiStepLR', by_epoch=True, begin=0, end=12, milestones=[8, 11])
STEPS_WITHOUT_END = dict(type='MultiStepLR', by_epoch=True, milestones=[30, 60, 90])
COSINE = dict(
    type='CosineAnnealingLR', by_epoch=True, end=100, T_max=100, convert_to_iter_based=True
)
COSINE_WITHOUT_END = dict(type='CosineAnnealingLR', by_epoch=True, T_max=100)
POLY = dict(type='PolyLR', by_epoch=False, begin=60, end=1000, power=1.0)
ONE_CYCLE = dict(type='OneCycleLR', by_epoch=True, eta_max=2.0)
LATE = dict(type='PolyLR', by_epoch=True, begin=50, end=100)
OFF = dict(type='ConstantLR', by_epoch=True, factor=1e-12, begin=0, end=30)


def schedule(settings, length, epoch=100, rate=1.0, scope='mmengine'):
    """Plays schedulers for `length` epochs, or iterations if `epoch` is None."""
    optimizer = SGD([torch.zeros(1)], lr=rate)
    arguments = dict(optimizer=optimizer, epoch_length=epoch)
    schedulers = []
    with DefaultScope.overwrite_default_scope(scope):
        for each in settings:
            end = length if each.get('by_epoch', True) else length * (epoch or 1)
            schedulers.append(PARAM_SCHEDULERS.build({'end': end, **each}, default_args=arguments))
    return play(schedulers, length * (epoch or 1), epoch)


def test_rates_are_those_that_the_schedulers_set():
    optimizer = SGD([torch.zeros(1)], lr=0.5)
    build = {'optimizer': optimizer, 'epoch_length': 10}
    schedulers = [PARAM_SCHEDULERS.build(dict(s), default_args=build) for s in (WARM_UP, STEPS)]
    played = play(schedulers, 120, 10)
    for iteration in range(120):
        assert played.rates[iteration] == optimizer.param_groups[0]['lr']
        optimizer.step()
        schedulers[0].step()
        if iteration % 10 == 9:
            schedulers[1].step()


GOOD = {
    'steps': ([WARM_UP, STEPS], 12, 100),
    'steps without an end': ([STEPS_WITHOUT_END], 100, 100),
    'cosine': ([COSINE], 100, 100),
    'poly': ([WARM_UP, POLY], 1000, None),
    'a constant rate after the warm-up': ([WARM_UP], 4000, None),
    'one cycle': ([ONE_CYCLE], 100, 100),
}
BAD = {
    'steps in a longer run': (
        [WARM_UP, STEPS], 36, 100,
        'the rate stays at 0.01 for the last 69% of the run: param_scheduler.1 (MultiStepLR) '
        'changes it until epoch 11 of 36. Set param_scheduler.1.end=36 '
        'param_scheduler.1.milestones=[24,33]',
    ),
    'steps in a shorter run': (
        [WARM_UP, STEPS], 6, 100,
        'param_scheduler.1 (MultiStepLR) lasts until epoch 12, but the run ends at epoch 6: its '
        'last rate is 1 instead of 0.01. Set param_scheduler.1.end=6 '
        'param_scheduler.1.milestones=[4,5]',
    ),
    'steps without an end in a longer run': (
        [STEPS_WITHOUT_END], 300, 100,
        'the rate stays at 0.001 for the last 70% of the run: param_scheduler.0 (MultiStepLR) '
        'changes it until epoch 90 of 300. Set param_scheduler.0.milestones=[90,180,270]',
    ),
    'steps without an end in a shorter run': (
        [STEPS_WITHOUT_END], 50, 100,
        'param_scheduler.0 (MultiStepLR) lasts until epoch 91, but the run ends at epoch 50: its '
        'last rate is 0.1 instead of 0.01. Set param_scheduler.0.end=50 '
        'param_scheduler.0.milestones=[15,30,45]',
    ),
    'cosine in a longer run': (
        [COSINE], 300, 100,
        'changes it until iteration 9937 of 30000. Set param_scheduler.0.end=300 '
        'param_scheduler.0.T_max=300',
    ),
    'cosine in a shorter run': (
        [COSINE], 50, 100,
        'its last rate is 0.5 instead of 2.47e-08. Set param_scheduler.0.end=50 '
        'param_scheduler.0.T_max=50',
    ),
    'cosine without an end in a longer run': (
        [COSINE_WITHOUT_END], 300, 100,
        'the rate falls to 0 at epoch 100 of 300 and rises again: param_scheduler.0 '
        '(CosineAnnealingLR). Set param_scheduler.0.T_max=300',
    ),
    'cosine without an end in a shorter run': (
        [COSINE_WITHOUT_END], 50, 100, 'lasts until epoch 100, but the run ends at epoch 50',
    ),
    'poly in a longer run': (
        [WARM_UP, POLY], 4000, None,
        'the rate stays at 0 for the last 75% of the run: param_scheduler.1 (PolyLR) changes it '
        'until iteration 999 of 4000. Set param_scheduler.1.end=4000',
    ),
    'a warm-up that is longer than the run': (
        [WARM_UP], 40, None,
        'its last rate is 0.661 instead of 1. Set param_scheduler.0.end=4',
    ),
    'a final rate above the first': (
        [dict(COSINE, eta_min=2.0)], 100, 100,
        "the rate rises to 2, past the optimizer's 1, at iteration 9999",
    ),
    'no rate': ([LATE, OFF], 100, 100, 'the rate is 0 from epoch 0 to epoch 29'),
}  # fmt: skip


@pytest.mark.parametrize('name', GOOD)
def test_nothing_is_said_about_a_schedule_that_fits(name):
    assert list(unusual(schedule(*GOOD[name]))) == []


@pytest.mark.parametrize('name', BAD)
def test_one_line_says_what_does_not_fit(name):
    *arguments, message = BAD[name]
    (line,) = unusual(schedule(*arguments))
    assert message in line


def test_a_scheduler_that_would_fail_later():
    with pytest.raises(ScheduleError, match='after iteration 5100 of 10000: Tried to step 52'):
        schedule([dict(ONE_CYCLE, total_steps=50)], 100)


def test_an_optimizer_without_a_rate():
    (line,) = unusual(schedule([WARM_UP], 40)._replace(base=0))
    assert line == "the optimizer's rate is 0: nothing is learned"


def test_other_settings_than_rates_are_left_out():
    momentum = dict(type='ConstantMomentum', factor=0.5)
    played = schedule([momentum], 4)
    assert played.schedulers == {}
    assert list(unusual(played)) == []


def test_table_shows_where_the_rate_changes():
    lines = table(schedule([WARM_UP, STEPS], 12)).splitlines()
    assert len(lines) <= 21
    rows = {int(step): float(rate) for step, _, rate, *_ in map(str.split, lines[1:])}
    assert (rows[0], rows[60], rows[800], rows[1100], rows[1199]) == (0.001, 1, 0.1, 0.01, 0.01)


def distinct_schedules():
    """Schedules of our recipes, and of the files that the stock configs of the libraries share."""
    paths = [*(ROOT / 'configs').glob('[!_]*/*.py')]
    for library in ('mmdet', 'mmseg', 'mmpretrain'):
        for folder in find_spec(library).submodule_search_locations:
            paths += Path(folder, '.mim/configs/_base_/schedules').glob('*.py')
    found = {}
    for path in paths:
        config = Config.fromfile(path)
        settings = config.param_scheduler
        settings = settings if isinstance(settings, list) else [settings]
        rate = config.optim_wrapper.optimizer.lr
        key = str((settings, config.train_cfg, rate))
        found.setdefault(key, (path.name, list(map(dict, settings)), config.train_cfg, rate))
    return found.values()


def test_nothing_is_said_about_stock_schedules():
    found = distinct_schedules()
    assert len(found) > 30
    for name, settings, loop, rate in found:
        epoch = 500 if 'max_epochs' in loop else None
        length = loop.max_epochs if epoch else loop.max_iters
        scope = 'mmseg' if any(s['type'] == PolyLRRatio.__name__ for s in settings) else 'mmengine'
        assert list(unusual(schedule(settings, length, epoch, rate, scope))) == [], name


def test_tool_warns_and_shows_the_table(sample, tmp_path, capsys):
    config = write_tiny_config(tmp_path / 'tiny.py')
    options = [*WITHOUT_WORKERS, 'train_cfg.max_iters=2', 'train_cfg.val_begin=99']
    options += ['param_scheduler.0.end=2', 'param_scheduler.1.begin=2', 'param_scheduler.1.end=99']
    warning = 'param_scheduler.1 (PolyLR) lasts until iteration 99, but the run ends at iteration 2'
    for flag in ('--show-schedule', '--no-dry-run'):
        arguments = with_data(['train', config, flag], sample, tmp_path / flag, *options)
        assert refusal_of(*arguments) == ''
        said = capsys.readouterr().out
        has_trained = bool([*(tmp_path / flag).glob('iter_*.pth')])
        assert has_trained == (flag == '--no-dry-run')
        if not has_trained:
            assert [line.split()[0] for line in said.splitlines()[-4:-1]] == ['iteration', '0', '1']
            assert warning in said.splitlines()[-1]
    (log,) = (tmp_path / flag).glob('*/*.log')
    assert f'Learning rate: {warning}' in log.read_text()
