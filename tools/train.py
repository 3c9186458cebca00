"""Trains any recipe: detection, segmentation or classification.

    python tools/train.py configs/detection/mask_rcnn_conv2former_t.py

One script for all host libraries: `default_scope` in the config says which one builds the parts.
For several processes see `dist_train.sh` and `slurm_train.sh`.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from importlib.util import find_spec

from common import (
    DEFAULT_VISUALIZER,
    add_arguments,
    build_runner,
    check_checkpoint,
    check_files,
    check_work_dir,
    load_config,
    read_ahead,
    run_errors,
)
from config_check import DEFAULT_TYPES
from mmengine.device import get_device
from mmengine.model import is_model_wrapper
from mmengine.runner import Runner


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument('config', help='config file')
    add_arguments(parser)
    parser.add_argument('--amp', action='store_true', help='train in mixed precision')
    parser.add_argument(
        '--auto-scale-lr',
        action='store_true',
        help="scale the learning rate by the real batch over the recipe's",
    )
    parser.add_argument(
        '--resume',
        nargs='?',
        const='auto',
        metavar='CHECKPOINT',
        help='go on from a checkpoint; without a name, from the newest in the work dir',
    )
    parser.add_argument(
        '--tensorboard', action='store_true', help='log for TensorBoard too (in WORK_DIR/TIME)'
    )
    args = parser.parse_args(argv)
    config = load_config(args, ('train_dataloader', 'train_cfg', 'optim_wrapper'))

    if args.amp:
        type_ = config.optim_wrapper.get('type', DEFAULT_TYPES['optim_wrapper'])
        if type_ not in ('OptimWrapper', 'AmpOptimWrapper'):
            raise SystemExit(
                'error: --amp needs optim_wrapper.type OptimWrapper or AmpOptimWrapper, '
                f'got {type_}'
            )
        on_cpu = get_device() == 'cpu'  # there in bfloat16
        config.optim_wrapper.type = (
            'mmconv2former.CpuAmpOptimWrapper' if on_cpu else 'AmpOptimWrapper'
        )
        config.optim_wrapper.setdefault('loss_scale', 'dynamic')
    if args.auto_scale_lr:
        if 'base_batch_size' not in (config.get('auto_scale_lr') or {}):
            raise SystemExit(
                f'error: --auto-scale-lr: {args.config} has no auto_scale_lr.base_batch_size'
            )
        config.auto_scale_lr.enable = True
    if args.tensorboard:
        if find_spec('tensorboard') is None:
            raise SystemExit(
                'error: --tensorboard: tensorboard is missing: pip install tensorboard'
            )
        visualizer = config.get('visualizer') or DEFAULT_VISUALIZER
        backends = [*(visualizer.get('vis_backends') or ()), dict(type='TensorboardVisBackend')]
        config.visualizer = dict(visualizer, vis_backends=backends)
    if args.resume is not None:
        config.resume = 'auto' if args.resume == 'auto' else True
        if args.resume != 'auto':
            check_checkpoint('--resume: ', args.resume)
            config.load_from = args.resume
    check_files(config, ['train_dataloader', 'val_dataloader'], check_weights=True)
    check_work_dir(config)
    compile_settings = config.pop('compile', False)

    with run_errors(args.traceback):
        runner = build_runner(config)
        if compile_settings:
            compile_backbone(runner, {} if compile_settings is True else compile_settings)
        read_ahead(runner, whole=bool(config.get('resume')))
        runner.train()


def compile_backbone(runner: Runner, settings: dict) -> None:
    """Obeys mmengine's key `compile` with the backbone alone, for all sizes of input at once.

    mmengine would compile the whole training step, at which torch fails in the optimizer's `step`
    that mmengine wraps; and heads change their shapes with every image.

    Args:
        runner: A runner whose model is built.
        settings: Arguments of `torch.compile`.
    """
    model = runner.model.module if is_model_wrapper(runner.model) else runner.model
    model.backbone.compile(**{'dynamic': True, **settings})
    runner.logger.info('The backbone is compiled with torch.compile at its first iteration.')


if __name__ == '__main__':
    main()
