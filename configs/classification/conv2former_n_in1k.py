"""Conv2Former-N on ImageNet-1K: published top-1 81.5 (official repository); not trained here."""

_base_ = '../_base_/imagenet_1k.py'

model = dict(
    backbone=dict(
        arch='nano',
        drop_path_rate=0.05,  # our choice: half of T's
    ),
    head=dict(in_channels=512),
)
