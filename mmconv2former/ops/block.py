"""A block of the network as one autograd function that reads and saves little.

With x' = LayerNorm(x) without scale and shift, a block computes

    x = x + factor_1 * W3 (DW(GELU(W1 x')) * W2 x')         modulation; W1 and W2 in one convolution
    x = x + factor_2 * W5 (h + GELU(DW_3x3(h))), h = GELU(W4 x')        feed-forward

The LayerNorms' scale and shift are folded into W1, W2 and W4, the layer scales into W3 and W5
(`folding`). The factors are those of drop path. Autograd would save the input of every
operation; this function recomputes what `RECOMPUTE` says (activation recomputation).

The steps are torch's operators (`block_stock`, for any device) or kernels that read and write each
tensor once (`block_triton`).
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from operator import attrgetter
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch._subclasses import FakeTensor

from . import block_stock, depthwise
from .depthwise import choose, device_choice, is_in_reach
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


class Saved(NamedTuple):
    """What the forward pass saves for the backward pass, (N, H, W, channels)."""

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
    """Whether `compute_block` takes these parameters here; stock layers take any.

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
    """Whether `compute_block` is faster or saves less than stock layers.

    On a CPU in float32 without recomputation, folding costs more than it saves (measured). A graph
    that is being captured should contain stock layers only.
    """
    if is_captured():
        return False
    saves_less = torch.is_grad_enabled() and recompute != 'nothing'
    return saves_less or not is_cpu_float32(x) or depthwise.setting == 'triton'


