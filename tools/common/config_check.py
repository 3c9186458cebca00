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
import os
import re
import sys
import textwrap
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from difflib import get_close_matches
from functools import cache
from importlib import import_module
from traceback import walk_tb
from types import FunctionType, NoneType, UnionType
from typing import Any, NamedTuple, NoReturn, Union, get_args, get_origin, get_type_hints

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
    # The last two are of AmpOptimWrapper, to which `--amp` changes the type.
    'optim_wrapper': {'constructor', 'paramwise_cfg', 'optimizer', 'loss_scale', 'dtype'},
    'loop': {'by_epoch'},
}
MARKS = {'type', '_scope_', '_delete_'}
DATALOADER = {
    *(set(inspect.signature(DataLoader.__init__).parameters) - {'self'}),
    *('num_batch_per_epoch', 'disable_subprocess_warning'),
}
# Where a type must be one of a registry; elsewhere a class may know further names.
SURE = re.compile(
    r'(?!tta_pipeline)\w+(\.\d+)?|default_hooks\.\w+|model\.(backbone|neck)|optim_wrapper\.optimizer'
    r'|\w+_dataloader\.(dataset|sampler|batch_sampler)|(\w+_dataloader\.dataset|tta)[._]pipeline\.\d+'
)
READERS = ('_file2dict', '_parse_lazy_import')  # of mmengine's Config, one call for each file
FOREIGN = {'Albu'}  # what they hold is of another library
SMALL_PARTS = {  # of plain settings
    'randomness': set(inspect.signature(Runner.set_randomness).parameters) - {'self'},
    'env_cfg': {'cudnn_benchmark', 'mp_cfg', 'dist_cfg', 'resource_limit'},
    'auto_scale_lr': {'base_batch_size', 'enable'},
}
NUMBER_WORDS = {'int', 'float', 'None', 'Optional', 'Union', 'Tensor'}
NUMBERS = {int, float, NoneType, Tensor}  # a bool of the host libraries may be a word as well


class ConfigError(ValueError):
    """A config that no run can be made of; the message names the place and what is allowed."""


def read_config(path: str) -> Config:
    """Reads a config and those it is based on.

    Raises:
        ConfigError: One of them cannot be read; the message names it, and the line if there is one.
    """
    if not os.path.isfile(path):
        problem = 'is a folder' if os.path.isdir(path) else 'does not exist'
        raise ConfigError(f'it {problem}')
    try:
        return Config.fromfile(path)
    except Exception as error:  # configs are programs, of other people: anything may go wrong
        files = [
            (frame.f_locals.get('filename'), frame, line)
            for frame, line in walk_tb(error.__traceback__)
        ]
        read = [name for name, frame, _ in files if frame.f_code.co_name in READERS and name]
        where = ''
        if read and os.path.abspath(read[-1]) != os.path.abspath(path):
            where = f'in its _base_ {read[-1]}: '
        lines = [
            line
            for _, frame, line in files
            if read and frame.f_code.co_filename == os.path.abspath(read[-1])
        ]
        while isinstance(error.__cause__, Exception):  # of imports mmengine tells sys.path first
            error = error.__cause__
        if isinstance(error, SyntaxError) and error.lineno:
            lines, error = [error.lineno], SyntaxError(error.msg)
        where += f'line {lines[-1]}: ' if lines else ''
        raise ConfigError(f'{where}{in_one_line(error)}') from error


def in_one_line(error: Exception) -> str:
    """What an error says, with its kind."""
    text = str(error).strip()
    return f'{type(error).__name__}: {text.splitlines()[0]}' if text else type(error).__name__


def merge_options(config: Config, options: Mapping[str, Any]) -> None:
    """Merges `--cfg-options` into a config.

    Raises:
        ConfigError: A place is not there, or its name is one slip away from one that is.
    """
    mark = '._delete_'  # replaces what is there as a whole, of whatever type
    replaced = {path.removesuffix(mark) for path in options if path.endswith(mark)}
    for path, value in options.items():
        if not any(path.startswith(f'{other}.') for other in replaced):
            check_option(config, path, value)
    try:
        config.merge_from_dict(dict(options))
    except (KeyError, TypeError, AttributeError) as error:
        raise ConfigError(f'--cfg-options {" ".join(options)}: {in_one_line(error)}') from error


