"""Conv2Former-B with 7x7 kernels: published top-1 84.2 (arXiv 2211.11943); not trained here."""

_base_ = '../classification/conv2former_b_in1k.py'

model = dict(backbone=dict(kernel_size=7))
