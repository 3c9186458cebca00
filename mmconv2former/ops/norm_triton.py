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
from .launch import Launcher, limits, sums_dtype
from .memory_format import to_channels_first
from .norm_kernels import (
    add_shares_kernel,
    column_sums_kernel,
    layer_norm_backward_kernel,
    layer_norm_kernel,
    residual_norm_backward_kernel,
    residual_norm_kernel,
)


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


def tile(channels: int, elements: int) -> dict[str, int]:
    """Rows and columns of a program that holds whole positions, of about `elements` elements."""
    block = triton.next_power_of_2(channels)
    return dict(ROWS=max(1, elements // block), BLOCK=block)


# ------------------------------------------------------------------------------------- residuals
@functools.cache
def residual_norm(
    device: int,
    dtypes: tuple[torch.dtype, ...],
    channels: int,
    eps: float,
    has_branch: bool,
    has_factor: bool,
    has_norm: bool,
    keep: bool,
) -> Launcher:
    """The launcher of `add_normalize`."""
    constants = dict(
        C=channels, EPS=eps, **tile(channels, 4096), HAS_BRANCH=has_branch, HAS_FACTOR=has_factor,
        HAS_NORM=has_norm, HAS_RSTD=keep, ACC=sums_dtype(dtypes[0]),
    )  # fmt: skip
    return Launcher(residual_norm_kernel, constants)


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
    dtypes = (x.dtype, x.dtype if branch is None else branch.dtype, dtype or x.dtype)
    launcher = residual_norm(
        x.get_device(), dtypes, x.shape[-1], eps, branch is not None, factor is not None,
        dtype is not None, keep,
    )  # fmt: skip
    programs = -(-positions // launcher.constants['ROWS'])
    launcher(programs, (x, branch, factor, total, y, rstd), (positions, per_image))
    return x if total is None else total, y, rstd


@functools.cache
def residual_norm_backward(
    device: int,
    dtypes: tuple[torch.dtype, ...],
    channels: int,
    has_norm: bool,
    has_branch: bool,
    has_sums: bool,
    has_factor: bool,
) -> Launcher:
    """The launcher of `add_normalize_backward`."""
    constants = dict(
        C=channels, **tile(channels, 2048), HAS_NORM=has_norm,
        HAS_BRANCH=has_branch, HAS_SUMS=has_sums, HAS_FACTOR=has_factor, ACC=sums_dtype(dtypes[0]),
    )  # fmt: skip
    return Launcher(residual_norm_backward_kernel, constants)


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
    launcher = residual_norm_backward(
        grad.get_device(), (grad.dtype, dtype or grad.dtype, grad.dtype if y is None else y.dtype),
        grad.shape[-1], norm is not None, has_branch, has_sums, factor is not None,
    )  # fmt: skip
    positions = positions_of(grad)
    tiles = -(-positions // launcher.constants['ROWS'])
    shares = min(tiles, programs_at_once(grad.get_device()))
    sums = grad.new_empty((shares, grad.shape[-1]), dtype=wide(grad.dtype)) if has_sums else None
    launcher(
        shares, (grad, grad_y, y, rstd, factor, grad_x, grad_branch, sums),
        (positions, grad.shape[1] * grad.shape[2], tiles),
    )  # fmt: skip
    return grad_x, grad_x if grad_branch is None else grad_branch, sums


# ------------------------------------------------------------------------------------------ norms
@functools.cache
def layer_normalizers(
    device: int, dtypes: tuple[torch.dtype, ...], channels: int, eps: float, channels_first: bool
) -> tuple[Launcher, Launcher]:
    """The forward and the backward kernel."""
    # With the channels first, long stretches of memory need more positions at once.
    warps = 8 if channels_first else 4
    constants = dict(
        C=channels, EPS=eps, **tile(channels, 1024 * warps), CHANNELS_FIRST=channels_first,
        ACC=sums_dtype(dtypes[0]),
    )  # fmt: skip
    backward = dict(constants, **tile(channels, 256 * warps))
    return (
        Launcher(layer_norm_kernel, constants, warps),
        Launcher(layer_norm_backward_kernel, backward, warps),
    )


def layer_norm(
    x: Tensor, weight: Tensor, bias: Tensor, eps: float, dtype: torch.dtype, channels_first: bool
) -> Tensor:
    """`mmconv2former.ops.norm.layer_norm`."""
    x = aligned(x)
    batch, height, width, channels = x.shape
    shape = (batch, channels, height, width) if channels_first else x.shape
    y = x.new_empty(shape, dtype=dtype)
    dtypes = (x.dtype, weight.dtype, dtype)
    launcher, _ = layer_normalizers(x.get_device(), dtypes, channels, eps, channels_first)
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
    dtypes = (x.dtype, weight.dtype, grad.dtype)
    _, launcher = layer_normalizers(x.get_device(), dtypes, channels, eps, channels_first)
    tiles = batch * -(-height * width // launcher.constants['ROWS'])
    shares = min(tiles, programs_at_once(x.get_device()))
    sums = x.new_empty((shares, 2 * channels), dtype=wide(x.dtype))
    launcher(shares, (grad, x, weight, grad_x, sums), (height * width, tiles))
    of_weight, of_bias = finish_sums(sums).view(2, channels).unbind()
    return grad_x, of_weight.to(weight.dtype), of_bias.to(weight.dtype)


# ------------------------------------------------------------------------------------------- sums
@functools.cache
def column_summer(device: int, dtype: torch.dtype, channels: int) -> Launcher:
    """The launcher of `column_sums`."""
    constants = dict(C=channels, ROWS=64, BLOCK=64, ACC=sums_dtype(dtype))
    return Launcher(column_sums_kernel, constants)


def column_sums(x: Tensor) -> Tensor:
    """Shares (shares, C) of the sums of x (N, H, W, C) over positions."""
    device, channels = x.get_device(), x.shape[-1]
    launcher = column_summer(device, x.dtype, channels)
    blocks = -(-channels // launcher.constants['BLOCK'])
    positions = positions_of(x)
    tiles = -(-positions // launcher.constants['ROWS'])
    shares = min(tiles, -(-programs_at_once(device) // blocks))
    sums = x.new_empty((shares, channels), dtype=wide(x.dtype))
    launcher(shares * blocks, (x, sums), (positions, tiles, shares))
    return sums


@functools.cache
def share_adder(device: int, dtype: torch.dtype, columns: int) -> Launcher:
    """The launcher of `finish_sums`."""
    constants = dict(N=columns, ROWS=64, BLOCK=32, ACC=sums_dtype(dtype))
    return Launcher(add_shares_kernel, constants)


def finish_sums(partial: Tensor) -> Tensor:
    """Adds the shares of (shares, columns), to (columns,)."""
    shares, columns = partial.shape
    launcher = share_adder(partial.get_device(), partial.dtype, columns)
    sums = partial.new_empty(columns)
    launcher(-(-columns // launcher.constants['BLOCK']), (partial, sums), (shares,))
    return sums
