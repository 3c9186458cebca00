"""LayerNorm over the channels of (N, H, W, C) with a result in another dtype or layout.

In a network of mixed precision the norms outside of blocks read the residual stream in float32.
What follows wants half precision (a convolution) or (N, C, H, W) (the necks of detectors). Here
both are written at once, where torch's operators need a pass of their own for each.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ..ops import block_stock
from .block import MOST_CHANNELS, block_triton, run
from .depthwise import runs_triton
from .memory_format import is_captured, is_transformed, without_autocast


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
        dtype: That of the result where kernels of this project compute it. Torch's operator chooses
            its own.
        channels_first: Whether the result is to lie in memory as contiguous (N, C, H, W).

    Returns:
        (N, H, W, C), contiguous unless `channels_first`.
    """
    plain = not is_captured() and not is_transformed()
    if plain and runs_triton(x) and x.shape[-1] <= MOST_CHANNELS:
        with without_autocast(x):
            if weight is not None and bias is not None:
                return LayerNormFunction.apply(x, weight, bias, eps, dtype, channels_first)
            if not torch.is_grad_enabled() and not channels_first:
                return run(normalize, block_triton(), x, eps, dtype)
    channels = int(x.shape[-1])  # in a trace it is a tensor
    return F.layer_norm(x, (channels,), weight, bias, eps)


def normalize(x: Tensor, eps: float, dtype: torch.dtype, steps: Any) -> Tensor:
    return steps.normalize(x, eps, dtype, keep=False)[0]


class LayerNormFunction(torch.autograd.Function):
    """`layer_norm` by kernels; keeps the input alone."""

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
        y = run(forward, block_triton(), x, weight, bias, eps, dtype, channels_first)
        return y.data  # no view, so that it may be modified in place

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, weight = ctx.saved_tensors
        # Stock operators have gradients of gradients.
        steps = block_stock if torch.is_grad_enabled() else block_triton()
        with without_autocast(x):
            grads = run(backward, steps, x, grad, weight, ctx.eps)
        return *grads, None, None, None


def forward(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    eps: float,
    dtype: torch.dtype,
    channels_first: bool,
    steps: Any,
) -> Tensor:
    if steps is block_triton():
        return steps.layer_norm(x, weight, bias, eps, dtype, channels_first)
    return F.layer_norm(x, (x.shape[-1],), weight, bias, eps).to(dtype)


def backward(
    x: Tensor, grad: Tensor, weight: Tensor, eps: float, steps: Any
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients for x, weight and bias."""
    if steps is block_triton():
        return steps.layer_norm_gradients(x, grad, weight, eps)
    shape = (x.shape[-1],)
    _, mean, rstd = torch.native_layer_norm(x, shape, None, None, eps)
    return torch.ops.aten.native_layer_norm_backward(
        grad.to(x.dtype).contiguous(), x, shape, mean, rstd, weight, weight, (True, True, True)
    )
