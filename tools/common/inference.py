"""Loads a model from a config and a checkpoint, and draws its predictions.

Shared by `predict.py`, `visualize.py`, `export.py` and `test.py`.
"""

from __future__ import annotations

import argparse
import copy
from collections.abc import Mapping
from typing import Any

import numpy as np
from mmengine.config import Config, ConfigDict
from mmengine.model import BaseModel, is_model_wrapper, revert_sync_batchnorm
from mmengine.registry import MODELS, VISUALIZERS, init_default_scope
from mmengine.runner import CheckpointLoader
from mmengine.visualization import Visualizer
from torch import nn

from common.cli import add_config_arguments, load_config
from mmconv2former import use_cuda_graphs
from mmconv2former.checkpoint.loading import load_model

# The visualizer that draws predictions, by library.
DRAWN_BY = {
    'mmdet': 'DetLocalVisualizer',
    'mmseg': 'SegLocalVisualizer',
    'mmpretrain': 'UniversalVisualizer',
}


# ------------------------------------------------------------------------------------ command line
def parser_of(description: str) -> argparse.ArgumentParser:
    """A parser for tools that take a config and a checkpoint of its whole model."""
    parser = argparse.ArgumentParser(
        description=description, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument('config', help='config file')
    parser.add_argument('checkpoint', help='checkpoint of the whole model')
    add_config_arguments(parser)
    return parser


def read_config(args: argparse.Namespace) -> Config:
    """The config from the command line, without pretrained weights, which the checkpoint replaces.

    Raises:
        SystemExit: The config or an option is not usable.
    """
    config = load_config(args)
    drop_pretrained(config)
    return config


def drop_pretrained(config: Config) -> None:
    """Removes pretrained weights from the config of a model that a checkpoint fills completely."""
    for part in ('backbone', 'head'):
        if 'init_cfg' in (config.model.get(part) or {}):
            config.model[part].init_cfg = None


def one_of(options: Mapping[str, Any], config: Config) -> Any:
    """The option for the config's library.

    Args:
        options: Options by default scope, such as 'mmdet'.
        config: A whole config.

    Raises:
        SystemExit: There is no option for this library.
    """
    scope = config.get('default_scope')
    if scope not in options:
        raise SystemExit(
            f'error: default_scope of {config.filename} must be one of {", ".join(options)}, '
            f'got {scope!r}'
        )
    return options[scope]


# ------------------------------------------------------------------------------------------- model
def load_whole_model(config: Config, checkpoint: str) -> BaseModel:
    """The config's model with all weights of a checkpoint, in eval mode, on the CPU.

    Its `dataset_meta` has the classes that the checkpoint names, or is None.

    Raises:
        CheckpointError: The checkpoint cannot be read, or is of another network.
    """
    init_default_scope(config.default_scope)
    settings = copy.deepcopy(config.model)
    if config.get('data_preprocessor') is not None:  # mmpretrain has it beside the model
        settings.setdefault('data_preprocessor', config.data_preprocessor)
    model = MODELS.build(settings)
    content = CheckpointLoader.load_checkpoint(checkpoint, 'cpu')
    load_model(model, content, checkpoint, strict=True)
    meta = (content.get('meta') or {}).get('dataset_meta')
    model.dataset_meta = meta and {key.lower(): value for key, value in meta.items()}
    return revert_sync_batchnorm(model).eval()


def dataset_settings(config: Config, split: str = 'test') -> ConfigDict:
    """The settings of a split's dataset, without wrappers such as RepeatDataset."""
    settings = config[f'{split}_dataloader'].dataset
    while 'dataset' in settings:
        settings = settings.dataset
    return settings


def to_deploy(model: nn.Module) -> None:
    """Folds the backbone for inference, if it can be folded."""
    switch_to_deploy = getattr(model.backbone, 'switch_to_deploy', None)
    if switch_to_deploy is not None:
        switch_to_deploy()


# ---------------------------------------------------------------------------------------- drawings
def build_visualizer(config: Config, dataset_meta: Mapping[str, Any]) -> Visualizer:
    """The config's visualizer or, by default, its library's, which draws but writes nothing.

    Args:
        config: A whole config.
        dataset_meta: Has `classes`, and `palette` for segmentation.
    """
    settings = dict(config.get('visualizer') or dict(type=one_of(DRAWN_BY, config)))
    visualizer = VISUALIZERS.build(settings | dict(vis_backends=None, name='inference'))
    visualizer.dataset_meta = dict(dataset_meta)
    return visualizer


def draw(
    visualizer: Visualizer,
    image: np.ndarray,
    sample: Any,
    name: str = '',
    score_thr: float | None = None,
    **options: Any,
) -> np.ndarray:
    """Draws a prediction, the ground truth, or both side by side, as the host library does.

    Args:
        visualizer: The visualizer of the host library.
        image: uint8 (H, W, 3), RGB.
        sample: A data sample of the host library.
        name: The title of a window that shows it.
        score_thr: Minimum score of a drawn object; None leaves it to the library.
        options: Further arguments of `add_datasample` or `visualize_cls`, such as `draw_gt` and
            `out_file`.

    Returns:
        uint8 (H, W, 3), RGB. It has what was drawn last, so set `draw_gt` or `draw_pred` to False.
    """
    if score_thr is not None and 'pred_instances' in sample:
        options['pred_score_thr'] = score_thr
    visualizer.set_image(image)  # mmseg leaves the previous one if there is nothing to draw
    add = getattr(visualizer, 'visualize_cls', visualizer.add_datasample)  # mmpretrain has both
    add(name=name, image=image, data_sample=sample, **options)
    return visualizer.get_image()


# ------------------------------------------------------------------------------------- CUDA graphs
def add_cuda_graphs_argument(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        '--cuda-graphs',
        action='store_true',
        help='replay the backbone as a CUDA graph: faster on a GPU, for images of one size',
    )


def check_cuda_graphs(device: str) -> None:
    """Raises SystemExit unless the device, such as cuda:1, supports `--cuda-graphs`."""
    if not device.startswith('cuda'):
        raise SystemExit(f'error: --cuda-graphs needs a CUDA device, the device is {device}')


def replay_backbone(model: nn.Module) -> None:
    """Applies `--cuda-graphs` to a model, or to one in its wrapper for several processes."""
    inner: Any = model.module if is_model_wrapper(model) else model
    use_cuda_graphs(inner.backbone)
