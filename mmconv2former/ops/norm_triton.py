"""Launches the kernels of `norm_kernels`: residual additions, LayerNorms, sums over positions.

`add_normalize` and `add_normalize_backward` are steps of a block, documented in `block_stock`.
The kernels also sum over positions while they read the tensors. `finish_sums`, or `unfold` in a
block, adds these shares in a fixed order, so every run gives the same results.
"""

from __future__ import annotations

import functools
from typing import Any

import torch
import triton
from torch import Tensor

from .depthwise import aligned
from .launch import launchers_of, limits
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


def positions_of(x: Tensor) -> int:
    """The number of positions of (N, H, W, C)."""
    return x.shape[0] * x.shape[1] * x.shape[2]


@functools.cache
def programs_at_once(device: int) -> int:
    """About the number of programs that keep a GPU busy."""
    return 4 * limits(device)[0] if device >= 0 else 3


@functools.cache
def tile(channels: int, elements: int) -> dict[str, int]:
    """Rows and columns of a program that holds whole positions, of about `elements` elements."""
    block = triton.next_power_of_2(channels)
    return dict(ROWS=max(1, elements // block), BLOCK=block)


# ------------------------------------------------------------------------------------- residuals
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
    x = aligned(x)
    branch = None if branch is None else aligned(branch)
    positions, per_image = positions_of(x), x.shape[1] * x.shape[2]
    total = None
    if branch is not None:
        total = x if in_place else torch.empty_like(x)
    y = rstd = None
    if dtype is not None:
        y = torch.empty_like(x, dtype=dtype)
        if keep:
            rstd = x.new_empty((*x.shape[:3], 1), dtype=wide(x.dtype))
    channels = x.shape[-1]
    launcher = residual_launcher(
        x.get_device(), (x.dtype, None if branch is None else branch.dtype, dtype), C=channels,
        EPS=eps, **tile(channels, 4096), HAS_BRANCH=branch is not None,
        HAS_FACTOR=factor is not None, HAS_NORM=dtype is not None, HAS_RSTD=keep,
    )  # fmt: skip
    programs = -(-positions // launcher.constants['ROWS'])
    launcher(programs, (x, branch, factor, total, y, rstd), (positions, per_image))
    return x if total is None else total, y, rstd


def add_normalize_backward(
    grad: Tensor,
    norm: tuple[Tensor, Tensor, Tensor] | None,
    factor: Tensor | None,
    dtype: torch.dtype | None,
    in_place: bool = False,
) -> tuple[Tensor, Any, Any]:
    """Gradients of `add_normalize` in one pass; see `block_stock`."""
    grad = aligned(grad)
    grad_y, y, rstd = (None, None, None) if norm is None else norm
    grad_x = grad if norm is None or in_place else torch.empty_like(grad)
    has_sums = dtype is not None
    # If the gradient of the branch is the gradient itself, only its sums are missing.
    has_branch = has_sums and (dtype != grad.dtype or factor is not None)
    grad_branch = torch.empty_like(grad, dtype=dtype) if has_branch else None
    channels = grad.shape[-1]
    launcher = residual_backward_launcher(
        grad.get_device(), (grad.dtype, dtype, None if y is None else y.dtype), C=channels,
        **tile(channels, 2048), HAS_NORM=norm is not None, HAS_BRANCH=has_branch,
        HAS_SUMS=has_sums, HAS_FACTOR=factor is not None,
    )  # fmt: skip
    positions = positions_of(grad)
    tiles = -(-positions // launcher.constants['ROWS'])
    shares = min(tiles, programs_at_once(grad.get_device()))
    sums = grad.new_empty((shares, channels), dtype=wide(grad.dtype)) if has_sums else None
    launcher(
        shares, (grad, grad_y, y, rstd, factor, grad_x, grad_branch, sums),
        (positions, grad.shape[1] * grad.shape[2], tiles),
    )  # fmt: skip
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
    sums = x.new_empty((shares, 2 * channels), dtype=wide(x.dtype))
    launcher(shares, (grad, x, weight, grad_x, sums), (height * width, tiles))
    of_weight, of_bias = finish_sums(sums).view(2, channels).unbind()
    return grad_x, of_weight.to(weight.dtype), of_bias.to(weight.dtype)


# ------------------------------------------------------------------------------------------- sums
def column_sums(x: Tensor) -> Tensor:
    """Shares (shares, C) of the sums of x (N, H, W, C) over positions."""
    device, channels = x.get_device(), x.shape[-1]
    launcher = column_launcher(device, (x.dtype,), C=channels, ROWS=64, BLOCK=64)
    blocks = -(-channels // launcher.constants['BLOCK'])
    positions = positions_of(x)
    tiles = -(-positions // launcher.constants['ROWS'])
    shares = min(tiles, -(-programs_at_once(device) // blocks))
    sums = x.new_empty((shares, channels), dtype=wide(x.dtype))
    launcher(shares * blocks, (x, sums), (positions, tiles, shares))
    return sums


def finish_sums(partial: Tensor) -> Tensor:
    """Adds the shares of (shares, columns), to (columns,)."""
    shares, columns = partial.shape
    launcher = share_launcher(partial.get_device(), (partial.dtype,), N=columns, ROWS=64, BLOCK=32)
    sums = partial.new_empty(columns)
    launcher(-(-columns // launcher.constants['BLOCK']), (partial, sums), (shares,))
    return sums
