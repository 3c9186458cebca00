"""What `train.py` and `test.py` share: arguments, reading a config, checks before a long run.

`convert_weights.py` takes from here how checkpoints are guarded.
"""

from __future__ import annotations

import argparse
import os
import re
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path
from tempfile import TemporaryFile
from traceback import walk_tb
from typing import Any

import torch
import torch.distributed
from mmengine.config import Config, ConfigDict, DictAction
from mmengine.registry import RUNNERS, build_from_cfg
from mmengine.runner import Runner
from torch.distributed.constants import default_pg_timeout

from common.config_check import (
    DEFAULT_TYPES,
    ConfigError,
    arguments_of,
    check_config,
    check_top,
    find_type,
    in_one_line,
    merge_options,
    read_config,
)
from mmconv2former.checkpoint.reading import (
    TRUST_VARIABLE,
    CheckpointError,
    admit_only_data,
    trusts_checkpoints,
)
from mmconv2former.datasets.checked import DataError
from mmconv2former.engine.finite import NonFiniteError
from mmconv2former.engine.runner import CheckpointNotSaved, ReliableRunner
from mmconv2former.models.baselines import (
    ALL_STAGES,
    BASELINES,
    find_baseline,
    parse_stages,
)

# What mmengine builds where a config has no visualizer.
DEFAULT_VISUALIZER = dict(
    type=DEFAULT_TYPES['visualizer'], vis_backends=[dict(type='LocalVisBackend')]
)
# torch's words for a data worker that the system ended, and for one that raised: with its trace.
DEAD_WORKER = re.compile(
    r'DataLoader worker \(pid(\(s\))? [\d, ]+\) (is killed by signal|exited unexpectedly)'
)
FAILED_WORKER = re.compile(r'Caught \w+ in DataLoader worker process \d+\.')


class OptionsAction(DictAction):
    """Takes KEY=VALUE as mmengine does, and refuses what is not of this form in one line."""

    def __call__(self, parser: argparse.ArgumentParser, *args: Any, **kwargs: Any) -> None:
        try:
            super().__call__(parser, *args, **kwargs)
        except (ValueError, AssertionError):
            raise SystemExit(
                f'error: --cfg-options takes KEY=VALUE with closed brackets, got {args[1]}'
            ) from None


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the arguments of a run: of train.py and test.py."""
    add_config_arguments(parser)
    parser.add_argument('--work-dir', help='for logs and checkpoints (default: work_dirs/CONFIG)')
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
    parser.add_argument('--data-root', help="where the data lie, instead of the config's data_root")


def add_config_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds what every tool takes that reads a config; those of a run get values that do nothing."""
    parser.add_argument(
        '--backbone',
        choices=list(BASELINES),
        metavar='NAME',
        help="another network in Conv2Former's place: a name of docs/baselines.md",
    )
    parser.add_argument(
        '--cfg-options',
        nargs='+',
        action=OptionsAction,
        default={},
        metavar='KEY=VALUE',
        help='change the config: a.b=1, a.0.b=x for an item of a list, "a=[(1,2),(3,4)]"',
    )
    parser.add_argument(
        '--traceback', action='store_true', help='show where an error of the config comes from'
    )
    add_trust_argument(parser)
    parser.set_defaults(work_dir=None, data_root=None, launcher='none', local_rank=0)


def add_trust_argument(parser: argparse.ArgumentParser) -> None:
    """Adds the flag that `guard_checkpoints` obeys."""
    parser.add_argument(
        '--trust-checkpoints',
        action='store_true',
        help=f'read checkpoints that hold more than data, and run what they hold '
        f'(as {TRUST_VARIABLE}=1 does)',
    )


def guard_checkpoints(args: argparse.Namespace) -> None:
    """From here on checkpoints are read as data only, unless the user says otherwise."""
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
    """Turns what stops a run because of its config or files into the tool's one-line error.

    Of other errors those are taken that come from building a part of the config; what goes wrong
    while the network runs keeps its trace.

    Args:
        traceback: Whether all errors keep it.
    """
    try:
        yield
    except (CheckpointError, CheckpointNotSaved, ConfigError, DataError, NonFiniteError) as error:
        if traceback:
            raise
        raise SystemExit(f'error: {error}') from None
    except Exception as error:
        if traceback:
            raise
        if DEAD_WORKER.match(str(error)):
            raise SystemExit(
                f'error: {error}. Was there too little memory, or shared memory? Fewer workers '
                'need less: train_dataloader.num_workers'
            ) from None
        if FAILED_WORKER.match(str(error)):
            reason = str(error).rstrip().splitlines()[-1]
            raise SystemExit(
                f'error: in a data worker: {reason} (--traceback shows where)'
            ) from None
        type_ = type_being_built(error)
        if type_ is None:
            raise
        raise SystemExit(
            f'error: cannot build {type_}: {in_one_line(error)} (--traceback shows where)'
        ) from None


