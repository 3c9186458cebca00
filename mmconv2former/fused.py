"""Convolutions with what follows them in one operator, for inference on a CPU.

oneDNN writes the result of a convolution once, with GELU, a product or a sum applied, where stock
operators write and read it again. The operators are those that `torch.compile` uses on CPUs.
Elsewhere, and wherever gradients or a graph are wanted, stock operators compute the same.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from .depthwise import depthwise_conv
from .layout import is_captured, is_cpu_float32, to_channels_first, to_channels_last
from .product import product


def is_fusible(x: Tensor) -> bool:
    """Whether oneDNN's fused operators can be used on `x`, the one place that decides."""
    is_plain = type(x) is Tensor  # what pretends to be a tensor knows stock operators only
    wants_more = torch.is_grad_enabled() or is_captured()
    return is_plain and not wants_more and is_cpu_float32(x) and HAS_FUSED_OPERATORS


HAS_FUSED_OPERATORS = torch.backends.mkldnn.is_available() and hasattr(
    torch.ops.mkldnn, '_convolution_pointwise'
)


def conv(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """1x1 or depthwise convolution, by the shape of the weight.

    Args:
        x: Input (N, H, W, C_in).
        weight: (C_out, C_in), or a depthwise kernel (C_in, 1, K, K) with 'same' padding.
        bias: (C_out,).

    Returns:
        (N, H, W, C_out).
    """
    return product(x, weight, bias) if weight.dim() == 2 else depthwise_conv(x, weight, bias)


def conv_gelu(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """GELU of `conv`."""
    if not is_fusible(x):
        return F.gelu(conv(x, weight, bias))
    operator = torch.ops.mkldnn._convolution_pointwise.default
    return to_channels_last(operator(*operands(x, weight, bias), 'gelu', [], 'none'))


def conv_times(x: Tensor, weight: Tensor, bias: Tensor, other: Tensor) -> Tensor:
    """`conv` times a tensor (N, H, W, C_out)."""
    if not is_fusible(x):
        return conv(x, weight, bias) * other
    return binary(x, weight, bias, other, 'mul')


def conv_plus(x: Tensor, weight: Tensor, bias: Tensor, other: Tensor) -> Tensor:
    """`conv` plus a tensor (N, H, W, C_out)."""
    if not is_fusible(x):
        return conv(x, weight, bias) + other
    return binary(x, weight, bias, other, 'add')


def binary(x: Tensor, weight: Tensor, bias: Tensor, other: Tensor, operation: str) -> Tensor:
    operator = torch.ops.mkldnn._convolution_pointwise.binary
    first, *rest = operands(x, weight, bias)
    other = to_channels_first(other)
    return to_channels_last(operator(first, other, *rest, operation, 1.0, None, [], None))


def operands(x: Tensor, weight: Tensor, bias: Tensor) -> list:
    """Input, weight, bias, padding, stride, dilation, groups, as oneDNN takes them."""
    is_depthwise = weight.dim() == 4
    weight = weight if is_depthwise else weight[..., None, None]
    groups = weight.shape[0] if is_depthwise else 1
    padding = [weight.shape[-1] // 2] * 2
    return [to_channels_first(x), weight, bias, padding, [1, 1], [1, 1], groups]
