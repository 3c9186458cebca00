"""Mask R-CNN with FPN on COCO, for any size of Conv2Former.

A leaf gives the backbone's arch, drop path and weights, and the neck's channels.
"""

_base_ = ['mmdet::_base_/models/mask-rcnn_r50_fpn.py', './coco_3x.py']

model = dict(
    backbone=dict(
        _delete_=True,  # else ResNet's arguments would remain
        type='mmconv2former.Conv2Former',
        out_indices=(0, 1, 2, 3),
    )
)
optim_wrapper = dict(
    optimizer=dict(lr=1e-4),  # at batch 16; our choice (ConvNeXt-T's)
    paramwise_cfg=dict(decay_rate=0.95),  # our choice (ConvNeXt-T's)
)
