"""UperNet, Conv2Former-B: published mIoU about 51.0 (arXiv 2211.11943); not trained here."""

_base_ = '../_base_/upernet.py'

model = dict(
    backbone=dict(
        arch='base',
        drop_path_rate=0.4,  # our choice (ConvNeXt-B's)
        init_cfg=dict(type='Pretrained', checkpoint='pretrain/conv2former_b.pth'),
    ),
    decode_head=dict(in_channels=[96, 192, 384, 768]),
    auxiliary_head=dict(in_channels=384),
)
