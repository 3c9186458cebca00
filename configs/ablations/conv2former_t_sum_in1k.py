"""Conv2Former-T, A + V: published top-1 82.7 (arXiv 2211.11943); not trained here."""

_base_ = '../classification/conv2former_t_in1k.py'

model = dict(backbone=dict(fusion='sum'))
