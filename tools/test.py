"""Evaluates a checkpoint of any recipe and draws its predictions.

    python tools/test.py configs/detection/mask_rcnn_conv2former_t.py work_dirs/.../epoch_36.pth

In the place of the checkpoint, `none` evaluates the network with its initial weights.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import mmcv
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
    add_cuda_graphs_argument,
    check_cuda_graphs,
    drop_pretrained,
    one_of,
    replay_backbone,
)
from mmengine.config import Config, ConfigDict
from mmengine.device import get_device
from mmengine.fileio import get
from mmengine.hooks import Hook
from mmengine.model import BaseModel, is_model_wrapper
from mmengine.registry import METRICS
from mmengine.runner import Runner

from mmconv2former.datasets.checked import leaves
from mmconv2former.engine.cuda_graphs import VaryingSizeError

# The visualizer that draws predictions, and its method for it, by library.
DRAW = {
    'mmdet': ('DetLocalVisualizer', 'add_datasample'),
    'mmseg': ('SegLocalVisualizer', 'add_datasample'),
    'mmpretrain': ('UniversalVisualizer', 'visualize_cls'),
}
LEAST_SIDE = 224  # pixels of a classifier's drawing, on which text is legible


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
        metavar='DIR',
        help='draw predictions and the truth into WORK_DIR/TIME/DIR, or into DIR if it begins '
        'with /; of several processes the first draws its share',
    )
    parser.add_argument('--show', action='store_true', help='show the drawings in a window')
    parser.add_argument('--wait-time', type=float, default=2, help='seconds a drawing is shown')
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
        if args.out is not None:
            # mmdet's own packs the masks; mmengine's serves the others.
            name = 'DumpDetResults' if config.get('default_scope') == 'mmdet' else 'DumpResults'
            metric = METRICS.build(dict(type=name, out_file_path=args.out))
            runner.test_evaluator.metrics.append(metric)
        if drawing is not None:
            runner.register_hook(drawing)
        preflight(runner, training=False)
        if args.checkpoint == 'none':
            initialize(runner.model)
        if args.cuda_graphs:
            replay_backbone(runner.model)
        try:
            runner.test()
        except VaryingSizeError as error:
            if args.traceback:
                raise
            raise SystemExit(f'error: --cuda-graphs: {error}') from None


def initialize(model: BaseModel) -> None:
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


class DrawPredictions(Hook):
    """Draws every picture's prediction and truth by the visualizer of the host library.

    In the place of the libraries' own hooks, which lay pictures into different folders under
    different names, and of which mmpretrain's draws one of 5000, with red and blue exchanged.

    Args:
        method: The visualizer's method for it.
        folder: Where the drawings go, under the names that the pictures have in their data set; a
            relative one is in the folder of the run. None draws for the window only.
        options: Further arguments of the method.
    """

    def __init__(self, method: str, folder: str | None, options: dict[str, Any]) -> None:
        self.method, self.folder, self.options = method, folder, options

    def before_test(self, runner: Runner) -> None:
        self.roots = [
            Path(prefix).absolute()
            for dataset in leaves(runner.test_dataloader.dataset)
            for prefix in getattr(dataset, 'data_prefix', {}).values()
            if prefix
        ]

    def after_test_iter(
        self, runner: Runner, batch_idx: int, data_batch: Any = None, outputs: Sequence[Any] = ()
    ) -> None:
        for sample in outputs:
            picture = mmcv.imfrombytes(get(sample.img_path), channel_order='rgb')
            name = self.name(sample.img_path)
            options = dict(self.options)
            if self.folder is not None:
                suffix = '' if name.lower().endswith(('.jpg', '.jpeg')) else '.jpg'
                options['out_file'] = str(Path(runner.log_dir, self.folder, name + suffix))
            if self.method == 'visualize_cls' and min(picture.shape[:2]) < LEAST_SIDE:
                options['resize'] = LEAST_SIDE
            getattr(runner.visualizer, self.method)(
                name=name, image=picture, data_sample=sample, **options
            )

    def name(self, path: str) -> str:
        """The picture's name with the folders that tell it from others, such as its class."""
        absolute = Path(path).absolute()
        for root in self.roots:
            if root in absolute.parents:
                return str(absolute.relative_to(root))
        return absolute.name


def draw_predictions(config: Config, args: argparse.Namespace) -> DrawPredictions:
    """The hook that draws, in the place of the config's own.

    Where the config has no visualizer, mmengine's, which draws no predictions, gives way to that of
    the library.

    Raises:
        SystemExit: The config is of no library that we can draw for.
    """
    visualizer, method = one_of(DRAW, config)
    if not config.get('visualizer'):
        config.visualizer = dict(DEFAULT_VISUALIZER, type=visualizer)
    settings = (config.get('default_hooks') or {}).pop('visualization', None) or ConfigDict()
    options = dict(show=args.show, wait_time=args.wait_time)
    if 'score_thr' in settings:  # of a detector's drawings
        options['pred_score_thr'] = settings.score_thr
    if not args.show_dir:
        config.visualizer.vis_backends = None  # which would keep the drawings
    return DrawPredictions(method, args.show_dir, options)


if __name__ == '__main__':
    main()
