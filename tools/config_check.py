"""Checks a whole config before anything is built or read.

mmengine ignores what it does not know at a config's top, and tells of a misspelt argument or type
when it builds that part: of a data pipeline or an optimizer after the data are loaded. Here every
dict with a `type` is looked up in the registries as mmengine would, and its keys are compared with
what that class takes. What cannot be known for certain is let through: classes that hand their
`**kwargs` to something else than their base, and settings that a builder reads by itself.
"""

from __future__ import annotations

import ast
import inspect
import textwrap
from collections.abc import Callable, Collection, Iterator, Mapping
from difflib import get_close_matches
from functools import cache
from importlib import import_module
from types import FunctionType, NoneType, UnionType
from typing import Any, Union, get_args, get_origin, get_type_hints

import mmengine.registry
from mmengine.config import Config
from mmengine.registry import Registry
from mmengine.runner import Runner
from torch import Tensor
from torch.utils.data import DataLoader

# The parts of a config that mmengine or the tools build; all else at its top are variables.
BUILT = (
    *('model', 'data_preprocessor', 'tta_model', 'tta_pipeline', 'model_wrapper_cfg'),
    *(f'{mode}_{part}' for mode in ('train', 'val', 'test') for part in ('dataloader', 'cfg')),
    *('val_evaluator', 'test_evaluator', 'optim_wrapper', 'param_scheduler', 'default_hooks'),
    *('custom_hooks', 'log_processor', 'visualizer'),
)
KNOWN_AT_TOP = {
    *(set(inspect.signature(Runner.__init__).parameters) - {'self', 'cfg'}),
    *BUILT,
    *('custom_imports', 'backend_args', 'compile', 'sync_bn', 'find_unused_parameters'),
    *('activation_checkpointing', 'efficient_conv_bn_eval', 'runner_type', 'data_root'),
    *('dataset_type', 'train_pipeline', 'val_pipeline', 'test_pipeline', 'vis_backends'),
}
# What a part is where it does not say its type.
DEFAULT_TYPES = {
    'val_cfg': 'ValLoop',
    'test_cfg': 'TestLoop',
    'optim_wrapper': 'OptimWrapper',
    'log_processor': 'LogProcessor',
    'visualizer': 'Visualizer',
}
# Keys that a part's builder takes out before the class sees the others.
TAKEN_BY_BUILDERS = {
    'hook': {'priority'},
    'parameter scheduler': {'convert_to_iter_based', 'epoch_length'},
    'optim_wrapper': {'constructor', 'paramwise_cfg', 'optimizer'},
    'loop': {'by_epoch'},
}
MARKS = {'type', '_scope_', '_delete_'}
DATALOADER = {
    *(set(inspect.signature(DataLoader.__init__).parameters) - {'self'}),
    *('num_batch_per_epoch', 'disable_subprocess_warning'),
}
SMALL_PARTS = {  # of plain settings
    'randomness': set(inspect.signature(Runner.set_randomness).parameters) - {'self'},
    'env_cfg': {'cudnn_benchmark', 'mp_cfg', 'dist_cfg', 'resource_limit'},
    'auto_scale_lr': {'base_batch_size', 'enable'},
}
NUMBERS = {int, float, bool, NoneType, Tensor}


class ConfigError(ValueError):
    """A config that no run can be made of; the message names the place and what is allowed."""


def check_config(config: Config) -> None:
    """Refuses what would not build, or would be ignored though it is a misspelt setting.

    Raises:
        ConfigError: With the first such place.
    """
    check_top(config)
    scope = config.get('default_scope') or 'mmengine'
    if not registries_of(scope):
        raise ConfigError(
            f'default_scope is {scope!r}, but there is no package {scope} with registries: '
            'is it installed?'
        )
    for part, allowed in SMALL_PARTS.items():
        for key in set(config.get(part) or ()) - allowed:
            refuse_if_near(f'{part}.{key}', key, allowed)
    for part in BUILT:
        settings = config.get(part)
        if part.endswith('_dataloader') and isinstance(settings, dict):
            check_keys(part, 'a data loader', set(settings), DATALOADER)
        if part == 'default_hooks':
            for name, hook in (settings or {}).items():
                if isinstance(hook, dict) and 'type' not in hook:
                    near = suggestion(name, [key for key in settings if key != name])
                    raise ConfigError(f'default_hooks.{name} has no type{near}')
        for path, value, inner_scope in dicts_of(settings, part, scope):
            if 'type' in value:
                check_typed(path, value, value['type'], inner_scope)
            elif path in DEFAULT_TYPES:
                check_typed(path, value, DEFAULT_TYPES[path], inner_scope)


