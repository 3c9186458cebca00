"""Cascade Mask R-CNN, Conv2Former-L, 22K weights; published numbers not found, not trained here."""

_base_ = '../_base_/cascade_mask_rcnn.py'

model = dict(
    backbone=dict(
        arch='large',
        drop_path_rate=0.7,  # our choice (ConvNeXt-L's)
        init_cfg=dict(type='Pretrained', checkpoint='pretrain/conv2former_l_in22k.pth'),
    ),
    neck=dict(in_channels=[128, 256, 512, 1024]),
)
optim_wrapper = dict(optimizer=dict(lr=1e-4), paramwise_cfg=dict(decay_rate=0.7))  # ConvNeXt's
