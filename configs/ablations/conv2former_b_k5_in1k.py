"""Conv2Former-B with 5x5 kernels: published top-1 84.1 (arXiv 2211.11943); not trained here."""

_base_ = '../classification/conv2former_b_in1k.py'

model = dict(backbone=dict(kernel_size=5))
