"""Conv2Former-IB, conv embedding: published top-1 83.0 (arXiv 2211.11943); not trained here."""

_base_ = './conv2former_ib_in1k.py'

model = dict(backbone=dict(patch_embedding='conv'))
