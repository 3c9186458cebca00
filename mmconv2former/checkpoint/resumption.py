"""Checks whether a run can be resumed from a checkpoint's content, before anything is loaded.

mmengine notices damaged content late or never: a best score that is a string fails after the next
validation, a bad position of a schedule in the first iteration.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from numbers import Real
from typing import Any

import torch
from mmengine.logging import HistoryBuffer
from mmengine.optim import OptimWrapperDict
from torch import Tensor

from ..text import first, printable
from .reading import CheckpointError, kind_of

OPTIMIZER_SETTINGS = ('betas', 'momentum', 'eps', 'alpha', 'rho')  # they tell optimizers apart
SEEDS = range(2**32)  # of NumPy
POSITION = ('last_step', '_global_step')  # of a schedule
# In the message hub, what hooks use later; also with the name of a metric behind it.
USED_LATER = {
    'best_score': (int, float),
    'best_ckpt': (str, type(None)),
    'last_ckpt': (str, type(None)),
    'keep_ckpt_ids': (list,),
    'stopped_at': (int,),
    'epoch_position': (list,),
}


def check_resumable(content: Mapping[str, Any], checkpoint: str) -> None:
    """Checks that a checkpoint has what mmengine needs to resume a run.

    Raises:
        CheckpointError: It has weights only, or something unexpected under these keys.
    """
    meta = content.get('meta')
    counts = [meta.get(key) for key in ('epoch', 'iter')] if isinstance(meta, dict) else [None]
    has = {
        'meta with epoch and iter': all(type(count) is int and count >= 0 for count in counts),
        **{part: isinstance(content.get(part), dict) for part in ('message_hub', 'optimizer')},
    }
    if lacking := [part for part, is_there in has.items() if not is_there]:
        raise CheckpointError(
            f'checkpoint {checkpoint!r} cannot be resumed from: it has no {", no ".join(lacking)}. '
            'To start a new run from its weights, give it as load_from '
            '(--cfg-options load_from=FILE).'
        )
    seed = content['meta'].get('seed')
    if seed is not None and not (type(seed) is int and seed in SEEDS):
        raise damaged(checkpoint, f'meta.seed is {shown(seed)}, not a number below 2**32')
    for problem in problems_of_log(content['message_hub']):
        raise damaged(checkpoint, f'message_hub.{problem}')
    for problem in problems_of_schedules(content.get('param_schedulers')):
        raise damaged(checkpoint, problem)
    done, last = content['meta']['iter'], content['message_hub']['runtime_info'].get('iter')
    if type(last) is int and abs(done - last) > 1:  # the iteration in which it was saved, from 0
        raise damaged(checkpoint, f'meta.iter is {done}, message_hub.runtime_info.iter {last}')


def problems_of_log(hub: Mapping[str, Any]) -> Iterator[str]:
    """What is wrong with the content of a message hub."""
    for part in ('log_scalars', 'runtime_info', 'resumed_keys'):
        if not isinstance(hub.get(part), dict):
            yield f'{part} is {shown(hub.get(part))}, not a dict'
            return
    for name, history in hub['log_scalars'].items():
        if not isinstance(history, HistoryBuffer):
            continue  # mmengine skips it
        values = [getattr(history, key, None) for key in ('_log_history', '_count_history')]
        kinds = [getattr(getattr(value, 'dtype', None), 'kind', 'O') for value in values]
        shapes = [getattr(value, 'shape', ()) for value in values]
        if 'O' in kinds or shapes[0] != shapes[1] or len(shapes[0]) != 1:
            yield f'log_scalars.{first([name])[0]} has no list of numbers'
    for name, value in hub['runtime_info'].items():
        key = next((key for key in USED_LATER if str(name).startswith(key)), None)
        if key is None:
            continue
        is_wanted = isinstance(value, USED_LATER[key])
        if key == 'keep_ckpt_ids' and is_wanted:
            is_wanted = all(type(step) is int for step in value)
        if key == 'epoch_position' and is_wanted:
            are_counts = all(type(count) is int for count in value)
            is_wanted = len(value) == 2 and are_counts and 0 <= value[0] < value[1]
        if not is_wanted and not (key == 'best_score' and is_number(value)):
            yield f'runtime_info.{first([name])[0]} is {shown(value)}'


def problems_of_schedules(saved: Any) -> Iterator[str]:
    """Positions of schedules that are not numbers; other settings are the config's."""
    lists = saved.values() if isinstance(saved, dict) else [saved]  # by optimizer
    for states in (states for states in lists if isinstance(states, list)):
        for index, state in enumerate(state for state in states if isinstance(state, dict)):
            for key in POSITION:
                if type(state.get(key, 0)) is not int:
                    yield f'param_schedulers.{index}.{key} is {shown(state[key])}'


