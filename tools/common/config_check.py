"""Reads configs and explains errors in them, in one line.

mmengine ignores unknown names at the top of a config, and `--cfg-options` that set nothing.
`check_config` and `merge_options` refuse those that look like a typing error. The constructors
refuse everything else, at the latest in `common.cli.preflight`; `explain_build_error` adds the
nearest allowed name.
"""

from __future__ import annotations

import os
import re
from collections.abc import Collection, Iterator, Mapping, Sequence
from difflib import get_close_matches
from importlib.util import find_spec
from inspect import signature
from itertools import takewhile
from traceback import walk_tb
from typing import Any

import torch
from mmengine.config import Config
from mmengine.optim import build_optim_wrapper
from mmengine.registry import Registry, build_from_cfg, build_runner_from_cfg
from mmengine.runner import Runner
from torch.utils.data import DataLoader, TensorDataset

from mmconv2former.engine.device_defaults import usable_loader
from mmconv2former.text import PrintableError, one_line

KNOWN_AT_TOP = {
    *(set(signature(Runner.__init__).parameters) - {'self', 'cfg'}),
    *('tta_model', 'tta_pipeline', 'model_wrapper_cfg', 'custom_imports', 'backend_args'),
    *('compile', 'sync_bn', 'find_unused_parameters', 'activation_checkpointing'),
    *('efficient_conv_bn_eval', 'runner_type', 'data_root', 'dataset_type', 'vis_backends'),
    *('train_pipeline', 'val_pipeline', 'test_pipeline'),
}
# Read only while a config is parsed: other parts of it copy their values.
ONLY_PARSED = {
    *('custom_imports', 'backend_args', 'data_root', 'dataset_type', 'vis_backends'),
    *('train_pipeline', 'val_pipeline', 'test_pipeline'),
}
NOT_KEYS = {
    'data_root': 'use --data-root DIR',
    'data_preprocessor': 'set model.data_preprocessor',
    'custom_imports': 'write it into the file',
}
READERS = ('_file2dict', '_parse_lazy_import')  # of mmengine's Config, one call for each file
BUILDERS = [f.__code__ for f in (build_from_cfg, build_runner_from_cfg, build_optim_wrapper)]
UNKNOWN_ARGUMENT = re.compile(
    r"__init__\(\) got an unexpected keyword argument '(\w+)'|has no argument (\w+)"
)


class ConfigError(PrintableError, ValueError):
    """A config that cannot be used; the message names the place and what is allowed there."""


def read_config(path: str) -> Config:
    """Reads a config and its bases.

    Raises:
        ConfigError: A file cannot be read, or is not a config of mmengine.
    """
    if not os.path.isfile(path):
        raise ConfigError('it is a folder' if os.path.isdir(path) else 'it does not exist')
    try:
        config = Config.fromfile(path)
    except Exception as error:  # configs are programs, which can raise any error
        raise ConfigError(explain_read_error(error, path)) from error
    if 'MODEL' in config:
        raise ConfigError('it is a detectron2 config (MODEL); a config of mmengine is needed')
    if 'data' in config and 'train_dataloader' not in config:
        raise ConfigError(
            'it was written for mmdet 2.x, mmseg 0.x or mmcls (`data`); now train_dataloader, '
            "optim_wrapper and train_cfg are needed (see mmengine's migration guide)"
        )
    if not isinstance(config.get('model'), dict):
        found = ', '.join(sorted(config)[:6]) or 'nothing'
        raise ConfigError(
            f'it has no dict `model`, so it is not a config of mmengine; it has {found}'
        )
    return config


def explain_read_error(error: Exception, path: str) -> str:
    """The file, the line and the reason of an error while a config was read."""
    frames = list(walk_tb(error.__traceback__))
    read = [f.f_locals['filename'] for f, _ in frames if f.f_code.co_name in READERS]
    file = os.path.abspath(read[-1] if read else path)
    where = f'in its _base_ {read[-1]}: ' if file != os.path.abspath(path) else ''
    lines = [line for frame, line in frames if frame.f_code.co_filename == file]
    while isinstance(error.__cause__, Exception):  # mmengine wraps errors of imports
        error = error.__cause__
    if isinstance(error, SyntaxError) and error.lineno:
        lines, error = [error.lineno], SyntaxError(error.msg)
    return where + (f'line {lines[-1]}: ' if lines else '') + in_one_line(error)


def in_one_line(error: Exception) -> str:
    """The type of an error and the first line of its message."""
    text = str(error).strip()
    if not text:
        return type(error).__name__
    return f'{type(error).__name__}: {one_line(text.splitlines()[0])}'


