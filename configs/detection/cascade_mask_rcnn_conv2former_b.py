"""Cascade Mask R-CNN, Conv2Former-B; published numbers not found, not trained here."""

_base_ = '../_base_/cascade_mask_rcnn.py'

model = dict(
    backbone=dict(
        arch='base',
        drop_path_rate=0.9,  # the paper's (arXiv 2211.11943, section 4.2)
        init_cfg=dict(type='Pretrained', checkpoint='pretrain/conv2former_b.pth'),
    ),
    neck=dict(in_channels=[96, 192, 384, 768]),
)
optim_wrapper = dict(paramwise_cfg=dict(decay_rate=0.8))  # our choice (ConvNeXt-B's)