def steps_for(x: Tensor, weights: Sequence[Tensor], is_folded: bool = False) -> Any:
    """The module whose steps compute a block of x (N, H, W, C) with these depthwise weights.

    Args:
        is_folded: Whether `folded_together` found that the kernels take these weights.
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


@contextmanager
def folded_together(blocks: Sequence[Any], x: Tensor) -> Iterator[None]:
    """Folds the weights of all blocks for one pass with a few launches, if kernels compute them.

    Args:
        blocks: Modules with `plain_parameters()` and `prefolded`, which is set to this thread, the
            parameters and the weights. (Other threads may run the network on other streams.)
        x: The network's input, for the device and the dtype of convolutions.
    """
    found = [(block, block.plain_parameters()) for block in blocks]
    found = [(block, p) for block, p in found if p is not None and is_supported(p)]
    if found:  # one launch is for one dtype and device
        kind = found[0][1].scale_1.dtype, x.device
        found = [(b, p) for b, p in found if (p.scale_1.dtype, p.scale_1.device) == kind]
    if found and not is_intercepted(x):
        parameters = [p for _, p in found]
        dtype = autocast_dtype(parameters[0].scale_1)
        weights = [weight for p in parameters for weight in (p.depthwise_weight, p.pos_weight)]
        if all(device_choice(weight, dtype) == 'triton' for weight in weights):
            with without_autocast(x):
                folded = run(fold_blocks, load('block_triton'), x, parameters, dtype)
            for (block, p), weights_of_block in zip(found, folded):
                block.prefolded = threading.get_ident(), p, weights_of_block
    try:
        yield
    finally:
        for block in blocks:
            block.prefolded = None


# ----------------------------------------------------------------------------------------- forward
def run_block(
    x: Tensor,
    factors: Tensor | None,
    weights: FoldedWeights,
    eps: float,
    recompute: str | None,
    steps: Any,
) -> tuple[Tensor, Saved | None]:
    """A block, (N, H, W, C) -> (N, H, W, C), and what it saves for the backward pass.

    Args:
        x: Input, in the dtype of the residual stream.
        factors: (2, N), the branches' factors for each image, or None for 1.
        weights: The weights of the block.
        eps: Epsilon of its LayerNorms.
        recompute: One of `RECOMPUTE`, or None to save nothing at all.
        steps: `block_stock` or `block_triton`.
    """
    w, dtype = weights, weights.gate_value_weight.dtype
    keep = recompute is not None
    factor_1, factor_2 = branch_factors(x, factors, w)

    # modulation
    _, normed_1, rstd_1 = steps.add_normalize(x, None, None, eps, dtype, keep)
    gate_value = steps.pointwise_conv(normed_1, w.gate_value_weight, w.gate_value_bias)
    gate, value = gate_value.chunk(2, -1)  # (N, H, W, C) each
    active_1 = steps.gelu(gate)
    a, weighted = steps.depthwise_times(active_1, w.depthwise_weight, w.depthwise_bias, value, keep)
    branch = steps.pointwise_conv(weighted, w.proj_weight, w.proj_bias)
    if recompute != 'nothing':
        active_1 = weighted = None
    x, normed_2, rstd_2 = steps.add_normalize(x, branch, factor_1, eps, dtype, keep)

    # feed-forward
    hidden = steps.pointwise_conv(normed_2, w.fc1_weight, w.fc1_bias)  # (N, H, W, mlp_ratio * C)
    active_2 = steps.gelu(hidden)
    if recompute not in ('nothing', 'elementwise'):
        hidden = None
    mixed, total = steps.depthwise_plus_gelu(active_2, w.pos_weight, w.pos_bias, keep)
    branch = steps.pointwise_conv(total, w.fc2_weight, w.fc2_bias)
    if recompute != 'nothing':
        active_2 = total = None
    x, _, _ = steps.add_normalize(x, branch, factor_2, eps, None, keep=False, in_place=True)
    if not keep:
        return x, None
    return x, Saved(
        normed_1, rstd_1, gate_value, a, active_1, weighted, normed_2, rstd_2, hidden, active_2,
        mixed, total,
    )  # fmt: skip


def branch_factors(
    x: Tensor, factors: Tensor | None, w: FoldedWeights
) -> tuple[Tensor | None, Tensor | None]:
    """The factors of both branches, (N,) each, with the units of folded weights in float16."""
    if w.unit_1 is None or w.unit_2 is None:
        return (None, None) if factors is None else (factors[0], factors[1])
    units = torch.stack([w.unit_1, w.unit_2])[:, None]
    factors = units.expand(2, x.shape[0]) if factors is None else factors * units
    return factors[0].contiguous(), factors[1].contiguous()


# ---------------------------------------------------------------------------------------- backward
def run_block_backward(
    grad: Tensor,
    saved: Saved,
    factors: Tensor | None,
    weights: FoldedWeights,
    parameters: BlockParameters,
    steps: Any,
) -> tuple[Tensor, BlockParameters]:
    """Gradients of `run_block` for x and the parameters.

    In float16 the gradients within a branch are divided by its unit, which keeps them from
    vanishing.
    """
    s, w, p = saved, weights, parameters
    dtype = s.gate_value.dtype
    factor_1, factor_2 = (None, None) if factors is None else (factors[0], factors[1])

    # feed-forward
    _, grad_branch, sums = steps.add_normalize_backward(grad, None, factor_2, dtype)
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
    grad_y = steps.pointwise_input_gradient(grad_hidden, w.fc1_weight)
    del grad_hidden
    rstd_2 = s.rstd_2 if w.unit_2 is None else s.rstd_2 * w.unit_2
    norm_2 = grad_y, s.normed_2, rstd_2
    grad, grad_branch, sums = steps.add_normalize_backward(grad, norm_2, factor_1, dtype)

    # modulation
    gate, value = s.gate_value.chunk(2, -1)
    grad_gate_value = torch.empty_like(s.gate_value)
    grad_gate, grad_value = grad_gate_value.chunk(2, -1)
    grad_weighted = steps.pointwise_input_gradient(grad_branch, w.proj_weight)
    grad_a, active, weighted = steps.modulation_gradients(
        grad_weighted, s.a, gate, value, grad_value, s.active_1, s.weighted
    )
    of_proj = steps.pointwise_weight_gradients(grad_branch, weighted, sums)
    of_depthwise = steps.depthwise_weight_gradients(grad_a, active, w.depthwise_weight)
    steps.depthwise_gelu_gradient(grad_a, w.depthwise_weight, gate, None, grad_gate)
    of_gate_value = steps.pointwise_weight_gradients(grad_gate_value, s.normed_1, None)
    grad_y = steps.pointwise_input_gradient(grad_gate_value, w.gate_value_weight)
    rstd_1 = s.rstd_1 if w.unit_1 is None else s.rstd_1 * w.unit_1
    norm_1 = grad_y, s.normed_1, rstd_1
    grad, _, _ = steps.add_normalize_backward(grad, norm_1, None, None, in_place=True)

    of_weights = FoldedGradients(of_gate_value, of_depthwise, of_proj, of_fc1, of_pos, of_fc2)
    return grad, steps.unfold(of_weights, p, w)


# ---------------------------------------------------------------------------------------- function
def compute_block(
    x: Tensor,
    factors: Tensor | None,
    parameters: BlockParameters,
    folded: FoldedWeights | None,
    eps: float,
    recompute: str,
) -> Tensor:
    """`run_block` in autocast's dtype, differentiable once.

    Args:
        parameters: The parameters of the block.
        folded: Its weights, if they are already folded.
        x, factors, eps, recompute: See `run_block`.
    """
    dtype = autocast_dtype(x)
    weights = parameters.depthwise_weight, parameters.pos_weight
    steps = steps_for(x, weights, folded is not None)
    with without_autocast(x):
        if torch.is_grad_enabled():
            return BlockFunction.apply(
                x, factors, folded, dtype, eps, recompute, steps, *parameters
            )
        folded = folded_in(dtype, folded, x, parameters, steps)
        return run(run_block, steps, x, factors, folded, eps, None)[0]


def folded_in(
    dtype: torch.dtype,
    folded: FoldedWeights | None,
    x: Tensor,
    parameters: BlockParameters,
    steps: Any,
) -> FoldedWeights:
    """The weights of a block in a dtype, folded here unless they already are."""
    if folded is None or folded.gate_value_weight.dtype != dtype:
        (folded,) = run(fold_blocks, steps, x, [parameters], dtype)
    return folded


class BlockFunction(torch.autograd.Function):
    """`run_block` with the gradients of `run_block_backward`."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        factors: Tensor | None,
        folded: FoldedWeights | None,
        dtype: torch.dtype,
        eps: float,
        recompute: str,
        steps: Any,
        *parameters: Tensor,
    ) -> Tensor:
        p = BlockParameters(*parameters)
        weights = folded_in(dtype, folded, x, p, steps)
        out, saved = run(run_block, steps, x, factors, weights, eps, recompute)
        # On a CPU the weights would take as much memory as the parameters, so they are folded
        # again.
        is_saved = dtype != p.fc1_weight.dtype or steps is not block_stock
        ctx.save_for_backward(factors, *saved, *(weights if is_saved else ()), *parameters)
        ctx.steps = steps
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
        factors, *tensors = ctx.saved_tensors
        first, last = len(Saved._fields), len(tensors) - len(BlockParameters._fields)
        saved, parameters = Saved(*tensors[:first]), BlockParameters(*tensors[last:])
        folded = FoldedWeights(*tensors[first:last]) if last > first else None
        with without_autocast(grad):
            weights = folded_in(saved.gate_value.dtype, folded, grad, parameters, ctx.steps)
            grad_x, grads = run(
                run_block_backward, ctx.steps, grad, saved, factors, weights, parameters
            )
        return grad_x, *(None,) * 6, *grads
