"""Cascade Mask R-CNN, Conv2Former-S; published numbers not found, not trained here."""

_base_ = '../_base_/cascade_mask_rcnn.py'

model = dict(
    backbone=dict(
        arch='small',
        drop_path_rate=0.6,  # the paper's (arXiv 2211.11943, section 4.2)
        init_cfg=dict(type='Pretrained', checkpoint='pretrain/conv2former_s.pth'),
    ),
    neck=dict(in_channels=[72, 144, 288, 576]),
)
optim_wrapper = dict(paramwise_cfg=dict(decay_rate=0.7))  # our choice (ConvNeXt-S's)
