"""UperNet on CamVid from random weights, Conv2Former-T; not trained here."""

_base_ = '../_base_/upernet_camvid.py'

model = dict(
    backbone=dict(arch='tiny', drop_path_rate=0.2),  # our choice
    decode_head=dict(in_channels=[72, 144, 288, 576]),
    auxiliary_head=dict(in_channels=288),
)
