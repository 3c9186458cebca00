"""UperNet, Conv2Former-T: published mIoU 48.0, multi-scale (arXiv 2211.11943); not trained here."""

_base_ = '../_base_/upernet.py'

model = dict(
    backbone=dict(
        arch='tiny',
        drop_path_rate=0.4,  # our choice (ConvNeXt-T's)
        init_cfg=dict(type='Pretrained', checkpoint='pretrain/conv2former_t.pth'),
    ),
    decode_head=dict(in_channels=[72, 144, 288, 576]),
    auxiliary_head=dict(in_channels=288),
)
