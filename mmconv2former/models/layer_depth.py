"""Depth of a parameter for learning-rate decay, by its stage and block: one rule for all backbones.

It is the rule for ConvNeXt in mmpretrain and mmdet, generalised to stages of any depth.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple


class Location(NamedTuple):
    """Where a parameter is: its stage, -1 for the stem, and its block in the stage.

    A downsampling counts with the first block after it.
    """

    stage: int
    block: int


STEM = Location(-1, 0)


def layer_depth(location: Location | None, depths: Sequence[int]) -> tuple[int, int]:
    """The layer of a parameter, from 0, and the number of layers.

    The stem is layer 0. Each stage forms `num_groups(depth)` layers of consecutive blocks.

    Args:
        location: None for parameters outside the stages, such as output norms and heads, which
            are in the last layer.
        depths: Blocks of each stage.
    """
    groups = [num_groups(depth) for depth in depths]
    num_layers = 1 + sum(groups) + 1
    if location is None:
        return num_layers - 1, num_layers
    stage, block = location
    if stage < 0:
        return 0, num_layers
    return 1 + sum(groups[:stage]) + block * groups[stage] // depths[stage], num_layers


def stage_depth(location: Location | None, depths: Sequence[int]) -> tuple[int, int]:
    """Like `layer_depth`, but each stage is one layer."""
    num_layers = 1 + len(depths) + 1
    return (num_layers - 1 if location is None else location.stage + 1), num_layers


def num_groups(depth: int) -> int:
    """Number of layers that a stage of `depth` blocks counts as.

    Our choice: groups of at least three blocks, at most nine, so that the rates published for
    ConvNeXt (three blocks a group; 3 groups of its 9, 9 of its 27 blocks) keep their meaning at
    Conv2Former's depths, 8 to 48.
    """
    return min(9, max(1, depth // 3))
