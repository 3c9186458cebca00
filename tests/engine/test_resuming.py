"""A resumed run follows its config: schedule, rates and settings of the optimizer."""

import json
import logging
from types import SimpleNamespace

import pytest
import torch
from helpers.in_process import refusal_of, with_data, write_tiny_config
from helpers.tiny import WITHOUT_WORKERS
from mmengine.optim import LinearLR
from mmengine.registry import OPTIMIZERS

from mmconv2former.checkpoint.reading import CheckpointError
from mmconv2former.engine.resuming import (
    FACTS,
    Settings,
    compare_classes,
    differences,
    follow_config,
    settings_of,
    sources,
)

WARNING = 'Resumed with other settings than the checkpoint'


@pytest.fixture
def train(sample, tmp_path):
    config = write_tiny_config(tmp_path / 'tiny.py')

    def run(folder, end, *options, resume=False, flags=()):
        """Trains to iteration `end`; returns rates by iteration, and the log."""
        work_dir = tmp_path / folder
        before = logs(work_dir, '*.log')
        arguments = ['train', config, '--no-dry-run', *flags]
        arguments += ['--resume'] if resume else []
        options = [
            *WITHOUT_WORKERS,
            'train_cfg.val_begin=99',
            f'train_cfg.max_iters={end}',
            *options,
        ]
        assert refusal_of(*with_data(arguments, sample, work_dir, *options)) == ''
        records = map(json.loads, logs(work_dir, 'vis_data/scalars.json').splitlines())
        rates = {record['step']: record['lr'] for record in records if 'lr' in record}
        return rates, logs(work_dir, '*.log').removeprefix(before)

    return run


def logs(work_dir, pattern):
    return ''.join(path.read_text() for path in sorted(work_dir.glob(f'*/{pattern}')))


def test_rates_are_those_of_an_uninterrupted_run(train):
    options = [
        'param_scheduler.1.end=8',
        'optim_wrapper.optimizer.lr=0.01',
        'optim_wrapper.optimizer.weight_decay=0.3',
    ]
    expected, _ = train('whole', 8, *options)
    train('resumed', 4)
    rates, log = train('resumed', 8, *options, resume=True)
    assert [rates[i] for i in range(5, 9)] == [expected[i] for i in range(5, 9)]
    assert min(rates[i] for i in range(5, 8)) > 0
    assert log.count(WARNING) == 1
    assert 'param_scheduler.1.end 8 (checkpoint: 4)' in log
    assert 'initial_lr ' in log
    assert 'weight_decay 0.3 (checkpoint: ' in log


def test_nothing_is_said_without_differences(train):
    train('run', 2)
    _, log = train('run', 4, resume=True)
    assert WARNING not in log
    assert 'Dry run' not in log  # --no-dry-run


def test_run_without_schedule_is_resumed(train):
    train('run', 2, 'param_scheduler=None')
    rates, log = train('run', 4, 'param_scheduler=None', resume=True)
    assert len(set(rates.values())) == 1
    assert {3, 4} <= rates.keys()
    assert WARNING not in log


@OPTIMIZERS.register_module()
class Growing(torch.optim.SGD):
    """Keeps a running value in its parameter groups, as Prodigy and D-Adaptation do."""

    def __init__(self, params, lr, momentum=0, weight_decay=0):
        super().__init__(params, lr, momentum, weight_decay=weight_decay)
        for group in self.param_groups:
            group['d'] = 0

    def step(self, closure=None):
        for group in self.param_groups:
            group['d'] += 1
        return super().step(closure)


def test_values_that_an_optimizer_keeps_in_its_groups(train, tmp_path):
    options = ['optim_wrapper.optimizer._delete_=True', 'optim_wrapper.optimizer.type=Growing',
               'optim_wrapper.optimizer.lr=0.01', 'param_scheduler.1.end=8']  # fmt: skip
    train('run', 4, *options)
    _, log = train('run', 8, *options, 'optim_wrapper.optimizer.momentum=0.5', resume=True)
    assert 'momentum 0.5 (checkpoint: 0)' in log
    checkpoint = torch.load(tmp_path / 'run/iter_8.pth', weights_only=False)
    groups = checkpoint['optimizer']['param_groups']
    assert {group['d'] for group in groups} == {8}
    assert {group['momentum'] for group in groups} == {0.5}


