"""Saves the gradients of a recipe's loss, in one process or as one of several.

    python gradients_worker.py detection FILE.pt
    torchrun --nproc_per_node 2 gradients_worker.py detection FILE.pt

The same four pictures are in one batch, or two in each of two processes, wrapped as our runner
does. Everything random is taken out, and the losses' normalisers are the same for all pictures, as
averages of averages are not the average otherwise.
"""

import os
import sys
from pathlib import Path

import torch
from demo import CONFIG
from mmcv.ops import batched_nms
from mmengine.config import Config
from mmengine.registry import MODEL_WRAPPERS, MODELS, init_default_scope
from torch import nn

from mmconv2former.engine.device_defaults import distributed_wrapper

ROOT = Path(__file__).parents[2]
SIDE, PICTURES, OBJECTS, ROIS = 64, 4, 4, 32
VARIANTS = {
    'plain': {},
    'frozen stages': {'model.backbone.frozen_stages': 2},
    'checkpointing': {'model.backbone.with_cp': True},
}
SMALL = {
    'model.backbone.init_cfg': None,
    'model.backbone.drop_path_rate': 0.0,
    'model.backbone.layer_scale_init_value': 1.0,
    'model.backbone.norm_eval': True,
}


def detection_config():
    config = Config.fromfile(ROOT / CONFIG)
    config.model.backbone.arch = 'nano'
    config.model.neck.in_channels = [64, 128, 256, 512]
    first = dict(type='mmdet.FirstSampler', add_gt_as_proposals=True, neg_pos_ub=-1)
    # as many positives as a picture has objects: those are proposals themselves
    config.merge_from_dict(
        {
            'model.train_cfg.rpn.sampler': first | dict(num=64, pos_fraction=0.5),
            'model.train_cfg.rcnn.sampler': first | dict(num=ROIS, pos_fraction=OBJECTS / ROIS),
        }
    )
    return config


def use_double_precision():
    extension = sys.modules[batched_nms.__module__].ext_module
    nms = extension.nms  # for float32 only, and its result has no gradient
    extension.nms = lambda boxes, scores, **options: nms(boxes.float(), scores.float(), **options)


def register_first_sampler():
    from mmdet.models.task_modules.samplers import RandomSampler
    from mmdet.registry import TASK_UTILS

    class FirstSampler(RandomSampler):
        def random_choice(self, gallery, num):
            return gallery[:num]

    TASK_UTILS.register_module(module=FirstSampler)


def detection_sample(rng):
    import numpy as np
    from mmdet.structures import DetDataSample
    from mmdet.structures.bbox import HorizontalBoxes
    from mmdet.structures.mask import BitmapMasks
    from mmengine.structures import InstanceData

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


def segmentation_config():
    config = Config.fromfile(ROOT / 'configs/segmentation/upernet_conv2former_n.py')
    config.merge_from_dict(
        {
            'model.data_preprocessor.size': (SIDE, SIDE),
            'model.decode_head.channels': 32,
            'model.decode_head.dropout_ratio': 0.0,
            'model.decode_head.norm_cfg.type': 'BN',  # SyncBN works on CUDA only
            'model.auxiliary_head.norm_cfg.type': 'BN',
            'model.auxiliary_head.channels': 32,
            'model.auxiliary_head.dropout_ratio': 0.0,
        }
    )
    return config


def segmentation_sample(rng):
    from mmengine.structures import PixelData
    from mmseg.structures import SegDataSample

    sample = SegDataSample(metainfo=dict(img_shape=(SIDE, SIDE), ori_shape=(SIDE, SIDE)))
    labels = torch.randint(150, (1, SIDE, SIDE), generator=rng)
    sample.gt_sem_seg = PixelData(data=labels)
    return sample


def gradients(config, options, make_sample):
    config = config.copy()
    config.merge_from_dict(SMALL | options)
    torch.manual_seed(0)
    model = MODELS.build(config.model)
    model.init_weights()
    model.double().train()
    for module in model.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            module.eval()
    rank, processes = int(os.environ.get('RANK', 0)), int(os.environ.get('WORLD_SIZE', 1))
    share = PICTURES // processes
    mine = range(rank * share, (rank + 1) * share)
    inputs, samples = [], []
    for index in mine:
        rng = torch.Generator().manual_seed(index)
        inputs.append(torch.randint(256, (3, SIDE, SIDE), generator=rng).byte())
        samples.append(make_sample(rng))
    batch = model.data_preprocessor(dict(inputs=inputs, data_samples=samples), training=True)
    batch['inputs'] = batch['inputs'].double()
    forward = model
    if processes > 1:
        settings = distributed_wrapper(None, find_unused_parameters=False)
        forward = MODEL_WRAPPERS.build(settings, default_args=dict(module=model))
    for _ in range(2):  # an unused parameter would be reported by the second
        model.zero_grad()
        loss, _ = model.parse_losses(forward(**batch, mode='loss'))
        loss.backward()
    return {
        name: parameter.grad for name, parameter in model.named_parameters()
        if parameter.requires_grad
    }  # fmt: skip


def main():
    kind, path = sys.argv[1:]
    if 'RANK' in os.environ:
        torch.distributed.init_process_group('gloo')
    if kind == 'detection':
        use_double_precision()
        register_first_sampler()
        config, make_sample = detection_config(), detection_sample
    else:
        config, make_sample = segmentation_config(), segmentation_sample
    init_default_scope(config.default_scope)
    results = {name: gradients(config, options, make_sample) for name, options in VARIANTS.items()}
    if int(os.environ.get('RANK', 0)) == 0:
        torch.save(results, path)


if __name__ == '__main__':
    main()
