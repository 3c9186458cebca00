"""UperNet, Conv2Former-B, 22K weights; published number not found, not trained here."""

_base_ = '../_base_/upernet_640.py'

model = dict(
    backbone=dict(
        arch='base',
        kernel_size=7,  # of the published 22K weights
        drop_path_rate=0.4,  # our choice (ConvNeXt-B's)
        init_cfg=dict(type='Pretrained', checkpoint='pretrain/conv2former_b_in22k.pth'),
    ),
    decode_head=dict(in_channels=[96, 192, 384, 768]),
    auxiliary_head=dict(in_channels=384),
)