def test_betas_follow_a_schedule_of_the_momentum():
    settings = Settings([dict(betas=(0.9, 0.999), eps=1e-8)], [])
    groups = [dict(betas=(0.85, 0.999), eps=1e-6)]
    assert list(differences(settings, groups, [], {'momentum'}, None)) == [
        'eps 1e-08 (checkpoint: 1e-06)'
    ]


class Epochs:
    """A loop of epochs at a position."""

    def __init__(self, epoch, iteration):
        self.epoch, self.iter = epoch, iteration


@pytest.mark.parametrize(('iteration', 'said'), [(4, ''), (5, '5'), (3, '3'), (0, '0')])
def test_steps_of_a_warmup_in_a_loader_of_another_length(iteration, said):
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.ones(1))], lr=1.0)
    warmup = LinearLR(optimizer, start_factor=0.1, end=3, by_epoch=False)
    own = [warmup.state_dict()]
    for _ in range(4):
        warmup.step()
    settings = Settings([], own)
    found = list(differences(settings, [], [warmup], {'lr'}, Epochs(1, iteration)))
    expected = [f'param_scheduler.0 at step {said} (checkpoint: at step 4)'] if said else []
    assert found == expected


@pytest.mark.parametrize('scaling', [[], ['--auto-scale-lr']], ids=['', 'scaled'])
def test_another_batch_is_named_and_rates_follow_the_flag(train, scaling):
    base = ['auto_scale_lr.base_batch_size=4', 'train_dataloader.batch_size=4']
    other = [*base[:1], 'train_dataloader.batch_size=2']
    longer = ['param_scheduler.1.end=8']
    expected, _ = train('whole', 8, *longer, *other, flags=scaling)
    train('run', 4, *base, flags=scaling)
    rates, log = train('run', 8, *longer, *other, resume=True, flags=scaling)
    assert [rates[i] for i in range(5, 9)] == [expected[i] for i in range(5, 9)]
    assert 'batch size 2 (checkpoint: 4). The run continues at its next iteration' in log
    assert ('rates are scaled to the batch' in log) == bool(scaling)


def test_other_data_and_optimizers_are_named(train):
    train('run', 2)
    options = ['train_dataloader.dataset.indices=3', 'optim_wrapper.optimizer.type=Adam']
    _, log = train('run', 4, *options, resume=True)
    assert 'optimizer Adam (checkpoint: AdamW); samples 3 (checkpoint: 40)' in log


def test_checkpoints_of_plain_mmengine_are_resumed(train, tmp_path):
    train('run', 2)
    path = tmp_path / 'run/iter_2.pth'
    content = torch.load(path, weights_only=False)
    facts = content['meta'].pop(FACTS)
    assert facts['data'].endswith('images/training')
    assert facts['batch size'] > 0
    torch.save(content, path)
    rates, log = train('run', 4, 'train_dataloader.batch_size=3', resume=True)
    assert 4 in rates
    assert 'with other settings' not in log


CLASSES = ['wall', 'sky', 'tree']


@pytest.mark.parametrize(
    ('own', 'message'),
    [
        (['wall', 'sky'], 'with 3 classes, train_dataloader.dataset.metainfo has 2. Resume with'),
        (['sky', 'wall', 'tree'], "has 3; the first difference is class 0: 'sky', not 'wall'. R"),
    ],
)
def test_other_classes_are_refused(own, message):
    with pytest.raises(CheckpointError, match=message) as caught:
        compare_classes(own, CLASSES, 'a.pth')
    assert 'load_from=FILE' in str(caught.value)


def test_renamed_classes_are_named():
    said = compare_classes(['wall', 'clouds', 'tree'], CLASSES, 'a.pth')
    assert said == "class 1 'clouds' (checkpoint: 'sky')"


def test_data_inside_wrappers_are_named():
    coco, folder = SimpleNamespace(ann_file='a.json'), SimpleNamespace(data_prefix=dict(img='b'))
    repeated = SimpleNamespace(dataset=SimpleNamespace(datasets=[coco, folder]))
    assert sources(repeated) == 'a.json, b'


def test_rates_that_are_not_compared_are_said(caplog):
    runner = SimpleNamespace(
        optim_wrapper={}, param_schedulers=[], logger=logging.getLogger('resumed')
    )
    assert settings_of(runner) is None
    follow_config(runner, None)
    assert 'the learning rates and the schedule of the checkpoint' in caplog.text
