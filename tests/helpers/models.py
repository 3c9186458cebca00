"""Tiny models of every kind with random weights, for tests of tools that load checkpoints."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from mmengine.config import Config
from mmengine.model import revert_sync_batchnorm
from mmengine.registry import MODELS, init_default_scope

from helpers import ROOT
from helpers.tiny import ARCH, CHANNELS, DETECTION, SEGMENTATION

CLASSES = ['Auto', 'Käse', 'Haus', 'Baum', 'See', 'Ei', 'Uhr']
RESIZE = 'test_dataloader.dataset.pipeline.1.scale'
BOX_HEAD = 'model.roi_head.bbox_head'
DETECTOR = {key: value for key, value in DETECTION.items() if key.startswith('model.')} | {
    RESIZE: (64, 64),
    'model.rpn_head.anchor_generator.scales': [4],
    'model.test_cfg.rpn.nms_pre': 100,
    'model.test_cfg.rpn.max_per_img': 40,
}
CASCADE = {key: value for key, value in DETECTOR.items() if not key.startswith(BOX_HEAD)} | {
    f'{BOX_HEAD}.{stage}.{key.rpartition(".")[2]}': value
    for key, value in DETECTOR.items()
    if key.startswith(BOX_HEAD)
    for stage in range(3)
}
CHANGES = {
    'detection/mask_rcnn_conv2former_n': DETECTOR,
    'detection/cascade_mask_rcnn_conv2former_t': CASCADE,
    'segmentation/upernet_conv2former_n': {
        key: value for key, value in SEGMENTATION.items() if key.startswith('model.')
    }
    | {
        RESIZE: (64, 64),
        'model.test_cfg.crop_size': (64, 64),
        'model.test_cfg.stride': (42, 42),
    },
    'classification/conv2former_n_in1k': {
        RESIZE: 64,
        'test_dataloader.dataset.pipeline.2.crop_size': 64,
        'model.head.in_channels': CHANNELS[-1],
        'model.head.hidden_channels': 32,
        'model.head.num_classes': len(CLASSES),
    },
}
DETECTION_MODEL, CASCADE_MODEL, SEGMENTATION_MODEL, CLASSIFICATION_MODEL = CHANGES


@dataclass(frozen=True)
class TinyModel:
    """A model in eval mode, its config file and a checkpoint of it."""

    config: Path
    checkpoint: Path
    scope: str
    model: Any


def save_model(recipe, folder, changes=None):
    """Writes the recipe with a tiny model and changes, and a checkpoint of random weights."""
    config = Config.fromfile(ROOT / f'configs/{recipe}.py')
    config.model.backbone.arch = ARCH
    config.merge_from_dict(
        CHANGES[recipe]
        | {'model.backbone.init_cfg': None, 'model.backbone.layer_scale_init_value': 0.1}
        | (changes or {})
    )
    path = folder / f'{Path(recipe).name}.py'
    path.write_text('\n'.join(f'{key} = {value!r}' for key, value in config.to_dict().items()))
    init_default_scope(config.default_scope)
    if config.get('data_preprocessor'):
        config.model.data_preprocessor = config.data_preprocessor
    torch.manual_seed(0)
    model = revert_sync_batchnorm(MODELS.build(config.model)).eval()
    # Little for detectors: many boxes of one score would have an arbitrary order.
    deviation = 0.02 if recipe.startswith('detection') else 0.1
    for parameter in model.parameters():
        parameter.data += deviation * torch.randn_like(parameter)
    meta = dict(dataset_meta=dict(classes=CLASSES)) if recipe == CLASSIFICATION_MODEL else {}
    checkpoint = path.with_suffix('.pth')
    torch.save(dict(state_dict=model.state_dict(), meta=meta), checkpoint)
    return TinyModel(path, checkpoint, config.default_scope, model)
