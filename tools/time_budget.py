"""A hook that trains for a given time instead of a given number of iterations.

    custom_imports = dict(imports=['mmconv2former', 'time_budget'], allow_failed_imports=False)
    custom_hooks = [dict(type='TimeBudgetHook', seconds=120)]
    param_scheduler = None

`tools/evidence.py fit` uses it, because the speed of the machine is not known in advance. It
supports one process and mmengine's `IterBasedTrainLoop`.
"""

from __future__ import annotations

import time
from typing import Any

from mmengine.hooks import Hook
from mmengine.registry import HOOKS


@HOOKS.register_module()
class TimeBudgetHook(Hook):
    """Ends training after `seconds`, with a learning rate that has fallen to zero by then.

    The rate rises linearly over the first `warmup` iterations, stays until half of the time has
    passed and then falls linearly. The loop validates after the last iteration as usual.

    Args:
        seconds: Training time without the first iteration, which may compile kernels for a minute,
            and without the validation.
        warmup: Number of iterations.
    """

    priority = 'HIGHEST'  # mmengine logs the learning rate at the next one

    def __init__(self, seconds: float, warmup: int = 40) -> None:
        self.seconds, self.warmup = seconds, warmup
        self.start: float | None = None
        self.rates: list[float] = []

    def before_train(self, runner: Any) -> None:
        self.rates = [group['lr'] for group in runner.optim_wrapper.param_groups]

    def factor(self, iteration: int, passed: float) -> float:
        """The factor of the learning rates, from 0 to 1.

        Args:
            iteration: Counted from 0.
            passed: Seconds since the first iteration ended.
        """
        return max(0.0, min(1.0, (iteration + 1) / self.warmup, 2 * (1 - passed / self.seconds)))

    def before_train_iter(self, runner: Any, batch_idx: int, data_batch: Any = None) -> None:
        passed = 0.0 if self.start is None else time.monotonic() - self.start
        factor = self.factor(runner.iter, passed)
        for group, rate in zip(runner.optim_wrapper.param_groups, self.rates):
            group['lr'] = rate * factor

    def after_train_iter(
        self, runner: Any, batch_idx: int, data_batch: Any = None, outputs: dict | None = None
    ) -> None:
        if self.start is None:
            self.start = time.monotonic()
        elif time.monotonic() - self.start >= self.seconds:
            runner.train_loop._max_iters = runner.iter + 1  # this was the last one
