"""The steps of a block with torch's own operators, for any device.

`block_triton` has the same functions as kernels. Tensors are contiguous (N, H, W, C), and gate and
value are the halves of one (N, H, W, 2 C). `dtype` is the dtype of convolutions (autocast's, if it
is on); the residual stream keeps its own. Sums over positions are at least in float32.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from . import pointwise
from .depthwise import choose, depthwise_conv, depthwise_conv_backward
from .folding import fold, unfold
from .pointwise import pointwise_conv, pointwise_input_gradient

__all__ = ['fold', 'pointwise_conv', 'pointwise_input_gradient', 'unfold']  # steps, too


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
    """Residual addition and LayerNorm over the last axis, without scale and shift.

    Args:
        x: Residual stream (N, H, W, C).
        branch: Tensor to add to it, or None.
        factor: Factor (N,) of the branch for each image; None for 1.
        eps: Epsilon of the LayerNorm.
        dtype: Dtype of its result; None to skip it.
        keep: Whether the backward pass needs the reciprocal standard deviations.
        in_place: Whether the first result may overwrite x.

    Returns:
        x + factor * branch in the dtype of x, its LayerNorm, and the reciprocal standard deviation
        of each position (N, H, W, 1). The last two may be None.
    """
    if branch is not None and factor is None:
        x = x + branch
    elif branch is not None and factor is not None:
        x = torch.addcmul(x, branch.to(x.dtype), factor.to(x.dtype).view(-1, 1, 1, 1))
    if dtype is None:
        return x, None, None
    y, _, rstd = torch.native_layer_norm(x, (x.shape[-1],), None, None, eps)
    return x, y.to(dtype), rstd if keep else None


def add_normalize_backward(
    grad: Tensor,
    norm: tuple[Tensor, Tensor, Tensor] | None,
    factor: Tensor | None,
    dtype: torch.dtype | None,
    in_place: bool = False,
) -> tuple[Tensor, Any, Any]:
    """Gradients of `add_normalize`.

    Args:
        grad: Gradient of the first result.
        norm: Gradient of the second result, and the second and third result; None without a norm.
        factor: Factor of the branch.
        dtype: Dtype of the branch's gradient; None to skip it.
        in_place: Whether the first result may overwrite grad.

    Returns:
        Gradients for x and the branch, and the sums of the latter as `pointwise_weight_gradients`
        needs them. The last two may be None.
    """
    if norm is not None:
        wide = torch.promote_types(grad.dtype, torch.float32)
        grad_y, y, rstd = (value.to(wide) for value in norm)
        inner = torch.ops.aten.native_layer_norm_backward(
            grad_y, y, (y.shape[-1],), torch.zeros_like(rstd), torch.ones_like(rstd), None, None,
            (True, False, False),
        )[0]  # fmt: skip
        grad = torch.addcmul(grad.to(wide), inner, rstd).to(grad.dtype)
    if dtype is None:
        return grad, None, None
    grad_branch = grad if factor is None else grad * factor.to(grad.dtype).view(-1, 1, 1, 1)
    return grad, grad_branch.to(dtype), None


# ------------------------------------------------------------------------- convolution with GELU
def pointwise_gelu(
    x: Tensor, weight: Tensor, bias: Tensor, channels: int, keep: bool
) -> tuple[Tensor | None, Tensor]:
    """The 1x1 convolution of x (None unless it is kept), and GELU of its first channels.

    The second result is contiguous.
    """
    y = pointwise_conv(x, weight, bias)
    return y if keep else None, F.gelu(y[..., :channels]).contiguous()


# ------------------------------------------------------------------------------------ modulation
def depthwise_times(
    x: Tensor, weight: Tensor, bias: Tensor, gate_value: Tensor, keep: bool
) -> tuple[Tensor | None, Tensor]:
    """The depthwise convolution a of x (None unless it is kept), and a * value."""
    a = depthwise_conv(x, weight, bias, choose(x, weight))
    value = gate_value[..., x.shape[-1] :]
    return (a, a * value) if keep else (None, a.mul_(value))


def modulation_gradients(
    grad: Tensor, a: Tensor, gate_value: Tensor, active: Tensor | None, weighted: Tensor | None
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients of a * value.

    Args:
        grad: Gradient of the product, which may be overwritten.
        a: The depthwise convolution of GELU(gate).
        gate_value: Gate and value (N, H, W, 2 C).
        active, weighted: GELU(gate) and a * value; None to recompute them.

    Returns:
        The gradient for a; that for gate and value (N, H, W, 2 C), in which the gate's half has yet
        to be written; `active`; `weighted`.
    """
    gate, value = gate_value.chunk(2, -1)
    grad_gate_value = torch.empty_like(gate_value)
    torch.mul(grad, a, out=grad_gate_value.chunk(2, -1)[1])
    active = F.gelu(gate).contiguous() if active is None else active
    weighted = a * value if weighted is None else weighted
    return grad * value, grad_gate_value, active, weighted


# ---------------------------------------------------------------------------------- feed-forward
def depthwise_plus_gelu(
    x: Tensor, weight: Tensor, bias: Tensor, keep: bool
) -> tuple[Tensor | None, Tensor]:
    """The depthwise convolution z of x (None unless it is kept), and x + GELU(z)."""
    z = depthwise_conv(x, weight, bias, choose(x, weight))
    return z if keep else None, F.gelu(z).add_(x)


def feed_forward_gradients(
    grad: Tensor, hidden: Tensor, mixed: Tensor, active: Tensor | None, total: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    """The gradient of GELU(hidden) + GELU(mixed) for mixed.

    Returns:
        The gradient, active = GELU(hidden) and the sum, total. The last two are recomputed if None.
    """
    active = F.gelu(hidden) if active is None else active
    total = F.gelu(mixed).add_(active) if total is None else total
    return torch.ops.aten.gelu_backward(grad, mixed), active, total


# ------------------------------------------------------------------------------------------ both
def depthwise_gelu_gradient(
    grad: Tensor, weight: Tensor, before: Tensor, other: Tensor | None, out: Tensor | None
) -> Tensor:
    """Gradient for `before` of a depthwise convolution of GELU(before).

    Args:
        grad: Gradient of the convolution.
        weight: Its weight.
        before: The input of GELU, in the first of its channels.
        other: Another gradient of GELU(before), which may be overwritten, or None.
        out: Output tensor, whose first channels are written; None for a new one.
    """
    before = before[..., : grad.shape[-1]]
    needs = (True, False, False)
    inner = depthwise_conv_backward(grad, before, weight, needs, choose(grad, weight))[0]
    inner = inner if other is None else inner.add_(other)
    out = inner if out is None else out[..., : grad.shape[-1]]
    return torch.ops.aten.gelu_backward.grad_input(inner, before, grad_input=out)


def depthwise_weight_gradients(grad: Tensor, x: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    """Gradients of a depthwise convolution of x for weight and bias."""
    implementation = choose(x, weight, is_trained=True)
    grads = depthwise_conv_backward(grad, x, weight, (False, True, True), implementation)
    return grads[1], grads[2]


def pointwise_weight_gradients(
    grad: Tensor, x: Tensor, sums: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Gradients of `pointwise_conv` for weight (C_out, C_in) and bias (C_out,).

    Args:
        grad: Gradient of the result (N, H, W, C_out).
        x: (N, H, W, C_in).
        sums: Sums of the gradient over positions, as returned by the step that computed them.
    """
    return pointwise.pointwise_weight_gradients(grad, x)