def check_optimizer(saved: Any, optimizer: Any, checkpoint: str) -> None:
    """Checks that the saved state of an optimizer, or of several by name, fits the run's.

    Args:
        saved: What the checkpoint has under `optimizer`.
        optimizer: The run's `OptimWrapper` or `OptimWrapperDict`.
        checkpoint: Name of the file, for messages.

    Raises:
        CheckpointError: It has other parameter groups, is of another kind of optimizer, or has
            values that no optimizer has.
    """
    if isinstance(optimizer, OptimWrapperDict):
        for name, part in optimizer.items():
            check_optimizer(saved.get(name), part, checkpoint)
        return
    sizes, settings = layout(optimizer.optimizer.param_groups)  # the wrapper adds an empty group
    try:
        saved_sizes, saved_settings = layout(saved['param_groups'])
    except (TypeError, LookupError):
        saved_sizes, saved_settings = [], []
    if saved_sizes != sizes or not set(settings) <= set(saved_settings):
        raise CheckpointError(
            f'checkpoint {checkpoint!r} cannot be resumed from: its optimizer has parameter groups '
            f'of sizes {saved_sizes} with {saved_settings}, this config has {sizes} with '
            f'{settings}. Resume with the optim_wrapper and frozen_stages of its run, or start a '
            'new run with it as load_from.'
        )
    parameters: dict[int, tuple[int, Tensor]] = {}
    for index, (group, own) in enumerate(
        zip(saved['param_groups'], optimizer.optimizer.param_groups)
    ):
        for key in ('lr', 'weight_decay'):  # torch adds others in later releases
            value = group.get(key)
            if key in own and not (is_number(value) and math.isfinite(value)):
                raise damaged(checkpoint, f'optimizer.param_groups.{index}.{key} is {shown(value)}')
        parameters |= {n: (index, value) for n, value in zip(group['params'], own['params'])}
    for problem in problems_of_state(saved.get('state'), parameters):
        raise damaged(checkpoint, f'optimizer.state{problem}')


def layout(param_groups: Sequence[Mapping[str, Any]]) -> tuple[list[int], list[str]]:
    """Sizes of parameter groups, and the settings that tell their optimizer from others."""
    sizes = [len(group['params']) for group in param_groups]
    return sizes, [k for k in OPTIMIZER_SETTINGS if all(k in group for group in param_groups)]


def problems_of_state(state: Any, parameters: Mapping[int, tuple[int, Tensor]]) -> Iterator[str]:
    """What is wrong with an optimizer's averages of the gradients of parameters, by number.

    Args:
        state: Averages by number.
        parameters: By number, each with the index of its group.
    """
    if not isinstance(state, dict):
        yield f' is {shown(state)}, not a dict'
        return
    # Names of averages, which have the shape of their parameter, and of counts: a group has the
    # same, except where averages are factored for matrices only. Optimizers in 8 bits have tables
    # beside the averages, for large parameters only.
    alike = {number: (index, value.dim()) for number, (index, value) in parameters.items()}
    tensors: dict[tuple[int, int], set[str]] = {}
    for number, averages in state.items():
        if not isinstance(averages, dict):
            yield f'[{shown(number)}] is {shown(averages)}, not a dict'
            return
        if number not in alike:
            yield f'[{shown(number)}] is of no parameter'
        else:
            names = tensors.setdefault(alike[number], set())
            shapes = ((), parameters[number][1].shape)
            names |= {
                name
                for name, value in averages.items()
                if isinstance(value, Tensor) and value.shape in shapes
            }
    for number, averages in state.items():
        names = tensors[alike[number]] if number in alike else set()
        for name in names - averages.keys() if averages else ():
            yield f'[{shown(number)}] has no {shown(name)}, others have'
        for name, value in averages.items():
            place = f'[{shown(number)}].{shown(name)}'
            if not isinstance(value, Tensor):
                if name in names or isinstance(value, str):
                    yield f'{place} is {shown(value)}'
            elif (kind := kind_of(value)) is not None:
                yield f'{place} is {kind}'
            elif not torch.isfinite(value).all():
                yield f'{place} is NaN or infinite'
            # A factored average has the size 1 where it was averaged. A vector may be a table.
            elif name in names or (number in alike and value.dim() == alike[number][1] > 1):
                own = parameters[number][1].shape
                has_dims = value.dim() in (0, len(own))
                if not has_dims or any(a not in (1, b) for a, b in zip(value.shape, own)):
                    yield f'{place} has the shape {tuple(value.shape)}, its parameter {tuple(own)}'


def is_number(value: Any) -> bool:
    """Whether a value is a real number, also as NumPy and torch have them, and not a bool."""
    if isinstance(value, Tensor):
        return value.numel() == 1 and kind_of(value) is None and not value.is_complex()
    return isinstance(value, Real) and not isinstance(value, bool)


def shown(value: Any) -> str:
    """A value for a message; its type if the value may be long."""
    is_short = value is None or isinstance(value, (bool, int, float, str))
    return printable(repr(value), 60) if is_short else f'of type {type(value).__name__}'


def damaged(checkpoint: str, problem: str) -> CheckpointError:
    """The error about content that is not what a run saves."""
    return CheckpointError(f'checkpoint {checkpoint!r} cannot be resumed from: {problem}')
