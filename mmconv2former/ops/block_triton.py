"""The steps of a block by Triton kernels: the same functions as in `block_stock`, documented there.

A step reads and writes each tensor once. Sums over positions are taken while the tensors are at
hand, in shares that `finish_sums` adds in a fixed order, so that results are the same in every run.
"""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple
from weakref import WeakKeyDictionary

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor, nn

from ..ops import block
from .activation_kernels import (
    feed_forward_backward_kernel,
    gelu_kernel,
    modulation_backward_kernel,
)
from .block import BlockParameters, FoldedWeights
from .depthwise import aligned
from .depthwise_triton import (
    depthwise_forward,
    depthwise_weight_gradient,
    lay_out,
    lay_out_together,
)
from .folding_kernels import fold_kernel, unfold_kernel
from .launch import CompilationError, Launcher, limits, sums_dtype
from .memory_format import to_channels_first
from .norm_kernels import (
    add_shares_kernel,
    column_sums_kernel,
    layer_norm_backward_kernel,
    layer_norm_kernel,
    residual_norm_backward_kernel,
    residual_norm_kernel,
)

__all__ = ['CompilationError']  # which `block.run` takes from here

BLOCK = 1024  # elements of a program that works element by element
FOLD_ROWS, FOLD_BLOCK = 8, 128


def wide(dtype: torch.dtype) -> torch.dtype:
    """In which sums of a dtype are."""
    return torch.promote_types(dtype, torch.float32)


def positions_of(x: Tensor) -> int:
    return x.shape[0] * x.shape[1] * x.shape[2]


@functools.cache
def programs_at_once(device: int) -> int:
    """About as many as a GPU keeps busy with."""
    return 4 * limits(device)[0] if device >= 0 else 3


