"""Launches the kernels of `depthwise_kernels`, and divides their work among programs.

`tools/kernel_resources.py` compiles them without a GPU and checks that none spills registers.
"""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass

import torch
import triton
from torch import Tensor

from .depthwise_kernels import (
    depthwise_forward_kernel,
    depthwise_sum_kernel,
    depthwise_weight_gradient_kernel,
)
from .launch import Launch, is_packed, launchers_of, remembered

# Rows of a kernel that a program keeps in registers: their weights, or the sums of their gradients.
# With 13 it spills.
MAX_TAPS = 12
MAX_SUMS = 28  # of all weights of a weight gradient program
forward_launcher = launchers_of(depthwise_forward_kernel)
shares_launcher = launchers_of(depthwise_weight_gradient_kernel)
sum_launcher = launchers_of(depthwise_sum_kernel)


@dataclass(frozen=True)
class Blocks:
    """How the work of one kernel size is divided among programs.

    Fields:
        taps: Rows of the kernel that a program handles at once.
        rows: Output rows of a forward program.
        block: Elements along f of a forward program.
        columns: Columns of the kernel of a weight gradient program.
        gradient_block: Elements along f of a weight gradient program.
        num_warps: Warps of every program.
    """

    taps: int
    rows: int
    block: int
    columns: int
    gradient_block: int
    num_warps: int = 4