def merge_options(config: Config, options: Mapping[str, Any]) -> None:
    """Merges `--cfg-options` into a config.

    Raises:
        ConfigError: The path does not exist, or a name in it looks like a typing error.
    """
    for path in options:
        refuse_variable(config, path.split('.')[0])
    for path in sorted(options, key=lambda path: not path.endswith('._delete_')):
        check_option(config, path, options[path])
        try:
            config.merge_from_dict({path: options[path]})
        except (KeyError, TypeError, AttributeError) as error:
            raise ConfigError(f'--cfg-options {path}: {in_one_line(error)}') from error


def check_option(config: Config, path: str, value: Any) -> None:
    """Follows a path such as `a.0.b` to its first new name.

    Raises:
        ConfigError: The name looks like one of its siblings (in a dict with a type, the constructor
            checks this), or a word would replace a dict with a type.
    """
    part: Any = config
    keys = path.split('.')
    for number, key in enumerate(keys):
        if isinstance(part, list) and key.isdigit() and int(key) < len(part):
            part = part[int(key)]
        elif not isinstance(part, (dict, Config)):
            return
        elif key in part:
            part = part[key]
        else:
            if 'type' not in part:
                refuse_typo(f'--cfg-options {path}: {key}', key, part)
            if any(later.isdigit() for later in keys[number + 1 :]):  # it would become a dict
                raise ConfigError(
                    f'--cfg-options {path}: the config has no list {key}: set the whole list, '
                    f'such as "{key}=[dict(...)]"'
                )
            return
    if isinstance(part, dict) and 'type' in part and isinstance(value, str):
        raise ConfigError(f'--cfg-options {path}: {path} is a dict with a type; set its keys')


def refuse_variable(config: Config, name: str) -> None:
    """Refuses a name at the top of a config that has no effect after the config was read.

    Raises:
        ConfigError: It is such a variable, or a slip for one; the message names the keys to set.
    """
    read = KNOWN_AT_TOP - ONLY_PARSED
    if 'data_preprocessor' in config.model:  # mmengine prefers it to the one at the top
        read.remove('data_preprocessor')
    if name in read:
        return
    variables = [key for key in [*config, *ONLY_PARSED, *NOT_KEYS] if key not in read]
    for variable in [name] if name in variables else variables:
        if name == variable or (is_slip(name, variable) and name not in config):
            parts = {key: config[key] for key in config if key in read}
            found = list(dict.fromkeys(places(parts, config.get(variable))))
            keys = [key for key in found if key.rpartition('.')[2] == variable] or found
            advice = f'set {", ".join(keys[:6])}{", ..." * (len(keys) > 6)}' if keys else ''
            advice = NOT_KEYS.get(variable, advice)
            slip = '' if name == variable else f'{name} is unknown, and '
            raise ConfigError(
                f'--cfg-options {name}: {slip}{variable} has no effect once the config file is read'
                f'{advice and "; "}{advice}'
            )


def places(part: Any, value: Any) -> Iterator[str]:
    """The keys in nested settings that have a value."""
    items = part.items() if isinstance(part, dict) else enumerate(part)
    for key, item in items:
        if type(item) is type(value) and item == value:
            yield str(key)
        elif isinstance(item, (dict, list, tuple)):
            yield from (f'{key}.{rest}' for rest in places(item, value))


def check_config(config: Config, needed: Sequence[str] = ()) -> None:
    """Refuses errors that mmengine would ignore, or report far from their cause.

    Args:
        config: A whole config.
        needed: Keys that it must have at the top level.

    Raises:
        ConfigError: A key is missing or looks misspelt, or the default scope is not installed.
    """
    for key in set(config) - KNOWN_AT_TOP:
        refuse_typo(key, key, KNOWN_AT_TOP)
    for key in needed:
        if config.get(key) is None:
            raise ConfigError(f'it has no {key}')
    scope = config.get('default_scope') or 'mmengine'
    if find_spec(scope) is None:
        raise ConfigError(f'default_scope is {scope!r}, but {scope} is not installed')
    if 'train_cfg' in needed:
        check_loop(config)


