"""Evaluates a checkpoint of any recipe and draws its predictions.

    python tools/test.py configs/detection/mask_rcnn_conv2former_t.py work_dirs/.../epoch_36.pth

With `none` instead of a checkpoint it evaluates the network with its initial weights.
"""

from __future__ import annotations

import argparse
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from common import parser_of
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
from common.inference import (
    DRAWN_BY,
    UniqueNames,
    add_cuda_graphs_argument,
    check_cuda_graphs,
    draw,
    drop_pretrained,
    load_for_drawing,
    one_of,
    replay_backbone,
)
from mmengine.config import Config, ConfigDict
from mmengine.device import get_device
from mmengine.hooks import Hook
from mmengine.registry import METRICS
from mmengine.runner import Runner

from mmconv2former.datasets.checked import leaves
from mmconv2former.engine.runner import unwrapped

MIN_SIDE = 224  # pixels; smaller images are enlarged, so that a classifier's text is legible


def main(argv: Sequence[str] | None = None) -> None:
    parser = parser_of(__doc__)
    parser.add_argument('config', help='config file')
    parser.add_argument('checkpoint', help='checkpoint file, or none for initial weights')
    add_arguments(parser)
    parser.add_argument(
        '--tta', action='store_true', help="test-time augmentation with the config's tta_pipeline"
    )
    parser.add_argument('--out', metavar='FILE.pkl', help='file for the predictions')
    parser.add_argument(
        '--show-dir',
        metavar='DIR',
        help='draw predictions beside the ground truth into WORK_DIR/TIME/DIR, or into DIR if it '
        'begins with /; with several processes, only the first draws its share',
    )
    parser.add_argument('--show', action='store_true', help='show the drawings in a window')
    parser.add_argument('--wait-time', type=float, default=2, help='seconds to show each drawing')
    add_cuda_graphs_argument(parser)
    args = parser.parse_args(argv)
    if args.cuda_graphs:
        check_cuda_graphs(get_device())
        if args.tta:
            parser.error('--cuda-graphs needs images of one size, and --tta makes several')
    if args.out is not None and Path(args.out).suffix not in ('.pkl', '.pickle'):
        parser.error(f'--out must end with .pkl or .pickle, got {args.out}')
    config = load_config(args, ('test_dataloader', 'test_cfg', 'test_evaluator'))

    if args.checkpoint == 'none':
        config.load_from = None
    else:
        config.load_from = args.checkpoint
        drop_pretrained(config)
    config.resume = False
    check_files(config, ['test_dataloader'])
    check_work_dir(config)
    drawing = draw_predictions(config, args) if args.show or args.show_dir else None
    if args.tta:
        augment_at_test_time(config)

    with run_errors(args.traceback):
        runner = build_runner(config)
        if drawing is not None:
            runner.register_hook(drawing)
        preflight(runner, ['test'])
        if args.out is not None:
            # mmdet's own packs the masks.
            name = 'DumpDetResults' if config.get('default_scope') == 'mmdet' else 'DumpResults'
            dump = METRICS.build(dict(type=name, out_file_path=args.out))
            runner.test_evaluator.metrics.append(dump)
        if args.checkpoint == 'none':
            model: Any = unwrapped(runner.model)
            model.init_weights()  # with pretrained weights; mmengine only does so for training
        if args.cuda_graphs:
            replay_backbone(runner.model)
        runner.test()


def augment_at_test_time(config: Config) -> None:
    """Wraps the model and replaces the pipeline, for test-time augmentation.

    Raises:
        SystemExit: The config has no test-time augmentation.
    """
    if not config.get('tta_model') or not config.get('tta_pipeline'):
        raise SystemExit(f'error: --tta: {config.filename} has no tta_model and tta_pipeline')
    config.model = dict(**config.tta_model, module=config.model)
    for settings in leaves(config.test_dataloader.dataset):
        settings.pipeline = config.tta_pipeline


class PredictionVisualizationHook(Hook):
    """Draws the prediction and the ground truth of every image with the library's visualizer.

    The libraries' own hooks write to different folders under different names; mmpretrain's draws
    one image of 5000, with red and blue swapped.

    Args:
        folder: Folder for the drawings, JPEG files with the names of the images in their dataset;
            of several datasets, in the folder that contains them all. A relative path is in the
            folder of the run. None only draws to the window.
        options: Further arguments of `draw`.
    """

    def __init__(self, folder: str | None, options: dict[str, Any]) -> None:
        self.folder, self.options = folder, options

    def before_test(self, runner: Runner) -> None:
        datasets = list(leaves(runner.test_dataloader.dataset))
        self.loader = datasets[0].pipeline.transforms[0]
        self.loaders = {  # by folder
            Path(prefix).absolute(): dataset.pipeline.transforms[0]
            for dataset in datasets
            for prefix in getattr(dataset, 'data_prefix', {}).values()
            if prefix
        }
        several = len(datasets) > 1 and self.loaders
        self.common = Path(os.path.commonpath(self.loaders)) if several else None
        self.names = UniqueNames()

    def after_test_iter(
        self, runner: Runner, batch_idx: int, data_batch: Any = None, outputs: Sequence[Any] = ()
    ) -> None:
        for sample in outputs:
            folder = self.folder_of(sample.img_path)
            loader = self.loaders[folder] if folder else self.loader
            image = np.ascontiguousarray(load_for_drawing(loader, sample.img_path)[..., ::-1])
            title = self.title(sample.img_path)
            options = dict(self.options)
            if self.folder is not None:
                name = self.names.name(sample.img_path, title)
                options['out_file'] = str(Path(runner.log_dir, self.folder, f'{name}.jpg'))
            if 'pred_score' in sample and min(image.shape[:2]) < MIN_SIDE:
                options['resize'] = MIN_SIDE
            draw(runner.visualizer, image, sample, title, **options)

    def folder_of(self, path: str) -> Path | None:
        """The folder of a dataset that an image is in."""
        parents = Path(path).absolute().parents
        return next((folder for folder in parents if folder in self.loaders), None)

    def title(self, path: str) -> str:
        """The path of an image within its dataset, or within the folder of several datasets."""
        absolute, folder = Path(path).absolute(), self.folder_of(path)
        return str(absolute.relative_to(self.common or folder)) if folder else absolute.name


def draw_predictions(config: Config, args: argparse.Namespace) -> PredictionVisualizationHook:
    """The hook that draws instead of the config's own.

    A config without a visualizer gets the library's; mmengine's default draws no predictions.

    Raises:
        SystemExit: Drawing is not supported for the config's library.
    """
    visualizer = one_of(DRAWN_BY, config)
    if not config.get('visualizer'):
        config.visualizer = dict(DEFAULT_VISUALIZER, type=visualizer)
    settings = (config.get('default_hooks') or {}).pop('visualization', None) or ConfigDict()
    options = dict(show=args.show, wait_time=args.wait_time)
    if 'score_thr' in settings:  # for detectors
        options['score_thr'] = settings.score_thr
    if not args.show_dir:
        config.visualizer.vis_backends = None  # they would save the drawings
    return PredictionVisualizationHook(args.show_dir, options)


if __name__ == '__main__':
    main()
