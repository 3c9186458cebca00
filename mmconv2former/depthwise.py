"""Depthwise convolution of large odd kernels, with a fast weight gradient on the CPU.

The stock weight gradient is the dearest single operation of training this network on a CPU. Here
it is a set of matrix products, one for each column of the kernel: for each channel, rows of the
padded input, shifted by that column, times the rows of the output's gradient. The wanted sums lie
on the diagonals of the products. The rest, off the diagonals, is wasted, and yet cheaper than the
stock operator where `has_fast_weight_gradient` chooses it.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, overload

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from .layout import is_captured, is_cpu_float32, to_channels_first, to_channels_last
from .registry import MODELS

ROWS_PER_BLOCK = 16  # of the gradient in one product: few waste less, many need fewer products
CACHE_BYTES = 2**22  # of the input at once, for which the products stay in a core's cache

# How the weight gradient is computed: 'auto' as `has_fast_weight_gradient` says, 'stock' never by
# matrix products, 'products' always by them.
weight_gradient_method = 'auto'


@MODELS.register_module()
class DepthwiseConv(nn.Conv2d):
    """Depthwise convolution of odd kernel with 'same' zero padding, (N, H, W, C) in and out.

    Another implementation takes its place by `Conv2Former(depthwise_conv='NameInTheRegistry')`: a
    module with these arguments, input and output, and the parameters `weight` and `bias`.
    """

    bias: Tensor

    def __init__(self, channels: int, kernel_size: int) -> None:
        super().__init__(channels, channels, kernel_size, padding=kernel_size // 2, groups=channels)

    def forward(self, x: Tensor) -> Tensor:
        if torch.is_grad_enabled() and has_fast_weight_gradient(to_channels_first(x), self.weight):
            return DepthwiseConvFunction.apply(x, self.weight, self.bias)
        return depthwise_conv(x, self.weight, self.bias)


def depthwise_conv(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """Depthwise convolution with stride 1 and 'same' zero padding, (N, H, W, C) in and out.

    Args:
        x: Input (N, H, W, C).
        weight: Kernel (C, 1, K, K), K odd.
        bias: (C,).
    """
    # int: torch < 2.4 traces sizes as tensors, which are no padding
    padding, channels = int(weight.shape[-1]) // 2, int(weight.shape[0])
    return to_channels_last(
        F.conv2d(to_channels_first(x), weight, bias, padding=padding, groups=channels)
    )


@overload
def depthwise_conv_backward(
    grad: Tensor, x: Tensor, weight: Tensor
) -> tuple[Tensor, Tensor, Tensor]: ...


@overload
def depthwise_conv_backward(
    grad: Tensor, x: Tensor, weight: Tensor, needs: Sequence[bool]
) -> tuple[Tensor | None, Tensor | None, Tensor | None]: ...


def depthwise_conv_backward(
    grad: Tensor, x: Tensor, weight: Tensor, needs: Sequence[bool] = (True, True, True)
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """Gradients of `depthwise_conv` for input, kernel and bias.

    Args:
        grad: Gradient of the output (N, H, W, C).
        x: Input (N, H, W, C).
        weight: Kernel (C, 1, K, K).
        needs: Which of the three are wanted; the others are None.
    """
    x, grad = to_channels_first(x), to_channels_first(grad)
    needs_x, needs_weight, needs_bias = needs
    is_fast = needs_weight and has_fast_weight_gradient(x, weight)
    padding = weight.shape[-1] // 2
    grad_x, grad_weight, grad_bias = torch.ops.aten.convolution_backward(
        grad, x, weight, [weight.shape[0]], [1, 1], [padding, padding], [1, 1], False, [0, 0],
        weight.shape[0], [needs_x, needs_weight and not is_fast, needs_bias and not is_fast],
    )  # fmt: skip
    if is_fast:
        grad_weight = weight_gradient(x, grad, weight.shape[-1])
        # oneDNN would compute the weight gradient to give that of the bias.
        grad_bias = grad.sum((0, 2, 3)) if needs_bias else None
    return to_channels_last(grad_x) if needs_x else None, grad_weight, grad_bias


def has_fast_weight_gradient(x: Tensor, weight: Tensor) -> bool:
    """Whether the matrix products are chosen for the weight gradient, the one place that decides.

    By measurement on 2 CPU cores in float32 (docs/performance.md); never on CUDA, where it was not
    measured, nor where a graph is captured. `weight_gradient_method` overrides it.

    Args:
        x: Input (N, C, H, W).
        weight: Kernel (C, 1, K, K).
    """
    if is_captured() or not weight.requires_grad or weight_gradient_method == 'stock':
        return False
    if weight_gradient_method == 'products':
        return True
    if not is_cpu_float32(x):
        return False
    kernel_size, channels, positions = weight.shape[-1], x.shape[1], x.shape[2] * x.shape[3]
    if kernel_size >= 13:
        return channels * positions >= 70_000
    if kernel_size >= 9:
        return channels * positions >= 200_000 or channels >= 512
    return kernel_size == 7 and positions >= 2048


class DepthwiseConvFunction(torch.autograd.Function):
    """`depthwise_conv` with the gradients of `depthwise_conv_backward`."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        ctx.save_for_backward(x, weight)
        return depthwise_conv(x, weight, bias)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        x, weight = ctx.saved_tensors
        return depthwise_conv_backward(grad, x, weight, ctx.needs_input_grad)


