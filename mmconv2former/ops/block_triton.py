"""The steps of a block as Triton kernels: the same functions as in `block_stock`, documented there.

A step reads and writes each tensor once, except for products.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from .activation_kernels import (
    feed_forward_backward_kernel,
    modulation_backward_kernel,
)
from .depthwise_triton import depthwise_forward, weight_gradient_shares
from .folding_triton import fold, unfold
from .launch import Launch, launchers_of, remembered
from .norm_triton import (
    add_normalize,
    add_normalize_backward,
    column_sums,
)
from .pointwise_triton import BLOCK, pointwise_conv, pointwise_gelu, pointwise_input_gradient

# steps, too
__all__ = ['add_normalize', 'add_normalize_backward', 'fold', 'pointwise_conv', 'pointwise_gelu',
           'pointwise_input_gradient', 'unfold']  # fmt: skip

modulation_launcher = launchers_of(modulation_backward_kernel)
feed_forward_launcher = launchers_of(feed_forward_backward_kernel)


# ------------------------------------------------------------------------------------ modulation
def depthwise_times(
    x: Tensor, weight: Tensor, bias: Tensor, gate_value: Tensor, keep: bool
) -> tuple[Tensor | None, Tensor]:
    a = torch.empty_like(x) if keep else None
    return a, depthwise_forward(x, weight, bias, epilogue='times', kept=a, other=gate_value)


@remembered
def modulation_launch(
    device: int, dtype: torch.dtype, shape: torch.Size, has_activations: bool
) -> Launch:
    """How `modulation_gradients` launches its kernel for a of this dtype and shape."""
    launcher = modulation_launcher(
        device, (dtype,), C=shape[3], HAS_ACTIVATIONS=has_activations, BLOCK=BLOCK
    )
    return launcher, -(-math.prod(shape) // BLOCK), (math.prod(shape[:3]),)


def modulation_gradients(
    grad: Tensor, a: Tensor, gate_value: Tensor, active: Tensor | None, weighted: Tensor | None
) -> tuple[Tensor, Tensor, Any, Any]:
    grad_gate_value = torch.empty_like(gate_value)
    is_saved = active is not None
    if not is_saved:
        active, weighted = torch.empty_like(a), torch.empty_like(a)
    outputs = (None, None) if is_saved else (weighted, active)
    launcher, programs, sizes = modulation_launch(a.get_device(), a.dtype, a.shape, not is_saved)
    launcher(programs, (grad, a, gate_value, grad, grad_gate_value, *outputs), sizes)
    # The gradient of a has taken the place of that of the product.
    return grad, grad_gate_value, active, weighted


# ---------------------------------------------------------------------------------- feed-forward
def depthwise_plus_gelu(
    x: Tensor, weight: Tensor, bias: Tensor, keep: bool
) -> tuple[Tensor | None, Tensor]:
    z = torch.empty_like(x) if keep else None
    return z, depthwise_forward(x, weight, bias, epilogue='plus_gelu', kept=z)


@remembered
def feed_forward_launch(
    device: int, dtype: torch.dtype, shape: torch.Size, has_activations: bool
) -> Launch:
    """How `feed_forward_gradients` launches its kernel for `mixed` of this dtype and shape."""
    launcher = feed_forward_launcher(
        device, (dtype,), C=shape[3], HAS_ACTIVATIONS=has_activations, BLOCK=BLOCK
    )
    return launcher, -(-math.prod(shape) // BLOCK), (math.prod(shape[:3]),)


def feed_forward_gradients(
    grad: Tensor, hidden: Tensor, mixed: Tensor, active: Tensor | None, total: Tensor | None
) -> tuple[Tensor, Any, Any]:
    grad_mixed = torch.empty_like(mixed)
    is_saved = active is not None
    if not is_saved:
        active, total = torch.empty_like(mixed), torch.empty_like(mixed)
    outputs = (None, None) if is_saved else (active, total)
    launcher, programs, sizes = feed_forward_launch(
        mixed.get_device(), mixed.dtype, mixed.shape, not is_saved
    )
    launcher(programs, (grad, hidden, mixed, grad_mixed, *outputs), sizes)
    return grad_mixed, active, total


# ------------------------------------------------------------------------------------------ both
def depthwise_gelu_gradient(
    grad: Tensor, weight: Tensor, before: Tensor, other: Tensor | None, out: Tensor | None
) -> Tensor:
    out = other if out is None else out
    return depthwise_forward(
        grad, weight, None, flip=True, epilogue='gelu_backward', y=out, other=other, before=before
    )


def depthwise_weight_gradients(grad: Tensor, x: Tensor, weight: Tensor) -> tuple[Tensor, Any]:
    """As in `block_stock`, but in shares, which `unfold` adds."""
    return weight_gradient_shares(x, grad, weight.shape[-1], has_bias=True)


def pointwise_weight_gradients(
    grad: Tensor, x: Tensor, sums: Tensor | None
) -> tuple[Tensor, Tensor]:
    """As in `block_stock`, but the gradient of the bias stays in shares, which `unfold` adds."""
    sums = column_sums(grad) if sums is None else sums
    batch, height, width, channels = grad.shape
    positions = batch * height * width
    transposed = grad.as_strided((channels, positions), (1, channels))  # one view, not two
    return torch.mm(transposed, x.view(positions, x.shape[3])), sums
