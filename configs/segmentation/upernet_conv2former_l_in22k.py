"""UperNet, Conv2Former-L, 22K weights: published mIoU 54.3 (arXiv 2211.11943); not trained here."""

_base_ = '../_base_/upernet_640.py'

model = dict(
    backbone=dict(
        arch='large',
        drop_path_rate=0.4,  # our choice (ConvNeXt-L's)
        init_cfg=dict(type='Pretrained', checkpoint='pretrain/conv2former_l_in22k.pth'),
    ),
    decode_head=dict(in_channels=[128, 256, 512, 1024]),
    auxiliary_head=dict(in_channels=512),
)
