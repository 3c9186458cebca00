"""The steps of a block as Triton kernels: the same functions as in `block_stock`, documented there.

A step reads and writes each tensor once, except for products.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .activation_kernels import (
    feed_forward_backward_kernel,
    modulation_backward_kernel,
)
from .depthwise_triton import depthwise_forward, weight_gradient_shares
from .folding_triton import fold, unfold
from .launch import launchers_of
from .norm_triton import (
    add_normalize,
    add_normalize_backward,
    column_sums,
    positions_of,
)
from .pointwise_triton import BLOCK, pointwise_conv, pointwise_gelu, pointwise_input_gradient

# steps, too
__all__ = ['add_normalize', 'add_normalize_backward', 'fold', 'pointwise_conv', 'pointwise_gelu',
           'pointwise_input_gradient', 'unfold']  # fmt: skip

modulation_launcher = launchers_of(modulation_backward_kernel)
feed_forward_launcher = launchers_of(feed_forward_backward_kernel)


# ------------------------------------------------------------------------------------ modulation
def depthwise_times(
    x: Tensor, weight: Tensor, bias: Tensor, value: Tensor, keep: bool
) -> tuple[Tensor | None, Tensor]:
    a = torch.empty_like(x) if keep else None
    return a, depthwise_forward(x, weight, bias, epilogue='times', kept=a, other=value)


def modulation_gradients(
    grad: Tensor, a: Tensor, gate: Tensor, value: Tensor, grad_value: Tensor,
    active: Tensor | None, weighted: Tensor | None,
) -> tuple[Tensor, Any, Any]:  # fmt: skip
    is_saved = active is not None
    if not is_saved:
        active, weighted = torch.empty_like(a), torch.empty_like(a)
    outputs = (None, None) if is_saved else (weighted, active)
    launcher = modulation_launcher(
        a.get_device(), (a.dtype,), C=a.shape[-1], STEP=value.stride(2),
        HAS_ACTIVATIONS=not is_saved, BLOCK=BLOCK,
    )  # fmt: skip
    launcher(
        -(-a.numel() // BLOCK), (grad, a, gate, value, grad, grad_value, *outputs),
        (positions_of(a),),
    )  # fmt: skip
    return grad, active, weighted  # the gradient of a has taken the place of that of the product


# ---------------------------------------------------------------------------------- feed-forward
def depthwise_plus_gelu(
    x: Tensor, weight: Tensor, bias: Tensor, keep: bool
) -> tuple[Tensor | None, Tensor]:
    z = torch.empty_like(x) if keep else None
    return z, depthwise_forward(x, weight, bias, epilogue='plus_gelu', kept=z)


def feed_forward_gradients(
    grad: Tensor, hidden: Tensor, mixed: Tensor, active: Tensor | None, total: Tensor | None
) -> tuple[Tensor, Any, Any]:
    grad_mixed = torch.empty_like(mixed)
    is_saved = active is not None
    if not is_saved:
        active, total = torch.empty_like(mixed), torch.empty_like(mixed)
    outputs = (None, None) if is_saved else (active, total)
    launcher = feed_forward_launcher(
        mixed.get_device(), (mixed.dtype,), C=mixed.shape[-1], HAS_ACTIVATIONS=not is_saved,
        BLOCK=BLOCK,
    )  # fmt: skip
    launcher(
        -(-mixed.numel() // BLOCK), (grad, hidden, mixed, grad_mixed, *outputs),
        (positions_of(mixed),),
    )  # fmt: skip
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
    channels = grad.shape[-1]
    transposed = grad.as_strided((channels, positions_of(grad)), (1, channels))  # one view, not two
    return torch.mm(transposed, x.view(-1, x.shape[-1])), sums
