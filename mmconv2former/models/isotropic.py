"""The isotropic Conv2Former: blocks of one width at one resolution, as in a vision transformer.

Paper: arXiv 2211.11943, section 4.1 ("isotropic models"), by ConvNeXt's protocol (arXiv 2201.03545,
section 3.3): 18 blocks after a 16x16 patch embedding. The paper gives parameter counts but no
widths. Those in `ISOTROPIC_ARCHS` are our choice: no other multiple of 32 fits the counts. No
weights were published, so parameter names are ours.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from ..registry import MODELS, register
from .arguments import check_choice, check_int, parse_arch, parse_kernel_size, with_arguments_of
from .base import Conv2FormerBase
from .blocks import Stem, drop_path_rates, embed, run_in_turn
from .layer_depth import STEM, LayeredBackbone, Location


@dataclass(frozen=True)
class IsotropicArch:
    """One row of the table of variants."""

    channels: int
    depth: int = 18
    kernel_size: int = 11

    def __post_init__(self) -> None:
        check_int('channels of arch', self.channels, minimum=4)
        check_int('depth of arch', self.depth, minimum=1)
        if self.channels % 4:
            raise ValueError(
                'channels of arch must be a multiple of 4, as the convolutional patch embedding is '
                f'a quarter as wide, got {self.channels}'
            )


ISOTROPIC_ARCHS = {
    'small': IsotropicArch(channels=320),  # 23 M parameters with the head; published: 22 to 23 M
    'base': IsotropicArch(channels=640),  # 86 M; published: more than 80 M
}
ISOTROPIC_LETTERS = {f'i{name[0]}': name for name in ISOTROPIC_ARCHS}
PATCH_STRIDE = 16


def patch_embedding_of(kind: str, in_channels: int, out_channels: int) -> nn.Module:
    """A patch embedding, (N, in_channels, H, W) -> (N, out_channels, H / 16, W / 16).

    The paper does not describe the three convolutions of 'conv'. Our choice: the hierarchical
    network's stem with strides 2, 2 and 4 and a quarter of the width, so that the embedding stays a
    small part of the cost.
    """
    check_choice('patch_embedding', kind, ('plain', 'conv'))
    if kind == 'plain':
        return nn.Conv2d(in_channels, out_channels, PATCH_STRIDE, stride=PATCH_STRIDE)
    return Stem(in_channels, out_channels, out_channels // 4, strides=(2, 2, 4), bias=True)


@register(MODELS)
class Conv2FormerIsotropic(LayeredBackbone, Conv2FormerBase):
    """Isotropic Conv2Former: every feature map has stride 16 and the same channels.

    For dense prediction, take the outputs of several blocks, as for a plain vision transformer, and
    build a pyramid from them with `mmseg.Feature2Pyramid` (docs/classification.md).

    Args:
        arch: 'small' or 'is', 'base' or 'ib', or a dict of `channels` (a multiple of 4) and
            optionally `depth` (18) and `kernel_size` (11).
        patch_embedding: 'plain', a 16x16 convolution, or 'conv', three convolutions.
        kernel_size: Odd size of the modulation's depthwise convolutions, None for the arch's.
        out_indices: Blocks whose outputs are returned, in this order: an int or a sequence;
            negatives count from the last block. Later blocks are not built.
        frozen_stages: -1 freezes nothing, 0 the patch embedding, k the embedding and the first k
            blocks with their output norms.
        norm_eval: Whether the BatchNorms of the convolutional patch embedding stay in eval mode.

    The other arguments, attributes and errors are those of `mmconv2former.Conv2Former`.

    Shapes:
        Input (N, in_channels, H, W), H and W at least 16. Returns a tuple of contiguous
        (N, channels[i], H / 16, W / 16); the plain embedding leaves out an incomplete last patch.

    Source: arXiv 2211.11943, section 4.1.
    """

    blocks: Any  # nn.ModuleList of Block; type checkers cannot tell the modules of one

    @with_arguments_of(Conv2FormerBase)
    def __init__(
        self,
        arch: str | Mapping = 'small',
        patch_embedding: str = 'plain',
        kernel_size: int | None = None,
        out_indices: int | Sequence[int] = -1,
        **shared: Any,
    ) -> None:
        super().__init__(**shared)
        variant = parse_arch(arch, ISOTROPIC_ARCHS, ISOTROPIC_LETTERS)
        channels, depth = variant.channels, variant.depth
        (size,) = parse_kernel_size(
            variant.kernel_size if kernel_size is None else kernel_size, num_stages=1
        )
        self._set_outputs(out_indices, [channels] * depth, [PATCH_STRIDE] * depth)
        self.smallest_input = PATCH_STRIDE

        self.patch_embed = patch_embedding_of(patch_embedding, self.in_channels, channels)
        rates = drop_path_rates(self.drop_path_rate, depth)[: max(self.out_indices) + 1]
        self.blocks = nn.ModuleList(self._block(channels, size, rate) for rate in rates)
        # For layer-wise decay each block is a stage, as in vision transformers.
        self.depths = (1,) * len(self.blocks)
        self._finish()

    def _forward(self, x: Tensor) -> tuple[Tensor, ...]:  # (N, in_channels, H, W)
        x = embed(self.patch_embed, x)  # (N, H / 16, W / 16, C)
        outputs, done = {}, 0
        for i in sorted(self.out_indices):
            x = run_in_turn([self.blocks[j] for j in range(done, i + 1)], x)
            outputs[i] = self._output(x, i)
            done = i + 1
        return tuple(outputs[i] for i in self.out_indices)

    def _blocks(self) -> Iterable[nn.Module]:
        return self.blocks

    def _stages_to_freeze(self, number: int) -> list[nn.Module]:
        return [self.patch_embed, *self.blocks[:number]]

    def _locate(self, param_name: str) -> Location | None:
        match param_name.split('.'):
            case ['patch_embed', *_]:
                return STEM
            case ['blocks', block, *_]:
                return Location(int(block), 0)
        return None
