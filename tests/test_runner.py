"""ReliableRunner: a run that was interrupted ends as one that was not."""

import pytest
import torch
from mmengine.hooks import Hook
from tiny import scalars, tiny_config

from mmconv2former import ReliableRunner

NOT_REPRODUCED = {'time', 'data_time', 'memory', 'epoch', 'iter'}


class Interrupt(Hook):
    """Raises KeyboardInterrupt in an iteration, counted from 1, or in the validation behind it."""

    priority = 'HIGHEST'

    def __init__(self, iteration, in_validation):
        self.iteration, self.in_validation = iteration, in_validation

    def after_train_iter(self, runner, batch_idx, data_batch=None, outputs=None):
        if not self.in_validation and runner.iter + 1 == self.iteration:
            raise KeyboardInterrupt

    def before_val_iter(self, runner, batch_idx, data_batch=None):
        if self.in_validation and runner.iter == self.iteration:
            raise KeyboardInterrupt


def run(config, interrupt_at=(), resume=False):
    """Trains, with interruptions, each followed by a resumption."""
    for moment in [*interrupt_at, None]:
        config.resume = 'auto' if resume else False
        config.experiment_name += '_'  # mmengine's loggers and visualizers go by their names
        config.visualizer.name = config.experiment_name
        runner = ReliableRunner.from_cfg(config)
        if moment is not None:
            runner.register_hook(Interrupt(*moment))
            with pytest.raises(KeyboardInterrupt):
                runner.train()
        else:
            runner.train()
        resume = True
    return runner


def final(work_dir, name):
    return torch.load(work_dir / name, weights_only=False)


CASES = {
    # name of the last checkpoint, length, interval, interruptions (iteration, whether in the
    # validation behind it), data workers of the resumed run
    'detection': ('epoch_3.pth', 3, 1, [(4, True), (7, False)], 0),
    'segmentation': ('iter_10.pth', 10, 2, [(1, False), (4, True), (7, False)], 2),
}


@pytest.mark.parametrize('task', CASES)
def test_interrupted_run_ends_as_an_uninterrupted_one(task, sample, tmp_path):
    """With random augmentation, drop path and dropout, whatever the number of workers."""
    last, length, interval, interruptions, workers = CASES[task]
    results = {}
    for name, interrupt_at in (('whole', []), ('interrupted', interruptions)):
        options = {
            'train_dataloader.num_workers': workers if interrupt_at else 0,
            'train_dataloader.persistent_workers': bool(workers and interrupt_at),
        }
        config = tiny_config(task, sample, tmp_path / name, length, interval, options=options)
        run(config, interrupt_at)
        results[name] = final(tmp_path / name, last), scalars(tmp_path / name)
    (whole, log), (interrupted, other_log) = results.values()
    assert_equal(interrupted['state_dict'], whole['state_dict'])
    assert_equal(interrupted['optimizer'], whole['optimizer'])
    assert interrupted['param_schedulers'] == whole['param_schedulers']
    expected = {key: value for key, value in log.items() if key[0] not in NOT_REPRODUCED}
    assert {key: other_log.get(key) for key in expected} == expected
    assert any(name == 'lr' for name, _ in expected)


def assert_equal(actual, expected):
    torch.testing.assert_close(actual, expected, rtol=0, atol=0)