def check_loop(config: Config) -> None:
    """Refuses a training without iterations, or whose parts count epochs and iterations.

    mmengine takes such configs. An endless epoch never validates or saves; in a loop of iterations,
    what counts epochs happens once, after the last iteration.

    Raises:
        ConfigError: The loop is empty, or a part does not fit it.
    """
    loop, parts = config.train_cfg, []
    for key in ('max_epochs', 'max_iters'):
        length = loop.get(key)
        if isinstance(length, int) and length < 1:
            raise ConfigError(f'train_cfg.{key} is {length}: nothing would be trained')
    if type_name(loop) == 'EpochBasedTrainLoop' or loop.get('by_epoch'):
        sampler = type_name(config.train_dataloader.get('sampler'))
        batches = type_name(config.train_dataloader.get('batch_sampler'))
        for key, name in (('sampler', sampler), ('batch_sampler', batches)):
            if 'Infinite' in name:
                raise ConfigError(
                    f'train_cfg counts epochs, but train_dataloader.{key} {name} has no end: take '
                    "DefaultSampler, or train_cfg=dict(type='IterBasedTrainLoop', max_iters=...)"
                )
        return
    if type_name(loop) != 'IterBasedTrainLoop' and loop.get('by_epoch') is not False:
        return  # a loop of another library
    schedulers = config.get('param_scheduler') or []
    for index, scheduler in enumerate(schedulers if isinstance(schedulers, list) else [schedulers]):
        if isinstance(scheduler, dict) and not scheduler.get('convert_to_iter_based'):
            parts.append((f'param_scheduler.{index}', scheduler))
    checkpoint = (config.get('default_hooks') or {}).get('checkpoint')
    if checkpoint is not None and checkpoint.get('interval', -1) > 0:
        parts.append(('default_hooks.checkpoint', checkpoint))
    for key, part in parts:
        if part.get('by_epoch', True):
            raise ConfigError(
                f'train_cfg counts iterations, but {key} ({type_name(part)}) counts epochs: set '
                f'{key}.by_epoch=False, and its numbers in iterations'
            )


def type_name(settings: Mapping | None) -> str:
    """The name of a type that a config gives as a word or as a class."""
    type_ = (settings or {}).get('type', '')
    return getattr(type_, '__name__', str(type_)).rpartition('.')[2]


def check_loader(name: str, settings: Mapping) -> None:
    """Builds a data loader before its dataset is read.

    Raises:
        ConfigError: The loader refuses its settings.
    """
    unread: dict[str, Any] = dict(
        dataset=TensorDataset(torch.zeros(1)), sampler=None, batch_sampler=None
    )
    if settings.get('batch_sampler'):
        unread['batch_size'] = 1  # it gets the config's, which may be one for each dataset
    try:
        Runner.build_dataloader({**usable_loader(dict(settings)), **unread}, seed=0)
    except (TypeError, ValueError, AssertionError, LookupError) as error:
        raise ConfigError(f'{name}: {in_one_line(error)}{advice(error, DataLoader)}') from error


def refuse_typo(place: str, name: str, allowed: Collection[str]) -> None:
    """Raises ConfigError if a name is one typing error away from an allowed one."""
    for other in sorted(allowed):
        if is_slip(name, other):
            raise ConfigError(f'{place} is unknown; did you mean {other!r}?')


def is_slip(written: str, meant: str) -> bool:
    """Whether one letter is missing, added or wrong, or two neighbours are swapped."""
    if min(len(written), len(meant)) < 4 or written.startswith('_'):
        return False
    same = sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], zip(written, meant)))
    a, b = written[same:], meant[same:]
    return a != b and (a[1:] == b or a == b[1:] or a[1:] == b[1:] or a[:2][::-1] + a[2:] == b)


def explain_build_error(error: Exception) -> str | None:
    """Describes what could not be built, and why; None if nothing was being built."""
    building = innermost_build(error)
    if building is None:
        return None
    cfg = building['cfg']
    type_ = building.get('obj_type') or (isinstance(cfg, Mapping) and cfg.get('type')) or cfg
    reason = in_one_line(error).partition('. Please check')[0]  # mmengine's advice on registries
    return f'cannot build {getattr(type_, "__name__", type_)}: {reason}{advice(error)}'


def advice(error: BaseException, cls: type | None = None) -> str:
    """The nearest name for an unknown type or argument, otherwise the arguments that exist.

    Args:
        error: The exception.
        cls: The class that was being built, if not by mmengine.
    """
    building = innermost_build(error) or {}
    if building.get('obj_cls', error) is None:
        registry: Registry = building['registry']
        known = {*registry.module_dict, *(registry.parent or registry).module_dict}
        return nearest(building['obj_type'].rpartition('.')[2], known)
    unknown = UNKNOWN_ARGUMENT.search(str(error))
    if unknown is None:
        return ''
    bases = getattr(cls or building.get('obj_cls'), '__mro__', ())
    inits = [vars(base)['__init__'] for base in bases if '__init__' in vars(base)]
    names = {name for init in inits for name in signature(init).parameters}
    names -= {'self', 'args', 'kwargs'}
    return nearest(unknown[1] or unknown[2], names) or f'; it takes {", ".join(sorted(names))}'


def innermost_build(error: BaseException) -> dict[str, Any] | None:
    """Variables of the function in mmengine that was building something when an error was raised.

    `obj_type` is the type as written, `obj_cls` the class, or None.
    """
    frames = [frame for frame, _ in walk_tb(error.__traceback__) if frame.f_code in BUILDERS]
    return frames[-1].f_locals if frames else None


def nearest(name: str, allowed: Collection[str]) -> str:
    """The nearest allowed name as a question, or nothing."""
    near = get_close_matches(name, list(allowed), n=1)
    return f'; did you mean {near[0]!r}?' if near else ''
