"""Cascade Mask R-CNN, Conv2Former-B, 22K weights; published numbers not found, not trained here."""

_base_ = '../_base_/cascade_mask_rcnn.py'

model = dict(
    backbone=dict(
        arch='base',
        kernel_size=7,  # of the published 22K weights
        drop_path_rate=0.9,  # our choice: as with 1K weights
        init_cfg=dict(type='Pretrained', checkpoint='pretrain/conv2former_b_in22k.pth'),
    ),
    neck=dict(in_channels=[96, 192, 384, 768]),
)
optim_wrapper = dict(optimizer=dict(lr=1e-4), paramwise_cfg=dict(decay_rate=0.8))  # ConvNeXt's
