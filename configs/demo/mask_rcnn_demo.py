"""The demo: Mask R-CNN with Conv2Former-T on the embedded sample (docs/demo.md)."""

_base_ = '../_base_/mask_rcnn_small.py'

model = dict(backbone=dict(arch='tiny'), neck=dict(in_channels=[72, 144, 288, 576]))
