"""Shared by tools that read a config: arguments, loading, checks before a long run."""

from __future__ import annotations

import argparse
import ast
import os
import re
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from datetime import timedelta
from inspect import signature
from pathlib import Path
from tempfile import TemporaryFile
from typing import Any

import torch
import torch.distributed
from mmengine.config import Config, ConfigDict, DictAction
from mmengine.registry import DATASETS, RUNNERS
from mmengine.runner import Runner
from torch.distributed.constants import default_pg_timeout

from common.backbones import set_backbone
from common.config_check import (
    ConfigError,
    advice,
    check_config,
    check_loader,
    explain_build_error,
    merge_options,
    read_config,
)
from common.quiet import hide_known_messages
from mmconv2former.checkpoint.reading import (
    TRUST_VARIABLE,
    admit_only_data,
    trusts_checkpoints,
)
from mmconv2former.datasets.checked import DataError
from mmconv2former.engine.dry_run import DryRunError
from mmconv2former.engine.lost_files import is_disk_error
from mmconv2former.engine.runner import ReliableRunner
from mmconv2former.models.baselines import BASELINES
from mmconv2former.text import PrintableError, printable

# The default of mmengine if a config has no visualizer.
DEFAULT_VISUALIZER = dict(type='Visualizer', vis_backends=[dict(type='LocalVisBackend')])
# How torch reports a data worker that the system killed, and one that raised an error.
DEAD_WORKER = re.compile(
    r'DataLoader worker \(pid(\(s\))? [\d, ]+\) (is killed by signal|exited unexpectedly)'
)
FAILED_WORKER = re.compile(r'Caught \w+ in DataLoader worker process \d+\.')


def key_value(text: str) -> tuple[str, Any]:
    """Key and value of KEY=VALUE, as in mmengine and with dicts.

    Raises:
        SystemExit: The text is not of this form.
    """
    key, equals, value = text.partition('=')
    try:
        if not equals:
            raise ValueError
        if 'dict(' in value or '{' in value:
            return key, python_value(ast.parse(value.strip(), mode='eval').body)
        return key, DictAction._parse_iterable(value)
    except (ValueError, AssertionError, SyntaxError, RecursionError):
        raise SystemExit(
            f'error: --cfg-options takes KEY=VALUE with closed brackets, got {text!r}'
        ) from None


def python_value(node: ast.expr) -> Any:
    """The value of an expression of literals and `dict(...)`, with bare names as words.

    Raises:
        ValueError: The expression has anything else.
    """
    if isinstance(node, (ast.List, ast.Tuple)):
        values = [python_value(item) for item in node.elts]
        return tuple(values) if isinstance(node, ast.Tuple) else values
    if isinstance(node, ast.Dict) and None not in node.keys:
        keys = [python_value(key) for key in node.keys if key is not None]
        return dict(zip(keys, map(python_value, node.values)))
    if isinstance(node, ast.Call) and ast.unparse(node.func) == 'dict' and not node.args:
        return {str(item.arg): python_value(item.value) for item in node.keywords}
    if isinstance(node, (ast.Name, ast.Attribute)):
        return ast.unparse(node)
    return ast.literal_eval(node)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the arguments that train.py and test.py share."""
    add_config_arguments(parser)
    parser.add_argument(
        '--work-dir', help='folder for logs and checkpoints (default: work_dirs/CONFIG)'
    )
    add_data_root_argument(parser)
    parser.add_argument(
        '--launcher',
        choices=['none', 'pytorch', 'slurm', 'mpi'],
        default='none',
        help='how the processes of a distributed run are started',
    )
    # Launchers older than torchrun pass the rank as an argument.
    parser.add_argument('--local_rank', '--local-rank', type=int, default=0)


def add_data_root_argument(parser: argparse.ArgumentParser) -> None:
    parser.add_argument('--data-root', help='folder with the data, instead of that of the config')


def add_config_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the arguments of every tool that reads a config; those of a run get defaults."""
    parser.add_argument(
        '--backbone',
        choices=list(BASELINES),
        metavar='NAME',
        help='use another network instead of Conv2Former: a name from docs/baselines.md',
    )
    parser.add_argument(
        '--cfg-options',
        nargs='+',
        action='extend',
        type=key_value,
        default=[],
        metavar='KEY=VALUE',
        help='change the config: a.b=1, a.0.b=x for an item of a list, "a=[(1,2),dict(b=3)]"',
    )
    parser.add_argument(
        '--traceback', action='store_true', help='show the traceback of an error in the config'
    )
    add_trust_argument(parser)
    parser.set_defaults(work_dir=None, data_root=None, launcher='none', local_rank=0)


