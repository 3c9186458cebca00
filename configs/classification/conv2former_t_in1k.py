"""Conv2Former-T on ImageNet-1K: published top-1 83.2 (official repository); not trained here."""

_base_ = '../_base_/imagenet_1k.py'

model = dict(
    backbone=dict(
        arch='tiny',
        drop_path_rate=0.1,  # our choice: ConvNeXt-T's
    ),
    head=dict(in_channels=576),
)
