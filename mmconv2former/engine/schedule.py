"""Simulates the learning rates of a whole run without its model, and reports what is unusual.

The most common mistake: `train_cfg.max_epochs` or `max_iters` was changed, the schedulers were not.
The rate then falls too late or too early, and nothing fails.
"""

from __future__ import annotations

import copy
import warnings
from collections.abc import Iterator, Sequence
from types import SimpleNamespace
from typing import Any, NamedTuple

import numpy as np
from mmengine.hooks import Hook
from mmengine.optim import OptimWrapperDict
from mmengine.runner import BaseLoop, EpochBasedTrainLoop

from ..registry import HOOKS, register
from ..text import PrintableError

MARGIN = 0.1  # of a run: nothing is said about shorter stretches at a constant rate
UNBOUNDED = 10**9  # mmengine's `end` of a scheduler without one
LONGEST = 5_000_000  # iterations that are simulated, in about 10 s; longer runs are stopped by hand
RISING = ('OneCycle', 'Restart', 'Cyclic')  # past the optimizer's rate, or again, by design
ROWS, BAR = 20, 30  # of a table


class ScheduleError(PrintableError, ValueError):
    """A scheduler would fail in the course of the run; the message says when."""


class Schedule(NamedTuple):
    """The learning rates of a run."""

    rates: np.ndarray  # by iteration; longer than the run if a scheduler is
    base: float  # the optimizer's
    iterations: int  # of the run
    epoch: int | None  # iterations of an epoch, if the run counts epochs
    schedulers: dict[int, Any]  # of the learning rate, by place in `param_scheduler`

    def moment(self, iteration: int, end: int | None = None) -> str:
        """A position in the run, such as 'epoch 11 of 36'."""
        unit = self.epoch or 1
        name, unit = ('epoch', unit) if self.epoch and iteration % unit == 0 else ('iteration', 1)
        return f'{name} {iteration // unit}' + (f' of {end // unit}' if end else '')


# --------------------------------------------------------------------------------------------- play
def schedule_of(runner: Any) -> Schedule | None:
    """The schedule of a runner whose schedulers are built and have not run yet.

    It follows the parameter group with the highest rate. None without a schedule, with several
    optimizers, and for runs that are too long to play.

    Raises:
        ScheduleError: A scheduler would fail in the course of the run.
    """
    loop, schedulers = runner.train_loop, runner.param_schedulers
    if not schedulers or isinstance(schedulers, dict):
        return None
    if isinstance(runner.optim_wrapper, OptimWrapperDict) or loop.max_iters > LONGEST:
        return None
    # The wrapper has one more group: the settings as they are written, without --auto-scale-lr.
    groups = runner.optim_wrapper.optimizer.param_groups
    rates = [group.get('initial_lr', group['lr']) for group in groups]
    epoch = len(loop.dataloader) if isinstance(loop, EpochBasedTrainLoop) else None
    return play(schedulers, loop.max_iters, epoch, group=int(np.argmax(rates)))


def play(schedulers: Sequence[Any], iterations: int, epoch: int | None, group: int = 0) -> Schedule:
    """Steps copies of schedulers as mmengine's `ParamSchedulerHook` does in a run.

    Those of other settings, such as the momentum, and those that wait for metrics are left out.

    Args:
        schedulers: mmengine's, at the first iteration.
        iterations: Of the run.
        epoch: Iterations of an epoch, if the run counts epochs.
        group: Index of the parameter group to follow.

    Raises:
        ScheduleError: A scheduler would fail in the course of the run.
    """
    values = dict(schedulers[0].optimizer.param_groups[group], params=[])
    followed = {
        index: copied(scheduler, values, group)
        for index, scheduler in enumerate(schedulers)
        if scheduler.param_name == 'lr' and not hasattr(scheduler, 'best')
    }
    for scheduler in followed.values():  # mmengine's default `end` is that of the run
        if scheduler.end * (epoch or 1 if scheduler.by_epoch else 1) >= iterations:
            scheduler.end = max(lengths(scheduler).values())
    by_iteration = [s for s in followed.values() if not s.by_epoch]
    by_epoch = [s for s in followed.values() if s.by_epoch]
    length = max([iterations, *(last_step(s, epoch) for s in followed.values())])
    rates: np.ndarray = np.empty(min(length, LONGEST))
    with warnings.catch_warnings():
        warnings.simplefilter('ignore')  # about steps of schedulers without the optimizer's
        for iteration in range(len(rates)):
            rates[iteration] = values['lr']
            is_end = epoch is not None and (iteration + 1) % epoch == 0
            try:
                for scheduler in [*by_iteration, *by_epoch] if is_end else by_iteration:
                    scheduler.step()
            except ValueError as error:
                if iteration + 1 < iterations:
                    raise ScheduleError(
                        f'param_scheduler would fail after iteration {iteration + 1} of '
                        f'{iterations}: {error}'
                    ) from error
                rates = rates[: iteration + 1]
                break
    return Schedule(rates, values.get('initial_lr', values['lr']), iterations, epoch, followed)


