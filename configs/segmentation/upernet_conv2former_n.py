"""UperNet, Conv2Former-N; no published result, not trained here."""

_base_ = '../_base_/upernet.py'

model = dict(
    backbone=dict(
        arch='nano',
        drop_path_rate=0.2,  # our choice: half of T's
        init_cfg=dict(type='Pretrained', checkpoint='pretrain/conv2former_n.pth'),
    ),
    decode_head=dict(in_channels=[64, 128, 256, 512]),
    auxiliary_head=dict(in_channels=256),
)
