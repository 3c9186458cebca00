"""Cascade Mask R-CNN with FPN on COCO, for any size of Conv2Former.

As ConvNeXt's (arXiv 2201.03545, appendix A.3): box heads of four convolutions with SyncBN and one
fully connected layer, GIoU loss on decoded boxes. On one process SyncBN is BatchNorm.

A leaf gives the backbone's arch, drop path and weights, the neck's channels and the decay rate.
"""

_base_ = ['mmdet::_base_/models/cascade-mask-rcnn_r50_fpn.py', './coco_3x.py']

box_head = dict(
    type='ConvFCBBoxHead',
    num_shared_convs=4,
    num_shared_fcs=1,
    in_channels=256,
    conv_out_channels=256,
    fc_out_channels=1024,
    roi_feat_size=7,
    num_classes=80,
    reg_class_agnostic=False,
    reg_decoded_bbox=True,  # GIoU compares boxes, not encoded differences
    norm_cfg=dict(type='SyncBN', requires_grad=True),
    loss_cls=dict(type='CrossEntropyLoss', use_sigmoid=False, loss_weight=1.0),
    loss_bbox=dict(type='GIoULoss', loss_weight=10.0),
)
# Each stage refines the boxes of the one before, so its differences are smaller.
target_stds = [(0.1, 0.1, 0.2, 0.2), (0.05, 0.05, 0.1, 0.1), (0.033, 0.033, 0.067, 0.067)]
model = dict(
    backbone=dict(
        _delete_=True,  # else ResNet's arguments would remain
        type='mmconv2former.Conv2Former',
        out_indices=(0, 1, 2, 3),
    ),
    roi_head=dict(
        bbox_head=[
            dict(
                bbox_coder=dict(
                    type='DeltaXYWHBBoxCoder', target_means=(0.0, 0.0, 0.0, 0.0), target_stds=stds
                ),
                **box_head,
            )
            for stds in target_stds
        ]
    ),
)
optim_wrapper = dict(optimizer=dict(lr=2e-4))  # at batch 16; our choice (ConvNeXt-T's, S's and B's)
