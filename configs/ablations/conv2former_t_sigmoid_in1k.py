"""Conv2Former-T, sigmoid(A) * V: published top-1 82.3 (arXiv 2211.11943); not trained here."""

_base_ = '../classification/conv2former_t_in1k.py'

model = dict(backbone=dict(fusion='sigmoid'))