def copied(scheduler: Any, values: dict, group: int) -> Any:
    """A copy of a scheduler for one parameter group, with an optimizer that only has `values`."""
    own = copy.copy(scheduler)
    own.base_values, own.verbose = [scheduler.base_values[group]], False
    own.optimizer = SimpleNamespace(param_groups=[values], step=None)
    return own


def lengths(scheduler: Any) -> dict[str, int]:
    """The settings of a scheduler that say how long it is, as steps from the start of the run."""
    found = {'end': scheduler.end}
    for key in ('T_max', 'total_steps'):
        if hasattr(scheduler, key):
            found[key] = scheduler.begin + getattr(scheduler, key)
    if getattr(scheduler, 'milestones', None):
        found['milestones'] = scheduler.begin + max(scheduler.milestones)
    return found


def last_step(scheduler: Any, epoch: int | None) -> int:
    """The iteration after which a scheduler changes nothing; 0 if it has no end."""
    found = lengths(scheduler)
    last = max((n for n in found.values() if n < UNBOUNDED), default=0)
    is_at_last = last > 0 and found.get('milestones') == last  # the rate of this step counts
    return (last + is_at_last) * (epoch or 1 if scheduler.by_epoch else 1)


# ------------------------------------------------------------------------------------------- judge
def unusual(schedule: Schedule) -> Iterator[str]:
    """Says what is unusual about the learning rates of a run: one line each, without a full stop.

    Nothing is said about mmdet's, mmseg's and mmpretrain's stock schedules.
    """
    rates, base, end, epoch, schedulers = schedule
    run = rates[:end]
    if base == 0:
        yield "the optimizer's rate is 0: nothing is learned"
    if not schedulers or not len(run) or base <= 0:
        return
    steps = {index: last_step(scheduler, epoch) for index, scheduler in schedulers.items()}
    last = max(steps, key=lambda index: steps[index])
    is_rising = any(word in type(s).__name__ for s in schedulers.values() for word in RISING)

    if len(rates) > end * (1 + MARGIN) and abs(rates[-1] - run[-1]) > 0.01 * base:
        yield (
            f'{named(last, schedule)} lasts until {schedule.moment(steps[last])}, but the run ends '
            f'at {schedule.moment(end)}: its last rate is {run[-1]:.3g} instead of '
            f'{rates[-1]:.3g}{fitting(last, schedule, is_warm_up=rates[-1] > run[-1])}'
        )

    moves = np.abs(run - run[-1]) > 0.01 * run[-1] + 1e-4 * base
    constant = int(np.argmax(moves[::-1])) if moves.any() else end
    ends_early = 0 < steps[last] < end
    stays = run[-1] < 0.99 * base and constant > end * (MARGIN if ends_early else 0.5)
    if stays:
        yield (
            f'the rate stays at {run[-1]:.3g} for the last {constant / end:.0%} of the run: '
            f'{named(last, schedule)} changes it until '
            f'{schedule.moment(end - constant, end)}{fitting(last, schedule)}'
        )

    borders = np.flatnonzero(np.diff([0, *(run <= 1e-9 * base), 0]))
    starts, ends = borders[::2], borders[1::2]
    for start, stop in zip(starts, ends):
        if stop - start > end * MARGIN and not (stays and stop == end):
            yield f'the rate is 0 from {schedule.moment(start)} to {schedule.moment(stop)}'

    if run.max() > 1.01 * base and not is_rising:
        yield (
            f"the rate rises to {run.max():.3g}, past the optimizer's {base:.3g}, at "
            f'{schedule.moment(int(run.argmax()))}'
        )

    falls = np.maximum.accumulate(run) - run > 0.01 * base
    after = run[int(np.argmax(falls)) :] if falls.any() else run[:1]
    turn = len(run) - len(after) + int(after.argmin())
    if (after - np.minimum.accumulate(after)).max() > MARGIN * base and not is_rising:
        yield (
            f'the rate falls to {after.min():.3g} at {schedule.moment(turn, end)} and rises '
            f'again: {named(last, schedule)}{fitting(last, schedule)}'
        )


