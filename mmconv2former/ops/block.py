"""Blocks of the network as one autograd function that reads and saves little.

With x' = LayerNorm(x) without scale and shift, a block computes

    x = x + factor_1 * W3 (DW(GELU(W1 x')) * W2 x')         modulation; W1 and W2 in one convolution
    x = x + factor_2 * W5 (h + GELU(DW_3x3(h))), h = GELU(W4 x')        feed-forward

The LayerNorms' scale and shift are folded into W1, W2 and W4, the layer scales into W3 and W5
(`folding`). The factors are those of drop path. Autograd would save the input of every
operation; this function recomputes what `RECOMPUTE` says (activation recomputation).

Each residual addition and the LayerNorm after it are one step, also from a block to the next.

The steps are torch's operators (`block_stock`, for any device) or kernels that read and write each
tensor once (`block_triton`).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import chain
from operator import attrgetter
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch._subclasses import FakeTensor

from . import block_stock, depthwise
from .depthwise import aligned, choose, device_choice, is_in_reach
from .dispatch import (
    autocast_dtype,
    is_captured,
    is_cpu_float32,
    is_intercepted,
    is_transformed,
    without_autocast,
)
from .folding import BlockParameters, FoldedGradients, FoldedWeights
from .triton_support import MOST_CHANNELS, failures, load, run_triton

# What the backward pass recomputes instead of reading what the forward pass saved.
RECOMPUTE = ('nothing', 'elementwise', 'expansion')
PLAIN_TENSORS = {Tensor, nn.Parameter, FakeTensor}  # FakeTensor: counts must see what runs
DTYPE = attrgetter('dtype')


Factors = tuple[Tensor | None, Tensor | None]  # (N,) of both branches of a block; None for 1


class Saved(NamedTuple):
    """What the forward pass of a block saves for its backward pass, (N, H, W, channels)."""

    factor_1: Tensor | None
    factor_2: Tensor | None
    normed_1: Tensor
    rstd_1: Tensor
    gate_value: Tensor  # gate before GELU, and value
    a: Tensor  # the depthwise convolution
    active_1: Tensor | None  # GELU(gate)
    weighted: Tensor | None  # a * value
    normed_2: Tensor
    rstd_2: Tensor
    hidden: Tensor | None  # h before GELU
    active_2: Tensor | None  # h
    mixed: Tensor  # DW_3x3(h)
    total: Tensor | None  # h + GELU(DW_3x3(h))


# ------------------------------------------------------------------------------------------ choice
def is_supported(parameters: BlockParameters) -> bool:
    """Whether `compute_blocks` takes these parameters here; stock layers take any.

    It does not in transforms of `torch.func`, or for parameters that have several dtypes, are not
    contiguous or are not plain tensors (such as sharded or quantized ones).
    """
    if is_transformed():
        return False
    # Without loops in Python, because this runs for each block of each forward pass.
    return (
        PLAIN_TENSORS.issuperset(map(type, parameters))
        and len(set(map(DTYPE, parameters))) == 1
        and all(map(Tensor.is_contiguous, parameters))
    )


def is_worth_it(x: Tensor, recompute: str) -> bool:
    """Whether `compute_blocks` is faster or saves less than stock layers.

    On a CPU in float32 without recomputation, folding costs more than it saves (measured). A graph
    that is being captured should contain stock layers only.
    """
    if is_captured():
        return False
    saves_less = torch.is_grad_enabled() and recompute != 'nothing'
    return saves_less or not is_cpu_float32(x) or depthwise.setting == 'triton'


def steps_for(x: Tensor, weights: Sequence[Tensor], is_folded: bool = False) -> Any:
    """The module whose steps compute blocks of x (N, H, W, C) with these depthwise weights.

    Args:
        is_folded: Whether `fold_together` found that the kernels take these weights.
    """
    if is_folded and not (failures or is_captured() or is_transformed() or is_intercepted(x)):
        # Asks less than `choose`.
        reach = (is_in_reach(*x.shape[:3], *weight.shape[::3]) for weight in weights)
        if x.shape[3] <= MOST_CHANNELS and all(reach):
            return load('block_triton')
        return block_stock
    if any(choose(x, weight) != 'triton' for weight in weights) or x.shape[3] > MOST_CHANNELS:
        return block_stock
    return load('block_triton')


def is_by_kernels(x: Tensor, p: BlockParameters, folded: FoldedWeights | None) -> bool:
    """Whether `compute_blocks` computes a block of x (N, H, W, C) with kernels."""
    weights = p.depthwise_weight, p.pos_weight
    return steps_for(x, weights, folded is not None) is not block_stock


def run(function: Callable[..., Any], steps: Any, x: Tensor, *args: Any) -> Any:
    """Calls function(x, *args, steps), with stock steps if a kernel fails to compile."""
    if steps is block_stock:
        return function(x, *args, steps)
    return run_triton(
        lambda *args: function(*args, steps), lambda *args: function(*args, block_stock), x, *args
    )


# ----------------------------------------------------------------------------------------- folding
@torch.no_grad()
def fold_blocks(
    x: Tensor, blocks: Sequence[BlockParameters], dtype: torch.dtype, steps: Any
) -> list[FoldedWeights]:
    """The weights of blocks, on the device of x."""
    return steps.fold(blocks, dtype)


def fold_together(blocks: Sequence[BlockParameters], x: Tensor) -> list[FoldedWeights] | None:
    """The weights of all blocks of a network, with a few launches; None if no kernels compute them.

    Args:
        blocks: Parameters that `compute_blocks` takes, of one dtype and device.
        x: The network's input, for the device and the dtype of convolutions.
    """
    if is_intercepted(x):
        return None
    dtype = autocast_dtype(blocks[0].scale_1)
    weights = [weight for p in blocks for weight in (p.depthwise_weight, p.pos_weight)]
    if any(device_choice(weight, dtype) != 'triton' for weight in weights):
        return None
    with without_autocast(x):
        return run(fold_blocks, load('block_triton'), x, blocks, dtype)


# ----------------------------------------------------------------------------------------- forward
def run_blocks(
    x: Tensor,
    factors: Sequence[Factors],
    weights: Sequence[FoldedWeights],
    eps: float,
    recompute: str | None,
    steps: Any,
) -> tuple[Tensor, list[Saved]]:
    """Blocks one after the other, and what they save for the backward pass.

    Args:
        x: Input (N, H, W, C), in the dtype of the residual stream.
        factors: The branches' factors, of each block.
        weights: The weights of each block.
        eps: Epsilon of their LayerNorms.
        recompute: One of `RECOMPUTE`, or None to save nothing at all.
        steps: `block_stock` or `block_triton`.

    Returns:
        The output (N, H, W, C), and one entry for each block or, without `recompute`, none.
    """
    dtype = weights[0].gate_value_weight.dtype
    keep, channels = recompute is not None, x.shape[-1]
    blocks: list[Saved] = []
    x = x if steps is block_stock else aligned(x)
    _, normed_1, rstd_1 = steps.add_normalize(x, None, None, eps, dtype, keep)
    for number, (w, (factor_1, factor_2)) in enumerate(zip(weights, factors), start=1):
        # modulation
        gate_value, active_1 = steps.pointwise_gelu(
            normed_1, w.gate_value_weight, w.gate_value_bias, channels, True
        )  # (N, H, W, 2 C) and (N, H, W, C)
        a, weighted = steps.depthwise_times(
            active_1, w.depthwise_weight, w.depthwise_bias, gate_value, keep
        )
        branch = steps.pointwise_conv(weighted, w.proj_weight, w.proj_bias)
        if recompute != 'nothing':
            active_1 = weighted = None
        factor = with_unit(factor_1, w.unit_1, x)
        x, normed_2, rstd_2 = steps.add_normalize(x, branch, factor, eps, dtype, keep)

        # feed-forward
        hidden_channels = w.fc1_weight.shape[0]
        keep_hidden = recompute in ('nothing', 'elementwise')
        hidden, active_2 = steps.pointwise_gelu(
            normed_2, w.fc1_weight, w.fc1_bias, hidden_channels, keep_hidden
        )  # (N, H, W, hidden_channels)
        mixed, total = steps.depthwise_plus_gelu(active_2, w.pos_weight, w.pos_bias, keep)
        branch = steps.pointwise_conv(total, w.fc2_weight, w.fc2_bias)
        if recompute != 'nothing':
            active_2 = total = None
        if keep:
            saved = Saved(
                factor_1, factor_2, normed_1, rstd_1, gate_value, a, active_1, weighted, normed_2,
                rstd_2, hidden, active_2, mixed, total,
            )  # fmt: skip
            blocks.append(saved)
        factor = with_unit(factor_2, w.unit_2, x)
        has_next = number < len(weights)
        x, normed_1, rstd_1 = steps.add_normalize(
            x, branch, factor, eps, dtype if has_next else None, keep and has_next, in_place=True
        )
    return x, blocks


def with_unit(factor: Tensor | None, unit: Tensor | None, x: Tensor) -> Tensor | None:
    """The factor (N,) of a branch, with the unit of folded weights in float16."""
    if unit is None:
        return factor
    return unit.expand(x.shape[0]).contiguous() if factor is None else factor * unit


# ---------------------------------------------------------------------------------------- backward
def run_blocks_backward(
    grad: Tensor,
    blocks: Sequence[Saved],
    weights: Sequence[FoldedWeights],
    parameters: Sequence[BlockParameters],
    steps: Any,
) -> tuple[Tensor, list[BlockParameters]]:
    """Gradients of `run_blocks` for x and the parameters.

    In float16 the gradients within a branch are divided by its unit, which keeps them from
    vanishing.
    """
    dtype = blocks[0].gate_value.dtype
    of_parameters: list[BlockParameters] = []
    grad = grad if steps is block_stock else aligned(grad)
    _, grad_branch, sums = steps.add_normalize_backward(grad, None, blocks[-1].factor_2, dtype)
    for index in reversed(range(len(blocks))):
        s, w = blocks[index], weights[index]
        of_fc1, of_pos, of_fc2, grad_y = feed_forward_backward(grad_branch, sums, s, w, steps)
        rstd = s.rstd_2 if w.unit_2 is None else s.rstd_2 * w.unit_2
        grad, grad_branch, sums = steps.add_normalize_backward(
            grad, (grad_y, s.normed_2, rstd), s.factor_1, dtype
        )
        of_gate_value, of_depthwise, of_proj, grad_y = modulation_backward(
            grad_branch, sums, s, w, steps
        )
        rstd = s.rstd_1 if w.unit_1 is None else s.rstd_1 * w.unit_1
        before = (blocks[index - 1].factor_2, dtype) if index > 0 else (None, None)
        grad, grad_branch, sums = steps.add_normalize_backward(
            grad, (grad_y, s.normed_1, rstd), *before, in_place=True
        )
        of_weights = FoldedGradients(of_gate_value, of_depthwise, of_proj, of_fc1, of_pos, of_fc2)
        of_parameters.append(steps.unfold(of_weights, parameters[index], w))
    return grad, of_parameters[::-1]


def feed_forward_backward(
    grad_branch: Tensor, sums: Any, s: Saved, w: FoldedWeights, steps: Any
) -> tuple[Any, Any, Any, Tensor]:
    """Gradients for the weights of fc1, pos and fc2, and for the result of the LayerNorm.

    Args:
        grad_branch: Gradient of the branch (N, H, W, C).
        sums: Its sums over positions, as `add_normalize_backward` returned them.
    """
    hidden = s.hidden
    if hidden is None:
        hidden = steps.pointwise_conv(s.normed_2, w.fc1_weight, w.fc1_bias)
    grad_total = steps.pointwise_input_gradient(grad_branch, w.fc2_weight)
    grad_mixed, active, total = steps.feed_forward_gradients(
        grad_total, hidden, s.mixed, s.active_2, s.total
    )
    of_fc2 = steps.pointwise_weight_gradients(grad_branch, total, sums)
    del total
    of_pos = steps.depthwise_weight_gradients(grad_mixed, active, w.pos_weight)
    del active
    grad_hidden = steps.depthwise_gelu_gradient(grad_mixed, w.pos_weight, hidden, grad_total, None)
    del grad_mixed, grad_total, hidden  # the second may be `grad_hidden` now
    of_fc1 = steps.pointwise_weight_gradients(grad_hidden, s.normed_2, None)
    return of_fc1, of_pos, of_fc2, steps.pointwise_input_gradient(grad_hidden, w.fc1_weight)


def modulation_backward(
    grad_branch: Tensor, sums: Any, s: Saved, w: FoldedWeights, steps: Any
) -> tuple[Any, Any, Any, Tensor]:
    """As `feed_forward_backward`, for gate and value, the depthwise convolution and proj."""
    grad_weighted = steps.pointwise_input_gradient(grad_branch, w.proj_weight)
    grad_a, grad_gate_value, active, weighted = steps.modulation_gradients(
        grad_weighted, s.a, s.gate_value, s.active_1, s.weighted
    )
    of_proj = steps.pointwise_weight_gradients(grad_branch, weighted, sums)
    of_depthwise = steps.depthwise_weight_gradients(grad_a, active, w.depthwise_weight)
    steps.depthwise_gelu_gradient(grad_a, w.depthwise_weight, s.gate_value, None, grad_gate_value)
    of_gate_value = steps.pointwise_weight_gradients(grad_gate_value, s.normed_1, None)
    grad_y = steps.pointwise_input_gradient(grad_gate_value, w.gate_value_weight)
    return of_gate_value, of_depthwise, of_proj, grad_y


# ---------------------------------------------------------------------------------------- function
def compute_blocks(
    x: Tensor,
    factors: Sequence[Factors],
    parameters: Sequence[BlockParameters],
    folded: Sequence[FoldedWeights] | None,
    eps: float,
    recompute: str,
) -> Tensor:
    """`run_blocks` in autocast's dtype, differentiable once.

    Args:
        parameters: The parameters of each block.
        folded: The weights of each block, if they are already folded.
        x, factors, eps, recompute: See `run_blocks`.
    """
    dtype = autocast_dtype(x)
    weights = [weight for p in parameters for weight in (p.depthwise_weight, p.pos_weight)]
    steps = steps_for(x, weights, folded is not None)
    inputs = x, *chain(*parameters)
    with without_autocast(x):
        if torch.is_grad_enabled() and any(value.requires_grad for value in inputs):
            return BlocksFunction.apply(
                x, factors, folded, dtype, eps, recompute, steps, *inputs[1:]
            )
        folded = folded_in(dtype, folded, x, parameters, steps)
        return run(run_blocks, steps, x, factors, folded, eps, None)[0]


def folded_in(
    dtype: torch.dtype,
    folded: Sequence[FoldedWeights] | None,
    x: Tensor,
    parameters: Sequence[BlockParameters],
    steps: Any,
) -> Sequence[FoldedWeights]:
    """The weights of blocks in a dtype, folded here unless they already are."""
    if folded and folded[0].gate_value_weight.dtype == dtype:
        return folded
    return run(fold_blocks, steps, x, parameters, dtype)


class BlocksFunction(torch.autograd.Function):
    """`run_blocks` with the gradients of `run_blocks_backward`."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        factors: Sequence[Factors],
        folded: Sequence[FoldedWeights] | None,
        dtype: torch.dtype,
        eps: float,
        recompute: str,
        steps: Any,
        *parameters: Tensor,
    ) -> Tensor:
        of_blocks = divide(parameters, BlockParameters)
        weights = folded_in(dtype, folded, x, of_blocks, steps)
        out, saved = run(run_blocks, steps, x, factors, weights, eps, recompute)
        # On a CPU the weights would take as much memory as the parameters, so they are folded
        # again.
        is_saved = dtype != parameters[0].dtype or steps is not block_stock
        ctx.save_for_backward(*chain(*saved), *chain(*(weights if is_saved else ())), *parameters)
        ctx.steps, ctx.number = steps, len(saved)
        return out

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        # `once_differentiable` would miss some uses and return wrong gradients silently.
        if torch.is_grad_enabled():
            raise RuntimeError(
                'a fused block has no gradients of gradients (create_graph=True). Run its layers '
                'one by one instead: register a hook, such as '
                'torch.nn.modules.module.register_module_forward_hook(lambda *_: None)'
            )
        tensors, number = ctx.saved_tensors, ctx.number
        first, last = number * len(Saved._fields), -number * len(BlockParameters._fields)
        saved, parameters = divide(tensors[:first], Saved), divide(tensors[last:], BlockParameters)
        folded = divide(tensors[first:last], FoldedWeights)
        with without_autocast(grad):
            weights = folded_in(saved[0].gate_value.dtype, folded, grad, parameters, ctx.steps)
            grad_x, grads = run(run_blocks_backward, ctx.steps, grad, saved, weights, parameters)
        return grad_x, *(None,) * 6, *chain(*grads)


def divide(tensors: Sequence[Any], kind: Any) -> list[Any]:
    """Named tuples of this kind from all their fields in a row."""
    size = len(kind._fields)
    return [kind._make(tensors[i : i + size]) for i in range(0, len(tensors), size)]
