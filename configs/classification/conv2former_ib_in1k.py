"""Conv2Former-IB, 16x16 patches: published top-1 82.7 (arXiv 2211.11943); not trained here."""

_base_ = './conv2former_is_in1k.py'

model = dict(
    backbone=dict(arch='ib', drop_path_rate=0.4),  # our choice
    head=dict(in_channels=640),
)
