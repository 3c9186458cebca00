"""A resumed run follows its config, not the settings that the checkpoint was trained with.

mmengine loads the rates, the schedule and the optimizer's settings from the checkpoint and ignores
the config: with a longer schedule the rate stays 0 to the end.
"""

from __future__ import annotations

import copy
import warnings
from collections.abc import Iterator
from typing import Any, NamedTuple

from mmengine.optim import OptimWrapperDict
from mmengine.runner import EpochBasedTrainLoop

# What changes with each step of a schedule.
STATE = ('last_step', '_global_step', '_last_value', 'verbose')


class Settings(NamedTuple):
    """What a config says, before a checkpoint is loaded over it."""

    groups: list[dict[str, Any]]  # of parameters, without these
    schedules: list[dict[str, Any]]  # states at the first iteration


def settings_of(runner: Any) -> Settings | None:
    """The settings of a runner that has not run yet.

    None if they cannot be replayed: several optimizers, or rates that depend on metrics.
    """
    schedules = runner.param_schedulers or []
    if isinstance(runner.optim_wrapper, (dict, OptimWrapperDict)) or isinstance(schedules, dict):
        return None
    if any(isinstance(schedule, dict) or hasattr(schedule, 'best') for schedule in schedules):
        return None  # not built yet, or ReduceOnPlateau
    groups = runner.optim_wrapper.param_groups
    return Settings(
        [{key: group[key] for key in group if key != 'params'} for group in groups],
        [copy.deepcopy(schedule.state_dict()) for schedule in schedules],
    )


def follow_config(runner: Any, settings: Settings | None) -> None:
    """Replaces settings that came from a checkpoint with the config's, and names both.

    If schedule or rates differ, the schedule is stepped again from the start, so that the run goes
    on as if it had been trained by this config.

    Args:
        runner: A runner that has just loaded a checkpoint, at the position of its loop.
        settings: Of the config; see `settings_of`.
    """
    if settings is None:
        return
    groups, schedules = runner.optim_wrapper.param_groups, runner.param_schedulers or []
    scheduled = {schedule.param_name for schedule in schedules}
    found = list(differences(settings, groups, schedules, scheduled))
    if not found:
        return
    for group, own in zip(groups, settings.groups):
        group.update(own)
    for schedule, own_state in zip(schedules, settings.schedules):
        schedule.load_state_dict(copy.deepcopy(own_state))
    with warnings.catch_warnings():
        warnings.simplefilter('ignore')  # about steps of the schedule without the optimizer's
        step_to(runner.train_loop, schedules)
    rates = sorted({group['lr'] for group in groups})
    runner.logger.warning(
        'Resumed with other settings than the checkpoint, which the config decides: '
        f'{"; ".join(dict.fromkeys(found))}. The learning rate is now {rates[-1]:.3g}.'
    )


def differences(
    settings: Settings, groups: list[dict], schedules: list[Any], scheduled: set[str]
) -> Iterator[str]:
    """Names each setting that differs, with its value in the config and in the checkpoint."""
    named = set(scheduled)
    for own, group in zip(settings.groups, groups):
        for key, value in own.items():
            if key not in named and value != group.get(key):
                named.add(key)  # once; other groups have scaled values
                yield f'{key} {shown(value)} (checkpoint: {shown(group.get(key))})'
    for index, (own_state, schedule) in enumerate(zip(settings.schedules, schedules)):
        state = schedule.state_dict()
        for key, value in own_state.items():
            if key not in (*STATE, 'base_values') and value != state.get(key):
                name = f'param_scheduler.{index}.{key}'
                yield f'{name} {shown(value)} (checkpoint: {shown(state.get(key))})'


def shown(value: Any) -> str:
    """A value with four digits, if it is a number."""
    return f'{value:.4g}' if isinstance(value, float) else str(value)


def step_to(loop: Any, schedules: list[Any]) -> None:
    """Steps schedules from the start to the position of a loop, as mmengine's hook does."""
    epoch = len(loop.dataloader) if isinstance(loop, EpochBasedTrainLoop) else None
    for iteration in range(1, loop.iter + 1):
        for schedule in schedules:
            if not schedule.by_epoch:
                schedule.step()
        if epoch is not None and iteration % epoch == 0:
            for schedule in schedules:
                if schedule.by_epoch:
                    schedule.step()
