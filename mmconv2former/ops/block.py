"""A block of the network as one autograd function that reads and keeps little.

With x' = LayerNorm(x) without scale and shift, a block computes

    x = x + factor_1 * W3 (DW(GELU(W1 x')) * W2 x')         the modulation, W1 and W2 in one product
    x = x + factor_2 * W5 (h + GELU(DW_3x3(h))), h = GELU(W4 x')        the feed-forward

where the LayerNorms' scale and shift are folded into W1, W2 and W4, the layer scales into W3 and W5
(`FoldedWeights`), and the factors are drop path's. Stock autograd keeps the input of every
operation; this keeps what `RECOMPUTE` says.

`Steps` are the operations in between. `block_stock` has them by torch's operators, for any device,
`block_triton` by kernels that read and write each tensor once.
"""

from __future__ import annotations

import functools
import importlib
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch._subclasses import FakeTensor

from ..ops import block_stock, depthwise
from .depthwise import choose, device_choice, stop_using_triton
from .memory_format import (
    autocast_dtype,
    is_captured,
    is_cpu_float32,
    is_intercepted,
    is_transformed,
    without_autocast,
)

# What the backward pass computes again rather than keeps from the forward pass.
RECOMPUTE = ('nothing', 'elementwise', 'expansion')
PLAIN_TENSORS = (Tensor, nn.Parameter, FakeTensor)  # what is counted with the last is what runs
NO_SECOND_GRADIENTS = (
    'a block that runs as one function has no gradients of gradients (create_graph=True). Let its '
    'layers run one by one: give them a hook, such as '
    'torch.nn.modules.module.register_module_forward_hook(lambda *_: None)'
)
MOST_CHANNELS = 8192  # for Triton's kernels: a program holds all channels of a position


class BlockParameters(NamedTuple):
    """A block's own parameters in the order data flows, 1x1 kernels as (C_out, C_in, 1, 1).

    The function returns their gradients in this order.
    """

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


# Parameters before the last product of the modulation, and of the feed-forward.
INNER_1 = BlockParameters._fields[:8]
INNER_2 = BlockParameters._fields[11:17]


class FoldedWeights(NamedTuple):
    """What the products and convolutions of a block are computed with, in their dtype.

    Weights of products are (C_out, C_in), those of convolutions as `prepare_weight` returns them;
    biases of convolutions may keep the dtype of the parameters. `unit_1` and `unit_2` are None but
    in float16, where an initial layer scale of 1e-6 would make the folded weights vanish: there
    the layer scale is folded divided by its largest value, the unit, by which the branch is
    multiplied instead.
    """

    pair_weight: Tensor  # (2 C, C), the gate's and the value's
    pair_bias: Tensor
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


class Kept(NamedTuple):
    """What the forward pass keeps of one block for the backward pass, (N, H, W, channels)."""

    y_1: Tensor  # the normalized input
    rstd_1: Tensor
    pair: Tensor  # gate before GELU, and value
    a: Tensor | None  # the depthwise convolution
    active_1: Tensor | None  # GELU(gate)
    weighted: Tensor | None  # a * value
    y_2: Tensor
    rstd_2: Tensor
    hidden: Tensor | None  # h before GELU
    active_2: Tensor | None  # h
    mixed: Tensor | None  # DW_3x3(h)
    total: Tensor | None  # h + GELU(DW_3x3(h))


# ------------------------------------------------------------------------------------------ choice
def steps_for(x: Tensor, weights: Sequence[Tensor]) -> Any:
    """`block_triton` where its kernels run, else `block_stock`.

    Args:
        x: Input (N, H, W, C).
        weights: Of both depthwise convolutions.
    """
    if any(choose(x, weight) != 'triton' for weight in weights):
        return block_stock
    return block_triton() if x.shape[3] <= MOST_CHANNELS else block_stock


def is_supported(x: Tensor, parameters: BlockParameters) -> bool:
    """Whether `compute_block` takes an input and parameters; stock layers take any.

    It is not for graphs that are captured, for transforms of `torch.func`, nor for parameters that
    have several dtypes, are not contiguous, or are no plain tensors (sharded or quantized ones).
    """
    if is_captured() or is_transformed():
        return False
    dtype = parameters.scale_1.dtype
    return all(
        type(p) in PLAIN_TENSORS and p.dtype == dtype and p.is_contiguous() for p in parameters
    )


def is_worth_it(x: Tensor, recompute: str) -> bool:
    """Whether `compute_block` is faster or keeps less than stock layers.

    On a CPU in float32, where nothing is recomputed, folding the weights costs more than the passes
    that it saves (measured).
    """
    keeps_less = torch.is_grad_enabled() and recompute != 'nothing'
    return keeps_less or not is_cpu_float32(x) or depthwise.setting == 'triton'


