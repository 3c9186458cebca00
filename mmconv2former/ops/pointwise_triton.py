"""Launches the kernel of `pointwise_kernels`: 1x1 convolutions of (N, H, W, C) in half precision.

torch's products take about twice as much of the host's time, with GELU three to five times
(docs/data/benchmarks.md). Large products, gradients of weights, which are sums over many positions,
and other dtypes are left to torch.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from .activation_kernels import gelu_kernel
from .launch import Launch, launchers_of, remembered
from .pointwise_kernels import pointwise_kernel

BLOCK = 1024  # elements per program of element-wise kernels
HALF = (torch.bfloat16, torch.float16)
SMALL = 2**32  # multiply-adds
gelu_launcher = launchers_of(gelu_kernel)
pointwise_launcher = launchers_of(pointwise_kernel)


class Tile(NamedTuple):
    """What a program of `pointwise_kernel` computes, and how.

    Fields:
        rows, columns: Positions and output channels of its part of the result.
        block: Input channels that it reads at a time.
        stages: Blocks that are being read at the same time.
        warps: Its threads, in groups of 32.
    """

    rows: int
    columns: int
    block: int
    stages: int
    warps: int


def tile_for(c_in: int, has_gelu: bool) -> Tile:
    """The tile for a product with c_in input channels, chosen on an H100.

    `tools/benchmark_pointwise.py --tiles` measures others. GELU needs registers, so tiles are
    smaller with it. The buffers of all stages fit into the 99 KiB that every supported GPU has.
    """
    if c_in <= 128:  # all at once
        return Tile(128, 64, 128, 1, 4) if has_gelu else Tile(128, 128, 128, 1, 8)
    if has_gelu:
        return Tile(64, 64, 64, 4, 4) if c_in <= 256 else Tile(64, 128, 64, 3, 4)
    return Tile(128, 128, 64, 3, 8)


def most_positions(dtype: torch.dtype, c_in: int, c_out: int, is_gradient: bool = False) -> float:
    """The kernel takes products of up to this number of positions.

    It reads 16 bytes at once. With few channels, memory limits its speed, and it is faster than
    torch's products. With more, it is slower on the GPU by about a third, which pays for small
    products, as long as launches take the host longer than the GPU works.
    """
    if dtype not in HALF or torch.version.hip is not None or c_in % 8 or c_out % 8:
        return 0
    if c_out <= 128 or (c_in <= 128 and not is_gradient):
        return math.inf
    return SMALL // (c_in * c_out)


@remembered
def is_left_to_torch(
    dtype: torch.dtype, shape: torch.Size, weight_shape: torch.Size, is_gradient: bool
) -> bool:
    """Whether torch multiplies x of this shape by a weight (C_out, C_in)."""
    c_out, c_in = weight_shape
    channels = (c_out, c_in) if is_gradient else (c_in, c_out)
    return math.prod(shape[:3]) > most_positions(dtype, *channels, is_gradient)


@remembered
def pointwise_launch(
    device: int,
    dtype: torch.dtype,
    shape: torch.Size,
    weight_shape: torch.Size,
    active: int,
    has_bias: bool,
    has_y: bool,
) -> Launch:
    """How `multiply` launches its kernel.

    Args:
        device: Index of the GPU, -1 for the interpreter.
        dtype, shape: Of x.
        active: Number of channels of `active`.
    """
    c_in = shape[3]
    c_out = weight_shape[0] if has_bias else weight_shape[1]
    rows, columns, block, stages, warps = tile_for(c_in, active > 0)
    launcher = pointwise_launcher(
        device, (dtype,), warps, C_IN=c_in, C_OUT=c_out, ACTIVE=active, TRANSPOSED=not has_bias,
        HAS_BIAS=has_bias, HAS_Y=has_y, ROWS=rows, COLUMNS=columns, BLOCK=block, STAGES=stages,
        WIDEN=device < 0,
    )  # fmt: skip
    positions = math.prod(shape[:3])
    return launcher, -(-positions // rows) * -(-c_out // columns), (positions,)


def multiply(
    x: Tensor, weight: Tensor, bias: Tensor | None, y: Tensor | None, active: Tensor | None
) -> None:
    """Computes y, active or both.

    Args:
        x: Input (N, H, W, C_in).
        weight: (C_out, C_in) with a bias, (C_in, C_out) without.
        bias: (C_out,).
        y: Output for the result (N, H, W, C_out).
        active: Output for GELU of its first channels (N, H, W, channels).
    """
    launcher, programs, sizes = pointwise_launch(
        x.get_device(), x.dtype, x.shape, weight.shape, 0 if active is None else active.shape[3],
        bias is not None, y is not None,
    )  # fmt: skip
    launcher(programs, (x, weight, bias, y, active), sizes)


def pointwise_conv(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """`mmconv2former.ops.pointwise.pointwise_conv`."""
    batch, height, width, _ = shape = x.shape
    if is_left_to_torch(x.dtype, shape, weight.shape, False):
        return F.linear(x, weight, bias)
    y = x.new_empty(batch, height, width, weight.shape[0])
    multiply(x, weight, bias, y, None)
    return y


def pointwise_gelu(
    x: Tensor, weight: Tensor, bias: Tensor, channels: int, keep: bool
) -> tuple[Tensor | None, Tensor]:
    """`mmconv2former.ops.block_stock.pointwise_gelu`."""
    batch, height, width, _ = shape = x.shape
    if is_left_to_torch(x.dtype, shape, weight.shape, False):
        whole = F.linear(x, weight, bias)
        return whole if keep else None, gelu(whole[..., :channels])
    y = x.new_empty(batch, height, width, weight.shape[0]) if keep else None
    active = x.new_empty(batch, height, width, channels)
    multiply(x, weight, bias, y, active)
    return y, active


def pointwise_input_gradient(grad: Tensor, weight: Tensor) -> Tensor:
    """`mmconv2former.ops.pointwise.pointwise_input_gradient`."""
    batch, height, width, _ = shape = grad.shape
    if is_left_to_torch(grad.dtype, shape, weight.shape, True):
        return grad @ weight
    out = grad.new_empty(batch, height, width, weight.shape[1])
    multiply(grad, weight, None, out, None)
    return out


def gelu(x: Tensor) -> Tensor:
    """GELU of some channels of a contiguous tensor, contiguous."""
    if x.is_contiguous():
        return F.gelu(x)
    y = torch.empty_like(x, memory_format=torch.contiguous_format)
    launcher = gelu_launcher(
        x.get_device(), (x.dtype,), C=x.shape[-1], STEP=x.stride(2), BLOCK=BLOCK
    )
    launcher(-(-x.numel() // BLOCK), (x, y), (math.prod(x.shape[:3]),))
    return y
