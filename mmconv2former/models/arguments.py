"""Checks of constructor arguments that would otherwise fail late or pass unnoticed."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any, TypeVar

FIXED_STRIDES = (
    'Its strides are fixed and nothing is dilated: adapt the head instead '
    '(docs/use_in_your_config.md shows it for DeepLabV3+)'
)
ADVICE = {
    **dict.fromkeys(('dilations', 'strides', 'dilation', 'output_stride'), FIXED_STRIDES),
    'pretrained': "Name the weights with init_cfg=dict(type='Pretrained', checkpoint=FILE); a "
    "segmentor's own pretrained must be None",
}
REPLACE_ALL = (
    'If these are the arguments of the backbone that a recipe had before, write _delete_=True in '
    "the backbone's dict"
)
Row = TypeVar('Row')
Init = TypeVar('Init', bound=Callable[..., None])


def with_arguments_of(base: type) -> Callable[[Init], Init]:
    """Decorator of an `__init__` that passes `**shared` on to a base.

    `help`, `inspect.signature` and checks of configs then see the base's own arguments.
    """
    _, *shared = inspect.signature(vars(base)['__init__'], eval_str=True).parameters.values()

    def decorate(init: Init) -> Init:
        signature = inspect.signature(init, eval_str=True)
        *own, _ = signature.parameters.values()  # without **shared
        init.__dict__['__signature__'] = signature.replace(parameters=[*own, *shared])
        init.__annotations__.update({item.name: item.annotation for item in shared})
        return init

    return decorate


def parse_arch(arch: str | Mapping, archs: Mapping[str, Row], letters: Mapping[str, str]) -> Row:
    """A row of a table of variants: by name, by the letters of a name, or from a dict."""
    if isinstance(arch, str) and letters.get(arch.lower(), arch.lower()) in archs:
        return archs[letters.get(arch.lower(), arch.lower())]
    if isinstance(arch, Mapping):
        row = type(next(iter(archs.values())))
        try:
            return row(**arch)
        except TypeError as error:
            raise TypeError(f'arch={dict(arch)} does not fit {inspect.signature(row)}') from error
    raise ValueError(f'arch must be one of {", ".join([*archs, *letters])} or a dict, got {arch!r}')


def parse_kernel_size(kernel_size: int | Sequence[int], num_stages: int) -> tuple[int, ...]:
    """One odd kernel size for each stage."""
    if not isinstance(kernel_size, (int, Sequence)):
        raise TypeError(f'kernel_size must be an int or a list of ints, got {kernel_size!r}')
    sizes = (kernel_size,) * num_stages if isinstance(kernel_size, int) else tuple(kernel_size)
    if len(sizes) != num_stages:
        raise ValueError(
            f'kernel_size must be an int or one int for each of {num_stages} stages, '
            f'got {kernel_size!r}'
        )
    for size in sizes:
        check_int('kernel_size', size, minimum=1)
        if size % 2 == 0:
            raise ValueError(f'kernel_size must be odd, got {size}')
    return sizes


def parse_out_indices(out_indices: int | Sequence[int], num_stages: int) -> tuple[int, ...]:
    """Stages counted from 0, none twice, in the given order."""
    if not isinstance(out_indices, (int, Sequence)):
        raise TypeError(f'out_indices must be an int or a list of ints, got {out_indices!r}')
    indices = (out_indices,) if isinstance(out_indices, int) else tuple(out_indices)
    for index in indices:
        check_int('out_indices', index, minimum=-num_stages, maximum=num_stages - 1)
    stages = tuple(index % num_stages for index in indices)
    if not stages or len(set(stages)) != len(stages):
        raise ValueError(
            f'out_indices must name at least one stage and none twice, got {out_indices!r}'
        )
    return stages


def refuse_foreign(name: str, arguments: Collection[str]) -> None:
    """Raises TypeError if a class called `name` got arguments that it does not have.

    They mostly come from the backbone that the config had before.
    """
    if arguments:
        advice = {ADVICE[argument]: None for argument in arguments if argument in ADVICE}
        raise TypeError(
            '. '.join([f'{name} has no argument {", ".join(arguments)}', *advice, REPLACE_ALL])
        )


def check_init_cfg(init_cfg: object) -> None:
    """Raises ValueError for an `init_cfg` that mmengine would ignore."""
    configs = init_cfg if isinstance(init_cfg, (list, tuple)) else [init_cfg]
    if init_cfg is not None and not all(isinstance(cfg, dict) and 'type' in cfg for cfg in configs):
        raise ValueError(
            f"init_cfg must be None, a dict with a 'type' or a list of these, got {init_cfg!r}"
        )


def check_choice(name: str, value: object, choices: Collection[str]) -> None:
    """Raises ValueError unless `value` is one of `choices`."""
    if value not in list(choices):
        raise ValueError(f'{name} must be one of {", ".join(choices)}, got {value!r}')


def check_int(name: str, value: object, minimum: int, maximum: int | None = None) -> None:
    """Raises TypeError or ValueError unless `value` is an int within the closed range."""
    allowed = f'at least {minimum}' if maximum is None else f'from {minimum} to {maximum}'
    if not isinstance(value, int):
        raise TypeError(f'{name} must be an int {allowed}, got {value!r}')
    if value < minimum or (maximum is not None and value > maximum):
        raise ValueError(f'{name} must be {allowed}, got {value}')


def check_number(name: str, value: Any, minimum: float, below: float) -> None:
    """Raises TypeError or ValueError unless `value` is a number in [minimum, below)."""
    if not isinstance(value, (int, float)):
        raise TypeError(f'{name} must be a number, got {value!r}')
    if not minimum <= value < below:
        raise ValueError(f'{name} must be at least {minimum} and below {below}, got {value}')