def check_top(config: Config) -> None:
    """Refuses configs of other kinds and misspelt parts.

    Raises:
        ConfigError: With the reason.
    """
    keys = set(config.keys())
    for key in keys - KNOWN_AT_TOP:
        others = KNOWN_AT_TOP - keys if key.rstrip('s') in KNOWN_AT_TOP else KNOWN_AT_TOP
        refuse_if_near(key, key, others)
    if 'model' in keys:
        if {'data', 'runner', 'optimizer', 'lr_config', 'total_epochs'} & keys and not (
            {'train_dataloader', 'test_dataloader', 'optim_wrapper'} & keys
        ):
            raise ConfigError(
                'it is of the older mmdet 2.x, mmseg 0.x or mmcls, with `data` and `runner`; here '
                'train_dataloader, optim_wrapper and train_cfg are needed (mmengine, migration)'
            )
        if isinstance(config.model, dict):
            return
        raise ConfigError(f'model must be a dict, got {type(config.model).__name__}')
    if 'MODEL' in keys:
        raise ConfigError('it is of detectron2 (MODEL); here a config of mmengine is needed')
    found = ', '.join(sorted(keys)[:6]) or 'nothing'
    raise ConfigError(f'it has no model: no config of mmengine? At its top: {found}')


def refuse_if_near(path: str, key: str, allowed: Collection[str]) -> None:
    """Refuses a key that is one slip of the keyboard away from an allowed one.

    Raises:
        ConfigError: It is.
    """
    for name in sorted(allowed):
        if is_slip(key, name):
            raise ConfigError(f'{path} is unknown; did you mean {name!r}?')


def is_slip(written: str, meant: str) -> bool:
    """Whether one letter is missing, added, another, or two neighbours are exchanged."""
    if written == meant or min(len(written), len(meant)) < 4:
        return False
    if len(written) > len(meant):
        written, meant = meant, written
    start = next(
        (i for i, (a, b) in enumerate(zip(written, meant)) if a != b), min(len(written), len(meant))
    )
    if len(written) < len(meant):
        return written[start:] == meant[start + 1 :]
    swapped = written[:start] + written[start : start + 2][::-1] + written[start + 2 :]
    return written[start + 1 :] == meant[start + 1 :] or swapped == meant


def suggestion(name: str, allowed: Collection[str]) -> str:
    """The nearest allowed name as a question, or nothing."""
    near = get_close_matches(name, list(allowed), n=1, cutoff=0.6)
    return f'; did you mean {near[0]!r}?' if near else ''


def dicts_of(settings: Any, path: str, scope: str) -> Iterator[tuple[str, dict, str]]:
    """Every dict in nested settings, with its path and the scope in which it is built."""
    if isinstance(settings, dict):
        scope = settings.get('_scope_') or scope
        yield path, settings, scope
        for key, value in settings.items():
            yield from dicts_of(value, f'{path}.{key}', scope)
    elif isinstance(settings, (list, tuple)):
        for index, value in enumerate(settings):
            yield from dicts_of(value, f'{path}.{index}', scope)


def is_read_by_its_owner(path: str) -> bool:
    """Whether settings are not built as they are, such as `norm_cfg` or the `nms` of a head."""
    head, _, key = path.rpartition('.')
    return bool(head) and (key.endswith('_cfg') or key in ('nms', 'override', 'roi_layer'))


def check_typed(path: str, settings: Mapping, type_: Any, scope: str) -> None:
    """Compares a dict with the class or function that its `type` names.

    Raises:
        ConfigError: There is none, it does not take one of the keys, or a number is a word.
    """
    if is_read_by_its_owner(path):
        return
    found = find_type(type_, scope) if isinstance(type_, str) else [(None, type_)]
    if not found:
        raise ConfigError(
            f'{path}.type: no registry of {scope} or mmengine has {type_!r}'
            f'{suggestion(type_, known_types(scope))}'
        )
    keys = set(settings) - MARKS
    refusals = []
    for kind, cls in found:
        allowed = arguments_of(cls)
        try:
            if allowed is not None:
                taken = TAKEN_BY_BUILDERS.get(kind, set())
                check_keys(path, getattr(cls, '__name__', str(cls)), keys, set(allowed) | taken)
                check_numbers(path, settings, allowed)
        except ConfigError as error:
            refusals.append(error)
    if len(refusals) == len(found):  # two registries may have the same name
        raise refusals[0]


def check_keys(path: str, name: str, keys: Collection[str], allowed: Collection[str]) -> None:
    """Refuses keys that are not allowed.

    Raises:
        ConfigError: With the nearest allowed one, or all.
    """
    for key in sorted(set(keys) - set(allowed)):
        near = suggestion(key, allowed) or f'; it takes {", ".join(sorted(allowed))}'
        raise ConfigError(f'{path}: {name} takes no {key!r}{near}')