def add_trust_argument(parser: argparse.ArgumentParser) -> None:
    """Adds the flag that `guard_checkpoints` obeys."""
    parser.add_argument(
        '--trust-checkpoints',
        action='store_true',
        help=f'read checkpoints that contain more than data, and run the code in them '
        f'(same as {TRUST_VARIABLE}=1)',
    )


def guard_checkpoints(args: argparse.Namespace) -> None:
    """From now on, checkpoints are read as data only, unless the user trusts them."""
    if args.trust_checkpoints:
        os.environ[TRUST_VARIABLE] = '1'
    if trusts_checkpoints():
        print(
            f'WARNING: --trust-checkpoints ({TRUST_VARIABLE}=1): any code in a checkpoint will '
            'run with your rights',
            file=sys.stderr,
        )
    admit_only_data()


@contextmanager
def run_errors(traceback: bool) -> Iterator[None]:
    """Ends the tool with one line if the user's config or files caused an error.

    This includes errors while a part of the config is being built. Errors of a running network keep
    their traceback.

    Args:
        traceback: Whether all errors keep their traceback.
    """
    try:
        yield
    except Exception as error:
        message = None if traceback else explain_error(error)
        if message is None:
            raise
        raise SystemExit(f'error: {printable(message)}') from None


def explain_error(error: Exception) -> str | None:
    """One line about an error that the user can fix; None for other errors."""
    text = str(error)
    if isinstance(error, DataError) and error.__cause__ is not None:
        return text + advice(error.__cause__)
    if isinstance(error, PrintableError):
        return text
    if is_disk_error(error):
        return f'cannot read or write a file of this run: {text} (--traceback shows where)'
    if isinstance(error, DryRunError):
        return f'{text} (--traceback shows where)'
    if DEAD_WORKER.match(text):
        return (
            f'{text}. Was there too little memory, or shared memory? Use fewer workers: '
            'train_dataloader.num_workers'
        )
    if FAILED_WORKER.match(text):
        reason: str | None = f'in a data worker: {text.rstrip().splitlines()[-1]}'
    else:
        reason = explain_build_error(error)
    return reason and f'{reason} (--traceback shows where)'


def load_config(args: argparse.Namespace, needed: Sequence[str] = ()) -> Config:
    """The config from the command line, ready for mmengine's runner.

    Args:
        args: What `add_arguments` defines.
        needed: Keys that the config must have, such as `train_dataloader`.

    Raises:
        SystemExit: The config file or an option of `args` cannot be used; the message says why.
    """
    os.environ.setdefault('LOCAL_RANK', str(args.local_rank))
    hide_known_messages()
    guard_checkpoints(args)
    try:
        config = read_config(args.config)
        if args.backbone is not None:
            set_backbone(config, args.backbone)
        if args.data_root is not None:
            set_data_root(config, args.data_root)
        merge_options(config, dict(args.cfg_options))
        check_config(config, needed)
    except ConfigError as error:
        if args.traceback:
            raise
        raise SystemExit(f'error: config {args.config}: {error}') from None
    if args.work_dir is not None:
        config.work_dir = args.work_dir
    elif config.get('work_dir') is None:
        names = [Path(args.config).stem] + ([args.backbone] if args.backbone else [])
        config.work_dir = str(Path('work_dirs') / '_'.join(names))
    config.launcher = args.launcher
    if args.launcher == 'pytorch' and not torch.cuda.is_available():
        use_gloo(config)
    return config


def build_runner(config: Config) -> Runner:
    """The config's runner; ours if it names none."""
    config.setdefault('runner_type', 'mmconv2former.ReliableRunner')
    return RUNNERS.build(config)


def preflight(runner: Runner, modes: Sequence[str]) -> None:
    """Finds errors in a run before the training data are read.

    mmengine builds many parts late. Those that need no training data are built here: the optimizer,
    evaluators, the validation data. The training dataset, its loader and the schedulers follow when
    the run starts. Other runners than ours are left unchanged.

    Args:
        runner: A new runner.
        modes: The modes among `train`, `val` and `test` that will run.

    Raises:
        ConfigError, CheckpointError, ...: See `run_errors`.
    """
    if not isinstance(runner, ReliableRunner):
        return
    for mode in modes:
        settings = getattr(runner, f'_{mode}_dataloader')
        if isinstance(settings, dict):
            check_loader(f'{mode}_dataloader', settings)
        evaluator = getattr(runner, f'_{mode}_evaluator', None)
        if evaluator is not None:
            setattr(runner, f'_{mode}_evaluator', runner.build_evaluator(evaluator))
    if 'train' in modes:
        runner.optim_wrapper = runner.build_optim_wrapper(runner.optim_wrapper)
    runner.preflight(training='train' in modes)
    if 'val' in modes:
        _ = runner.val_loop  # built at first use


