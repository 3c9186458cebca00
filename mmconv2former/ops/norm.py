"""LayerNorm over the channels of (N, H, W, C) with a result in another dtype or layout.

Under mixed precision the norms outside blocks read the residual stream in float32. What follows
needs half precision (a convolution) or (N, C, H, W) (the necks of detectors). The kernels write
that directly; with torch's operators each would be another pass.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from . import block_stock
from .depthwise import aligned, runs_triton
from .dispatch import is_captured, is_transformed, without_autocast
from .triton_support import load, run_triton


def layer_norm(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    dtype: torch.dtype,
    channels_first: bool = False,
) -> Tensor:
    """LayerNorm over the channels.

    Args:
        x: Input (N, H, W, C).
        weight, bias: (C,), or both None.
        eps: Added to the variance.
        dtype: Dtype of the result if a kernel computes it; torch's operator chooses its own.
        channels_first: Whether a kernel writes the result as contiguous (N, C, H, W).

    Returns:
        (N, H, W, C), contiguous unless `channels_first`.
    """
    is_plain = not is_captured() and not is_transformed()
    if is_plain and runs_triton(x):
        with without_autocast(x):
            if weight is not None and bias is not None:
                return LayerNormFunction.apply(x, weight, bias, eps, dtype, channels_first)
            if not torch.is_grad_enabled() and not channels_first:
                functions = load('norm_triton').add_normalize, block_stock.add_normalize
                return run_triton(*functions, aligned(x), None, None, eps, dtype, False)[1]
    channels = int(x.shape[-1])  # a tensor while tracing
    return F.layer_norm(x, (channels,), weight, bias, eps)


class LayerNormFunction(torch.autograd.Function):
    """`layer_norm` with kernels; saves only its input."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        bias: Tensor,
        eps: float,
        dtype: torch.dtype,
        channels_first: bool,
    ) -> Tensor:
        ctx.save_for_backward(x, weight)
        ctx.eps = eps
        kernel = load('norm_triton').layer_norm
        y = run_triton(kernel, stock_layer_norm, x, weight, bias, eps, dtype, channels_first)
        return y.data  # not a view, so that it may be modified in place

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, weight = ctx.saved_tensors
        with without_autocast(x):
            if torch.is_grad_enabled():  # gradients of gradients: with operators that have them
                grads = stock_gradients(x, grad, weight, ctx.eps)
            else:
                kernel = load('norm_triton').layer_norm_gradients
                grads = run_triton(kernel, stock_gradients, x, grad, weight, ctx.eps)
        return *grads, None, None, None


def stock_layer_norm(
    x: Tensor, weight: Tensor, bias: Tensor, eps: float, dtype: torch.dtype, channels_first: bool
) -> Tensor:
    """LayerNorm with torch operators."""
    return F.layer_norm(x, (x.shape[-1],), weight, bias, eps).to(dtype)


def stock_gradients(
    x: Tensor, grad: Tensor, weight: Tensor, eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients for x, weight and bias."""
    shape = (x.shape[-1],)
    _, mean, rstd = torch.native_layer_norm(x, shape, None, None, eps)
    return torch.ops.aten.native_layer_norm_backward(
        grad.to(x.dtype).contiguous(), x, shape, mean, rstd, weight, weight, (True, True, True)
    )