def type_being_built(error: Exception) -> str | None:
    """The innermost `type` that a registry was building; None if it was not building."""
    name = None
    for frame, _ in walk_tb(error.__traceback__):
        if frame.f_code is build_from_cfg.__code__:
            type_ = frame.f_locals['cfg'].get('type')
            name = getattr(type_, '__name__', type_)
    return name


def load_config(args: argparse.Namespace, needed: Sequence[str] = ()) -> Config:
    """The config of the command line, checked and ready for mmengine's runner.

    Args:
        args: What `add_arguments` defines.
        needed: Keys that the config must have, such as `train_dataloader`.

    Raises:
        SystemExit: The config file or an option of `args` is not usable; the message says why.
    """
    os.environ.setdefault('LOCAL_RANK', str(args.local_rank))
    guard_checkpoints(args)
    try:
        config = read_config(args.config)
        check_top(config)
        if args.backbone is not None:
            set_backbone(config, args.backbone)
        if args.data_root is not None:
            set_data_root(config, args.data_root)
        merge_options(config, args.cfg_options)
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


def preflight(runner: Runner, training: bool) -> None:
    """Has our runner refuse a bad checkpoint before the data are loaded; see its `preflight`."""
    if isinstance(runner, ReliableRunner):
        runner.preflight(training)


# Of any classification head of mmpretrain.
CLASSIFIER_SETTINGS = ('num_classes', 'loss', 'topk', 'cal_acc')
# That read feature maps where there is no neck.
HEADS = ('decode_head', 'auxiliary_head', 'panoptic_head')


def set_backbone(config: Config, name: str) -> None:
    """Puts a baseline in the backbone's place and fits what reads its feature maps to it.

    All else stays: schedule, augmentation, drop path, heads. Where the recipe starts from
    pretrained weights, those of the baseline are expected in `pretrain/NAME.pth`. In a classifier
    global average pooling and a linear layer, with which all baselines were published, take the
    place of Conv2Former's head, with its loss. For dense prediction the baseline gives the stages
    that the backbone gave (its `out_indices`).

    Raises:
        ValueError: There is no baseline of this name.
        SystemExit: The recipe has no place for its feature maps, or wants stages that a baseline
            cannot give.
    """
    variant = find_baseline(name)
    model = config.model
    old = model.backbone
    model.backbone = dict(
        type='mmconv2former.Baseline', name=name, drop_path_rate=old.get('drop_path_rate', 0.0)
    )
    if old.get('init_cfg') is not None:
        model.backbone.init_cfg = dict(type='Pretrained', checkpoint=f'pretrain/{name}.pth')

    if model.type == 'ImageClassifier':
        model.backbone.classification = True
        model.neck = dict(type='GlobalAveragePooling')
        kept = {key: model.head[key] for key in CLASSIFIER_SETTINGS if key in model.head}
        model.head = dict(type='LinearClsHead', in_channels=variant.linear_channels, **kept)
    elif readers := readers_of(model):
        try:
            stages = parse_stages(old.get('out_indices', ALL_STAGES))
        except (TypeError, ValueError) as error:
            raise SystemExit(f'error: --backbone {name}: {error}') from None
        if stages != ALL_STAGES:
            model.backbone.out_indices = stages
        channels = [variant.channels[i] for i in stages]
        for reader in readers:
            set_channels(reader, channels)
    else:
        raise SystemExit(
            f'error: --backbone: {config.filename} has no neck and no {", no ".join(HEADS)}'
        )

    for part in variant.family.no_weight_decay:
        custom_keys = {part: dict(decay_mult=0.0)}
        config.merge_from_dict({'optim_wrapper.paramwise_cfg': dict(custom_keys=custom_keys)})


def readers_of(model: ConfigDict) -> list[ConfigDict]:
    """The parts of a model that read the backbone's feature maps."""
    neck = model.get('neck')
    if neck:
        return [neck[0] if isinstance(neck, list) else neck]  # of several the next reads the first
    heads = [model.get(name) or [] for name in HEADS]
    return [head for item in heads for head in (item if isinstance(item, list) else [item])]


