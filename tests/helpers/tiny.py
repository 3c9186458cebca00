"""Small models on images of 64 pixels: recipes around a network of half a million parameters."""

import itertools
import json
from contextlib import contextmanager
from functools import partial
from unittest.mock import patch

import torch
from common.image_sizes import scale_images
from mmengine.config import Config

from helpers import ROOT

CHANNELS = [16, 24, 32, 48]
ARCH = dict(channels=CHANNELS, depths=[1, 1, 1, 1], kernel_size=5)
SMALL_DETECTION = 'configs/demo/mask_rcnn_demo.py'
SMALL_SEGMENTATION = 'tests/helpers/configs/upernet_small.py'
DETECTION = {
    'model.neck': dict(in_channels=CHANNELS, out_channels=16),
    'model.rpn_head': dict(in_channels=16, feat_channels=16),
    'model.roi_head': dict(
        bbox_roi_extractor=dict(out_channels=16),
        mask_roi_extractor=dict(out_channels=16),
        bbox_head=dict(in_channels=16, fc_out_channels=32),
        mask_head=dict(in_channels=16, conv_out_channels=16, num_convs=1),
    ),
    # Without a threshold, as hardly trained weights predict nothing with certainty.
    'model.test_cfg.rcnn': dict(score_thr=0.0, max_per_img=20),
    'param_scheduler.0.end': 8,
    'param_scheduler.1.milestones': [2],
}
BATCH_NORM = dict(type='BN')  # SyncBN works on CUDA only
SEGMENTATION = {
    'model.decode_head': dict(in_channels=CHANNELS, channels=16, norm_cfg=BATCH_NORM),
    'model.auxiliary_head': dict(in_channels=CHANNELS[2], channels=16, norm_cfg=BATCH_NORM),
    'param_scheduler.0.end': 2,
    'param_scheduler.1.begin': 2,
}
# For a segmentor, as options of the command line.
FOUR_ITERATIONS = [
    'train_cfg.max_iters=4',
    'train_cfg.val_interval=2',
    'param_scheduler.0.end=1',
    'param_scheduler.1.begin=1',
    'param_scheduler.1.end=4',
    'default_hooks.checkpoint.interval=2',
    'default_hooks.logger.interval=1',
]
WITHOUT_WORKERS = [
    f'{part}_dataloader.{option}'
    for part in ('train', 'val', 'test')
    for option in ('num_workers=0', 'persistent_workers=False')
]
names = itertools.count()


def tiny_config(task, sample, work_dir, length, interval=1, images=8, options=None):
    """The config of a short run on the embedded sample.

    `length` and `interval` (of validation and checkpoints) are in epochs of `images / 2` iterations
    in detection, in iterations in segmentation.
    """
    is_detector = task == 'detection'
    config = Config.fromfile(ROOT / (SMALL_DETECTION if is_detector else SMALL_SEGMENTATION))
    scale_images(config, 64)
    data_root = sample / ('coco' if is_detector else 'ade/ADEChallengeData2016')
    for part in ('train', 'val', 'test'):
        loader = config[f'{part}_dataloader']
        loader.update(num_workers=0, persistent_workers=False)
        loader.dataset.data_root = f'{data_root}/'
        if is_detector and part != 'train':
            evaluator = config[f'{part}_evaluator']
            evaluator.ann_file = f'{data_root}/annotations/instances_val2017.json'
    config.model.backbone.arch = ARCH
    config.merge_from_dict(DETECTION if is_detector else SEGMENTATION)
    config.merge_from_dict(
        {
            'model.backbone.init_cfg': None,
            'model.backbone.layer_scale_init_value': 0.1,
            'model.backbone.drop_path_rate': 0.2,
            'optim_wrapper.optimizer.lr': 1e-3,
            'train_dataloader.dataset.indices': images,
            'train_dataloader.batch_size': 2,
            'train_cfg.max_epochs' if is_detector else 'train_cfg.max_iters': length,
            'train_cfg.val_interval': interval,
            'param_scheduler.1.end': length,
            'default_hooks.checkpoint.interval': interval,
            'default_hooks.logger.interval': 1,
            'randomness.seed': 0,
            'work_dir': str(work_dir),
            'experiment_name': f'tiny_{next(names)}',
            'log_level': 'WARNING',
        }
    )
    config.merge_from_dict(options or {})
    return config


def write_config(path, task, sample, *args, **kwargs):
    """Writes the config of a short run that is named by its time; the work dir is an argument."""
    config = tiny_config(task, sample, 'unused', *args, **kwargs)
    config.pop('experiment_name')
    config.dump(path)
    return path


def scalars(work_dir):
    """All logged values by (name, step); the last one of a step that was logged twice."""
    values = {}
    for path in sorted(work_dir.glob('*/vis_data/scalars.json')):
        for line in path.read_text().splitlines():
            record = json.loads(line)
            values |= {(name, record['step']): value for name, value in record.items()}
    return values


@contextmanager
def without_values():
    """Modules that are built here have shapes only."""
    # mmpretrain takes numbers out of a linspace.
    with patch('torch.linspace', partial(torch.linspace, device='cpu')), torch.device('meta'):
        yield
