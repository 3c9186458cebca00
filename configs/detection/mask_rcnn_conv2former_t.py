"""Mask R-CNN, Conv2Former-T: published box AP 48.0 (arXiv 2211.11943); not trained here."""

_base_ = '../_base_/mask_rcnn.py'

# Drop path: our choice, what the paper gives for Cascade Mask R-CNN with T.
checkpoint = 'pretrain/conv2former_t.pth'
model = dict(
    backbone=dict(
        arch='tiny',
        drop_path_rate=0.2,
        init_cfg=dict(type='Pretrained', checkpoint=checkpoint),
    ),
    neck=dict(in_channels=[72, 144, 288, 576]),
)
optim_wrapper = dict(paramwise_cfg=dict(decay_rate=0.95))  # our choice (ConvNeXt-T's)
