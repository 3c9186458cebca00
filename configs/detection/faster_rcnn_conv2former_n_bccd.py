"""Faster R-CNN on BCCD from random weights, Conv2Former-N; results in docs/public_data.md."""

_base_ = '../_base_/faster_rcnn_bccd.py'

model = dict(
    backbone=dict(arch='nano', drop_path_rate=0.1),  # our choice: as on COCO
    neck=dict(in_channels=[64, 128, 256, 512]),
)
