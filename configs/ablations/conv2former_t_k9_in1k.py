"""Conv2Former-T with 9x9 kernels: published number not found; not trained here."""

_base_ = '../classification/conv2former_t_in1k.py'

model = dict(backbone=dict(kernel_size=9))