def named(index: int, schedule: Schedule) -> str:
    """The place and type of a scheduler."""
    return f'param_scheduler.{index} ({type(schedule.schedulers[index]).__name__})'


def fitting(index: int, schedule: Schedule, is_warm_up: bool = False) -> str:
    """Advice: settings that make a scheduler as long as the run, as for `--cfg-options`.

    Args:
        index: Of the scheduler.
        schedule: Of the run.
        is_warm_up: Whether the scheduler raises the rate; it then gets a tenth of the run.
    """
    scheduler, epoch = schedule.schedulers[index], schedule.epoch
    found = {key: n for key, n in lengths(scheduler).items() if n < UNBOUNDED}
    # `convert_to_iter_based` has multiplied numbers of epochs.
    is_converted = not any(n % (epoch or 1) for n in [scheduler.begin, *found.values()])
    size = epoch if epoch and is_converted and not scheduler.by_epoch else 1
    in_epochs = epoch is not None and (scheduler.by_epoch or is_converted)
    run = schedule.iterations // epoch if epoch and in_epochs else schedule.iterations
    begin, found = scheduler.begin // size, {key: n // size for key, n in found.items()}
    if is_warm_up:
        run = max(begin + 1, run // 10)
    settings: dict[str, Any] = {'end': run, 'T_max': run - begin, 'total_steps': run - begin}
    if 'milestones' in found:
        old = found['milestones'] * 10 / 9
        if run != found.get('end', run) > found['milestones']:
            old = found['end']
        new = sorted({max(1, int(step // size * run / old)) for step in scheduler.milestones})
        settings['milestones'] = str(new).replace(' ', '')
    changed = {'T_max': begin, 'total_steps': begin}
    words = [
        f'param_scheduler.{index}.{key}={settings[key]}'
        for key, n in found.items()
        if n - changed.get(key, 0) != settings[key]
    ]
    return f'. Set {" ".join(words)}' if words else ''


# -------------------------------------------------------------------------------------------- show
def table(schedule: Schedule) -> str:
    """The learning rates of a run as a table with bars, of at most 20 rows."""
    rates, _, end, epoch, schedulers = schedule
    steps = {0, end - 1}
    for scheduler in schedulers.values():
        size = (epoch or 1) if scheduler.by_epoch else 1
        marks = [scheduler.begin, *lengths(scheduler).values()]
        marks += [scheduler.begin + step for step in getattr(scheduler, 'milestones', ())]
        steps |= {mark * size for mark in marks if mark * size < end}
    even = np.linspace(0, end - 1, max(2, ROWS - len(steps))).astype(int).tolist()
    highest = rates[:end].max() or 1
    lines = [f'{"iteration":>10}  {"epoch":>7}  {"lr":>9}']
    for step in sorted({*sorted(steps)[: ROWS // 2], end - 1, *even}):
        position = f'{step / epoch:.2f}' if epoch else '-'
        bar = '#' * round(BAR * rates[step] / highest)
        lines.append(f'{step:>10}  {position:>7}  {rates[step]:>9.3g}  {bar}'.rstrip())
    return '\n'.join(lines)


@register(HOOKS)
class ScheduleHook(Hook):
    """Warns before training if the learning rates of the run are unusual; see `unusual`.

    Raises:
        ScheduleError: A scheduler would fail in the course of the run.
    """

    def before_run(self, runner: Any) -> None:
        if isinstance(runner._train_loop, BaseLoop):  # not in a standalone validation
            schedule = schedule_of(runner)
            for line in unusual(schedule) if schedule else ():
                runner.logger.warning(f'Learning rate: {line}. (--show-schedule prints a table)')
