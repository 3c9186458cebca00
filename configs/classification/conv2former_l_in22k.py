"""Conv2Former-L on ImageNet-22K; no number published for this step, not trained here."""

_base_ = '../_base_/imagenet_22k.py'

model = dict(
    backbone=dict(
        arch='large',
        drop_path_rate=0.1,  # our choice: ConvNeXt-L's on 22K
    ),
    head=dict(in_channels=1024),
)
