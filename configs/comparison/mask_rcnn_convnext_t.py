"""Mask R-CNN, ConvNeXt-T instead of Conv2Former-T, all else equal; not trained here."""

_base_ = '../detection/mask_rcnn_conv2former_t.py'

model = dict(
    backbone=dict(
        _delete_=True,
        type='mmconv2former.Baseline',
        name='convnext_tiny',
        drop_path_rate=0.2,
        init_cfg=dict(type='Pretrained', checkpoint='pretrain/convnext_tiny.pth'),
    ),
    neck=dict(in_channels=[96, 192, 384, 768]),
)
