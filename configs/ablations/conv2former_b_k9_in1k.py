"""Conv2Former-B with 9x9 kernels: published number not found; not trained here."""

_base_ = '../classification/conv2former_b_in1k.py'

model = dict(backbone=dict(kernel_size=9))
