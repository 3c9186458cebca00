"""UperNet on CamVid from random weights, Conv2Former-N; results in docs/public_data.md."""

_base_ = '../_base_/upernet_camvid.py'

model = dict(
    backbone=dict(arch='nano', drop_path_rate=0.1),  # our choice
    decode_head=dict(in_channels=[64, 128, 256, 512]),
    auxiliary_head=dict(in_channels=256),
)
