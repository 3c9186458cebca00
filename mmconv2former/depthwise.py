"""Depthwise convolution of large odd kernels, with a fast weight gradient on the CPU.

The stock weight gradient is the dearest single operation of training this network on a CPU. Here
it is a batched matrix product: for each channel, rows of the padded input, shifted by each column
of the kernel, times the rows of the output's gradient. The wanted sums lie on the diagonals of the
products. The rest, off the diagonals, is wasted, and yet less work than the stock operator does
on small maps with large kernels, where `has_fast_weight_gradient` chooses it.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

ROWS_PER_BLOCK = 16  # of the gradient in one product: few waste less, many need fewer products


class DepthwiseConv(nn.Conv2d):
    """Depthwise convolution of odd kernel with 'same' zero padding, (N, H, W, C) in and out."""

    def __init__(self, channels: int, kernel_size: int) -> None:
        super().__init__(channels, channels, kernel_size, padding=kernel_size // 2, groups=channels)

    def forward(self, x: Tensor) -> Tensor:
        x = to_channels_first(x)
        if has_fast_weight_gradient(x, self.weight):
            x = DepthwiseConvFunction.apply(x, self.weight, self.bias)
        else:
            x = super().forward(x)
        return to_channels_last(x)


def to_channels_first(x: Tensor) -> Tensor:
    """(N, H, W, C) -> (N, C, H, W), a view; of a contiguous tensor it is `torch.channels_last`."""
    return x.permute(0, 3, 1, 2)


def to_channels_last(x: Tensor) -> Tensor:
    """(N, C, H, W) -> contiguous (N, H, W, C), a view if `x` is `torch.channels_last`."""
    return x.permute(0, 2, 3, 1).contiguous()


def has_fast_weight_gradient(x: Tensor, weight: Tensor) -> bool:
    """Whether the matrix products are chosen for the weight gradient, the one place that decides.

    By measurement on 2 CPU cores in float32 (see docs/performance.md); never on CUDA, where it was
    not measured, nor where a graph is captured or autocast would cast inside.

    Args:
        x: Input (N, C, H, W).
        weight: Kernel (C, 1, K, K).
    """
    if torch.jit.is_tracing() or torch.compiler.is_compiling():
        return False
    return (
        torch.is_grad_enabled()
        and weight.requires_grad
        and x.device.type == 'cpu'
        and x.dtype == torch.float32
        and not is_cpu_autocast()
        and weight.shape[-1] >= 9
        and x.shape[2] * x.shape[3] <= x.shape[1]
    )


def is_cpu_autocast() -> bool:
    if hasattr(torch, 'get_autocast_dtype'):  # torch >= 2.4
        return torch.is_autocast_enabled('cpu')
    return torch.is_autocast_cpu_enabled()


class DepthwiseConvFunction(torch.autograd.Function):
    """The stock depthwise convolution with the weight gradient of `weight_gradient`."""

    @staticmethod
    def forward(ctx, x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        ctx.save_for_backward(x, weight)
        return F.conv2d(x, weight, bias, padding=weight.shape[-1] // 2, groups=weight.shape[0])

    @staticmethod
    @once_differentiable
    def backward(ctx, grad: Tensor) -> tuple[Tensor | None, Tensor, Tensor]:
        x, weight = ctx.saved_tensors
        grad_x = None
        if ctx.needs_input_grad[0]:
            padding = weight.shape[-1] // 2
            grad_x = torch.nn.grad.conv2d_input(
                x.shape, weight, grad, padding=padding, groups=weight.shape[0]
            )
        return grad_x, weight_gradient(x, grad, weight.shape[-1]), grad.sum((0, 2, 3))


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

    x = F.pad(x.contiguous(), (pad, pad, pad, pad + missing_rows))
    grad = F.pad(grad.contiguous(), (0, 0, 0, missing_rows))
    x = x.unfold(2, padded_rows, rows).unfold(3, width, 1)  # (N, C, blocks, K, padded_rows, W)
    x = x.permute(1, 2, 3, 4, 0, 5).reshape(
        channels * blocks, kernel_size * padded_rows, batch * width
    )
    grad = grad.view(batch, channels, blocks, rows, width).permute(1, 2, 0, 4, 3)
    grad = grad.reshape(channels * blocks, batch * width, rows)
    products = torch.bmm(x, grad).view(channels, blocks, kernel_size, padded_rows, rows)
    # [c, b, j, i + r, r] for all rows r: a step along r is one row down and one column right
    *outer, row_stride, column_stride = products.stride()
    diagonals = products.as_strided(
        (channels, blocks, kernel_size, kernel_size, rows),
        (*outer, row_stride, row_stride + column_stride),
    )
    return diagonals.sum((1, 4)).transpose(1, 2).unsqueeze(1)
