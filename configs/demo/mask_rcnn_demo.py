"""The demo: Mask R-CNN with Conv2Former-N on the embedded sample (docs/demo.md)."""

_base_ = '../_base_/mask_rcnn_small.py'

model = dict(backbone=dict(arch='nano'), neck=dict(in_channels=[64, 128, 256, 512]))