def check_option(config: Config, path: str, value: Any) -> None:
    """Follows a path of `--cfg-options` as far as the config has it.

    Raises:
        ConfigError: See `merge_options`.
    """
    part: Any = config
    keys = path.split('.')
    if not all(keys):
        raise ConfigError(f'--cfg-options {path}: a name between the dots is empty')
    for depth, key in enumerate(keys):
        where = '.'.join(keys[:depth])
        if isinstance(part, list):
            if not key.isdigit() or int(key) >= len(part):
                raise ConfigError(
                    f'--cfg-options {path}: {where} is a list of {len(part)} items, counted from '
                    f'0; got {key}'
                )
            if depth == len(keys) - 1:
                raise ConfigError(
                    f'--cfg-options {path}: of items of lists only keys can be set; '
                    f'give {where} as a whole'
                )
            part = part[int(key)]
        elif isinstance(part, (dict, Config)):
            if key not in part:
                if 'type' not in part:  # else its class is asked, when all is merged
                    refuse_if_near(f'--cfg-options {path}: {key}', key, part.keys())
                return
            part = part[key]
        else:
            raise ConfigError(f'--cfg-options {path}: {where} is {part!r}, which has no {key}')
    if isinstance(part, dict) and 'type' in part and isinstance(value, (str, int, float)):
        raise ConfigError(f'--cfg-options {path}: {path} is a dict with a type; set its keys')


def check_config(config: Config, needed: Sequence[str] = ()) -> None:
    """Refuses what would not build, or would be ignored though it is a misspelt setting.

    Args:
        config: A whole config.
        needed: Keys that it must have at its top.

    Raises:
        ConfigError: With the first such place.
    """
    check_top(config)
    for key in needed:
        if config.get(key) is None:
            raise ConfigError(f'it has no {key}')
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
            check_numbers(part, settings, named_parameters(DataLoader.__init__))
        if part == 'default_hooks':
            for name, hook in (settings or {}).items():
                if isinstance(hook, dict) and 'type' not in hook:
                    near = suggestion(name, [key for key in settings if key != name])
                    raise ConfigError(f'default_hooks.{name} has no type{near}')
        check_within(settings, part, scope, owners=())
    constructor = (config.get('optim_wrapper') or {}).get('constructor')
    if constructor is not None and not find_type(constructor, scope):
        near = suggestion(constructor, known_types(scope))
        raise ConfigError(f'optim_wrapper.constructor: there is no {constructor!r}{near}')


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
    if written == meant or min(len(written), len(meant)) < 4 or written.startswith('_'):
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


def suggestion(name: str, allowed: Collection[str], cutoff: float = 0.6) -> str:
    """The nearest allowed name as a question, or nothing."""
    near = get_close_matches(name, list(allowed), n=1, cutoff=cutoff)
    return f'; did you mean {near[0]!r}?' if near else ''


def check_within(settings: Any, path: str, scope: str, owners: Sequence[Found]) -> None:
    """Checks every dict with a `type` in nested settings.

    Args:
        settings: A part of a config.
        path: Where it is, such as `model.neck`.
        scope: The scope in which it is built.
        owners: What the next dict around it that has a type may build.

    Raises:
        ConfigError: See `check_typed`.
    """
    if isinstance(settings, dict):
        scope = settings.get('_scope_') or scope
        type_ = settings.get('type', DEFAULT_TYPES.get(path))
        if type_ is not None:
            if not is_read_by_its_owner(path):
                check_typed(path, settings, type_, scope, owners)
            if type_ in FOREIGN:
                return
            owners = find_type(type_, scope)
        for key, value in settings.items():
            check_within(value, f'{path}.{key}', scope, owners)
    elif isinstance(settings, (list, tuple)):
        for index, value in enumerate(settings):
            check_within(value, f'{path}.{index}', scope, owners)


def is_read_by_its_owner(path: str) -> bool:
    """Whether settings are not built as they are, such as `norm_cfg` or the `nms` of a head."""
    head, _, key = path.rpartition('.')
    return bool(head) and (key.endswith('_cfg') or key in ('nms', 'override', 'roi_layer'))


