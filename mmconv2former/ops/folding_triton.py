"""Launches the kernels of `folding_kernels`: the functions of `folding`, documented there.

One launch folds the weights of all blocks. It reads the addresses of the parameters from a plan,
which is copied to the GPU once and kept for as long as the addresses stay the same.
"""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import torch
import triton.language as tl
from torch import Tensor
from torch._utils import _unflatten_dense_tensors

from . import folding
from .depthwise_triton import blocks_for, lay_out, lay_out_together
from .folding import INNER_1, INNER_2, BlockParameters, FoldedGradients, FoldedWeights
from .folding_kernels import finish_kernel, fold_kernel, unfold_kernel
from .launch import Launcher, launchers_of, sums_dtype

TASK = 11  # numbers of a task of `fold_kernel`
FOLD_ROWS, FOLD_BLOCK = 8, 128
fold_launcher = launchers_of(fold_kernel)
UNFOLD_SHARES = 8  # of the rows of a weight, for sums over rows


# -------------------------------------------------------------------------------------------- plan
class Part(NamedTuple):
    """A 1x1 convolution, or some of its output channels, and the parameters folded into it."""

    convolution: str
    weight: str
    bias: str
    scale_in: str | None
    shift_in: str | None
    scale_out: str | None


PARTS = (
    Part('gate_value', 'gate_weight', 'gate_bias', 'norm_1_weight', 'norm_1_bias', None),
    Part('gate_value', 'value_weight', 'value_bias', 'norm_1_weight', 'norm_1_bias', None),
    Part('proj', 'proj_weight', 'proj_bias', None, None, 'scale_1'),
    Part('fc1', 'fc1_weight', 'fc1_bias', 'norm_2_weight', 'norm_2_bias', None),
    Part('fc2', 'fc2_weight', 'fc2_bias', None, None, 'scale_2'),
)


class Plan(NamedTuple):
    """Where the folded weights of blocks are in one tensor.

    Fields:
        tasks: Tasks of `fold_kernel`, on the device.
        segments: Padded number of elements, and shape, of each segment. Blocks of one shape form a
            group, which has a segment for the weights and one for the biases of each convolution;
            their first axis is the block.
    """

    tasks: Tensor
    segments: list[tuple[int, tuple[int, ...]]]


plans: dict[tuple, Plan] = {}  # by the addresses and shapes of the parameters
MOST_PLANS = 128  # more than two large networks need with activation checkpointing
captured: list[Tensor] = []  # tasks that CUDA graphs read, of at most 0.5 MB each


def plan_for(blocks: Sequence[BlockParameters], is_capturing: bool) -> Plan | None:
    """The plan of blocks, made if necessary; None if a capture makes that impossible."""
    key: tuple[Any, ...] = (
        blocks[0].scale_1.device, *(p.fc2_weight.shape for p in blocks),
        *[parameter.data_ptr() for parameters in blocks for parameter in parameters],
    )  # fmt: skip
    plan = plans.get(key)
    if plan is None and not is_capturing:  # a capture forbids copies from the host
        if len(plans) >= MOST_PLANS:
            del plans[next(iter(plans))]  # the oldest
        plan = plans[key] = make_plan(blocks)
    if plan is not None and is_capturing:
        captured.append(plan.tasks)
    return plan


