"""The weight gradient of a depthwise convolution with matrix products, for large kernels on a CPU.

On a CPU the stock weight gradient is the most expensive operation of training. Here, for each
channel and each column of the kernel, the rows of the padded input, shifted by that column, are
multiplied by the rows of the output's gradient. The needed sums are on the diagonals of these
matrix products. The rest is wasted, but this is still faster where `is_faster` says so.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

ROWS_PER_BLOCK = 16  # of the gradient in one product: few waste less, many need fewer products
CACHE_BYTES = 2**22  # of the input at once, so that the products stay in a core's cache


def is_faster(x: Tensor, weight: Tensor) -> bool:
    """Whether matrix products beat the stock operator, as measured on 2 CPU cores in float32.

    docs/data/benchmarks.md has the table. x is (N, H, W, ...), weight (C, 1, K, K).
    """
    channels, kernel_size = weight.shape[0], weight.shape[-1]
    positions = x.shape[1] * x.shape[2]
    if kernel_size >= 13:
        return channels * positions >= 70_000
    if kernel_size >= 9:
        return channels * positions >= 200_000 or channels >= (288 if kernel_size == 11 else 512)
    return kernel_size == 7 and positions >= 2048


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
    return diagonals.sum((2, 4)).permute(1, 2, 0)  # (C, K, K)
