"""A resumed run follows its config, not the settings that the checkpoint was trained with.

Every difference is named with both values. Only other classes are refused, because the weights
would then mean something else.

mmengine loads the rates, the schedule and the optimizer's settings from the checkpoint and ignores
the config: with a longer schedule the rate stays 0 to the end.
"""

from __future__ import annotations

import copy
import warnings
from collections.abc import Iterator
from inspect import signature
from typing import Any, NamedTuple

from mmengine.hooks import Hook
from mmengine.optim import OptimWrapperDict
from mmengine.runner import EpochBasedTrainLoop

from ..checkpoint.reading import CheckpointError
from ..registry import HOOKS, register
from ..text import printable

FACTS = 'mmconv2former'  # in a checkpoint's `meta`
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
    optimizer = runner.optim_wrapper.optimizer
    return Settings(
        [{key: group[key] for key in group if is_setting(key, optimizer)} for group in groups],
        [copy.deepcopy(schedule.state_dict()) for schedule in schedules],
    )


def is_setting(key: str, optimizer: Any) -> bool:
    """Whether a config can set a key of a parameter group; other keys are state, as Prodigy's d."""
    arguments = signature(type(optimizer).__init__).parameters
    name = key.removeprefix('initial_')  # from which schedules compute the current value
    return key != 'params' and (name in arguments or name in ('lr', 'weight_decay', 'momentum'))


def follow_config(runner: Any, settings: Settings | None) -> None:
    """Replaces settings that came from a checkpoint with the config's, and names both.

    If schedule or rates differ, the schedule is stepped again from the start, so that the run goes
    on as if it had been trained by this config.

    Args:
        runner: A runner that has just loaded a checkpoint, at the position of its loop.
        settings: Of the config; see `settings_of`.
    """
    if settings is None:
        runner.logger.warning(
            'Resumed with the learning rates and the schedule of the checkpoint: those of the '
            'config are not compared (several optimizers, ReduceOnPlateau, or not built yet).'
        )
        return
    groups, schedules = runner.optim_wrapper.param_groups, runner.param_schedulers or []
    scheduled = {schedule.param_name for schedule in schedules}
    found = list(differences(settings, groups, schedules, scheduled, runner.train_loop))
    if not found:
        return
    for group, own in zip(groups, settings.groups):
        group.update(own)
    for schedule, own_state in zip(schedules, settings.schedules):
        schedule.load_state_dict(copy.deepcopy(own_state))
    with warnings.catch_warnings():
        warnings.simplefilter('ignore')  # about steps of the schedule without the optimizer's
        step_to(runner.train_loop, schedules)
    # Without the wrapper's last group, the settings as they are written, which are not scaled.
    rates = sorted({group['lr'] for group in runner.optim_wrapper.optimizer.param_groups})
    runner.logger.warning(
        'Resumed with other settings than the checkpoint; those of the config apply: '
        f'{"; ".join(dict.fromkeys(found))}. The learning rate is now {rates[-1]:.3g}.'
    )


def differences(
    settings: Settings, groups: list[dict], schedules: list[Any], scheduled: set[str], loop: Any
) -> Iterator[str]:
    """Names each setting that differs, with its value in the config and in the checkpoint."""
    named = scheduled | ({'betas'} if 'momentum' in scheduled else set())
    for own, group in zip(settings.groups, groups):
        for key, value in own.items():
            if key not in named and value != group.get(key):
                named.add(key)  # once; other groups have scaled values
                yield f'{key} {shown(value)} (checkpoint: {shown(group.get(key))})'
    for index, (own_state, schedule) in enumerate(zip(settings.schedules, schedules)):
        state = schedule.state_dict()
        done = loop.epoch if schedule.by_epoch else loop.iter
        step = state.get('_global_step', done)
        if step != done:  # 0 if it was not in the checkpoint
            yield f'param_scheduler.{index} at step {done} (checkpoint: at step {step})'
        for key, value in own_state.items():
            if key not in (*STATE, 'base_values') and value != state.get(key):
                name = f'param_scheduler.{index}.{key}'
                yield f'{name} {shown(value)} (checkpoint: {shown(state.get(key))})'


def shown(value: Any) -> str:
    """A value with four digits, if it is a number."""
    return f'{value:.4g}' if isinstance(value, float) else printable(str(value), 100)


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


