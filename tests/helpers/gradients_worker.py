"""Saves the gradients of a recipe's loss, in one process or as one of several.

All processes together have the same four images, wrapped as our runner does. Nothing is random, and
the losses have the same normalisers for all images, as otherwise the average over processes would
not be the average over images.
"""

import os
import sys
from pathlib import Path

import numpy as np
import torch
from mmcv.ops import batched_nms
from mmdet.models.task_modules.samplers import RandomSampler
from mmdet.registry import TASK_UTILS
from mmdet.structures import DetDataSample
from mmdet.structures.bbox import HorizontalBoxes
from mmdet.structures.mask import BitmapMasks
from mmengine.registry import MODEL_WRAPPERS, MODELS, init_default_scope
from mmengine.structures import InstanceData, PixelData
from mmseg.structures import SegDataSample
from torch import nn

from helpers.tiny import tiny_config
from mmconv2former.engine.device_defaults import distributed_wrapper

SIDE, IMAGES, OBJECTS, ROIS = 64, 4, 4, 32
VARIANTS = {
    'plain': {},
    'frozen stages': {'model.backbone.frozen_stages': 2},
    'checkpointing': {'model.backbone.with_cp': True},
}
COMMON = {
    'model.backbone.drop_path_rate': 0.0,
    'model.backbone.layer_scale_init_value': 1.0,
    'model.backbone.norm_eval': True,
}
FIRST = dict(type='FirstSampler', add_gt_as_proposals=True, neg_pos_ub=-1)
OPTIONS = {
    # As many positives as an image has objects: those are proposals themselves.
    'detection': {
        'model.train_cfg.rpn.sampler': FIRST | dict(num=64, pos_fraction=0.5),
        'model.train_cfg.rcnn.sampler': FIRST | dict(num=ROIS, pos_fraction=OBJECTS / ROIS),
    },
    'segmentation': {
        'model.decode_head.dropout_ratio': 0.0,
        'model.auxiliary_head.dropout_ratio': 0.0,
    },
}


class FirstSampler(RandomSampler):
    def random_choice(self, gallery, num):
        return gallery[:num]


def use_double_precision():
    """NMS knows float32 only, and its result has no gradient."""
    extension = sys.modules[batched_nms.__module__].ext_module
    nms = extension.nms
    extension.nms = lambda boxes, scores, **options: nms(boxes.float(), scores.float(), **options)


def detection_sample(rng):
    corner = torch.rand(OBJECTS, 2, generator=rng) * SIDE / 2
    boxes = torch.cat([corner, corner + SIDE / 4 + corner.flip(1) / 2], 1)
    masks = np.zeros((OBJECTS, SIDE, SIDE), np.uint8)
    for mask, (x1, y1, x2, y2) in zip(masks, boxes.int().tolist()):
        mask[y1:y2, x1 : (x1 + x2) // 2] = 1
    sample = DetDataSample(
        metainfo=dict(img_shape=(SIDE, SIDE), ori_shape=(SIDE, SIDE), scale_factor=(1.0, 1.0))
    )
    sample.gt_instances = InstanceData(
        bboxes=HorizontalBoxes(boxes),
        labels=torch.randint(80, (OBJECTS,), generator=rng),
        masks=BitmapMasks(masks, SIDE, SIDE),
    )
    sample.ignored_instances = InstanceData(bboxes=HorizontalBoxes(torch.zeros(0, 4)))
    return sample


def segmentation_sample(rng):
    sample = SegDataSample(metainfo=dict(img_shape=(SIDE, SIDE), ori_shape=(SIDE, SIDE)))
    sample.gt_sem_seg = PixelData(data=torch.randint(150, (1, SIDE, SIDE), generator=rng))
    return sample


def gradients(config, make_sample, rank, processes):
    torch.manual_seed(0)
    model = MODELS.build(config.model)
    model.init_weights()
    model.double().train()
    for module in model.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            module.eval()
    share = IMAGES // processes
    inputs, samples = [], []
    for index in range(rank * share, (rank + 1) * share):
        rng = torch.Generator().manual_seed(index)
        inputs.append(torch.randint(256, (3, SIDE, SIDE), generator=rng).byte())
        samples.append(make_sample(rng))
    batch = model.data_preprocessor(dict(inputs=inputs, data_samples=samples), training=True)
    batch['inputs'] = batch['inputs'].double()
    forward = model
    if processes > 1:
        settings = distributed_wrapper(None, find_unused_parameters=False)
        forward = MODEL_WRAPPERS.build(settings, default_args=dict(module=model))
    for _ in range(2):  # the second step would report unused parameters
        model.zero_grad()
        loss, _ = model.parse_losses(forward(**batch, mode='loss'))
        loss.backward()
    return {name: p.grad for name, p in model.named_parameters() if p.requires_grad}


def main():
    task, path = sys.argv[1:3]
    rank, processes = int(os.environ.get('RANK', 0)), int(os.environ.get('WORLD_SIZE', 1))
    if processes > 1:
        torch.distributed.init_process_group('gloo')
    use_double_precision()
    TASK_UTILS.register_module(module=FirstSampler)
    init_default_scope('mmdet' if task == 'detection' else 'mmseg')
    make_sample = detection_sample if task == 'detection' else segmentation_sample
    results = {}
    for name, variant in VARIANTS.items():
        options = COMMON | OPTIONS[task] | variant
        config = tiny_config(task, Path('unused'), 'unused', 1, options=options)
        results[name] = gradients(config, make_sample, rank, processes)
    if rank == 0:
        torch.save(results, path)
