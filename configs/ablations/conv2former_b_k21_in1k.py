"""Conv2Former-B with 21x21 kernels: published top-1 84.5 (arXiv 2211.11943); not trained here."""

_base_ = '../classification/conv2former_b_in1k.py'

model = dict(backbone=dict(kernel_size=21))
