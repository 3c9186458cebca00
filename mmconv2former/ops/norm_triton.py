"""Launches the kernels of `norm_kernels`: residual additions, LayerNorms, sums over positions.

`add_normalize` and `add_normalize_backward` are steps of a block, documented in `block_stock`.
The kernels also sum over positions while they read the tensors. `finish_sums`, or `unfold` in a
block, adds these shares in a fixed order, so every run gives the same results.
"""

from __future__ import annotations

import functools
import math
from typing import Any

import torch
import triton
from torch import Tensor

from .depthwise import aligned
from .launch import Launch, launchers_of, limits, remembered
from .memory_format import to_channels_first
from .norm_kernels import (
    add_shares_kernel,
    column_sums_kernel,
    layer_norm_backward_kernel,
    layer_norm_kernel,
    residual_norm_backward_kernel,
    residual_norm_kernel,
)

residual_launcher = launchers_of(residual_norm_kernel)
residual_backward_launcher = launchers_of(residual_norm_backward_kernel)
norm_launcher = launchers_of(layer_norm_kernel)
norm_backward_launcher = launchers_of(layer_norm_backward_kernel)
column_launcher = launchers_of(column_sums_kernel)
share_launcher = launchers_of(add_shares_kernel)


@functools.cache
def wide(dtype: torch.dtype) -> torch.dtype:
    """The dtype in which tensors of `dtype` are summed."""
    return torch.promote_types(dtype, torch.float32)


def programs_at_once(device: int) -> int:
    """About the number of programs that keep a GPU busy."""
    return 4 * limits(device)[0] if device >= 0 else 3


