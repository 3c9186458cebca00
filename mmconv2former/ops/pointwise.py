"""1x1 convolutions of (N, H, W, C), with the faster of two equivalent operators.

These are a matrix product on the last axis and torch's convolution. On a CPU in float32, MKL
computes the first at half the speed of AMD processors, and oneDNN the second at full speed
(docs/performance.md).
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from .dispatch import is_captured, is_cpu_float32
from .memory_format import to_channels_first, to_channels_last


def is_convolution(x: Tensor) -> bool:
    """Whether torch's convolution is used: on a CPU in float32, unless a graph is captured."""
    if is_captured() or x.dim() != 4:
        return False
    return is_cpu_float32(x) and torch.backends.mkldnn.is_available()


def pointwise_conv(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """1x1 convolution, (N, H, W, C_in) -> (N, H, W, C_out).

    Args:
        x: Input (N, H, W, C_in).
        weight: (C_out, C_in).
        bias: (C_out,).
    """
    if not is_convolution(x):
        return F.linear(x, weight, bias)
    return to_channels_last(F.conv2d(to_channels_first(x), weight[..., None, None], bias))


def pointwise_input_gradient(grad: Tensor, weight: Tensor) -> Tensor:
    """Gradient of `pointwise_conv` for x, from the gradient of its output (N, H, W, C_out)."""
    if not is_convolution(grad):
        return grad @ weight
    like_x = grad.new_empty(*grad.shape[:3], weight.shape[1])  # only its shape matters
    grad_x, _, _ = convolution_backward(grad, like_x, weight, (True, False, False))
    return to_channels_last(grad_x)


def pointwise_weight_gradients(grad: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
    """Gradients of `pointwise_conv` for weight and bias; the bias at least in float32."""
    if is_convolution(x):
        like_weight = grad.new_empty(grad.shape[-1], x.shape[-1])
        _, of_weight, of_bias = convolution_backward(grad, x, like_weight, (False, True, True))
        return of_weight.flatten(1), of_bias
    flat = grad.flatten(0, -2)  # (positions, C_out)
    dtype = torch.promote_types(flat.dtype, torch.float32)
    return flat.t() @ x.flatten(0, -2), flat.sum(0, dtype=dtype)


def convolution_backward(
    grad: Tensor, x: Tensor, weight: Tensor, needs: tuple[bool, bool, bool]
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients for input (N, C_in, H, W), weight (C_out, C_in, 1, 1) and bias, as needed."""
    return torch.ops.aten.convolution_backward(
        to_channels_first(grad), to_channels_first(x), weight[..., None, None],
        [weight.shape[0]], [1, 1], [0, 0], [1, 1], False, [0, 0], 1, needs,
    )  # fmt: skip