def check_typed(
    path: str, settings: Mapping, type_: Any, scope: str, owners: Sequence[Found]
) -> None:
    """Compares a dict with the class or function that its `type` names.

    Raises:
        ConfigError: There is none, it does not take one of the keys, or a number is a word.
    """
    found = find_type(type_, scope)
    if not found:
        near = suggestion(type_, known_types(scope), cutoff=0.85)
        if near or SURE.fullmatch(path):
            raise ConfigError(
                f'{path}.type: no registry of {scope} or mmengine has {type_!r}'
                f'{near or suggestion(type_, known_types(scope))}'
            )
        return
    keys = {key for key in set(settings) - MARKS if not any(names_key(o, key) for o in owners)}
    refusals = []
    for kind, cls in found:
        allowed = arguments_of(cls)
        try:
            if allowed is not None:
                taken = TAKEN_BY_BUILDERS.get(kind or '', set())
                check_keys(path, getattr(cls, '__name__', str(cls)), keys, set(allowed) | taken)
                check_numbers(path, settings, allowed)
        except ConfigError as error:
            refusals.append(error)
    if len(refusals) == len(found):  # two registries may have the same name
        raise refusals[0]


def names_key(owner: Found, key: str) -> bool:
    """Whether the source of an owner or its bases has a key as a string: it may read that itself.

    So do RandAugment with `magnitude_key` of its policies, and heads that `pop` from a loss.
    """
    modules = {base.__module__ for base in getattr(owner.cls, '__mro__', ())}
    return any(key in strings_of(module) for module in modules)


@cache
def strings_of(module: str) -> frozenset[str]:
    """All strings in the source of a module that is imported."""
    try:
        tree = ast.parse(inspect.getsource(sys.modules[module]))
    except (KeyError, OSError, TypeError):  # built in
        return frozenset()
    return frozenset(
        node.value
        for node in ast.walk(tree)
        if isinstance(node, ast.Constant) and isinstance(node.value, str)
    )


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
    if isinstance(annotation, str):
        words = set(re.findall(r'\w+', annotation))
        return bool({'int', 'float'} & words) and words <= NUMBER_WORDS
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


class Found(NamedTuple):
    """What a type name may mean: the name of the registry, if it is of one, and what is there."""

    kind: str | None
    cls: Any


def find_type(type_: Any, scope: str) -> list[Found]:
    """All that a type may mean; lazy configs have the class itself there."""
    if not isinstance(type_, str):
        return [Found(None, type_)]
    first, _, rest = type_.partition('.')
    scope, name = (first, rest) if rest and registries_of(first) else (scope, type_)
    found = [
        Found(registry.name, registry.module_dict[name])
        for registry in registries_of(scope)
        if name in registry.module_dict
    ]
    return found or [Found(None, value) for value in by_full_name(type_)]


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
        takes_any = not isinstance(cls, FunctionType) or rest_of(cls)
        return None if takes_any else named_parameters(cls)
    if type(cls).__call__ is not type.__call__:
        return None
    inits = [vars(base)['__init__'] for base in cls.__mro__ if '__init__' in vars(base)]
    names: dict[str, Any] = {}
    reached = 0
    for init in inits:
        reached += 1
        if not isinstance(init, FunctionType) or hasattr(init, '__wrapped__'):
            return None
        names = {**named_parameters(init), **names}
        rest = rest_of(init)
        if rest is None or types_of(init).get(rest) is NoReturn:  # which takes no value
            break
        if not hands_on(init, rest):
            return None
    # With several bases an `__init__` may skip some of them.
    for init in inits[reached:] if reached > 1 else ():
        if isinstance(init, FunctionType):
            names = {**named_parameters(init), **names}
    return names


def rest_of(function: FunctionType) -> str | None:
    """The name of a function's `**kwargs`, if it has any."""
    parameters = inspect.signature(function).parameters.values()
    return next((item.name for item in parameters if item.kind is item.VAR_KEYWORD), None)


def types_of(function: Callable) -> dict[str, Any]:
    """The types of a function's parameters, if all of them can be told."""
    try:
        return get_type_hints(function)
    except (NameError, TypeError, AttributeError, SyntaxError):  # of names for type checkers only
        return {}


def named_parameters(function: Callable) -> dict[str, Any]:
    types = types_of(function)
    return {
        item.name: types.get(item.name, item.annotation)
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
