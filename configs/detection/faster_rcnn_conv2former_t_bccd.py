"""Faster R-CNN on BCCD from random weights, Conv2Former-T; not trained here."""

_base_ = '../_base_/faster_rcnn_bccd.py'

model = dict(
    backbone=dict(arch='tiny', drop_path_rate=0.2),  # our choice: as on COCO
    neck=dict(in_channels=[72, 144, 288, 576]),
)
