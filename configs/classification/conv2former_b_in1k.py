"""Conv2Former-B on ImageNet-1K: published top-1 84.4 (official repository); not trained here."""

_base_ = '../_base_/imagenet_1k.py'

model = dict(
    backbone=dict(
        arch='base',
        drop_path_rate=0.5,  # our choice: ConvNeXt-B's
    ),
    head=dict(in_channels=768),
)
