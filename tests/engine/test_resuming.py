"""A resumed run follows its config: schedule, rates and settings of the optimizer."""

import json

import pytest
from helpers.in_process import refusal_of, with_data, write_tiny_config
from helpers.tiny import WITHOUT_WORKERS

WARNING = 'Resumed with other settings than the checkpoint'


@pytest.fixture
def train(sample, tmp_path):
    config = write_tiny_config(tmp_path / 'tiny.py')

    def run(folder, end, *options, resume=False):
        """Trains to iteration `end`; returns rates by iteration, and the log."""
        work_dir = tmp_path / folder
        before = logs(work_dir, '*.log')
        arguments = ['train', config, '--no-dry-run', *(['--resume'] if resume else [])]
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


LONGER = ['param_scheduler.1.end=8']


@pytest.mark.parametrize(
    ('options', 'said'),
    [
        (LONGER, 'param_scheduler.1.end 8 (checkpoint: 4)'),
        ([*LONGER, 'optim_wrapper.optimizer.lr=0.01'], 'initial_lr '),
        (
            [
                *LONGER,
                'optim_wrapper.optimizer.lr=0.01',
                'optim_wrapper.optimizer.weight_decay=0.3',
            ],
            'weight_decay 0.3 (checkpoint: ',
        ),
    ],
    ids=['longer schedule', 'other rate', 'other weight decay'],
)
def test_rates_are_those_of_an_uninterrupted_run(train, options, said):
    expected, _ = train('whole', 8, *options)
    train('resumed', 4)
    rates, log = train('resumed', 8, *options, resume=True)
    assert [rates[i] for i in range(5, 9)] == [expected[i] for i in range(5, 9)]
    assert min(rates[i] for i in range(5, 8)) > 0
    assert log.count(WARNING) == 1
    assert said in log


def test_nothing_is_said_without_differences(train):
    train('run', 2)
    _, log = train('run', 4, resume=True)
    assert WARNING not in log
