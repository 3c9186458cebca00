"""The recipes around a network of half a million parameters, for pictures of 64 pixels."""

import itertools
import json

from demo import DATA_AND_SCHEDULE, MODEL
from evidence import segmentation_size
from mmengine.config import Config, DictAction

from helpers import ROOT

CHANNELS = [16, 24, 32, 48]
ARCH = dict(channels=CHANNELS, depths=[1, 1, 1, 1], kernel_size=5)
DETECTION = {
    'model.neck.in_channels': CHANNELS,
    'model.neck.out_channels': 16,
    'model.rpn_head.in_channels': 16,
    'model.rpn_head.feat_channels': 16,
    'model.roi_head.bbox_roi_extractor.out_channels': 16,
    'model.roi_head.mask_roi_extractor.out_channels': 16,
    'model.roi_head.bbox_head.in_channels': 16,
    'model.roi_head.bbox_head.fc_out_channels': 32,
    'model.roi_head.mask_head.in_channels': 16,
    'model.roi_head.mask_head.conv_out_channels': 16,
    'model.roi_head.mask_head.num_convs': 1,
    'model.test_cfg.rcnn.score_thr': 0.0,  # else hardly trained weights predict nothing
    'model.test_cfg.rcnn.max_per_img': 20,
    'train_dataloader.batch_size': 2,
    'train_dataloader.dataset.pipeline.3.transforms.0.0.scales': [(64, 64)],
    'val_dataloader.dataset.pipeline.1.scale': (64, 64),
    'test_dataloader.dataset.pipeline.1.scale': (64, 64),
    'param_scheduler.0.end': 8,
    'param_scheduler.1.milestones': [2],
    'optim_wrapper.optimizer.lr': 1e-3,
}
SEGMENTATION = {
    'model.decode_head.in_channels': CHANNELS,
    'model.decode_head.channels': 16,
    'model.decode_head.norm_cfg.type': 'BN',  # SyncBN works on CUDA only
    'model.auxiliary_head.in_channels': CHANNELS[2],
    'model.auxiliary_head.channels': 16,
    'model.auxiliary_head.norm_cfg.type': 'BN',
    'param_scheduler.0.end': 2,
    'param_scheduler.1.begin': 2,
    'optim_wrapper.optimizer.lr': 1e-3,
}
WITHOUT_RANDOM_AUGMENTATION = {
    'detection': {'train_dataloader.dataset.pipeline.2.prob': 0.0},
    'segmentation': {
        'train_dataloader.dataset.pipeline.2.ratio_range': (1.0, 1.0),
        'train_dataloader.dataset.pipeline.4.prob': 0.0,
        'train_dataloader.dataset.pipeline.5': dict(type='RandomFlip', prob=0.0),
    },
}
# Of a segmentor, as options of the command line.
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
    changes = [*MODEL, *DATA_AND_SCHEDULE] if task == 'detection' else segmentation_size(64)
    changes = {key: DictAction._parse_iterable(value) for key, _, value in
               (change.partition('=') for change in changes)}  # fmt: skip
    changes |= DETECTION if task == 'detection' else SEGMENTATION
    recipe = {'detection': 'mask_rcnn_conv2former_n', 'segmentation': 'upernet_conv2former_n'}[task]
    config = Config.fromfile(ROOT / f'configs/{task}/{recipe}.py')
    data_root = sample / ('coco' if task == 'detection' else 'ade/ADEChallengeData2016')
    for loader in ('train_dataloader', 'val_dataloader', 'test_dataloader'):
        changes[f'{loader}.dataset.data_root'] = f'{data_root}/'
        changes[f'{loader}.num_workers'] = 0
        changes[f'{loader}.persistent_workers'] = False
    for key in ('val_evaluator', 'test_evaluator') if task == 'detection' else ():
        changes[f'{key}.ann_file'] = f'{data_root}/annotations/instances_val2017.json'
    by_epoch = task == 'detection'
    config.model.backbone.arch = ARCH
    config.merge_from_dict(changes)
    config.merge_from_dict(
        {
            'model.backbone.init_cfg': None,
            'model.backbone.layer_scale_init_value': 0.1,
            'model.backbone.drop_path_rate': 0.2,
            'train_dataloader.dataset.indices': images,
            'train_dataloader.batch_size': 2,
            'train_cfg.max_epochs' if by_epoch else 'train_cfg.max_iters': length,
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


def scalars(work_dir):
    """All logged values by (name, step); of a step that was logged twice the last."""
    values = {}
    for path in sorted(work_dir.glob('*/vis_data/scalars.json')):
        for line in path.read_text().splitlines():
            record = json.loads(line)
            values |= {(name, record['step']): value for name, value in record.items()}
    return values


SEGMENTATION_RECIPE = 'configs/segmentation/upernet_conv2former_n.py'
QUICK_SEGMENTATION = [
    'model.backbone.init_cfg=None',
    'model.decode_head.channels=32',
    'model.auxiliary_head.channels=32',
    *segmentation_size(64),
    *FOUR_ITERATIONS,
]


def quick_segmentation(sample, work_dir, *options):
    data_root = sample / 'ade/ADEChallengeData2016'
    return ['--data-root', data_root, '--work-dir', work_dir,
            '--cfg-options', *QUICK_SEGMENTATION, *options]  # fmt: skip
