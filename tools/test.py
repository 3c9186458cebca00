"""Evaluates a checkpoint of any recipe and draws its predictions.

    python tools/test.py configs/detection/mask_rcnn_conv2former_t.py work_dirs/.../epoch_36.pth

In the place of the checkpoint, `none` evaluates the network with its initial weights.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

import torch
from common import (
    add_arguments,
    build_runner,
    check_checkpoint,
    check_files,
    check_work_dir,
    load_config,
    read_ahead,
    run_errors,
)
from mmengine.config import Config
from mmengine.model import is_model_wrapper
from mmengine.registry import METRICS


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument('config', help='config file')
    parser.add_argument('checkpoint', help='checkpoint file, or none')
    add_arguments(parser)
    parser.add_argument(
        '--tta', action='store_true', help="augment at test time, as the config's tta_pipeline says"
    )
    parser.add_argument('--out', metavar='FILE.pkl', help='where to write the predictions')
    parser.add_argument(
        '--show-dir',
        help='draw predictions beside the truth into WORK_DIR/TIME/SHOW_DIR '
        '(segmentation: WORK_DIR/SHOW_DIR/vis_data/vis_image)',
    )
    parser.add_argument('--show', action='store_true', help='show the drawings in a window')
    parser.add_argument('--wait-time', type=float, default=2, help='seconds a drawing is shown')
    args = parser.parse_args(argv)
    if args.out is not None and Path(args.out).suffix not in ('.pkl', '.pickle'):
        parser.error(f'--out must end with .pkl or .pickle, got {args.out}')
    config = load_config(args, ('test_dataloader', 'test_cfg', 'test_evaluator'))

    if args.checkpoint == 'none':
        config.load_from = None
    else:
        check_checkpoint('', args.checkpoint)
        config.load_from = args.checkpoint
        if 'backbone' in config.model:
            config.model.backbone.init_cfg = None  # the checkpoint holds all weights
    config.resume = False
    check_files(config, ['test_dataloader'], check_weights=args.checkpoint == 'none')
    check_work_dir(config)
    if args.show or args.show_dir:
        draw_predictions(config, args)
    if args.tta:
        augment_at_test_time(config)

    with run_errors(args.traceback):
        runner = build_runner(config)
        if args.out is not None:
            # mmdet's own packs the masks; mmengine's serves the others.
            name = 'DumpDetResults' if config.get('default_scope') == 'mmdet' else 'DumpResults'
            metric = METRICS.build(dict(type=name, out_file_path=args.out))
            runner.test_evaluator.metrics.append(metric)
        read_ahead(runner, whole=True)
        if args.checkpoint == 'none':
            initialize(runner.model)
        runner.test()


def initialize(model: torch.nn.Module) -> None:
    """Gives a model its initial weights, pretrained ones too, which mmengine does to train only."""
    (model.module if is_model_wrapper(model) else model).init_weights()


def augment_at_test_time(config: Config) -> None:
    """Wraps the model and exchanges the pipeline for the test.

    Raises:
        SystemExit: The config does not say how.
    """
    if not config.get('tta_model') or not config.get('tta_pipeline'):
        raise SystemExit(f'error: --tta: {config.filename} has no tta_model and tta_pipeline')
    config.model = dict(**config.tta_model, module=config.model)
    config.test_dataloader.dataset.pipeline = config.tta_pipeline


def draw_predictions(config: Config, args: argparse.Namespace) -> None:
    """Turns the host library's visualization hook on.

    Raises:
        SystemExit: The config has no such hook.
    """
    if 'visualization' not in config.default_hooks:
        raise SystemExit(f'error: --show: {args.config} has no default_hooks.visualization')
    hook = config.default_hooks.visualization
    hook.draw = True
    if args.show:
        hook.show, hook.wait_time = True, args.wait_time
    if args.show_dir:
        if config.get('default_scope') == 'mmdet':
            hook.test_out_dir = args.show_dir
        else:
            config.visualizer.save_dir = str(Path(config.work_dir, args.show_dir))


if __name__ == '__main__':
    main()
