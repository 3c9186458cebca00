"""Folds the affine parts around a 1x1 convolution into its weight and bias, and unfolds gradients.

Scale and shift of a LayerNorm go into the convolution that follows, a layer scale into the one
before it:

    folded weight = scale_out * weight * scale_in
    folded bias = scale_out * (bias + weight @ shift_in)

Stock operators do it here, kernels in `folding_triton`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor


class BlockParameters(NamedTuple):
    """The parameters of a block in the order data flows, 1x1 kernels as (C_out, C_in, 1, 1)."""

    norm_1_weight: Tensor
    norm_1_bias: Tensor
    gate_weight: Tensor
    gate_bias: Tensor
    value_weight: Tensor
    value_bias: Tensor
    depthwise_weight: Tensor
    depthwise_bias: Tensor
    proj_weight: Tensor
    proj_bias: Tensor
    scale_1: Tensor
    norm_2_weight: Tensor
    norm_2_bias: Tensor
    fc1_weight: Tensor
    fc1_bias: Tensor
    pos_weight: Tensor
    pos_bias: Tensor
    fc2_weight: Tensor
    fc2_bias: Tensor
    scale_2: Tensor


# Parameters before the last convolution of the modulation, and of the feed-forward.
INNER_1 = slice(0, 8)
INNER_2 = slice(11, 17)


class FoldedWeights(NamedTuple):
    """The weights that a block computes with, in the dtype of its convolutions.

    1x1 kernels are (C_out, C_in). Depthwise kernels are as `depthwise.prepare_weight` returns them;
    their biases may keep the dtype of the parameters. `unit_1` and `unit_2` are None except in
    float16, where an initial layer scale of 1e-6 would make the folded weights vanish. There the
    layer scale is divided by its largest value, the unit, and the branch is multiplied by the unit.
    """

    gate_value_weight: Tensor  # (2 C, C), both branches of the modulation
    gate_value_bias: Tensor
    depthwise_weight: Tensor
    depthwise_bias: Tensor
    proj_weight: Tensor
    proj_bias: Tensor
    fc1_weight: Tensor
    fc1_bias: Tensor
    pos_weight: Tensor
    pos_bias: Tensor
    fc2_weight: Tensor
    fc2_bias: Tensor
    unit_1: Tensor | None = None
    unit_2: Tensor | None = None


# -------------------------------------------------------------------------------------------- fold
def fold(blocks: Sequence[BlockParameters], dtype: torch.dtype) -> list[FoldedWeights]:
    """The weights of blocks in a dtype."""
    return [fold_block(parameters, dtype) for parameters in blocks]


def fold_block(p: BlockParameters, dtype: torch.dtype) -> FoldedWeights:
    """Folds the weights of one block; see `fold`."""
    scales, units = [p.scale_1, p.scale_2], []
    if dtype == torch.float16:
        tiny = torch.finfo(p.scale_1.dtype).tiny
        units = [scale.abs().amax().clamp_min(tiny) for scale in scales]
        scales = [scale / unit for scale, unit in zip(scales, units)]
    gate_value = torch.cat([p.gate_weight, p.value_weight]).flatten(1)
    bias = torch.cat([p.gate_bias, p.value_bias])
    fc1, proj, fc2 = (weight.flatten(1) for weight in (p.fc1_weight, p.proj_weight, p.fc2_weight))
    return FoldedWeights(
        *fold_columns(gate_value, bias, p.norm_1_weight, p.norm_1_bias, dtype),
        p.depthwise_weight.to(dtype), p.depthwise_bias,
        *fold_rows(proj, p.proj_bias, scales[0], dtype),
        *fold_columns(fc1, p.fc1_bias, p.norm_2_weight, p.norm_2_bias, dtype),
        p.pos_weight.to(dtype), p.pos_bias,
        *fold_rows(fc2, p.fc2_bias, scales[1], dtype),
        *units,
    )  # fmt: skip


def fold_columns(
    weight: Tensor, bias: Tensor, scale: Tensor, shift: Tensor, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """Folds the scale and shift (C_in,) of the input into weight (C_out, C_in) and bias."""
    folded_bias = torch.addmv(bias, weight, shift).to(dtype)
    return (weight * scale).to(dtype), folded_bias


def fold_rows(
    weight: Tensor, bias: Tensor, scale: Tensor, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """Folds a scale (C_out,) of the output into weight (C_out, C_in) and bias."""
    return (scale[:, None] * weight).to(dtype), (scale * bias).to(dtype)


# ------------------------------------------------------------------------------------------ unfold
class FoldedGradients(NamedTuple):
    """Gradients of weight and bias of each convolution, as the steps of a block compute them."""

    gate_value: tuple[Tensor, Any]
    depthwise: tuple[Tensor, Any]
    proj: tuple[Tensor, Any]
    fc1: tuple[Tensor, Any]
    pos: tuple[Tensor, Any]
    fc2: tuple[Tensor, Any]


def unfold(grads: FoldedGradients, p: BlockParameters, w: FoldedWeights) -> BlockParameters:
    """Gradients of the parameters p, in their shapes and dtypes, from those of folded weights w.

    The latter are overwritten.
    """
    weight = torch.cat([p.gate_weight, p.value_weight])
    gate_value_weight, norm_1_weight, norm_1_bias = unfold_columns(
        *grads.gate_value, weight, p.norm_1_weight, p.norm_1_bias
    )
    gate_weight, value_weight = gate_value_weight.chunk(2)
    gate_bias, value_bias = grads.gate_value[1].chunk(2)
    fc1_weight, norm_2_weight, norm_2_bias = unfold_columns(
        *grads.fc1, p.fc1_weight, p.norm_2_weight, p.norm_2_bias
    )
    results = BlockParameters(
        norm_1_weight, norm_1_bias, gate_weight, gate_bias, value_weight, value_bias,
        *grads.depthwise,
        *unfold_rows(*grads.proj, p.proj_weight, p.proj_bias, p.scale_1),
        norm_2_weight, norm_2_bias, fc1_weight, grads.fc1[1],
        *grads.pos,
        *unfold_rows(*grads.fc2, p.fc2_weight, p.fc2_bias, p.scale_2),
    )  # fmt: skip
    results = BlockParameters._make(like(grad, value) for grad, value in zip(results, p))
    for part, unit in ((INNER_1, w.unit_1), (INNER_2, w.unit_2)):
        for grad in results[part] if unit is not None else ():
            grad.mul_(unit)
    return results


def like(grad: Tensor, parameter: Tensor) -> Tensor:
    """A gradient in the shape and dtype of its parameter."""
    if grad.dtype != parameter.dtype:
        grad = grad.to(parameter.dtype)
    return grad if grad.dim() == parameter.dim() else grad.view(parameter.shape)


def unfold_columns(
    grad: Tensor, grad_bias: Tensor, weight: Tensor, scale: Tensor, shift: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of `fold_columns` for weight (C_out, C_in, 1, 1), scale and shift."""
    weight = weight.flatten(1)
    grad, grad_bias = grad.to(weight.dtype), grad_bias.to(weight.dtype)
    of_scale = (grad * weight).sum(0)
    # In place: allocating costs as much as the arithmetic.
    return grad.mul_(scale).addr_(grad_bias, shift), of_scale, grad_bias @ weight


def unfold_rows(
    grad: Tensor, grad_bias: Tensor, weight: Tensor, bias: Tensor, scale: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of `fold_rows` for weight (C_out, C_in, 1, 1), bias and scale."""
    weight = weight.flatten(1)
    grad, grad_bias = grad.to(weight.dtype), grad_bias.to(bias.dtype)
    of_scale = (grad * weight).sum(1).addcmul_(grad_bias, bias)
    return grad.mul_(scale[:, None]), grad_bias * scale, of_scale