def check_numbers(path: str, settings: Mapping, allowed: Mapping[str, Any]) -> None:
    """Refuses words where the signature wants a number.

    Raises:
        ConfigError: With the value.
    """
    for key, value in settings.items():
        annotation = allowed.get(key)
        if isinstance(value, str) and annotation is not None and wants_number(annotation):
            raise ConfigError(f'{path}.{key} must be a number, got {value!r}')


def wants_number(annotation: Any) -> bool:
    if get_origin(annotation) in (Union, UnionType):
        return all(map(wants_number, get_args(annotation)))
    return annotation in NUMBERS


@cache
def registries_of(scope: str) -> tuple[Registry, ...]:
    """All registries of a package and of mmengine, filled; none if there is no such package."""
    try:
        module = import_module(f'{scope}.registry')
    except ModuleNotFoundError:
        return ()
    registries = [
        value
        for owner in (module, mmengine.registry)
        for value in vars(owner).values()
        if isinstance(value, Registry)
    ]
    for registry in registries:
        registry.import_from_location()
    return tuple(registries)


def find_type(type_: str, scope: str) -> list[tuple[str | None, Any]]:
    """What a type name may mean, each with the name of its registry."""
    first, _, rest = type_.partition('.')
    scope, name = (first, rest) if rest and registries_of(first) else (scope, type_)
    found = [
        (registry.name, registry.module_dict[name])
        for registry in registries_of(scope)
        if name in registry.module_dict
    ]
    return found or [(None, value) for value in by_full_name(type_)]


def by_full_name(name: str) -> Iterator[Any]:
    """The object of a name such as `torch.optim.AdamW`, if there is one."""
    module, _, attribute = name.rpartition('.')
    if module:
        try:
            yield getattr(import_module(module), attribute)
        except (ImportError, AttributeError):
            return


def known_types(scope: str) -> set[str]:
    return {name for registry in registries_of(scope) for name in registry.module_dict}


@cache
def arguments_of(cls: Callable) -> dict[str, Any] | None:
    """Names that a class or function takes, with their types; None: it may take any.

    `**kwargs` that `__init__` hands on to its base, and to nothing else, stand for the arguments of
    the base. A decorated `__init__` may take more than it says.
    """
    if not inspect.isclass(cls):
        return parameters_of(cls)[0] if isinstance(cls, FunctionType) else None
    if type(cls).__call__ is not type.__call__:
        return None
    names: dict[str, Any] = {}
    for base in cls.__mro__:
        init = vars(base).get('__init__')
        if init is None:
            continue
        if not isinstance(init, FunctionType) or hasattr(init, '__wrapped__'):
            return None
        own, rest = parameters_of(init)
        if own is None and not hands_on(init, rest):
            return None
        names = {**named_parameters(init), **names}
        if own is not None:
            return names
    return None


def parameters_of(function: FunctionType) -> tuple[dict[str, Any] | None, str | None]:
    """Names with types of a function, None if it takes any; and the name of its `**kwargs`."""
    parameters = inspect.signature(function).parameters.values()
    rest = [item.name for item in parameters if item.kind is item.VAR_KEYWORD]
    return (None, rest[0]) if rest else (named_parameters(function), None)


def named_parameters(function: FunctionType) -> dict[str, Any]:
    try:
        types = get_type_hints(function)
    except (NameError, TypeError, AttributeError, SyntaxError):  # annotations that say nothing
        types = {}
    return {
        item.name: types.get(item.name)
        for item in inspect.signature(function).parameters.values()
        if item.kind in (item.POSITIONAL_OR_KEYWORD, item.KEYWORD_ONLY) and item.name != 'self'
    }


def hands_on(init: FunctionType, rest: str) -> bool:
    """Whether the `**kwargs` called `rest` go to `__init__` of a base and nowhere else."""
    try:
        tree = ast.parse(textwrap.dedent(inspect.getsource(init)))
    except (OSError, TypeError, SyntaxError):  # no source
        return False
    uses = sum(isinstance(node, ast.Name) and node.id == rest for node in ast.walk(tree))
    handed_on = sum(
        isinstance(node, ast.Call)
        and isinstance(node.func, ast.Attribute)
        and node.func.attr == '__init__'
        and any(
            keyword.arg is None and isinstance(keyword.value, ast.Name) and keyword.value.id == rest
            for keyword in node.keywords
        )
        for node in ast.walk(tree)
    )
    return uses == handed_on > 0
