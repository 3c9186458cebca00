"""Conv2Former-T, L1-normalised A: published top-1 82.8 (arXiv 2211.11943); not trained here."""

_base_ = '../classification/conv2former_t_in1k.py'

model = dict(backbone=dict(fusion='l1'))
