"""Conv2Former-T with 5x5 kernels: published top-1 82.8 (arXiv 2211.11943); not trained here."""

_base_ = '../classification/conv2former_t_in1k.py'

model = dict(backbone=dict(kernel_size=5))
