"""The steps of a block by torch's own operators, for any device.

`block_triton` has the same functions by kernels. Tensors are contiguous (N, H, W, C) but for parts
of the pair (N, H, W, 2 C) that the modulation's first product gives. `dtype` is that of products:
autocast's, where that is on. The residual stream keeps its own. Sums over positions are of float32
at least.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor

from .depthwise import choose, depthwise_conv, depthwise_conv_backward
from .pointwise import product, product_gradient, product_input_gradient

__all__ = ['product', 'product_input_gradient']  # which are steps too

if TYPE_CHECKING:  # which imports this file
    from .block import BlockParameters


# ------------------------------------------------------------------------------------- residuals
def normalize(
    x: Tensor, eps: float, dtype: torch.dtype, keep: bool
) -> tuple[Tensor, Tensor | None]:
    """LayerNorm over the last axis without scale and shift.

    Returns:
        The result in `dtype` and, if it is to be kept, the reciprocal deviation of each position
        (N, H, W, 1).
    """
    y, _, rstd = torch.native_layer_norm(x, (x.shape[-1],), None, None, eps)
    return y.to(dtype), rstd if keep else None


def add(x: Tensor, branch: Tensor, factor: Tensor | None) -> Tensor:
    """x + factor * branch, in the dtype of x; factor (N,) is of each image, None for 1."""
    if factor is None:
        return x + branch
    return torch.addcmul(x, branch.to(x.dtype), factor.to(x.dtype).view(-1, 1, 1, 1))


def add_normalize(
    x: Tensor, branch: Tensor, factor: Tensor | None, eps: float, dtype: torch.dtype, keep: bool
) -> tuple[Tensor, Tensor, Tensor | None]:
    """`add`, and `normalize` of its result."""
    x = add(x, branch, factor)
    return x, *normalize(x, eps, dtype, keep)


def branch_gradient(
    grad: Tensor, factor: Tensor | None, dtype: torch.dtype
) -> tuple[Tensor, Tensor | None]:
    """Gradient of `add` for the branch in `dtype`.

    Returns:
        The gradient, and what `product_gradients` needs to know of its sums.
    """
    if factor is not None:
        grad = grad * factor.to(grad.dtype).view(-1, 1, 1, 1)
    return grad.to(dtype), None


def normalize_gradient(grad_y: Tensor, y: Tensor, rstd: Tensor, grad: Tensor) -> Tensor:
    """grad plus the gradient of `normalize` for its input.

    Args:
        grad_y, y, rstd: Gradient of the first result, and the results.
        grad: Gradient of the input from elsewhere, in the dtype of the input.
    """
    wide = torch.promote_types(grad.dtype, torch.float32)
    inner = torch.ops.aten.native_layer_norm_backward(
        grad_y.to(wide), y.to(wide), (y.shape[-1],), torch.zeros_like(rstd, dtype=wide),
        torch.ones_like(rstd, dtype=wide), None, None, (True, False, False),
    )[0]  # fmt: skip
    return torch.addcmul(grad.to(wide), inner, rstd.to(wide)).to(grad.dtype)


def add_normalize_gradients(
    grad_y: Tensor, y: Tensor, rstd: Tensor, grad: Tensor, factor: Tensor | None
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Gradients of `add_normalize` for x and branch: `normalize_gradient`, `branch_gradient`."""
    grad = normalize_gradient(grad_y, y, rstd, grad)
    return grad, *branch_gradient(grad, factor, y.dtype)


# ------------------------------------------------------------------------------------ modulation
def gelu(x: Tensor) -> Tensor:
    """GELU, contiguous."""
    return F.gelu(x).contiguous()


def depthwise_times(
    x: Tensor, weight: Tensor, bias: Tensor, value: Tensor, keep: bool
) -> tuple[Tensor | None, Tensor]:
    """a = depthwise convolution of x, if it is to be kept, and a * value."""
    a = depthwise_conv(x, weight, bias, choose(x, weight))
    return (a, a * value) if keep else (None, a.mul_(value))


