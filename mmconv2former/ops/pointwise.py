"""1x1 convolutions, by the faster of two operators that compute the same.

Either a matrix product on the last axis or torch's convolution. On a CPU in float32 the first is
MKL's, which leaves half the speed of AMD's processors unused, the second oneDNN's, which does not
(docs/performance.md).
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from .memory_format import is_captured, is_cpu_float32, to_channels_first, to_channels_last

# How 1x1 convolutions are computed: 'auto' as `is_convolution` says, 'linear' always by matrix
# products, 'convolution' always by torch's convolution.
product_method = 'auto'


def is_convolution(x: Tensor) -> bool:
    """Whether torch's convolution is chosen, the one place that decides.

    By measurement on a CPU in float32; elsewhere never, nor where a graph is captured.
    `product_method` overrides it.
    """
    if is_captured() or product_method == 'linear' or x.dim() != 4:
        return False
    if product_method == 'convolution':
        return True
    return is_cpu_float32(x) and torch.backends.mkldnn.is_available()


def product(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """1x1 convolution, (N, H, W, C_in) -> (N, H, W, C_out).

    Args:
        x: Input (N, H, W, C_in).
        weight: (C_out, C_in).
        bias: (C_out,).
    """
    if not is_convolution(x):
        return F.linear(x, weight, bias)
    return to_channels_last(F.conv2d(to_channels_first(x), weight[..., None, None], bias))


def product_input_gradient(grad: Tensor, weight: Tensor) -> Tensor:
    """Gradient of `product` for its input, (N, H, W, C_out) -> (N, H, W, C_in).

    Args:
        grad: Gradient of the output (N, H, W, C_out).
        weight: (C_out, C_in).
    """
    if not is_convolution(grad):
        return grad @ weight
    like_x = grad.new_empty(*grad.shape[:3], weight.shape[1])  # only its shape matters
    return convolution_gradients(grad, like_x, weight, (True, False, False))[0]


def product_gradient(grad: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
    """Gradients of `product` for weight (C_out, C_in) and bias (C_out,), of at least float32.

    Args:
        grad: Gradient of the output (N, H, W, C_out).
        x: Input (N, H, W, C_in).
    """
    if is_convolution(x):
        like_weight = grad.new_empty(grad.shape[-1], x.shape[-1])
        _, of_weight, of_bias = convolution_gradients(grad, x, like_weight, (False, True, True))
        return of_weight.flatten(1), of_bias
    flat = grad.flatten(0, -2)  # (positions, C_out)
    dtype = torch.float64 if flat.dtype == torch.float64 else torch.float32
    return flat.t() @ x.flatten(0, -2), flat.sum(0, dtype=dtype)


def convolution_gradients(
    grad: Tensor, x: Tensor, weight: Tensor, needs: tuple[bool, bool, bool]
) -> tuple[Tensor, Tensor, Tensor]:
    """Those of input (N, H, W, C_in), weight and bias that are needed."""
    of_x, of_weight, of_bias = torch.ops.aten.convolution_backward(
        to_channels_first(grad), to_channels_first(x), weight[..., None, None],
        [weight.shape[0]], [1, 1], [0, 0], [1, 1], False, [0, 0], 1, needs,
    )  # fmt: skip
    return to_channels_last(of_x) if needs[0] else of_x, of_weight, of_bias