@functools.cache
def tile(channels: int, elements: int) -> dict[str, int]:
    """Rows and columns of a program that holds whole positions, of about `elements` elements."""
    block = triton.next_power_of_2(channels)
    return dict(ROWS=max(1, elements // block), BLOCK=block)


# ------------------------------------------------------------------------------------- residuals
@remembered
def residual_launch(
    device: int,
    dtype: torch.dtype,
    branch_dtype: torch.dtype | None,
    norm_dtype: torch.dtype | None,
    shape: torch.Size,
    eps: float,
    has_factor: bool,
    has_rstd: bool,
) -> Launch:
    """How `add_normalize` launches its kernel.

    Args:
        device: Index of the GPU, -1 for the interpreter.
        dtype, branch_dtype, norm_dtype: Of x, the branch and the normalized sum.
        shape: Of x.
    """
    launcher = residual_launcher(
        device, (dtype, branch_dtype, norm_dtype), C=shape[3], EPS=eps, **tile(shape[3], 4096),
        HAS_BRANCH=branch_dtype is not None, HAS_FACTOR=has_factor,
        HAS_NORM=norm_dtype is not None, HAS_RSTD=has_rstd,
    )  # fmt: skip
    positions = math.prod(shape[:3])
    programs = -(-positions // launcher.constants['ROWS'])
    return launcher, programs, (positions, shape[1] * shape[2])


def add_normalize(
    x: Tensor,
    branch: Tensor | None,
    factor: Tensor | None,
    eps: float,
    dtype: torch.dtype | None,
    keep: bool,
    in_place: bool = False,
) -> tuple[Tensor, Any, Any]:
    """Residual sum and norm in one pass; see `block_stock`."""
    batch, height, width, _ = shape = x.shape
    total = branch_dtype = None
    if branch is not None:
        total, branch_dtype = x if in_place else torch.empty_like(x), branch.dtype
    y = rstd = None
    if dtype is not None:
        y = torch.empty_like(x, dtype=dtype)
        if keep:
            rstd = x.new_empty(batch, height, width, 1, dtype=wide(x.dtype))
    launcher, programs, sizes = residual_launch(
        x.get_device(), x.dtype, branch_dtype, dtype, shape, eps, factor is not None, keep
    )
    launcher(programs, (x, branch, factor, total, y, rstd), sizes)
    return x if total is None else total, y, rstd


@remembered
def residual_backward_launch(
    device: int,
    dtype: torch.dtype,
    branch_dtype: torch.dtype | None,
    norm_dtype: torch.dtype | None,
    shape: torch.Size,
    has_branch: bool,
    has_factor: bool,
) -> Launch:
    """How `add_normalize_backward` launches its kernel, which sums in as many shares as programs.

    Args:
        branch_dtype: Of the branch's gradient; None without its sums.
        has_branch: Whether this gradient is another tensor than that of x.
        device, dtype, norm_dtype, shape: See `residual_launch`.
    """
    launcher = residual_backward_launcher(
        device, (dtype, branch_dtype, norm_dtype), C=shape[3], **tile(shape[3], 2048),
        HAS_NORM=norm_dtype is not None, HAS_BRANCH=has_branch,
        HAS_SUMS=branch_dtype is not None, HAS_FACTOR=has_factor,
    )  # fmt: skip
    positions = math.prod(shape[:3])
    tiles = -(-positions // launcher.constants['ROWS'])
    shares = min(tiles, programs_at_once(device))
    return launcher, shares, (positions, shape[1] * shape[2], tiles)


def add_normalize_backward(
    grad: Tensor,
    norm: tuple[Tensor, Tensor, Tensor] | None,
    factor: Tensor | None,
    dtype: torch.dtype | None,
    in_place: bool = False,
) -> tuple[Tensor, Any, Any]:
    """Gradients of `add_normalize` in one pass; see `block_stock`."""
    grad_y, y, rstd = (None, None, None) if norm is None else norm
    grad_x = grad if norm is None or in_place else torch.empty_like(grad)
    # If the gradient of the branch is the gradient itself, only its sums are missing.
    has_branch = dtype is not None and (dtype != grad.dtype or factor is not None)
    grad_branch = torch.empty_like(grad, dtype=dtype) if has_branch else None
    shape = grad.shape
    launcher, shares, sizes = residual_backward_launch(
        grad.get_device(), grad.dtype, dtype, None if y is None else y.dtype, shape, has_branch,
        factor is not None,
    )  # fmt: skip
    sums = None if dtype is None else grad.new_empty(shares, shape[3], dtype=wide(grad.dtype))
    launcher(shares, (grad, grad_y, y, rstd, factor, grad_x, grad_branch, sums), sizes)
    return grad_x, grad_x if grad_branch is None else grad_branch, sums


# ------------------------------------------------------------------------------------------ norms
def warps_for(channels_first: bool) -> int:
    """With the channels first, long stretches of memory need more positions at once."""
    return 8 if channels_first else 4


def layer_norm(
    x: Tensor, weight: Tensor, bias: Tensor, eps: float, dtype: torch.dtype, channels_first: bool
) -> Tensor:
    """`mmconv2former.ops.norm.layer_norm`."""
    x = aligned(x)
    batch, height, width, channels = x.shape
    shape = (batch, channels, height, width) if channels_first else x.shape
    y = x.new_empty(shape, dtype=dtype)
    warps = warps_for(channels_first)
    launcher = norm_launcher(
        x.get_device(), (x.dtype, weight.dtype, dtype), warps, C=channels, EPS=eps,
        **tile(channels, 1024 * warps), CHANNELS_FIRST=channels_first,
    )  # fmt: skip
    programs = batch * -(-height * width // launcher.constants['ROWS'])
    launcher(programs, (x, weight, bias, y), (height * width,))
    return y.permute(0, 2, 3, 1) if channels_first else y  # (N, H, W, C)


def layer_norm_gradients(
    x: Tensor, grad: Tensor, weight: Tensor, eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of `layer_norm` for x, weight and bias; grad (N, H, W, C) in either layout."""
    x = aligned(x)
    batch, height, width, channels = x.shape
    channels_first = to_channels_first(grad).is_contiguous()
    grad = grad if channels_first else grad.contiguous()
    grad = grad if grad.data_ptr() % 16 == 0 else grad.clone()
    grad_x = torch.empty_like(x)
    warps = warps_for(channels_first)
    launcher = norm_backward_launcher(
        x.get_device(), (x.dtype, weight.dtype, grad.dtype), warps, C=channels, EPS=eps,
        **tile(channels, 256 * warps), CHANNELS_FIRST=channels_first,
    )  # fmt: skip
    tiles = batch * -(-height * width // launcher.constants['ROWS'])
    shares = min(tiles, programs_at_once(x.get_device()))
    sums = x.new_empty(shares, 2 * channels, dtype=wide(x.dtype))
    launcher(shares, (grad, x, weight, grad_x, sums), (height * width, tiles))
    of_weight, of_bias = finish_sums(sums).view(2, channels).unbind()
    return grad_x, of_weight.to(weight.dtype), of_bias.to(weight.dtype)


# ------------------------------------------------------------------------------------------- sums
@remembered
def column_launch(device: int, dtype: torch.dtype, shape: torch.Size) -> Launch:
    """How `column_sums` launches its kernel; the last size is the number of shares."""
    launcher = column_launcher(device, (dtype,), C=shape[3], ROWS=64, BLOCK=64)
    blocks = -(-shape[3] // launcher.constants['BLOCK'])
    positions = math.prod(shape[:3])
    tiles = -(-positions // launcher.constants['ROWS'])
    shares = min(tiles, -(-programs_at_once(device) // blocks))
    return launcher, shares * blocks, (positions, tiles, shares)


def column_sums(x: Tensor) -> Tensor:
    """Shares (shares, C) of the sums of x (N, H, W, C) over positions."""
    dtype, shape = x.dtype, x.shape
    launcher, programs, sizes = column_launch(x.get_device(), dtype, shape)
    sums = x.new_empty(sizes[2], shape[3], dtype=wide(dtype))
    launcher(programs, (x, sums), sizes)
    return sums


def finish_sums(partial: Tensor) -> Tensor:
    """Adds the shares of (shares, columns), to (columns,)."""
    shares, columns = partial.shape
    launcher = share_launcher(partial.get_device(), (partial.dtype,), N=columns, ROWS=64, BLOCK=32)
    sums = partial.new_empty(columns)
    launcher(-(-columns // launcher.constants['BLOCK']), (partial, sums), (shares,))
    return sums
