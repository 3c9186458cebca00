"""Loads a model and the test data of a config, and draws predictions.

Shared by `predict.py`, `visualize.py`, `export.py` and `test.py`.
"""

from __future__ import annotations

import argparse
import copy
import math
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from mmengine.config import Config, ConfigDict
from mmengine.model import BaseModel, revert_sync_batchnorm
from mmengine.registry import MODELS, VISUALIZERS, init_default_scope
from mmengine.runner import CheckpointLoader
from mmengine.structures import InstanceData, PixelData
from mmengine.visualization import Visualizer
from torch import nn

from common import parser_of
from common.cli import add_config_arguments, load_config
from common.config_check import type_name
from mmconv2former import use_cuda_graphs
from mmconv2former.checkpoint.loading import load_model
from mmconv2former.datasets.checked import leaves
from mmconv2former.engine.runner import unwrapped

# The visualizer that draws predictions, by library.
DRAWN_BY = {
    'mmdet': 'DetLocalVisualizer',
    'mmseg': 'SegLocalVisualizer',
    'mmpretrain': 'UniversalVisualizer',
}
# Pixels of a segmentation with class names drawn in it: mmseg needs 150 bytes a pixel for these.
LARGEST_NAMED = 2**23
# Pixels of a drawing: matplotlib needs 80 bytes a pixel and more.
MOST_DRAWN = 2**25
LONGEST_SIDE = 65_500  # of a JPEG


# ------------------------------------------------------------------------------------ command line
def parser_for_model(description: str) -> argparse.ArgumentParser:
    """A parser for tools that take a config and a checkpoint of its whole model."""
    parser = parser_of(description)
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
    init_default_scope(config.get('default_scope') or 'mmengine')
    settings = copy.deepcopy(config.model)
    if config.get('data_preprocessor') is not None:  # mmpretrain has it beside the model
        settings.setdefault('data_preprocessor', config.data_preprocessor)
    model = MODELS.build(settings)
    content = CheckpointLoader.load_checkpoint(checkpoint, 'cpu')
    load_model(model, content, checkpoint, strict=True)
    meta = (content.get('meta') or {}).get('dataset_meta')
    model.dataset_meta = meta and {key.lower(): value for key, value in meta.items()}
    return revert_sync_batchnorm(model).eval()


def to_deploy(model: nn.Module) -> None:
    """Folds the backbone for inference, if it can be folded."""
    switch_to_deploy = getattr(getattr(model, 'backbone', None), 'switch_to_deploy', None)
    if switch_to_deploy is not None:
        switch_to_deploy()


# -------------------------------------------------------------------------------------------- data
def dataset_settings(config: Config, split: str | None = None) -> list[ConfigDict]:
    """The settings of a split's datasets, without wrappers such as ConcatDataset.

    Args:
        config: A whole config.
        split: `train`, `val` or `test`; None means the test data or, if there are none, the
            validation data.

    Raises:
        SystemExit: The config has no such data.
    """
    keys = [f'{name}_dataloader' for name in ([split] if split else ['test', 'val'])]
    for key in keys:
        if config.get(key):
            return list(leaves(config[key].dataset))
    raise SystemExit(
        f'error: {config.filename} has no {" and no ".join(keys)}: add one, whose dataset has the '
        'pipeline that images need'
    )


def settings_of_files(config: Config) -> ConfigDict:
    """The settings of the test data. Several datasets must read images in the same way.

    Raises:
        SystemExit: There are no test data, their pipelines differ, or make several views of an
            image.
    """
    first, *others = dataset_settings(config)
    if any(type_name(step) == 'TestTimeAug' for step in first.pipeline):
        raise SystemExit(
            f'error: the test pipeline of {config.filename} has TestTimeAug, which makes several '
            'inputs of an image: move it to tta_pipeline (tools/test.py --tta)'
        )
    for other in others:
        if without_labels(other.pipeline) != without_labels(first.pipeline):
            raise SystemExit(
                f'error: the test datasets of {config.filename} have different pipelines, so a '
                'file could be read in several ways: give them one, or keep one dataset'
            )
    return first