def make_plan(blocks: Sequence[BlockParameters]) -> Plan:
    """Divides the weights of blocks among programs."""
    segments: list[tuple[int, tuple[int, ...]]] = []
    tasks: list[list[int]] = []
    place, number = 0, 0
    for (channels, hidden), group in groups(blocks):
        sizes = dict(
            gate_value=(2 * channels, channels), proj=(channels, channels), fc1=(hidden, channels),
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
            done: dict[str, int] = {}  # rows of each convolution
            for part in PARTS:
                rows, columns = getattr(parameters, part.weight).shape[:2]
                first = index * sizes[part.convolution][0] + done.get(part.convolution, 0)
                done[part.convolution] = rows
                addresses = [
                    0 if name is None else getattr(parameters, name).data_ptr() for name in part[1:]
                ]
                unit = 2 * number + (part.scale_out == 'scale_2')
                tasks += [
                    [
                        *addresses, row, rows, columns,
                        places[part.convolution, 'weight'] + first * columns,
                        places[part.convolution, 'bias'] + first, unit,
                    ]
                    for row in range(0, rows, FOLD_ROWS)
                ]  # fmt: skip
            number += 1
    device = blocks[0].scale_1.device
    return Plan(torch.tensor(tasks, dtype=torch.int64).to(device), segments)


def groups(
    blocks: Sequence[BlockParameters],
) -> Iterator[tuple[tuple[int, int], list[BlockParameters]]]:
    """Channels and hidden channels, and the consecutive blocks that have them."""
    for shape, group in itertools.groupby(blocks, lambda p: tuple(p.fc2_weight.shape[:2])):
        yield shape, list(group)


# -------------------------------------------------------------------------------------------- fold
def fold(blocks: Sequence[BlockParameters], dtype: torch.dtype) -> list[FoldedWeights]:
    """The weights of blocks whose parameters have one dtype and device.

    One launch makes their 1x1 kernels, two launches the depthwise kernels of each size.
    """
    first = blocks[0].scale_1
    plan = plan_for(blocks, first.is_cuda and torch.cuda.is_current_stream_capturing())
    if plan is None:
        return [fold_without_plan(parameters, dtype) for parameters in blocks]
    tasks, segments = plan
    sizes = [size for size, _ in segments]
    folded = first.new_empty(sum(sizes), dtype=dtype)
    units = None
    if dtype == torch.float16:
        scales = [torch.stack([p.scale_1, p.scale_2]) for p in blocks]
        units = torch.cat([scale.abs().amax(1) for scale in scales])
        units = units.clamp_min(torch.finfo(units.dtype).tiny)
    launcher = fold_launcher(
        first.get_device(), (first.dtype, dtype), TASK=TASK, HAS_UNITS=units is not None,
        ROWS=FOLD_ROWS, BLOCK=FOLD_BLOCK,
        DTYPE=getattr(tl, str(first.dtype).removeprefix('torch.')),
    )  # fmt: skip
    launcher(tasks.shape[0], (tasks, units, folded), ())
    convolutions = lay_out_together(
        [weight for p in blocks for weight in (p.depthwise_weight, p.pos_weight)], dtype
    )
    of_segments = iter(
        part[: math.prod(shape)].view(shape).unbind()
        for part, (_, shape) in zip(folded.split(sizes), segments)
    )
    results: list[FoldedWeights] = []
    for _, group in groups(blocks):
        # Weight and bias of the four 1x1 convolutions, of each block.
        for p, (gate_value, gate_value_bias, proj, proj_bias, *feed_forward) in zip(
            group, zip(*itertools.islice(of_segments, 8))
        ):
            fc1, fc1_bias, fc2, fc2_bias = feed_forward
            n = 2 * len(results)
            results.append(
                FoldedWeights(
                    gate_value, gate_value_bias, convolutions[n], p.depthwise_bias, proj, proj_bias,
                    fc1, fc1_bias, convolutions[n + 1], p.pos_bias, fc2, fc2_bias,
                    *(() if units is None else units[n : n + 2].unbind()),
                )
            )  # fmt: skip
    return results


def fold_without_plan(parameters: BlockParameters, dtype: torch.dtype) -> FoldedWeights:
    """`fold` of one block with stock operators, which takes many launches."""
    folded = folding.fold_block(parameters, dtype)
    return folded._replace(
        depthwise_weight=lay_out(folded.depthwise_weight, dtype),
        pos_weight=lay_out(folded.pos_weight, dtype),
    )


# ------------------------------------------------------------------------------------------ unfold
class Unfolding(NamedTuple):
    """How the gradients of a block's parameters are computed and stored.

    They lie in one tensor in the order of `BlockParameters`: an allocation for each would take more
    of the host's time than a kernel takes of the GPU's.

    Fields:
        unfold, finish: The kernels, and the number of programs of each.
        size: Elements of all parameters.
        inner: Where the gradients are that lie within the first and the second branch.
    """

    unfold: tuple[Launcher, int]
    finish: tuple[Launcher, int]
    size: int
    inner: list[slice]


@functools.cache
def unfolding(
    device: int, dtypes: tuple[torch.dtype, torch.dtype], *shapes: torch.Size
) -> Unfolding:
    """The `Unfolding` of parameters of these shapes.

    Args:
        device: Index of the GPU, -1 for the interpreter.
        dtypes: Of the folded weights and of the parameters.
        shapes: Of the parameters.
    """
    sizes = tuple(math.prod(shape) for shape in shapes)
    of = dict(zip(BlockParameters._fields, shapes))
    places = dict(zip(BlockParameters._fields, itertools.accumulate(sizes, initial=0)))
    channels, hidden = of['fc2_weight'][:2]
    kernel_size, pos_size = of['depthwise_weight'][-1], of['pos_weight'][-1]
    shared = dict(C=channels, E=hidden, SHARES=UNFOLD_SHARES)
    unfold_constants = dict(
        shared, ROWS=FOLD_ROWS, BLOCK=FOLD_BLOCK, SHARE_ROWS=32, COLUMNS=32,
        ACC=sums_dtype(dtypes[1]),
        **{n.upper(): places[f'{n}_weight'] for n in ('gate', 'value', 'proj', 'fc1', 'fc2')},
    )  # fmt: skip
    unfold_programs = 2 * -(-channels // FOLD_ROWS) + 2 * UNFOLD_SHARES * -(-channels // 32)
    finish_constants = dict(
        shared, K=kernel_size, POS_K=pos_size, PERIOD=blocks_for(kernel_size).gradient_block,
        POS_PERIOD=blocks_for(pos_size).gradient_block, ROWS=64, BLOCK=32,
        ACC=sums_dtype(dtypes[1]),
        **{n.upper(): places[f'{n}_weight'] for n in ('depthwise', 'pos', 'norm_2')},
    )  # fmt: skip
    finish_programs = (
        (kernel_size**2 + 1) * -(-channels // 32) + (pos_size**2 + 1) * -(-hidden // 32)
        + -(-4 * channels // 32)
    )  # fmt: skip
    return Unfolding(
        (Launcher(unfold_kernel, unfold_constants), unfold_programs),
        (Launcher(finish_kernel, finish_constants), finish_programs),
        sum(sizes),
        [slice(sum(sizes[: part.start]), sum(sizes[: part.stop])) for part in (INNER_1, INNER_2)],
    )


def unfold(grads: FoldedGradients, p: BlockParameters, w: FoldedWeights) -> BlockParameters:
    """Gradients of the parameters, from those of the folded weights that `block_triton` computes.

    Those of biases and of depthwise convolutions come in shares, which are added here.
    """
    (pair, pair_bias), (depthwise, depthwise_blocks) = grads.gate_value, grads.depthwise
    (proj, proj_bias), (fc1, fc1_bias) = grads.proj, grads.fc1
    (pos, pos_blocks), (fc2, fc2_bias) = grads.pos, grads.fc2
    plan = unfolding(
        fc2.get_device(), (fc2.dtype, p.scale_1.dtype), *[parameter.shape for parameter in p]
    )
    flat = p.scale_1.new_empty(plan.size)
    partial = fc1_bias.new_empty(UNFOLD_SHARES * 4 * p.scale_1.shape[0])
    launcher, programs = plan.unfold
    launcher(
        programs,
        (
            pair, pair_bias, proj, proj_bias, fc1, fc1_bias, fc2, fc2_bias, p.gate_weight,
            p.value_weight, p.proj_weight, p.proj_bias, p.scale_1, p.fc1_weight, p.fc2_weight,
            p.fc2_bias, p.scale_2, p.norm_1_weight, p.norm_1_bias, p.norm_2_weight, p.norm_2_bias,
            flat, partial,
        ),
        (pair_bias.shape[0], proj_bias.shape[0], fc1_bias.shape[0], fc2_bias.shape[0]),
    )  # fmt: skip
    launcher, programs = plan.finish
    launcher(
        programs, (depthwise, pos, partial, flat),
        (depthwise_blocks, depthwise.shape[0], pos_blocks, pos.shape[0]),
    )  # fmt: skip
    for place, unit in zip(plan.inner, (w.unit_1, w.unit_2)):
        if unit is not None:
            flat[place].mul_(unit)
    return BlockParameters._make(_unflatten_dense_tensors(flat, p))
