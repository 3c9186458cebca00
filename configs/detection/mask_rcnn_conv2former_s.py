"""Mask R-CNN, Conv2Former-S; no published result, not trained here."""

_base_ = '../_base_/mask_rcnn.py'

model = dict(
    backbone=dict(
        arch='small',
        drop_path_rate=0.6,  # our choice: the paper's for Cascade Mask R-CNN
        init_cfg=dict(type='Pretrained', checkpoint='pretrain/conv2former_s.pth'),
    ),
    neck=dict(in_channels=[72, 144, 288, 576]),
)
