"""How things are computed: operators that know tensors, not networks.

`depthwise_conv2d` and its module `DepthwiseConv` are for use in any network. Triton kernels make
them fast on GPUs, with nothing to compile beforehand, for kernel sizes from 3 to 31 and beyond.
"""

from .depthwise import DepthwiseConv, depthwise_conv2d

__all__ = ['DepthwiseConv', 'depthwise_conv2d']
