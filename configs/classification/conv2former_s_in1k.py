"""Conv2Former-S on ImageNet-1K: published top-1 84.1 (official repository); not trained here."""

_base_ = '../_base_/imagenet_1k.py'

model = dict(
    backbone=dict(
        arch='small',
        drop_path_rate=0.4,  # our choice: ConvNeXt-S's
    ),
    head=dict(in_channels=576),
)
