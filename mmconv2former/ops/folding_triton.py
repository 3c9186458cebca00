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

from . import folding
from .depthwise_triton import lay_out, lay_out_together
from .folding import BlockParameters, FoldedWeights, Gradients
from .folding_kernels import fold_kernel, unfold_kernel
from .launch import Launcher, sums_dtype
from .norm_triton import finish_sums

TASK = 11  # numbers of a task of `fold_kernel`
FOLD_ROWS, FOLD_BLOCK = 8, 128
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
@functools.cache
def folder(device: int, dtypes: tuple[torch.dtype, torch.dtype], has_units: bool) -> Launcher:
    """The launcher that folds weights."""
    names = {torch.float32: tl.float32, torch.float64: tl.float64, torch.float16: tl.float16,
             torch.bfloat16: tl.bfloat16}  # fmt: skip
    constants = dict(
        TASK=TASK, HAS_UNITS=has_units, ROWS=FOLD_ROWS, BLOCK=FOLD_BLOCK, DTYPE=names[dtypes[0]],
        ACC=sums_dtype(dtypes[0]),
    )  # fmt: skip
    return Launcher(fold_kernel, constants)


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
    launcher = folder(first.get_device(), (first.dtype, dtype), units is not None)
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
    gate_value: Gradients, proj: Gradients, fc1: Gradients, fc2: Gradients, p: BlockParameters
) -> dict[str, Tensor]:
    """Gradients of the original weights from those of the folded ones."""
    channels, hidden = p.fc2_weight.shape[:2]
    sums = gate_value[1], proj[1], fc1[1], fc2[1]
    gate_value_bias, proj_bias, fc1_bias, fc2_bias = finish_sums(*sums)
    names = 'gate_weight', 'value_weight', 'proj_weight', 'fc1_weight', 'fc2_weight'
    g = {name: torch.empty_like(getattr(p, name)) for name in names}
    small = p.scale_1.new_empty(4, channels).unbind()
    g.update(zip(('proj_bias', 'scale_1', 'fc2_bias', 'scale_2'), small))
    partial = fc1_bias.new_empty(UNFOLD_SHARES, 4 * channels)
    launcher, programs = unfolder(
        partial.get_device(), (gate_value[0].dtype, p.scale_1.dtype), channels, hidden
    )
    launcher(
        programs,
        (
            gate_value[0], gate_value_bias, proj[0], proj_bias, fc1[0], fc1_bias, fc2[0], fc2_bias,
            p.gate_weight, p.value_weight, p.proj_weight, p.proj_bias, p.scale_1, p.fc1_weight,
            p.fc2_weight, p.fc2_bias, p.scale_2, p.norm_1_weight, p.norm_1_bias, p.norm_2_weight,
            p.norm_2_bias, g['gate_weight'], g['value_weight'], g['proj_weight'], g['proj_bias'],
            g['scale_1'], g['fc1_weight'], g['fc2_weight'], g['fc2_bias'], g['scale_2'], partial,
        ),
        (),
    )  # fmt: skip
    norms = finish_sums(partial)[0].view(4, channels).unbind()
    g.update(zip(('norm_1_weight', 'norm_1_bias', 'norm_2_weight', 'norm_2_bias'), norms))
    gate_bias, value_bias = gate_value_bias.view(2, channels).unbind()
    return g | dict(gate_bias=gate_bias, value_bias=value_bias, fc1_bias=fc1_bias)
