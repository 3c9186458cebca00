"""Short runs of `ReliableRunner`, interrupted and resumed."""

import pytest
import torch
from mmengine.hooks import Hook

from mmconv2former import ReliableRunner

NOT_REPRODUCED = {'time', 'data_time', 'memory', 'epoch', 'iter'}


class Interrupt(Hook):
    """Raises KeyboardInterrupt in an iteration, counted from 1, or in the validation after it."""

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
    """Trains a run that is interrupted at each given moment and then resumed."""
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
        if runner.train_dataloader.persistent_workers:
            # Each would wait 5 s if garbage collection, which closes their queues, came first.
            runner.train_dataloader._iterator._shutdown_workers()
        resume = True
    return runner


def final(work_dir, name):
    return torch.load(work_dir / name, weights_only=False)