def set_channels(reader: ConfigDict, channels: Sequence[int]) -> None:
    """Tells a neck or head the channels of the feature maps it reads.

    Those are all if it had several numbers; of mmseg's heads what `in_index` says, else the last.
    """
    reads_all = isinstance(reader.get('in_channels'), (list, tuple))
    index = reader.get('in_index', range(len(channels)) if reads_all else -1)
    one = isinstance(index, int)
    reader.in_channels = channels[index] if one else [channels[i] for i in index]
    if 'c1_in_channels' in reader:  # of DeepLabV3+, the first map, which it reads beside the other
        reader.c1_in_channels = channels[0]


def use_gloo(config: Config) -> None:
    """Joins a process group without CUDA, for which mmengine would select a CUDA device.

    SyncBN works on CUDA only: it becomes BN, with statistics of each process alone.
    """
    seconds = config.get('env_cfg', {}).get('dist_cfg', {}).get('timeout')
    timeout = default_pg_timeout if seconds is None else timedelta(seconds=seconds)
    torch.distributed.init_process_group('gloo', timeout=timeout)
    config.model = replace_values(config.model, lambda value: 'BN' if value == 'SyncBN' else value)
    config.setdefault(
        'model_wrapper_cfg',
        dict(
            type='MMDistributedDataParallel',
            device_ids=None,  # else mmengine passes the local rank
            broadcast_buffers=False,  # as mmengine does by default
            find_unused_parameters=config.get('find_unused_parameters', False),
        ),
    )


def set_data_root(config: Config, data_root: str) -> None:
    """Puts `data_root` in the place of `config.data_root`, wherever a path begins with that.

    Raises:
        SystemExit: The config has no `data_root` at its top, or an empty one.
    """
    if not config.get('data_root'):
        raise SystemExit(
            f'error: --data-root: {config.filename} has no data_root at its top, whose place it '
            'could take'
        )
    old = config.data_root.rstrip('/') + '/'
    new = os.path.join(data_root, '')

    def replace(value: Any) -> Any:
        # With the slash: data/coco is not the beginning of data/coco_extra.
        is_inside = isinstance(value, str) and os.path.join(value, '').startswith(old)
        return new + value[len(old) :] if is_inside else value

    for key, value in list(config.items()):
        config[key] = replace_values(value, replace)


def replace_values(settings: Any, replace: Callable[[Any], Any]) -> Any:
    """A copy of nested dicts and lists with every innermost value replaced."""
    if isinstance(settings, dict):
        return type(settings)((k, replace_values(v, replace)) for k, v in settings.items())
    if isinstance(settings, (list, tuple)):
        return type(settings)(replace_values(item, replace) for item in settings)
    return replace(settings)


def check_work_dir(config: Config) -> None:
    """Checks that a run can write where its logs and checkpoints go.

    Raises:
        SystemExit: It cannot; the message says why.
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
    """Checks that the data of a run are there, before anything is built.

    Args:
        config: A whole config.
        dataloaders: Names of those to be used, such as `['train_dataloader']`.

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
            + '\nPut them there, or say where they lie with --data-root DIR (README, section Data).'
        )


def dataset_paths(settings: ConfigDict, scope: str) -> Iterator[str]:
    """Annotation files and image folders of all datasets in the settings of a data loader.

    Args:
        settings: Of a data loader, or of a part of one.
        scope: The scope in which it is built.
    """
    scope = settings.get('_scope_') or scope
    classes = [found.cls for found in find_type(settings.get('type'), scope)]
    if not downloads(settings, classes):
        root = settings.get('data_root') or ''
        # A dict of folders in detection and segmentation, one folder in classification.
        prefixes = settings.get('data_prefix') or {}
        paths = [*prefixes.values()] if isinstance(prefixes, dict) else [prefixes]
        if not paths and settings.get('split') and has_folder_of_split(classes):
            paths = [settings['split']]
        if settings.get('ann_file'):
            paths.insert(0, settings['ann_file'])
        if not paths and root:
            yield root
        yield from (os.path.join(root, path) for path in paths if path is not None)
    for value in settings.values():
        for item in value if isinstance(value, (list, tuple)) else [value]:
            if isinstance(item, dict):
                yield from dataset_paths(item, scope)


def downloads(settings: Mapping, classes: Sequence[Any]) -> bool:
    """Whether a dataset gets its own files where they are missing, as CIFAR and MNIST do."""
    return bool(settings.get('download', True)) and any(
        'download' in (arguments_of(cls) or {}) for cls in classes
    )


def has_folder_of_split(classes: Sequence[Any]) -> bool:
    """Whether a dataset's `split` names a folder.

    It does in mmpretrain's two ImageNets alone; all others have files that list their splits.
    """
    names = {base.__name__ for cls in classes for base in getattr(cls, '__mro__', ())}
    return bool(names & {'ImageNet', 'ImageNet21k'})


def is_local(path: str) -> bool:
    return '://' not in path