def without_labels(pipeline: Iterable[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
    """The steps of a pipeline, from its settings, without those that load annotations."""
    return [step for step in pipeline if not type_name(step).endswith('LoadAnnotations')]


# ---------------------------------------------------------------------------------------- drawings
def drawable(image: np.ndarray) -> np.ndarray:
    """An image as loaded, (H, W) or (H, W, C) of any type, as uint8 (H, W, 3) in BGR.

    Values above 255 are scaled to the image's own range. Of more than three channels the first
    three are kept, of two the first.
    """
    if image.ndim == 2 or image.shape[2] < 3:
        image = image.reshape(*image.shape[:2], -1)[..., [0, 0, 0]]
    image = image[..., :3]
    if image.dtype != np.uint8:
        low, high = float(image.min()), float(image.max())
        if high > 255:
            image = (image - low) * (255 / (high - low or 1))
        image = np.rint(image).clip(0, 255).astype(np.uint8)
    return np.ascontiguousarray(image)


def load_for_drawing(loader: Callable[[dict], Any], path: str | Path) -> np.ndarray:
    """The image of a file as a pipeline's first step loads it, uint8 (H, W, 3) in BGR."""
    return drawable(loader(dict(img_path=str(path)))['img'])


class UniqueNames:
    """Names of results of files, without suffixes; x.png and x.jpg get `x` and `x_2`."""

    def __init__(self) -> None:
        self.names: dict[str, str] = {}  # by file
        self.taken: set[str] = set()

    def name(self, file: str | Path, wanted: str | Path) -> str:
        """The name of a file, always the same: its wanted one, with a number if that is taken."""
        if str(file) not in self.names:
            base = name = str(Path(wanted).with_suffix(''))
            number = 1
            while name in self.taken:
                number += 1
                name = f'{base}_{number}'
            self.names[str(file)] = name
            self.taken.add(name)
        return self.names[str(file)]


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
        uint8 (H, W, 3), RGB; smaller if the image has more than `MOST_DRAWN` pixels or a side
        above `LONGEST_SIDE`. It has what was drawn last, so set `draw_gt` or `draw_pred` to False.
    """
    image, sample = reduced(image, sample)
    if score_thr is not None and 'pred_instances' in sample:
        options['pred_score_thr'] = score_thr
    if 'pred_sem_seg' in sample and image.shape[0] * image.shape[1] > LARGEST_NAMED:
        options['with_labels'] = False
    visualizer.set_image(image)  # mmseg leaves the previous one if there is nothing to draw
    add = getattr(visualizer, 'visualize_cls', visualizer.add_datasample)  # mmpretrain has both
    add(name=name, image=image, data_sample=sample, **options)
    return visualizer.get_image()


def reduced(image: np.ndarray, sample: Any) -> tuple[np.ndarray, Any]:
    """An image and its sample, with a part of their rows and columns if they are too large."""
    height, width = image.shape[:2]
    longest = max(
        math.sqrt(height * width / MOST_DRAWN), height / LONGEST_SIDE, width / LONGEST_SIDE
    )
    every = math.ceil(longest)
    if every == 1:
        return image, sample
    image = np.ascontiguousarray(image[::every, ::every])
    sample = sample.new()
    for name, part in sample.items():
        if isinstance(part, PixelData):
            setattr(sample, name, PixelData(data=part.data[..., ::every, ::every]))
        elif isinstance(part, InstanceData) and 'bboxes' in part:
            part = part.new()
            part.bboxes = getattr(part.bboxes, 'tensor', part.bboxes) / every
            if 'masks' in part and isinstance(part.masks, (torch.Tensor, np.ndarray)):
                part.masks = part.masks[..., ::every, ::every]
            elif 'masks' in part:
                part.masks = part.masks.resize(image.shape[:2])
            setattr(sample, name, part)
    return image, sample


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
    inner: Any = unwrapped(model)
    use_cuda_graphs(inner.backbone)
