"""UperNet, Conv2Former-S; published number not found, not trained here."""

_base_ = '../_base_/upernet.py'

model = dict(
    backbone=dict(
        arch='small',
        drop_path_rate=0.3,  # our choice (ConvNeXt-S's)
        init_cfg=dict(type='Pretrained', checkpoint='pretrain/conv2former_s.pth'),
    ),
    decode_head=dict(in_channels=[72, 144, 288, 576]),
    auxiliary_head=dict(in_channels=288),
)
