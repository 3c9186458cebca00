"""Checks of constructor arguments. Messages name the argument, the value and what is allowed."""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence
from numbers import Integral, Real
from typing import Any, TypeGuard

import numpy as np

# Far above what anybody builds (our choice): beyond, a slip would take all memory or hours.
MOST_CHANNELS = 2**16
MOST_BLOCKS = 1000  # of a stage
MOST_STAGES = 12
LARGEST_KERNEL = 999
LARGEST_RATIO = 64


def parse_kernel_size(kernel_size: int | Sequence[int], num_stages: int) -> tuple[int, ...]:
    """One odd kernel size a stage."""
    sizes: Sequence[Any] = kernel_size if is_sequence(kernel_size) else (kernel_size,) * num_stages
    if len(sizes) != num_stages:
        raise ValueError(
            f'kernel_size must be an int or one int for each of {num_stages} stages, '
            f'got {kernel_size!r}'
        )
    for size in sizes:
        check_int('kernel_size', size, minimum=1, maximum=LARGEST_KERNEL)
        if size % 2 == 0:
            raise ValueError(f'kernel_size must be odd, got {size}')
    return tuple(map(int, sizes))


def parse_out_indices(out_indices: int | Sequence[int], num_stages: int) -> tuple[int, ...]:
    """Stages from 0, none twice, in the given order."""
    indices: Sequence[Any] = out_indices if is_sequence(out_indices) else (out_indices,)
    if not 1 <= len(indices) <= num_stages:
        raise ValueError(
            f'out_indices must name at least one stage and none of {num_stages} twice, '
            f'got {out_indices!r}'
        )
    for index in indices:
        check_int('out_indices', index, minimum=-num_stages, maximum=num_stages - 1)
    stages = tuple(int(index) % num_stages for index in indices)
    if len(set(stages)) != len(stages):
        raise ValueError(f'out_indices must not name a stage twice, got {out_indices!r}')
    return stages


def refuse_foreign(name: str, arguments: Mapping[str, object]) -> None:
    """Raises TypeError if there are arguments: those of the backbone that a config had before.

    Args:
        name: Of the class, for the message.
        arguments: What a constructor got beyond its own.
    """
    if not arguments:
        return
    advice = [f'{name} has no argument {", ".join(arguments)}']
    if set(arguments) & {'dilations', 'strides', 'dilation', 'output_stride'}:
        advice.append(
            'Its strides are fixed and nothing is dilated: let the head take them as they are '
            '(docs/use_in_your_config.md shows it for DeepLabV3+)'
        )
    if 'pretrained' in arguments:
        advice.append(
            "Weights are named by init_cfg=dict(type='Pretrained', checkpoint=FILE), and a "
            "segmentor's own pretrained must be None"
        )
    advice.append(
        'If these are the arguments of the backbone that a recipe had before, write _delete_=True '
        "in the backbone's dict"
    )
    raise TypeError('. '.join(advice))


def check_choice(name: str, value: object, choices: Collection[str]) -> None:
    """Raises ValueError unless `value` is one of `choices`."""
    if not isinstance(value, str) or value not in choices:
        raise ValueError(f'{name} must be one of {", ".join(choices)}, got {value!r}')


def is_sequence(value: object) -> TypeGuard[Sequence]:
    """Whether a value is a sequence, of which a text is none here."""
    return isinstance(value, Sequence) and not isinstance(value, (str, bytes))


def check_bool(name: str, value: object) -> None:
    """Raises TypeError unless `value` is a bool."""
    if not isinstance(value, (bool, np.bool_)):
        raise TypeError(f'{name} must be a bool, got {value!r}')


def check_init_cfg(init_cfg: object) -> None:
    """Raises TypeError or ValueError unless `init_cfg` is None, a dict with a type, or such."""
    configs = init_cfg if isinstance(init_cfg, (list, tuple)) else [init_cfg]
    for cfg in configs if init_cfg is not None else ():
        if not isinstance(cfg, dict):
            raise TypeError(f'init_cfg must be a dict, a list of dicts or None, got {init_cfg!r}')
        if 'type' not in cfg:
            raise ValueError(f"init_cfg must have a 'type', got {cfg}")


def check_int(name: str, value: object, minimum: int, maximum: int | None = None) -> None:
    """Raises TypeError or ValueError unless `value` is an int within the closed range."""
    allowed = f'at least {minimum}' if maximum is None else f'from {minimum} to {maximum}'
    if isinstance(value, bool) or not isinstance(value, Integral):
        raise TypeError(f'{name} must be an int {allowed}, got {value!r}')
    if value < minimum or not (maximum is None or value <= maximum):
        raise ValueError(f'{name} must be {allowed}, got {value}')


def check_number(
    name: str,
    value: object,
    minimum: float | None = None,
    maximum: float | None = None,
    above: float | None = None,
    below: float | None = None,
) -> None:
    """Raises TypeError or ValueError unless `value` is a finite number within the given bounds."""
    if isinstance(value, bool) or not isinstance(value, Real):
        raise TypeError(f'{name} must be a number, got {value!r}')
    # `numbers.Real` declares < and <= only.
    bounds = [
        (minimum is None or value >= minimum, f'at least {minimum}'),  # type: ignore[operator]
        (maximum is None or value <= maximum, f'at most {maximum}'),
        (above is None or value > above, f'above {above}'),  # type: ignore[operator]
        (below is None or value < below, f'below {below}'),
        (value == value and value not in (math.inf, -math.inf), 'finite'),
    ]
    broken = [text for holds, text in bounds if not holds]
    if broken:
        raise ValueError(f'{name} must be {" and ".join(broken)}, got {value}')