def weight_gradient(x: Tensor, grad: Tensor, kernel_size: int) -> Tensor:
    """Gradient of a depthwise convolution's kernel, with stride 1 and 'same' zero padding.

    Args:
        x: Input (N, C, H, W), in any memory layout.
        grad: Gradient of the output (N, C, H, W).
        kernel_size: K, odd.

    Returns:
        (C, 1, K, K), at [c, 0, i, j] the sum over n, h, w of x[n, c, h + i - K // 2,
        w + j - K // 2] * grad[n, c, h, w].
    """
    batch, channels, height, width = x.shape
    rows = min(ROWS_PER_BLOCK, height)
    blocks = -(-height // rows)
    padded_rows = rows + 2 * (kernel_size // 2)
    bytes_per_channel = blocks * padded_rows * (width + kernel_size) * x.element_size()
    channels_at_once = max(1, CACHE_BYTES // bytes_per_channel)
    result = x.new_zeros(channels, kernel_size, kernel_size)
    for image in range(batch):
        for start in range(0, channels, channels_at_once):
            part = slice(start, start + channels_at_once)
            result[part] += weight_gradient_of_part(
                x[image, part].contiguous(), grad[image, part].contiguous(), kernel_size, rows
            )
    return result.unsqueeze(1)


def weight_gradient_of_part(x: Tensor, grad: Tensor, kernel_size: int, rows: int) -> Tensor:
    """`weight_gradient` of some channels of one image, (C, H, W) -> (C, K, K)."""
    channels, height, width = x.shape
    blocks = -(-height // rows)
    missing_rows = blocks * rows - height
    pad = kernel_size // 2
    padded_rows = rows + 2 * pad

    x = F.pad(x, (pad, pad, pad, pad + missing_rows))
    x = x.unfold(1, padded_rows, rows).transpose(2, 3)  # (C, blocks, padded_rows, padded W)
    x = x.reshape(channels * blocks, padded_rows, width + 2 * pad)
    grad = F.pad(grad, (0, 0, 0, missing_rows))
    grad = grad.view(channels * blocks, rows, width).transpose(1, 2)
    products = x.new_empty(kernel_size, channels * blocks, padded_rows, rows)
    for column, product in enumerate(products):
        torch.bmm(x[..., column : column + width], grad, out=product)
    products = products.view(kernel_size, channels, blocks, padded_rows, rows)
    # [j, c, b, i + r, r] for all rows r: a step along r is one row down and one column right
    *outer, row_stride, column_stride = products.stride()
    diagonals = products.as_strided(
        (kernel_size, channels, blocks, kernel_size, rows),
        (*outer, row_stride, row_stride + column_stride),
    )
    return diagonals.sum((2, 4)).permute(1, 2, 0)
