"""Conv2Former-T with 21x21 kernels: published top-1 83.4 (arXiv 2211.11943); not trained here."""

_base_ = '../classification/conv2former_t_in1k.py'

model = dict(backbone=dict(kernel_size=21))
