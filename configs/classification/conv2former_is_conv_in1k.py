"""Conv2Former-IS, conv embedding: published top-1 82.0 (arXiv 2211.11943); not trained here."""

_base_ = './conv2former_is_in1k.py'

model = dict(backbone=dict(patch_embedding='conv'))