@functools.cache
def block_triton() -> Any:
    """`mmconv2former.ops.block_triton`, imported when it is needed: Triton may be missing."""
    return importlib.import_module('.block_triton', __package__)


def run(function: Callable[..., Any], steps: Any, x: Tensor, *args: Any) -> Any:
    """Calls a function with x, other arguments and steps, on the device of x.

    If Triton fails to compile one of its kernels, the function is called again with stock steps.
    """
    if steps is block_stock or depthwise.failures:
        return function(x, *args, block_stock)
    try:
        if x.is_cuda and x.get_device() != torch.cuda.current_device():
            with torch.cuda.device(x.device):
                return function(x, *args, steps)
        return function(x, *args, steps)
    except steps.CompilationError as error:
        stop_using_triton(error)
        return function(x, *args, block_stock)


# ----------------------------------------------------------------------------------------- folding
def fold(parameters: BlockParameters, dtype: torch.dtype) -> FoldedWeights:
    """The weights of a block in a dtype, by stock operators."""
    p = parameters
    scales, units = [p.scale_1, p.scale_2], []
    if dtype == torch.float16:
        tiny = torch.finfo(p.scale_1.dtype).tiny
        units = [scale.abs().amax().clamp_min(tiny) for scale in scales]
        scales = [scale / unit for scale, unit in zip(scales, units)]
    pair_weight = torch.cat([p.gate_weight, p.value_weight]).flatten(1)
    pair_bias = torch.cat([p.gate_bias, p.value_bias])
    fc1, proj, fc2 = (weight.flatten(1) for weight in (p.fc1_weight, p.proj_weight, p.fc2_weight))
    return FoldedWeights(
        *fold_columns(pair_weight, pair_bias, p.norm_1_weight, p.norm_1_bias, dtype),
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
    """Weight (C_out, C_in) and bias of a product with scale and shift (C_in,) before it in them."""
    folded_bias = torch.addmv(bias, weight, shift).to(dtype)
    return (weight * scale).to(dtype), folded_bias


def fold_rows(
    weight: Tensor, bias: Tensor, scale: Tensor, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """Weight (C_out, C_in) and bias of a product, with a scale (C_out,) behind it in them."""
    return (scale[:, None] * weight).to(dtype), (scale * bias).to(dtype)


def fold_blocks(
    x: Tensor,
    blocks: Sequence[BlockParameters],
    dtype: torch.dtype,
    owner: nn.Module | None,
    steps: Any,
) -> list[FoldedWeights]:
    """The weights of blocks on the device of x; see `folded_together`."""
    with torch.no_grad():
        if steps is block_stock:
            return [fold(parameters, dtype) for parameters in blocks]
        return steps.fold(blocks, dtype, owner)


@contextmanager
def folded_together(blocks: Sequence[Any], x: Tensor, owner: nn.Module) -> Iterator[None]:
    """While it lasts, the weights of all blocks are folded: by a few launches, not one by one.

    Does nothing where stock operators compute the blocks.

    Args:
        blocks: Modules of a network that is about to run once, so that its weights do not change,
            with `plain_parameters()` and `ready`, which becomes this thread (others may run the
            same network on other streams) and both kinds of weights.
        x: Its input, for the device and the dtype of products.
        owner: The network, for which the places of the weights are remembered.
    """
    found = [(block, block.plain_parameters()) for block in blocks]
    plain = [(block, p) for block, p in found if p is not None and is_supported(x, p)]
    if plain:  # one launch is of one dtype and device
        kind = plain[0][1].scale_1.dtype, x.device
        plain = [(b, p) for b, p in plain if (p.scale_1.dtype, p.scale_1.device) == kind]
    if plain and not is_intercepted(x):
        parameters = [p for _, p in plain]
        dtype = autocast_dtype(parameters[0].scale_1)
        weights = [weight for p in parameters for weight in (p.depthwise_weight, p.pos_weight)]
        if all(device_choice(weight, dtype) == 'triton' for weight in weights):
            with without_autocast(x):
                folded = run(fold_blocks, block_triton(), x, parameters, dtype, owner)
            for (block, p), weights_of_block in zip(plain, folded):
                block.ready = threading.get_ident(), p, weights_of_block
    try:
        yield
    finally:
        for block in blocks:
            block.ready = None


# ----------------------------------------------------------------------------------------- forward
def run_block(
    x: Tensor,
    factors: Tensor | None,
    folded: FoldedWeights,
    eps: float,
    recompute: str | None,
    steps: Any,
) -> tuple[Tensor, Kept | None]:
    """A block, (N, H, W, C) -> (N, H, W, C), and what is kept for the backward pass.

    Args:
        x: Input, of the dtype of the residual stream.
        factors: (2, N), by which the branches of each image are multiplied, or None.
        folded: The block's weights.
        eps: Of its LayerNorms.
        recompute: One of `RECOMPUTE`, or None to keep nothing at all.
        steps: `block_stock` or `block_triton`.
    """
    w = folded
    dtype = w.pair_weight.dtype
    keep, keep_activations = recompute is not None, recompute == 'nothing'
    factor_1, factor_2 = branch_factors(x, factors, w)
    y_1, rstd_1 = steps.normalize(x, eps, dtype, keep)
    pair = steps.product(y_1, w.pair_weight, w.pair_bias)  # (N, H, W, 2 C)
    gate, value = pair.chunk(2, -1)
    active_1 = steps.gelu(gate)
    a, weighted = steps.depthwise_times(active_1, w.depthwise_weight, w.depthwise_bias, value, keep)
    branch = steps.product(weighted, w.proj_weight, w.proj_bias)
    if not keep_activations:
        active_1 = weighted = None
    x, y_2, rstd_2 = steps.add_normalize(x, branch, factor_1, eps, dtype, keep)
    hidden = steps.product(y_2, w.fc1_weight, w.fc1_bias)  # (N, H, W, mlp_ratio * C)
    active_2 = steps.gelu(hidden)
    kept_hidden = hidden if recompute in ('nothing', 'elementwise') else None
    del hidden
    mixed, total = steps.depthwise_plus_gelu(active_2, w.pos_weight, w.pos_bias, keep)
    branch = steps.product(total, w.fc2_weight, w.fc2_bias)
    x = steps.add(x, branch, factor_2)
    if not keep:
        return x, None
    if not keep_activations:
        active_2 = total = None
    return x, Kept(
        y_1, rstd_1, pair, a, active_1, weighted, y_2, rstd_2, kept_hidden, active_2, mixed, total
    )


def branch_factors(
    x: Tensor, factors: Tensor | None, w: FoldedWeights
) -> tuple[Tensor | None, Tensor | None]:
    """What the branches are multiplied by, (N,) each."""
    if w.unit_1 is None or w.unit_2 is None:
        return (None, None) if factors is None else (factors[0], factors[1])
    units = torch.stack([w.unit_1, w.unit_2])[:, None]
    factors = units.expand(2, x.shape[0]) if factors is None else factors * units
    return factors[0].contiguous(), factors[1].contiguous()


# ---------------------------------------------------------------------------------------- backward
def run_block_backward(
    grad: Tensor,
    kept: Kept,
    factors: Tensor | None,
    folded: FoldedWeights,
    parameters: BlockParameters,
    steps: Any,
) -> tuple[Tensor, BlockParameters]:
    """Gradients of `run_block` for x and the parameters.

    In float16 the gradients of a branch are divided by its unit until the branch begins, which
    keeps them from vanishing.
    """
    k, w, p = kept, folded, parameters
    dtype = k.pair.dtype
    factor_1, factor_2 = (None, None) if factors is None else (factors[0], factors[1])
    has_activations = k.active_1 is not None

    # feed-forward
    grad_branch, sums = steps.branch_gradient(grad, factor_2, dtype)
    hidden = steps.product(k.y_2, w.fc1_weight, w.fc1_bias) if k.hidden is None else k.hidden
    grad_total = steps.product_input_gradient(grad_branch, w.fc2_weight)
    grad_mixed, active, total = steps.feed_forward_gradients(
        grad_total, hidden, k.mixed, has_activations
    )
    active, total = (k.active_2, k.total) if has_activations else (active, total)
    of_fc2 = steps.product_gradients(grad_branch, total, sums)
    del total
    of_pos = steps.depthwise_weight_gradients(grad_mixed, active, w.pos_weight)
    del active
    grad_hidden = steps.depthwise_gelu_gradient(
        grad_mixed, w.pos_weight, hidden, grad_total, out=None
    )
    del grad_mixed, grad_total, hidden
    of_fc1 = steps.product_gradients(grad_hidden, k.y_2, None)
    grad_y = steps.product_input_gradient(grad_hidden, w.fc1_weight)
    del grad_hidden
    rstd_2 = k.rstd_2 if w.unit_2 is None else k.rstd_2 * w.unit_2
    grad, grad_branch, sums = steps.add_normalize_gradients(grad_y, k.y_2, rstd_2, grad, factor_1)

    # modulation
    gate, value = k.pair.chunk(2, -1)
    grad_pair = torch.empty_like(k.pair)
    grad_gate, grad_value = grad_pair.chunk(2, -1)
    grad_weighted = steps.product_input_gradient(grad_branch, w.proj_weight)
    grad_a, active, weighted = steps.modulation_gradients(
        grad_weighted, k.a, gate, value, grad_value, has_activations
    )
    active, weighted = (k.active_1, k.weighted) if has_activations else (active, weighted)
    of_proj = steps.product_gradients(grad_branch, weighted, sums)
    of_depthwise = steps.depthwise_weight_gradients(grad_a, active, w.depthwise_weight)
    steps.depthwise_gelu_gradient(grad_a, w.depthwise_weight, gate, None, out=grad_gate)
    of_pair = steps.product_gradients(grad_pair, k.y_1, None)
    grad_y = steps.product_input_gradient(grad_pair, w.pair_weight)
    rstd_1 = k.rstd_1 if w.unit_1 is None else k.rstd_1 * w.unit_1
    grad = steps.normalize_gradient(grad_y, k.y_1, rstd_1, grad)

    # parameters
    grads = steps.unfold(of_pair, of_proj, of_fc1, of_fc2, p)
    grads['depthwise_weight'], grads['depthwise_bias'] = of_depthwise
    grads['pos_weight'], grads['pos_bias'] = of_pos
    if w.unit_1 is not None and w.unit_2 is not None:
        for names, unit in ((INNER_1, w.unit_1), (INNER_2, w.unit_2)):
            for name in names:
                grads[name] = grads[name].to(unit.dtype) * unit
    return grad, BlockParameters(
        *(like(grads[name], parameter) for name, parameter in zip(p._fields, p))
    )


def like(grad: Tensor, parameter: Tensor) -> Tensor:
    """A gradient in the shape and dtype of its parameter."""
    if grad.dtype != parameter.dtype:
        grad = grad.to(parameter.dtype)
    return grad if grad.dim() == parameter.dim() else grad.view(parameter.shape)


# ---------------------------------------------------------------------------------------- function
def compute_block(
    x: Tensor,
    factors: Tensor | None,
    parameters: BlockParameters,
    folded: FoldedWeights | None,
    eps: float,
    recompute: str,
) -> Tensor:
    """A block, (N, H, W, C) -> (N, H, W, C), differentiable once.

    Args:
        x: Input, of the dtype of the residual stream; products run in autocast's dtype.
        factors: (2, N), by which the branches of each image are multiplied, or None.
        parameters: The block's.
        folded: Its weights if they are folded already.
        eps: Of its LayerNorms.
        recompute: What the backward pass computes again, one of `RECOMPUTE`.
    """
    dtype = autocast_dtype(x)
    steps = steps_for(x, (parameters.depthwise_weight, parameters.pos_weight))
    with without_autocast(x):
        if torch.is_grad_enabled():
            return BlockFunction.apply(
                x, factors, folded, dtype, eps, recompute, steps, *parameters
            )
        if folded is None or folded.pair_weight.dtype != dtype:
            (folded,) = run(fold_blocks, steps, x, [parameters], dtype, None)
        return run(run_block, steps, x, factors, folded, eps, None)[0]


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
        own = BlockParameters(*parameters)
        if folded is None or folded.pair_weight.dtype != dtype:
            (folded,) = run(fold_blocks, steps, x, [own], dtype, None)
        out, kept = run(run_block, steps, x, factors, folded, eps, recompute)
        # On a CPU they would cost as much memory as the parameters: they are folded again.
        is_kept = dtype != own.fc1_weight.dtype or steps is not block_stock
        ctx.save_for_backward(factors, *kept, *(folded if is_kept else ()), *parameters)
        ctx.steps = steps
        return out

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        # `once_differentiable` would miss some uses: gradients would be wrong without a word.
        if torch.is_grad_enabled():
            raise RuntimeError(NO_SECOND_GRADIENTS)
        factors, *saved = ctx.saved_tensors
        kept, saved = Kept(*saved[: len(Kept._fields)]), saved[len(Kept._fields) :]
        parameters = BlockParameters(*saved[-len(BlockParameters._fields) :])
        folded = saved[: -len(BlockParameters._fields)]
        with without_autocast(grad):
            if not folded:
                (folded,) = run(fold_blocks, ctx.steps, grad, [parameters], kept.pair.dtype, None)
            grad_x, grads = run(
                run_block_backward, ctx.steps, grad, kept, factors, FoldedWeights(*folded),
                parameters,
            )  # fmt: skip
        return grad_x, *(None,) * 6, *grads
