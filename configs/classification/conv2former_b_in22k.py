"""Conv2Former-B on ImageNet-22K; no number published for this step, not trained here."""

_base_ = '../_base_/imagenet_22k.py'

model = dict(
    backbone=dict(
        arch='base',
        kernel_size=7,  # as the published 22K weights of B
        drop_path_rate=0.1,  # our choice: ConvNeXt-B's on 22K
    ),
    head=dict(in_channels=768),
)
