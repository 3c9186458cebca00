"""Operators: how the network is computed. They know tensors, not networks.

Public, for any network:

- `depthwise_conv2d(x, weight, bias)`: depthwise convolution of (N, H, W, C), kernels from 3 to 31
  and larger. On GPUs it runs Triton kernels, which are compiled at first use.
- `DepthwiseConv(channels, kernel_size)`: the same as a module.
"""

from .depthwise import DepthwiseConv, depthwise_conv2d

__all__ = ['DepthwiseConv', 'depthwise_conv2d']