# --------------------------------------------------------------------------------------- other run
@register(HOOKS)
class RunFactsHook(Hook):
    """Saves with each checkpoint how it was trained; see `facts_of`."""

    def before_save_checkpoint(self, runner: Any, checkpoint: dict) -> None:
        checkpoint['meta'][FACTS] = facts_of(runner)


def facts_of(runner: Any) -> dict[str, Any]:
    """What a checkpoint has to say about its run, beyond what mmengine saves: plain data."""
    loader = runner.train_dataloader
    optimizer = getattr(runner.optim_wrapper, 'optimizer', None)
    return {
        'batch size': getattr(loader.batch_sampler, 'batch_size', None),
        'processes': runner.world_size,
        'optimizer': type(optimizer).__name__ if optimizer is not None else None,
        'samples': len(loader.dataset),
        'data': sources(loader.dataset),
    }


def sources(dataset: Any) -> str:
    """The annotation files, or else the folders, of a dataset or of those inside a wrapper."""
    inner = getattr(dataset, 'datasets', None) or [getattr(dataset, 'dataset', None)]
    if inner != [None]:
        return ', '.join(map(sources, inner))
    if getattr(dataset, 'ann_file', None):
        return str(dataset.ann_file)
    prefix = getattr(dataset, 'data_prefix', None)
    if isinstance(prefix, dict):
        prefix = prefix.get('img_path') or prefix.get('img')
    return str(prefix or getattr(dataset, 'data_root', '') or type(dataset).__name__)


def check_run(runner: Any, meta: dict[str, Any], checkpoint: str) -> None:
    """Compares the run of a checkpoint with a run that is to resume it, and names differences.

    Checkpoints of mmengine's own runner say nothing about batches and data; only their classes are
    compared.

    Args:
        runner: A runner whose training data are built.
        meta: Of the checkpoint.
        checkpoint: Its name, for messages.

    Raises:
        CheckpointError: The classes have another number or order.
    """
    found = []
    own = (getattr(runner.train_dataloader.dataset, 'metainfo', None) or {}).get('classes')
    saved = (meta.get('dataset_meta') or {}).get('classes')
    if own and saved and list(own) != list(saved):
        found.append(compare_classes(list(own), list(saved), checkpoint))
    facts, saved_facts = facts_of(runner), meta.get(FACTS) or {}
    different = [key for key in facts if facts[key] != saved_facts.get(key, facts[key])]
    batch = [key for key in ('batch size', 'processes') if key in different]
    found += [f'{key} {facts[key]} (checkpoint: {shown(saved_facts[key])})' for key in different]
    if not found:
        return
    note = describe_batch(runner) if batch else ''
    runner.logger.warning(
        f'Resuming {checkpoint} with other settings, as the config says: {"; ".join(found)}.{note}'
    )


def compare_classes(own: list[str], saved: list[str], checkpoint: str) -> str:
    """Names the classes that differ if they were renamed only.

    Raises:
        CheckpointError: The classes have another number or order.
    """
    pairs = [(i, a, b) for i, (a, b) in enumerate(zip(own, saved)) if a != b]
    is_moved = any(a in saved for _, a, _ in pairs) or any(b in own for *_, b in pairs)
    if len(own) == len(saved) and not is_moved:
        index, name, old = pairs[0]
        return f'class {index} {name!r} (checkpoint: {old!r})' + ', ...' * (len(pairs) > 1)
    first = ''
    if pairs:
        index, name, old = pairs[0]
        first = f'; the first difference is class {index}: {name!r}, not {old!r}'
    raise CheckpointError(
        f'checkpoint {checkpoint!r} cannot be resumed from: it was trained with {len(saved)} '
        f'classes, train_dataloader.dataset.metainfo has {len(own)}{first}. Resume with the '
        'classes of its run, or start a new run from its weights: without --resume, with '
        '--cfg-options load_from=FILE.'
    )


def describe_batch(runner: Any) -> str:
    """What another batch size or number of processes means for the position and the rates."""
    loop = runner.train_loop
    if isinstance(loop, EpochBasedTrainLoop):
        position = (
            f'at the same place in its epoch, which now has {len(loop.dataloader)} iterations'
        )
    else:
        position = 'at its next iteration, with the samples as if all batches had had this size'
    is_scaled = (runner.auto_scale_lr or {}).get('enable', False)
    rates = 'are scaled' if is_scaled else 'are not scaled'
    flag = '' if is_scaled else ' (--auto-scale-lr)'
    return f' The run continues {position}. Learning rates {rates} to the batch size{flag}.'
