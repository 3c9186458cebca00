"""Conv2Former-S on ImageNet-22K; no number published for this step, not trained here."""

_base_ = '../_base_/imagenet_22k.py'

model = dict(
    backbone=dict(
        arch='small',
        drop_path_rate=0.0,  # our choice: ConvNeXt-S's on 22K
    ),
    head=dict(in_channels=576),
)