@functools.cache
def blocks_for(kernel_size: int) -> Blocks:
    """The division of the work for a kernel size, the same for all inputs, so one kernel is enough.

    `rows`, `block` and `num_warps` are the fastest measured on an H100 (bfloat16, kernels 3, 7 and
    11); the rest follows from the registers that `tools/kernel_resources.py` reports.
    """
    taps = split_evenly(kernel_size, MAX_TAPS)
    columns = split_evenly(kernel_size, MAX_SUMS // taps)
    gradient_block = 512 if kernel_size == 3 else 256
    return Blocks(taps, rows=8, block=512, columns=columns, gradient_block=gradient_block)


def split_evenly(total: int, most: int) -> int:
    """The size of the fewest equal parts of at most `most` each."""
    return math.ceil(total / math.ceil(total / most))


# ------------------------------------------------------------------------------------------- calls
@remembered
def forward_launch(
    device: int,
    dtype: torch.dtype,
    bias_dtype: torch.dtype | None,
    shape: torch.Size,
    kernel_size: int,
    step: int,
    flip: bool,
    epilogue: str,
    has_kept: bool,
    y_step: int,
    other_step: int | None,
    before_step: int | None,
) -> Launch:
    """How `depthwise_forward` launches its kernel.

    Args:
        device: Index of the GPU, -1 for the interpreter.
        dtype, shape: Of x.
        bias_dtype: None without a bias.
        step: Elements of the weight from one place in the kernel to the next.
        y_step, other_step, before_step: Channels of these tensors.
    """
    _, height, width, channels = shape
    blocks = blocks_for(kernel_size)
    launcher = forward_launcher(
        device, (dtype, bias_dtype), blocks.num_warps, C=channels, K=kernel_size, STEP=step,
        TAPS=blocks.taps, ROWS=blocks.rows, BLOCK=blocks.block, HAS_BIAS=bias_dtype is not None,
        FLIP=flip, PACKED=is_packed(device, dtype), EPILOGUE=epilogue, HAS_KEPT=has_kept,
        HAS_OTHER=other_step is not None, Y_STEP=y_step, OTHER_STEP=other_step or 0,
        BEFORE_STEP=before_step or 0,
    )  # fmt: skip
    programs = shape[0] * -(-height // blocks.rows) * -(-width * channels // blocks.block)
    return launcher, programs, (height, width)


def depthwise_forward(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    flip: bool = False,
    epilogue: str = 'none',
    y: Tensor | None = None,
    kept: Tensor | None = None,
    other: Tensor | None = None,
    before: Tensor | None = None,
) -> Tensor:
    """Depthwise convolution and what follows it, (N, H, W, C) -> (N, H, W, C).

    Args:
        x: Contiguous input (N, H, W, C), on the current device.
        weight: (C, 1, K, K) of the dtype of x, as `lay_out` returns it.
        bias: (C,) of any dtype, or None.
        flip: Whether to reverse the weights, which computes the input gradient.
        epilogue: What to compute from the convolution z: 'none' z, 'times' z * other,
            'plus_gelu' x + GELU(z), 'gelu_backward' (z + other) * GELU'(before).
        y: Output tensor; None for a new one.
        kept: Contiguous output tensor for z, or None.
        other, before: (N, H, W, C), as the epilogue needs them. These and y may have more channels:
            of `other` the last C are read, of the two others the first C are written or read. y
            may be `before`, or `other` if that has C channels.
    """
    shape = x.shape
    y = torch.empty_like(x) if y is None else y
    launcher, programs, sizes = forward_launch(
        x.get_device(), x.dtype, None if bias is None else bias.dtype, shape, weight.shape[3],
        weight.stride(3), flip, epilogue, kept is not None, y.shape[3],
        None if other is None else other.shape[3], None if before is None else before.shape[3],
    )  # fmt: skip
    launcher(programs, (x, weight, bias, y, kept, other, before), sizes)
    return y


def depthwise_weight_gradient(
    x: Tensor, grad: Tensor, kernel_size: int, dtype: torch.dtype, has_bias: bool
) -> tuple[Tensor, Tensor | None]:
    """Gradients of weight and bias, the same to the last bit in every run.

    Args:
        dtype: Dtype of the results.
        x, grad, kernel_size, has_bias: See `weight_gradient_shares`.

    Returns:
        (C, 1, K, K), contiguous, and (C,) or None.
    """
    channels = x.shape[3]
    partial, period_blocks = weight_gradient_shares(x, grad, kernel_size, has_bias)
    weight_grad = x.new_empty((channels, 1, kernel_size, kernel_size), dtype=dtype)
    bias_grad = x.new_empty(channels, dtype=dtype) if has_bias else None
    block = min(32, triton.next_power_of_2(channels))
    sum_up = sum_launcher(
        x.get_device(), (x.dtype, dtype), C=channels, K=kernel_size, HAS_BIAS=has_bias,
        PERIOD_BLOCK=blocks_for(kernel_size).gradient_block, ROWS=2048 // block, BLOCK=block,
    )  # fmt: skip
    programs = partial.shape[1] * -(-channels // block)
    sum_up(programs, (partial, weight_grad, bias_grad), (period_blocks, partial.shape[0]))
    return weight_grad, bias_grad


@remembered
def shares_launch(
    device: int, dtype: torch.dtype, shape: torch.Size, kernel_size: int, has_bias: bool
) -> tuple[Launch, torch.dtype, int, int, int]:
    """How `weight_gradient_shares` launches its kernel, which is compiled to learn what fits.

    Args:
        device: Index of the GPU, -1 for the interpreter.
        dtype, shape: Of x.
        kernel_size, has_bias: See `weight_gradient_shares`.

    Returns:
        The launch, the dtype of sums, and the number of shares, elements and blocks of a period.
    """
    batch, height, width, channels = shape
    blocks = blocks_for(kernel_size)
    sums_dtype = torch.promote_types(dtype, torch.float32)
    launcher = shares_launcher(
        device, (dtype,), blocks.num_warps, C=channels, K=kernel_size, HAS_BIAS=has_bias,
        TAPS=blocks.taps, COLUMNS=blocks.columns, BLOCK=blocks.gradient_block,
        PACKED=is_packed(device, dtype),
    )  # fmt: skip
    if launcher.run is None and device >= 0:
        tensors = [torch.empty(0, dtype=d, device=device) for d in (dtype, dtype, sums_dtype)]
        launcher.compile(tuple(tensors), (0,) * 5)
    row_blocks = -(-width * channels // blocks.gradient_block)
    # After this many blocks the channels repeat.
    period_blocks = min(channels // math.gcd(channels, blocks.gradient_block), row_blocks)
    rows = batch * -(-row_blocks // period_blocks) * height
    programs = period_blocks * -(-kernel_size // blocks.columns) * -(-kernel_size // blocks.taps)
    shares = launcher.at_once // programs
    rows_per_share = -(-rows // max(1, min(shares, rows // (2 * blocks.taps))))
    shares = -(-rows // rows_per_share)
    sizes = (height, width, period_blocks, rows, rows_per_share)
    launch = (launcher, programs * shares, sizes)
    return launch, sums_dtype, shares, period_blocks * blocks.gradient_block, period_blocks


def weight_gradient_shares(
    x: Tensor, grad: Tensor, kernel_size: int, has_bias: bool
) -> tuple[Tensor, int]:
    """Parts of the gradients of weight and bias, for `depthwise_sum`, which adds them.

    Args:
        x: Contiguous input (N, H, W, C), on the current device.
        grad: Contiguous gradient of the output (N, H, W, C).
        kernel_size: K.
        has_bias: Whether the gradient of the bias is needed.

    Returns:
        (shares, K * K + has_bias, period), and the blocks of a period.
    """
    launch, sums_dtype, shares, period, period_blocks = shares_launch(
        x.get_device(), x.dtype, x.shape, kernel_size, has_bias
    )
    launcher, programs, sizes = launch
    partial = x.new_empty(shares, kernel_size**2 + has_bias, period, dtype=sums_dtype)
    launcher(programs, (x, grad, partial), sizes)
    return partial, period_blocks


def lay_out(weight: Tensor, dtype: torch.dtype) -> Tensor:
    """A weight (C, 1, K, K) in `dtype`, stored as (K, K, C); the same tensor if it already is."""
    channels, _, kernel_size, _ = weight.shape
    to_channel, _, to_row, to_column = weight.stride()
    is_right = to_channel == 1 and to_row == kernel_size * to_column and weight.dtype == dtype
    if is_right and weight.data_ptr() % 16 == 0:
        return weight
    result = weight.new_empty((kernel_size, kernel_size, 1, channels), dtype=dtype)
    return result.permute(3, 2, 0, 1).copy_(weight)


def lay_out_together(weights: list[Tensor], dtype: torch.dtype) -> list[Tensor]:
    """`lay_out` of many weights with two launches for each kernel size."""
    if any(weight.shape[0] % 8 for weight in weights):  # the parts would not be aligned
        return [lay_out(weight, dtype) for weight in weights]
    results: dict[int, Tensor] = {}
    by_size: dict[tuple, list[int]] = {}
    for index, weight in enumerate(weights):
        by_size.setdefault((weight.shape[-1], weight.device), []).append(index)
    for indices in by_size.values():
        together = lay_out(torch.cat([weights[index] for index in indices]), dtype)
        parts = together.split([weights[index].shape[0] for index in indices])
        results.update(zip(indices, parts))
    return [results[index] for index in range(len(weights))]
