"""Mask R-CNN, Conv2Former-T: published box AP 48.0 (arXiv 2211.11943); not trained here."""

_base_ = '../_base_/mask_rcnn.py'

model = dict(
    backbone=dict(
        arch='tiny',
        drop_path_rate=0.2,  # our choice: the paper's for Cascade Mask R-CNN
        init_cfg=dict(type='Pretrained', checkpoint='pretrain/conv2former_t.pth'),
    ),
    neck=dict(in_channels=[72, 144, 288, 576]),
)
