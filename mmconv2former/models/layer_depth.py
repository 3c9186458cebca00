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


class LayeredBackbone:
    """A backbone that can tell the depth of its parameters.

    Attributes:
        depths: Blocks of each stage.
    """

    depths: Sequence[int]

    def _locate(self, param_name: str) -> Location | None:
        """Stage and block of a parameter of the backbone; None if it is outside the stages."""
        raise NotImplementedError(f'{type(self).__name__} must say where its parameters are')

    def get_layer_depth(self, param_name: str, prefix: str = '') -> tuple[int, int]:
        """Depth of a parameter for layer-wise learning-rate decay, as mmpretrain's backbones do.

        The stem is layer 0. Each stage forms `num_groups(depth)` layers of consecutive blocks; a
        downsampling counts with the blocks after it. Everything outside the stages, such as output
        norms and any name without `prefix`, is in the last layer, with the heads.

        Args:
            param_name: Name of a parameter, in the backbone or in the model around it.
            prefix: Prefix of the backbone's parameters in that name, such as `'backbone.'`.

        Returns:
            The layer, from 0, and the number of layers.
        """
        return self._depth(param_name, prefix, [num_groups(depth) for depth in self.depths])

    def _depth(self, param_name: str, prefix: str, groups: Sequence[int]) -> tuple[int, int]:
        """The layer of a parameter and their number, for so many layers in each stage."""
        num_layers = 1 + sum(groups) + 1
        inside = param_name.startswith(prefix)
        location = self._locate(param_name.removeprefix(prefix)) if inside else None
        if location is None:
            return num_layers - 1, num_layers
        stage, block = location
        if stage < 0:
            return 0, num_layers
        return 1 + sum(groups[:stage]) + block * groups[stage] // self.depths[stage], num_layers


class StagedBackbone(LayeredBackbone):
    """A backbone of a few stages, for which decay by stages makes sense too."""

    def get_stage_depth(self, param_name: str, prefix: str = '') -> tuple[int, int]:
        """Like `get_layer_depth`, for stage-wise decay: stem, each stage, everything else."""
        return self._depth(param_name, prefix, [1] * len(self.depths))


def num_groups(depth: int) -> int:
    """Number of layers that a stage of `depth` blocks counts as.

    Our choice: groups of at least three blocks, at most nine, so that the rates published for
    ConvNeXt (three blocks a group; 3 groups of its 9, 9 of its 27 blocks) keep their meaning at
    Conv2Former's depths, 8 to 48.
    """
    return min(9, max(1, depth // 3))