def use_gloo(config: Config) -> None:
    """Joins a gloo process group; mmengine's own would need a CUDA device.

    SyncBN, which needs CUDA too, becomes BN with statistics of each process.
    """
    seconds = config.get('env_cfg', {}).get('dist_cfg', {}).get('timeout')
    timeout = default_pg_timeout if seconds is None else timedelta(seconds=seconds)
    torch.distributed.init_process_group('gloo', timeout=timeout)
    config.model = replace_values(config.model, lambda value: 'BN' if value == 'SyncBN' else value)
    config.setdefault(
        'model_wrapper_cfg',
        dict(
            type='MMDistributedDataParallel',
            device_ids=None,  # otherwise mmengine passes the local rank
            broadcast_buffers=False,  # as mmengine does by default
            find_unused_parameters=config.get('find_unused_parameters', False),
        ),
    )


def set_data_root(config: Config, data_root: str) -> None:
    """Replaces `config.data_root` with `data_root` in every path that begins with it.

    Raises:
        SystemExit: The config has no `data_root` at its top, or an empty one.
    """
    if not config.get('data_root'):
        raise SystemExit(
            f'error: --data-root: {config.filename} has no data_root at its top to replace'
        )
    old = config.data_root.rstrip('/') + '/'
    new = os.path.join(data_root, '')

    def replace(value: Any) -> Any:
        # With the slash, as data/coco_extra is not in data/coco.
        is_inside = isinstance(value, str) and os.path.join(value, '').startswith(old)
        return new + value[len(old) :] if is_inside else value

    for key, value in list(config.items()):
        config[key] = replace_values(value, replace)


def replace_values(settings: Any, replace: Callable[[Any], Any]) -> Any:
    """A copy of nested dicts and lists with `replace` applied to every innermost value."""
    if isinstance(settings, dict):
        return type(settings)((k, replace_values(v, replace)) for k, v in settings.items())
    if isinstance(settings, (list, tuple)):
        return type(settings)(replace_values(item, replace) for item in settings)
    return replace(settings)


def check_work_dir(config: Config) -> None:
    """Checks that a run can write logs and checkpoints.

    Raises:
        SystemExit: The work dir is not writable; the message says why.
    """
    try:
        os.makedirs(config.work_dir, exist_ok=True)
        with TemporaryFile(dir=config.work_dir) as file:
            file.write(b'0')
    except OSError as error:
        raise SystemExit(
            f'error: --work-dir {config.work_dir} cannot be written to: {error.strerror}'
        ) from None


def check_files(config: Config, dataloaders: list[str]) -> None:
    """Checks that the data of a run exist, before anything is built.

    Args:
        config: A whole config.
        dataloaders: Names of the data loaders that will be used, such as `['train_dataloader']`.

    Raises:
        SystemExit: Files are missing; the message lists them and says what to do.
    """
    scope = config.get('default_scope') or 'mmengine'
    missing = [
        f'{path} ({name})'
        for name in dataloaders
        for path in dataset_paths(config.get(name) or {}, scope)
        if is_local(path) and not os.path.exists(path)
    ]
    if missing:
        raise SystemExit(
            'error: data are missing:\n  '
            + '\n  '.join(dict.fromkeys(missing))
            + '\nPut them there, or name their folder with --data-root DIR (docs/data.md).'
        )


def dataset_paths(settings: ConfigDict, scope: str) -> Iterator[str]:
    """Annotation files and image folders of all datasets in the settings of a data loader.

    Args:
        settings: Settings of a data loader, or of a part of one.
        scope: The config's default scope.
    """
    if not downloads(settings, scope):
        root = settings.get('data_root') or ''
        # A dict of folders in detection and segmentation, one folder in classification.
        prefixes = settings.get('data_prefix') or {}
        folders = prefixes.values() if isinstance(prefixes, dict) else [prefixes]
        paths = [path for path in (settings.get('ann_file'), *folders) if path]
        yield from (os.path.join(root, path) for path in paths)
        if not paths and root:
            yield root
    for value in settings.values():
        for item in value if isinstance(value, (list, tuple)) else [value]:
            if isinstance(item, dict):
                yield from dataset_paths(item, scope)


def downloads(settings: ConfigDict, scope: str) -> bool:
    """Whether a dataset fetches its own files if they are missing, as CIFAR and MNIST do."""
    with DATASETS.switch_scope_and_registry(scope) as registry:
        cls = registry.get(str(settings.get('type')))
    bases = getattr(cls, '__mro__', ())
    return settings.get('download') is not False and any(
        'download' in signature(base.__init__).parameters for base in bases
    )


def is_local(path: str) -> bool:
    return '://' not in path
