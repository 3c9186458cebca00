"""Trains any recipe: detection, segmentation or classification.

    python tools/train.py configs/detection/mask_rcnn_conv2former_t.py

`default_scope` in the config says which library builds the parts. For several processes see
`dist_train.sh` and `slurm_train.sh`.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import common  # before torch
import torch
from common.cli import (
    DEFAULT_VISUALIZER,
    add_arguments,
    build_runner,
    check_files,
    check_work_dir,
    load_config,
    preflight,
    run_errors,
)
from common.config_check import type_name
from mmengine.config import Config
from mmengine.device import get_device
from mmengine.runner import Runner

from mmconv2former.engine.runner import locked_when_built, unwrapped
from mmconv2former.engine.schedule import schedule_of, table, unusual

AMP_FORMATS = ('auto', 'bfloat16', 'float16')
CPU_WRAPPER = 'mmconv2former.CpuAmpOptimWrapper'
GPU_WRAPPER = 'mmconv2former.ReliableAmpOptimWrapper'
# Types that `--amp` may replace; the last two come from the config that an earlier run saved.
AMP_REPLACES = (
    *('OptimWrapper', 'AmpOptimWrapper'),
    *(name.rpartition('.')[2] for name in (CPU_WRAPPER, GPU_WRAPPER)),
)


def main(argv: Sequence[str] | None = None) -> None:
    parser = common.parser_of(__doc__)
    parser.add_argument('config', help='config file')
    add_arguments(parser)
    parser.add_argument(
        '--amp',
        nargs='?',
        const='auto',
        choices=AMP_FORMATS,
        help='mixed precision; auto (default) is bfloat16 if the device has it, otherwise float16',
    )
    parser.add_argument(
        '--auto-scale-lr',
        action='store_true',
        help="scale the learning rate by the actual batch size over the recipe's",
    )
    parser.add_argument(
        '--resume',
        nargs='?',
        const='auto',
        metavar='CHECKPOINT',
        help='resume from a checkpoint; without a path, from the newest in the work dir',
    )
    parser.add_argument(
        '--take-over',
        action='store_true',
        help='take the work dir from another run, which stops at its next checkpoint',
    )
    parser.add_argument(
        '--tensorboard', action='store_true', help='also log for TensorBoard (in WORK_DIR/TIME)'
    )
    parser.add_argument(
        '--no-dry-run',
        action='store_true',
        help='skip the trial of evaluation, drawing and saving on two images before training',
    )
    parser.add_argument(
        '--no-census', action='store_true', help='skip the census of the data before training'
    )
    parser.add_argument(
        '--show-schedule',
        action='store_true',
        help='print the learning rate over the run as a table, without training',
    )
    args = parser.parse_args(separate_config(sys.argv[1:] if argv is None else argv))
    config = load_config(args, ('train_dataloader', 'train_cfg', 'optim_wrapper'))

    precision = None if args.amp is None else set_precision(config, args.amp)
    if args.auto_scale_lr:
        if 'base_batch_size' not in (config.get('auto_scale_lr') or {}):
            raise SystemExit(
                f'error: --auto-scale-lr: {args.config} has no auto_scale_lr.base_batch_size'
            )
        config.auto_scale_lr.enable = True
    if args.tensorboard:
        add_tensorboard(config)
    if args.resume is not None:
        config.resume = 'auto' if args.resume == 'auto' else True
        if args.resume != 'auto':
            config.load_from = args.resume
    for name, is_off in (('census', args.no_census), ('dry_run', args.no_dry_run)):
        if is_off:
            config.default_hooks = {**(config.get('default_hooks') or {}), name: None}
    check_files(config, ['train_dataloader', 'val_dataloader'])
    check_work_dir(config)
    compile_settings = config.pop('compile', False)

    with run_errors(args.traceback):
        if args.show_schedule:
            show_schedule(build_runner(config))
            return
        with locked_when_built(args.take_over):
            runner = build_runner(config)
        if precision is not None:
            runner.logger.info(precision)
        if compile_settings:
            compile_backbone(runner, {} if compile_settings is True else compile_settings)
        modes = ['train', 'val'] if config.get('val_dataloader') else ['train']
        preflight(runner, modes)
        runner.train()


def separate_config(words: Sequence[str]) -> list[str]:
    """Rewrites `--amp CONFIG` as `--amp=auto CONFIG`; argparse would take CONFIG for the format."""
    return [
        '--amp=auto' if word == '--amp' and Path(after).suffix else word
        for word, after in zip(words, [*words[1:], ''])
    ]


def set_precision(config: Config, format_: str) -> str:
    """Makes a config train in mixed precision.

    Fills in what the config leaves open: the format, and whether the loss is scaled. bfloat16 has
    the range of float32 and needs no scaling.

    Args:
        config: Has an `optim_wrapper`.
        format_: One of `AMP_FORMATS`. 'auto' is the config's own `dtype`; without one, bfloat16 on
            a CPU and on GPUs that have it, otherwise float16.

    Returns:
        A line for the log: the format and the reason for it.

    Raises:
        SystemExit: `optim_wrapper` has an unsupported type, or the GPU has no bfloat16.
    """
    settings = config.optim_wrapper
    type_ = type_name(settings) or 'OptimWrapper'
    if type_ not in AMP_REPLACES:
        raise SystemExit(
            f'error: --amp needs optim_wrapper.type OptimWrapper or AmpOptimWrapper, got {type_}'
        )
    device = get_device()
    name = torch.cuda.get_device_name() if device == 'cuda' else device
    # `torch.cuda.is_bf16_supported` is true for emulation too.
    is_old_gpu = device == 'cuda' and torch.cuda.get_device_capability() < (8, 0)
    own = settings.get('dtype')
    if format_ != 'auto':
        dtype, reason = format_, f'--amp {format_}'
        default = 'float16' if type_ == 'AmpOptimWrapper' else format_  # mmengine's
        if (own or default) != format_:
            settings.pop('loss_scale', None)  # meant for the config's own format
    elif own is not None:
        dtype, reason = own, f'optim_wrapper.dtype={own}'
    else:
        dtype = 'bfloat16' if device in ('cpu', 'cuda') and not is_old_gpu else 'float16'
        reason = f'the default on {name}' + (', which has no bfloat16' if is_old_gpu else '')
    if dtype == 'bfloat16' and is_old_gpu:
        raise SystemExit(
            f'error: {reason}: {name} has no bfloat16, only float16 (bfloat16 needs compute '
            'capability 8.0 or later); use --amp float16'
        )
    settings.type = CPU_WRAPPER if device == 'cpu' else GPU_WRAPPER
    settings.dtype = dtype
    scale = settings.setdefault(
        'loss_scale', dict(enabled=False) if dtype == 'bfloat16' else 'dynamic'
    )
    scaling = 'off' if scale == dict(enabled=False) else scale
    return f'Mixed precision: {dtype} ({reason}); loss scaling: {scaling}'


def add_tensorboard(config: Config) -> None:
    """Adds a backend for TensorBoard to the visualizer, unless it has one.

    Raises:
        SystemExit: TensorBoard is not installed.
    """
    if find_spec('tensorboard') is None:
        raise SystemExit('error: --tensorboard needs: pip install tensorboard')
    visualizer = config.get('visualizer') or DEFAULT_VISUALIZER
    backends = visualizer.get('vis_backends') or []
    backends = [backends] if isinstance(backends, dict) else list(backends)
    if 'TensorboardVisBackend' not in map(type_name, backends):
        backends.append(dict(type='TensorboardVisBackend'))
    config.visualizer = dict(visualizer, vis_backends=backends)


def show_schedule(runner: Runner) -> None:
    """Prints the learning rates of a run that does not begin, and what is unusual about them."""
    runner.optim_wrapper = runner.build_optim_wrapper(runner.optim_wrapper)
    runner.scale_lr(runner.optim_wrapper, runner.auto_scale_lr)
    runner._train_loop = runner.build_train_loop(runner._train_loop)
    if runner.param_schedulers is not None:
        runner.param_schedulers = runner.build_param_scheduler(runner.param_schedulers)
    schedule = schedule_of(runner)
    if schedule is None:
        raise SystemExit('error: --show-schedule needs a param_scheduler, and one optimizer')
    print('\n'.join([table(schedule), *unusual(schedule)]))


def compile_backbone(runner: Runner, settings: dict) -> None:
    """Compiles the backbone alone for mmengine's key `compile`, for all input sizes at once.

    mmengine would compile the whole training step. torch fails on the optimizer's wrapped `step`
    there, and shapes in the heads change with every image.

    Args:
        runner: A runner whose model is built.
        settings: Arguments of `torch.compile`.
    """
    model: Any = unwrapped(runner.model)
    model.backbone.compile(**{'dynamic': True, **settings})
    runner.logger.info('The backbone is compiled with torch.compile in the first iteration.')


if __name__ == '__main__':
    main()
