"""Depthwise convolution of large odd kernels, with a fast weight gradient on the CPU.

The stock weight gradient is the dearest single operation of training this network on a CPU. Here
it is a set of matrix products, one for each column of the kernel: for each channel, rows of the
padded input, shifted by that column, times the rows of the output's gradient. The wanted sums lie
on the diagonals of the products. The rest, off the diagonals, is wasted, and yet cheaper than the
stock operator where `has_fast_weight_gradient` chooses it.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from .registry import MODELS

ROWS_PER_BLOCK = 16  # of the gradient in one product: few waste less, many need fewer products

# How the weight gradient is computed: 'auto' as `has_fast_weight_gradient` says, 'stock' never by
# matrix products, 'products' always by them.
weight_gradient_method = 'auto'


@MODELS.register_module()
class DepthwiseConv(nn.Conv2d):
    """Depthwise convolution of odd kernel with 'same' zero padding, (N, H, W, C) in and out.

    Another implementation takes its place by `Conv2Former(depthwise_conv='NameInTheRegistry')`: a
    module with these arguments, input and output, and the parameters `weight` and `bias`.
    """

    def __init__(self, channels: int, kernel_size: int) -> None:
        super().__init__(channels, channels, kernel_size, padding=kernel_size // 2, groups=channels)

    def forward(self, x: Tensor) -> Tensor:
        if torch.is_grad_enabled() and has_fast_weight_gradient(to_channels_first(x), self.weight):
            return DepthwiseConvFunction.apply(x, self.weight, self.bias)
        return depthwise_conv(x, self.weight, self.bias)


def to_channels_first(x: Tensor) -> Tensor:
    """(N, H, W, C) -> (N, C, H, W), a view; of a contiguous tensor it is `torch.channels_last`."""
    return x.permute(0, 3, 1, 2)


def to_channels_last(x: Tensor) -> Tensor:
    """(N, C, H, W) -> contiguous (N, H, W, C), a view if `x` is `torch.channels_last`."""
    return x.permute(0, 2, 3, 1).contiguous()


def depthwise_conv(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """Depthwise convolution with stride 1 and 'same' zero padding, (N, H, W, C) in and out.

    Args:
        x: Input (N, H, W, C).
        weight: Kernel (C, 1, K, K), K odd.
        bias: (C,).
    """
    padding, channels = weight.shape[-1] // 2, weight.shape[0]
    return to_channels_last(
        F.conv2d(to_channels_first(x), weight, bias, padding=padding, groups=channels)
    )


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
        weight.shape[0], [needs_x, needs_weight and not is_fast, needs_bias],
    )  # fmt: skip
    if is_fast:
        grad_weight = weight_gradient(x, grad, weight.shape[-1])
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
    is_measured = x.device.type == 'cpu' and x.dtype == torch.float32 and not is_cpu_autocast()
    return is_measured and weight.shape[-1] >= 9 and x.shape[2] * x.shape[3] <= x.shape[1]


def is_captured() -> bool:
    """Whether a graph is being made of what runs: there only stock operators belong."""
    return torch.jit.is_tracing() or torch.compiler.is_compiling()


def is_cpu_autocast() -> bool:
    if hasattr(torch, 'get_autocast_dtype'):  # torch >= 2.4
        return torch.is_autocast_enabled('cpu')
    return torch.is_autocast_cpu_enabled()


class DepthwiseConvFunction(torch.autograd.Function):
    """`depthwise_conv` with the gradients of `depthwise_conv_backward`."""

    @staticmethod
    def forward(ctx, x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        ctx.save_for_backward(x, weight)
        return depthwise_conv(x, weight, bias)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad: Tensor) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        return depthwise_conv_backward(grad, *ctx.saved_tensors, ctx.needs_input_grad)


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
    missing_rows = blocks * rows - height
    pad = kernel_size // 2
    padded_rows = rows + 2 * pad
    matrices = batch * channels * blocks

    x = F.pad(x.contiguous(), (pad, pad, pad, pad + missing_rows))
    x = x.unfold(2, padded_rows, rows).transpose(3, 4)  # (N, C, blocks, padded_rows, padded W)
    x = x.reshape(matrices, padded_rows, width + 2 * pad)
    grad = F.pad(grad.contiguous(), (0, 0, 0, missing_rows))
    grad = grad.view(matrices, rows, width).transpose(1, 2)
    products = x.new_empty(kernel_size, matrices, padded_rows, rows)
    for column, product in enumerate(products):
        torch.bmm(x[..., column : column + width], grad, out=product)
    products = products.view(kernel_size, batch, channels, blocks, padded_rows, rows)
    # [j, n, c, b, i + r, r] for all rows r: a step along r is one row down and one column right
    *outer, row_stride, column_stride = products.stride()
    diagonals = products.as_strided(
        (kernel_size, batch, channels, blocks, kernel_size, rows),
        (*outer, row_stride, row_stride + column_stride),
    )
    return diagonals.sum((1, 3, 5)).permute(1, 2, 0).unsqueeze(1)