def modulation_gradients(
    grad: Tensor, a: Tensor, gate: Tensor, value: Tensor, grad_value: Tensor, is_kept: bool
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """Gradients of a * value.

    Args:
        grad: Gradient of the product.
        a, value: Its operands.
        gate: What GELU and the depthwise convolution made a of.
        grad_value: Where the gradient for the value goes.
        is_kept: Whether the activations are at hand.

    Returns:
        The gradient for a and, unless they are at hand, GELU(gate) and a * value.
    """
    torch.mul(grad, a, out=grad_value)
    return grad * value, None if is_kept else gelu(gate), None if is_kept else a * value


# ---------------------------------------------------------------------------------- feed-forward
def depthwise_plus_gelu(
    x: Tensor, weight: Tensor, bias: Tensor, keep: bool
) -> tuple[Tensor | None, Tensor]:
    """z = depthwise convolution of x, if it is to be kept, and x + GELU(z)."""
    z = depthwise_conv(x, weight, bias, choose(x, weight))
    return z if keep else None, F.gelu(z).add_(x)


def feed_forward_gradients(
    grad: Tensor, hidden: Tensor, mixed: Tensor, is_kept: bool
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """The gradient of GELU(hidden) + GELU(mixed) for mixed.

    Returns:
        The gradient and, unless `is_kept`, GELU(hidden) and the sum.
    """
    active = None if is_kept else F.gelu(hidden)
    total = None if active is None else F.gelu(mixed).add_(active)
    return torch.ops.aten.gelu_backward(grad, mixed), active, total


# ------------------------------------------------------------------------------------------ both
def depthwise_gelu_gradient(
    grad: Tensor, weight: Tensor, before: Tensor, other: Tensor | None, out: Tensor | None
) -> Tensor:
    """Gradient for `before` of a depthwise convolution of GELU(before).

    Args:
        grad: Gradient of the convolution.
        weight: Its weight.
        before: What GELU was applied to.
        other: A further gradient of GELU(before), or None.
        out: Where the result goes; None for a new tensor.
    """
    needs = (True, False, False)
    inner = depthwise_conv_backward(grad, before, weight, needs, choose(grad, weight))[0]
    assert inner is not None
    inner = inner if other is None else inner.add_(other)
    out = inner if out is None else out
    return torch.ops.aten.gelu_backward.grad_input(inner, before, grad_input=out)


def depthwise_weight_gradients(grad: Tensor, x: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    """Gradients of a depthwise convolution of x for weight and bias."""
    needs = (False, True, True)
    _, of_weight, of_bias = depthwise_conv_backward(
        grad, x, weight, needs, choose(x, weight, is_trained=True)
    )
    assert of_weight is not None
    assert of_bias is not None
    return of_weight, of_bias


def product_gradients(grad: Tensor, x: Tensor, sums: Tensor | None) -> tuple[Tensor, Tensor]:
    """Gradients of a product of x for weight (C_out, C_in) and bias (C_out,).

    Args:
        grad: Gradient of the result (N, H, W, C_out).
        x: (N, H, W, C_in).
        sums: What the function that gave the gradient knows of its sums.
    """
    return product_gradient(grad, x)


# --------------------------------------------------------------------------------------- folding
def unfold(
    of_pair: tuple[Tensor, Tensor],
    of_proj: tuple[Tensor, Tensor],
    of_fc1: tuple[Tensor, Tensor],
    of_fc2: tuple[Tensor, Tensor],
    p: BlockParameters,
) -> dict[str, Tensor]:
    """Gradients of what is folded, from those of the folded weights and biases.

    Args:
        of_pair, of_proj, of_fc1, of_fc2: What `product_gradients` returned, which is used up.
        p: The parameters.

    Returns:
        The gradients by the names of the parameters, but for those of the convolutions.
    """
    gate_bias, value_bias = of_pair[1].chunk(2)
    pair_weight = torch.cat([p.gate_weight, p.value_weight])
    pair, norm_1_weight, norm_1_bias = unfold_columns(
        *of_pair, pair_weight, p.norm_1_weight, p.norm_1_bias
    )
    proj_weight, proj_bias, scale_1 = unfold_rows(*of_proj, p.proj_weight, p.proj_bias, p.scale_1)
    fc1_weight, norm_2_weight, norm_2_bias = unfold_columns(
        *of_fc1, p.fc1_weight, p.norm_2_weight, p.norm_2_bias
    )
    fc2_weight, fc2_bias, scale_2 = unfold_rows(*of_fc2, p.fc2_weight, p.fc2_bias, p.scale_2)
    gate_weight, value_weight = pair.chunk(2)
    return dict(
        norm_1_weight=norm_1_weight, norm_1_bias=norm_1_bias, gate_weight=gate_weight,
        gate_bias=gate_bias, value_weight=value_weight, value_bias=value_bias,
        proj_weight=proj_weight, proj_bias=proj_bias, scale_1=scale_1, norm_2_weight=norm_2_weight,
        norm_2_bias=norm_2_bias, fc1_weight=fc1_weight, fc1_bias=of_fc1[1], fc2_weight=fc2_weight,
        fc2_bias=fc2_bias, scale_2=scale_2,
    )  # fmt: skip


def unfold_columns(
    grad: Tensor, grad_bias: Tensor, weight: Tensor, scale: Tensor, shift: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of `block.fold_columns` for weight, scale and shift.

    Args:
        grad, grad_bias: Gradients of the results.
        weight, scale, shift: As folded, but the weight as (C_out, C_in, 1, 1).
    """
    weight = weight.flatten(1)
    grad, grad_bias = grad.to(weight.dtype), grad_bias.to(weight.dtype)
    of_scale = (grad * weight).sum(0)
    # In place: new memory costs as much as the arithmetic.
    return grad.mul_(scale).addr_(grad_bias, shift), of_scale, grad_bias @ weight


def unfold_rows(
    grad: Tensor, grad_bias: Tensor, weight: Tensor, bias: Tensor, scale: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of `block.fold_rows` for weight, bias and scale."""
    weight = weight.flatten(1)
    grad, grad_bias = grad.to(weight.dtype), grad_bias.to(bias.dtype)
    of_scale = (grad * weight).sum(1).addcmul_(grad_bias, bias)
    return grad.mul_(scale[:, None]), grad_bias * scale, of_scale