def tile(channels: int, elements: int) -> dict[str, int]:
    """Rows and columns of about so many elements that hold whole positions."""
    block = triton.next_power_of_2(channels)
    return dict(ROWS=max(1, elements // block), BLOCK=block)


# ------------------------------------------------------------------------------------- residuals
@functools.cache
def residual_norm(
    device: int,
    dtypes: tuple[torch.dtype, ...],
    channels: int,
    eps: float,
    has_branch: bool,
    has_factor: bool,
    has_norm: bool,
    keep: bool,
) -> Launcher:
    constants = dict(
        C=channels, EPS=eps, **tile(channels, 4096), HAS_BRANCH=has_branch, HAS_FACTOR=has_factor,
        HAS_NORM=has_norm, HAS_RSTD=keep, ACC=sums_dtype(dtypes[0]),
    )  # fmt: skip
    return Launcher(residual_norm_kernel, constants)


def run_residual_norm(
    x: Tensor,
    branch: Tensor | None,
    factor: Tensor | None,
    eps: float,
    dtype: torch.dtype | None,
    keep: bool,
) -> tuple[Tensor, Any, Any]:
    x = aligned(x)
    branch = None if branch is None else aligned(branch)
    positions, per_image = positions_of(x), x.shape[1] * x.shape[2]
    total = None if branch is None else torch.empty_like(x)
    y = rstd = None
    if dtype is not None:
        y = torch.empty_like(x, dtype=dtype)
        if keep:
            rstd = x.new_empty((*x.shape[:3], 1), dtype=wide(x.dtype))
    dtypes = (x.dtype, x.dtype if branch is None else branch.dtype, dtype or x.dtype)
    launcher = residual_norm(
        x.get_device(), dtypes, x.shape[-1], eps, branch is not None, factor is not None,
        dtype is not None, keep,
    )  # fmt: skip
    programs = -(-positions // launcher.constants['ROWS'])
    launcher(programs, (x, branch, factor, total, y, rstd), (positions, per_image))
    return x if total is None else total, y, rstd


def normalize(
    x: Tensor, eps: float, dtype: torch.dtype, keep: bool
) -> tuple[Tensor, Tensor | None]:
    return run_residual_norm(x, None, None, eps, dtype, keep)[1:]


def add(x: Tensor, branch: Tensor, factor: Tensor | None) -> Tensor:
    return run_residual_norm(x, branch, factor, 0.0, None, keep=False)[0]


def add_normalize(
    x: Tensor, branch: Tensor, factor: Tensor | None, eps: float, dtype: torch.dtype, keep: bool
) -> tuple[Tensor, Tensor, Tensor | None]:
    return run_residual_norm(x, branch, factor, eps, dtype, keep)


@functools.cache
def residual_norm_backward(
    device: int,
    dtypes: tuple[torch.dtype, ...],
    channels: int,
    has_norm: bool,
    has_branch: bool,
    has_sums: bool,
    has_factor: bool,
) -> Launcher:
    constants = dict(
        C=channels, **tile(channels, 2048), HAS_NORM=has_norm,
        HAS_BRANCH=has_branch, HAS_SUMS=has_sums, HAS_FACTOR=has_factor, ACC=sums_dtype(dtypes[0]),
    )  # fmt: skip
    return Launcher(residual_norm_backward_kernel, constants)


def run_residual_norm_backward(
    grad: Tensor,
    norm: tuple[Tensor, Tensor, Tensor] | None,
    factor: Tensor | None,
    dtype: torch.dtype | None,
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """Gradients for x and, in `dtype` unless that is None, for the branch, with shares of its sums.

    Args:
        grad: Of the sum (N, H, W, C).
        norm: Gradient of the normalized sum, the normalized sum, rstd; or None.
        factor: (N,) or None.
        dtype: Of the branch.
    """
    grad = aligned(grad)
    grad_y, y, rstd = (None, None, None) if norm is None else norm
    grad_x = grad if norm is None else torch.empty_like(grad)
    has_sums = dtype is not None
    # Where the gradient of the branch is the gradient itself, only sums are missing.
    has_branch = has_sums and (dtype != grad.dtype or factor is not None)
    grad_branch = torch.empty_like(grad, dtype=dtype) if has_branch else None
    launcher = residual_norm_backward(
        grad.get_device(), (grad.dtype, dtype or grad.dtype, grad.dtype if y is None else y.dtype),
        grad.shape[-1], norm is not None, has_branch, has_sums, has_factor=factor is not None,
    )  # fmt: skip
    positions = positions_of(grad)
    tiles = -(-positions // launcher.constants['ROWS'])
    shares = min(tiles, programs_at_once(grad.get_device()))
    sums = grad.new_empty((shares, grad.shape[-1]), dtype=wide(grad.dtype)) if has_sums else None
    launcher(
        shares, (grad, grad_y, y, rstd, factor, grad_x, grad_branch, sums),
        (positions, grad.shape[1] * grad.shape[2], tiles),
    )  # fmt: skip
    if has_sums and grad_branch is None:
        grad_branch = grad_x
    return grad_x, grad_branch, sums


def branch_gradient(
    grad: Tensor, factor: Tensor | None, dtype: torch.dtype
) -> tuple[Tensor, Tensor | None]:
    _, grad_branch, sums = run_residual_norm_backward(grad, None, factor, dtype)
    assert grad_branch is not None
    return grad_branch, sums


def normalize_gradient(grad_y: Tensor, y: Tensor, rstd: Tensor, grad: Tensor) -> Tensor:
    return run_residual_norm_backward(grad, (grad_y, y, rstd), None, None)[0]


def add_normalize_gradients(
    grad_y: Tensor, y: Tensor, rstd: Tensor, grad: Tensor, factor: Tensor | None
) -> tuple[Tensor, Tensor, Tensor | None]:
    grad_x, grad_branch, sums = run_residual_norm_backward(grad, (grad_y, y, rstd), factor, y.dtype)
    assert grad_branch is not None
    return grad_x, grad_branch, sums


@functools.cache
def layer_normalizer(
    device: int, dtypes: tuple[torch.dtype, ...], channels: int, eps: float, channels_first: bool
) -> tuple[Launcher, Launcher]:
    # With the channels first, more positions at once are needed for long stretches of memory.
    warps = 8 if channels_first else 4
    constants = dict(
        C=channels, EPS=eps, **tile(channels, 1024 * warps), CHANNELS_FIRST=channels_first,
        ACC=sums_dtype(dtypes[0]),
    )  # fmt: skip
    backward = dict(constants, **tile(channels, 256 * warps))
    return (
        Launcher(layer_norm_kernel, constants, warps),
        Launcher(layer_norm_backward_kernel, backward, warps),
    )


def layer_norm(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    eps: float,
    dtype: torch.dtype,
    channels_first: bool,
) -> Tensor:
    """`mmconv2former.ops.norm.layer_norm`."""
    x = aligned(x)
    batch, height, width, channels = x.shape
    shape = (batch, channels, height, width) if channels_first else x.shape
    y = x.new_empty(shape, dtype=dtype)
    dtypes = (x.dtype, weight.dtype, dtype)
    launcher, _ = layer_normalizer(x.get_device(), dtypes, channels, eps, channels_first)
    programs = batch * -(-height * width // launcher.constants['ROWS'])
    launcher(programs, (x, weight, bias, y), (height * width,))
    return y.permute(0, 2, 3, 1) if channels_first else y


def layer_norm_gradients(
    x: Tensor, grad: Tensor, weight: Tensor, eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of `layer_norm` for x, weight and bias; grad (N, H, W, C) in either layout."""
    x = aligned(x)
    batch, height, width, channels = x.shape
    channels_first = to_channels_first(grad).is_contiguous()
    grad = grad if channels_first else grad.contiguous()
    grad = grad if grad.data_ptr() % 16 == 0 else grad.clone()
    grad_x = torch.empty_like(x)
    dtypes = (x.dtype, weight.dtype, grad.dtype)
    _, launcher = layer_normalizer(x.get_device(), dtypes, channels, eps, channels_first)
    tiles = batch * -(-height * width // launcher.constants['ROWS'])
    shares = min(tiles, programs_at_once(x.get_device()))
    sums = x.new_empty((shares, 2 * channels), dtype=wide(x.dtype))
    launcher(shares, (grad, x, weight, grad_x, sums), (height * width, tiles))
    of_weight, of_bias = finish_sums(sums)[0].view(2, channels).unbind()
    return grad_x, of_weight.to(weight.dtype), of_bias.to(weight.dtype)


# ------------------------------------------------------------------------------------ modulation
@functools.cache
def strided_gelu(device: int, dtype: torch.dtype, channels: int, step: int) -> Launcher:
    constants = dict(C=channels, STEP=step, BLOCK=BLOCK, ACC=sums_dtype(dtype))
    return Launcher(gelu_kernel, constants)


def gelu(x: Tensor) -> Tensor:
    if x.is_contiguous():
        return F.gelu(x)
    channels = x.shape[-1]
    y = x.new_empty(x.shape)
    launcher = strided_gelu(x.get_device(), x.dtype, channels, x.stride(2))
    launcher(-(-x.numel() // BLOCK), (x, y), (positions_of(x),))
    return y


def depthwise_times(
    x: Tensor, weight: Tensor, bias: Tensor, value: Tensor, keep: bool
) -> tuple[Tensor | None, Tensor]:
    a = torch.empty_like(x) if keep else None
    return a, depthwise_forward(x, weight, bias, epilogue='times', kept=a, other=value)


@functools.cache
def modulation_backward(
    device: int, dtype: torch.dtype, channels: int, step: int, has_activations: bool
) -> Launcher:
    constants = dict(
        C=channels, STEP=step, HAS_ACTIVATIONS=has_activations, BLOCK=BLOCK, ACC=sums_dtype(dtype)
    )
    return Launcher(modulation_backward_kernel, constants)


def modulation_gradients(
    grad: Tensor, a: Tensor, gate: Tensor, value: Tensor, grad_value: Tensor, is_kept: bool
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    grad_a = torch.empty_like(a)
    product, active = (None if is_kept else torch.empty_like(a) for _ in range(2))
    launcher = modulation_backward(
        a.get_device(), a.dtype, a.shape[-1], value.stride(2), not is_kept
    )
    launcher(
        -(-a.numel() // BLOCK), (grad, a, gate, value, grad_a, grad_value, product, active),
        (positions_of(a),),
    )  # fmt: skip
    return grad_a, active, product


# ---------------------------------------------------------------------------------- feed-forward
def depthwise_plus_gelu(
    x: Tensor, weight: Tensor, bias: Tensor, keep: bool
) -> tuple[Tensor | None, Tensor]:
    z = torch.empty_like(x) if keep else None
    return z, depthwise_forward(x, weight, bias, epilogue='plus_gelu', kept=z)


@functools.cache
def feed_forward_backward(
    device: int, dtype: torch.dtype, channels: int, has_activations: bool
) -> Launcher:
    constants = dict(
        C=channels, HAS_ACTIVATIONS=has_activations, BLOCK=BLOCK, ACC=sums_dtype(dtype)
    )
    return Launcher(feed_forward_backward_kernel, constants)


def feed_forward_gradients(
    grad: Tensor, hidden: Tensor, mixed: Tensor, is_kept: bool
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    grad_mixed = torch.empty_like(mixed)
    active, total = (None if is_kept else torch.empty_like(mixed) for _ in range(2))
    launcher = feed_forward_backward(mixed.get_device(), mixed.dtype, mixed.shape[-1], not is_kept)
    launcher(
        -(-mixed.numel() // BLOCK), (grad, hidden, mixed, grad_mixed, active, total),
        (positions_of(mixed),),
    )  # fmt: skip
    return grad_mixed, active, total


# ------------------------------------------------------------------------------------------ both
def depthwise_gelu_gradient(
    grad: Tensor, weight: Tensor, before: Tensor, other: Tensor | None, out: Tensor | None
) -> Tensor:
    return depthwise_forward(
        grad, weight, None, flip=True, epilogue='gelu_backward', y=out, other=other, before=before
    )


def depthwise_weight_gradients(grad: Tensor, x: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    dtype = wide(x.dtype)
    of_weight, of_bias = depthwise_weight_gradient(x, grad, weight.shape[-1], dtype, has_bias=True)
    assert of_bias is not None
    return of_weight, of_bias


product = F.linear


def product_input_gradient(grad: Tensor, weight: Tensor) -> Tensor:
    return grad @ weight


@functools.cache
def column_sums(device: int, dtype: torch.dtype, channels: int) -> Launcher:
    constants = dict(C=channels, ROWS=64, BLOCK=64, ACC=sums_dtype(dtype))
    return Launcher(column_sums_kernel, constants)


def product_gradients(grad: Tensor, x: Tensor, sums: Tensor | None) -> tuple[Tensor, Tensor]:
    channels = grad.shape[-1]
    if sums is None:
        device = grad.get_device()
        launcher = column_sums(device, grad.dtype, channels)
        blocks = -(-channels // launcher.constants['BLOCK'])
        positions = positions_of(grad)
        tiles = -(-positions // launcher.constants['ROWS'])
        shares = min(tiles, -(-programs_at_once(device) // blocks))
        sums = grad.new_empty((shares, channels), dtype=wide(grad.dtype))
        launcher(shares * blocks, (grad, sums), (positions, tiles, shares))
    return torch.mm(grad.view(-1, channels).t(), x.view(-1, x.shape[-1])), sums


SUMS_BLOCK = 32  # columns of a program of `add_shares`


@functools.cache
def add_shares(
    device: int, dtype: torch.dtype, columns: tuple[int, ...]
) -> tuple[Launcher, list[int]]:
    """The kernel, and the sizes of results: of each tensor, and what fills up its last block."""
    constants = dict(ROWS=64, BLOCK=SUMS_BLOCK, ACC=sums_dtype(dtype))
    padded = (*columns, *(0,) * (4 - len(columns)))
    constants.update({f'N{index}': number for index, number in enumerate(padded)})
    sizes = [size for number in columns for size in (number, -number % SUMS_BLOCK)]
    return Launcher(add_shares_kernel, constants), sizes


def finish_sums(*sums: Tensor) -> Sequence[Tensor]:
    """Adds the shares of at most four tensors (shares, columns): (columns,) of each."""
    first = sums[0]
    columns = tuple([part.shape[1] for part in sums])
    launcher, sizes = add_shares(first.get_device(), first.dtype, columns)
    size = sum(sizes)
    total = first.new_empty(size)
    filled = (*sums, *(first,) * (4 - len(sums)))
    shares = tuple([part.shape[0] for part in filled])
    launcher(size // SUMS_BLOCK, (*filled, total), shares)
    return torch.split_with_sizes(total, sizes)[::2]


# --------------------------------------------------------------------------------------- folding
TASK = 11  # numbers of a task of `fold_kernel`


class Part(NamedTuple):
    """A product's weight and bias, or a part of their rows, and what is folded into them."""

    product: str
    weight: str
    bias: str
    scale_in: str | None
    shift_in: str | None
    scale_out: str | None


PARTS = (
    Part('pair', 'gate_weight', 'gate_bias', 'norm_1_weight', 'norm_1_bias', None),
    Part('pair', 'value_weight', 'value_bias', 'norm_1_weight', 'norm_1_bias', None),
    Part('proj', 'proj_weight', 'proj_bias', None, None, 'scale_1'),
    Part('fc1', 'fc1_weight', 'fc1_bias', 'norm_2_weight', 'norm_2_bias', None),
    Part('fc2', 'fc2_weight', 'fc2_bias', None, None, 'scale_2'),
)


class Plan(NamedTuple):
    """Where the folded weights of blocks are in one tensor.

    Fields:
        tasks: Of `fold_kernel`, on the device.
        segments: Padded number of elements, and shape, of each segment. Blocks of one shape form a
            group, whose products have a segment for weights and one for biases; its first axis is
            the block.
    """

    tasks: Tensor
    segments: list[tuple[int, tuple[int, ...]]]


# Of the owners of blocks, with what they depend on.
plans: WeakKeyDictionary[nn.Module, tuple[tuple, Plan | None]] = WeakKeyDictionary()
# Of blocks that are computed again in the backward pass (activation checkpointing) or alone.
lone_plans: dict[tuple, Plan] = {}
MOST_LONE_PLANS = 256
captured: list[Tensor] = []  # what CUDA graphs read, of at most 0.5 MB each


def make_plan(blocks: Sequence[BlockParameters]) -> Plan:
    segments: list[tuple[int, tuple[int, ...]]] = []
    tasks: list[list[int]] = []
    place, number = 0, 0
    for (channels, hidden), group in groups(blocks):
        sizes = dict(
            pair=(2 * channels, channels), proj=(channels, channels), fc1=(hidden, channels),
            fc2=(channels, hidden),
        )  # fmt: skip
        places = {}
        for name, (rows, columns) in sizes.items():
            for suffix, shape in (('weight', (rows, columns)), ('bias', (rows,))):
                places[name, suffix] = place
                size = math.prod(shape) * len(group)
                segments.append((-(-size // 64) * 64, (len(group), *shape)))
                place += segments[-1][0]
        for index, parameters in enumerate(group):
            done: dict[str, int] = {}  # rows of each product
            for part in PARTS:
                weight = getattr(parameters, part.weight)
                rows, columns = weight.shape[:2]
                of_product = index * sizes[part.product][0] + done.get(part.product, 0)
                done[part.product] = rows
                addresses = [
                    0 if name is None else getattr(parameters, name).data_ptr()
                    for name in (part.weight, part.bias, *part[3:])
                ]
                unit = 2 * number + (part.scale_out == 'scale_2')
                tasks += [
                    [
                        *addresses, row, rows, columns,
                        places[part.product, 'weight'] + of_product * columns,
                        places[part.product, 'bias'] + of_product, unit,
                    ]
                    for row in range(0, rows, FOLD_ROWS)
                ]  # fmt: skip
            number += 1
    device = blocks[0].scale_1.device
    return Plan(torch.tensor(tasks, dtype=torch.int64).to(device), segments)


def groups(
    blocks: Sequence[BlockParameters],
) -> Iterator[tuple[tuple[int, int], list[BlockParameters]]]:
    """Channels and hidden channels, and the blocks that have these, one after the other."""
    for shape, group in itertools.groupby(blocks, lambda p: tuple(p.fc2_weight.shape[:2])):
        yield shape, list(group)


def fold_by_operators(parameters: BlockParameters, dtype: torch.dtype) -> FoldedWeights:
    """`fold` of one block, with many launches and without a plan."""
    folded = block.fold(parameters, dtype)
    return folded._replace(
        depthwise_weight=lay_out(folded.depthwise_weight, dtype),
        pos_weight=lay_out(folded.pos_weight, dtype),
    )


def fold(
    blocks: Sequence[BlockParameters], dtype: torch.dtype, owner: nn.Module | None
) -> list[FoldedWeights]:
    """The weights of blocks: their products by one launch, their convolutions by two a kernel size.

    Args:
        blocks: Parameters of one dtype on one device.
        dtype: Of the results.
        owner: Where the blocks come from. For it the addresses of the parameters are remembered,
            so that nothing is copied to the GPU as long as they stay where they are.
    """
    first = blocks[0].scale_1
    is_capturing = first.is_cuda and torch.cuda.is_current_stream_capturing()
    key: tuple[Any, ...] = tuple(
        [parameter.data_ptr() for parameters in blocks for parameter in parameters]
    )
    if owner is None:
        key = (first.device, *key, *(p.fc2_weight.shape for p in blocks))
        known = key, lone_plans.get(key)
    else:
        known = plans.get(owner, ((), None))
    if known[1] is None or known[0] != key:
        if is_capturing:  # nothing may be copied from the host
            return [fold_by_operators(parameters, dtype) for parameters in blocks]
        known = key, make_plan(blocks)
        if owner is not None:
            plans[owner] = known
        else:
            if len(lone_plans) >= MOST_LONE_PLANS:
                lone_plans.clear()
            lone_plans[key] = known[1]
    plan = known[1]
    assert plan is not None
    tasks, segments = plan
    if is_capturing:  # the graph will read it again
        captured.append(tasks)
    folded = first.new_empty(sum(size for size, _ in segments), dtype=dtype)
    units = None
    if dtype == torch.float16:
        scales = [torch.stack([p.scale_1, p.scale_2]) for p in blocks]
        units = torch.cat([scale.abs().amax(1) for scale in scales])
        units = units.clamp_min(torch.finfo(units.dtype).tiny)
    launcher = folder(first.get_device(), (first.dtype, dtype), units is not None)
    launcher(tasks.shape[0], (tasks, units, folded), ())
    convolutions = lay_out_together(
        [weight for p in blocks for weight in (p.depthwise_weight, p.pos_weight)], dtype
    )
    parts = iter(zip(folded.split([size for size, _ in segments]), segments))
    results: list[FoldedWeights] = []
    for _, group in groups(blocks):
        # Weight and bias of the four products, of each block.
        products = zip(
            *(
                part[: math.prod(shape)].view(shape).unbind()
                for part, (_, shape) in itertools.islice(parts, 8)
            )
        )
        for p, (pair_w, pair_b, proj_w, proj_b, fc1_w, fc1_b, fc2_w, fc2_b) in zip(group, products):
            n = len(results)
            results.append(
                FoldedWeights(
                    pair_w, pair_b, convolutions[2 * n], p.depthwise_bias, proj_w, proj_b,
                    fc1_w, fc1_b, convolutions[2 * n + 1], p.pos_bias, fc2_w, fc2_b,
                    *((None, None) if units is None else units[2 * n : 2 * n + 2].unbind()),
                )
            )  # fmt: skip
    return results


@functools.cache
def folder(device: int, dtypes: tuple[torch.dtype, torch.dtype], has_units: bool) -> Launcher:
    names = {torch.float32: tl.float32, torch.float64: tl.float64, torch.float16: tl.float16,
             torch.bfloat16: tl.bfloat16}  # fmt: skip
    constants = dict(
        TASK=TASK, HAS_UNITS=has_units, ROWS=FOLD_ROWS, BLOCK=FOLD_BLOCK, DTYPE=names[dtypes[0]],
        ACC=sums_dtype(dtypes[0]),
    )  # fmt: skip
    return Launcher(fold_kernel, constants)


UNFOLD_SHARES = 8  # of the rows of a weight, whose sums over rows are partial


@functools.cache
def unfolder(
    device: int, dtypes: tuple[torch.dtype, torch.dtype], channels: int, hidden: int
) -> tuple[Launcher, int]:
    """The kernel and its number of programs."""
    rows, columns = FOLD_ROWS, 32
    constants = dict(
        C=channels, E=hidden, SHARES=UNFOLD_SHARES, ROWS=rows, BLOCK=FOLD_BLOCK, SHARE_ROWS=32,
        COLUMNS=columns, ACC=sums_dtype(dtypes[1]),
    )  # fmt: skip
    programs = 2 * -(-channels // rows) + 2 * UNFOLD_SHARES * -(-channels // columns)
    return Launcher(unfold_kernel, constants), programs


def unfold(
    of_pair: tuple[Tensor, Tensor],
    of_proj: tuple[Tensor, Tensor],
    of_fc1: tuple[Tensor, Tensor],
    of_fc2: tuple[Tensor, Tensor],
    p: BlockParameters,
) -> dict[str, Tensor]:
    channels, hidden = p.fc2_weight.shape[:2]
    sums = of_pair[1], of_proj[1], of_fc1[1], of_fc2[1]
    pair_bias, proj_bias, fc1_bias, fc2_bias = finish_sums(*sums)
    names = 'gate_weight', 'value_weight', 'proj_weight', 'fc1_weight', 'fc2_weight'
    grads = {name: torch.empty_like(getattr(p, name)) for name in names}
    small = p.scale_1.new_empty(4, channels).unbind()
    grads.update(zip(('proj_bias', 'scale_1', 'fc2_bias', 'scale_2'), small))
    partial = fc1_bias.new_empty(UNFOLD_SHARES, 4 * channels)
    launcher, programs = unfolder(
        partial.get_device(), (of_pair[0].dtype, p.scale_1.dtype), channels, hidden
    )
    g = grads
    launcher(
        programs,
        (
            of_pair[0], pair_bias, of_proj[0], proj_bias, of_fc1[0], fc1_bias, of_fc2[0], fc2_bias,
            p.gate_weight, p.value_weight, p.proj_weight, p.proj_bias, p.scale_1, p.fc1_weight,
            p.fc2_weight, p.fc2_bias, p.scale_2, p.norm_1_weight, p.norm_1_bias, p.norm_2_weight,
            p.norm_2_bias, g['gate_weight'], g['value_weight'], g['proj_weight'], g['proj_bias'],
            g['scale_1'], g['fc1_weight'], g['fc2_weight'], g['fc2_bias'], g['scale_2'], partial,
        ),
        (),
    )  # fmt: skip
    norms = finish_sums(partial)[0].view(4, channels).unbind()
    grads.update(zip(('norm_1_weight', 'norm_1_bias', 'norm_2_weight', 'norm_2_bias'), norms))
    gate_bias, value_bias = pair_bias.view(2, channels).unbind()
    return grads | dict(gate_bias=gate_bias, value_bias=value_bias, fc1_bias=fc1_bias)
