"""The isotropic Conv2Former: blocks of one width at one resolution, as in a vision transformer.

Paper: arXiv 2211.11943, section 4.1 ("isotropic models"), by ConvNeXt's protocol (arXiv 2201.03545,
section 3.3): 18 blocks behind a 16x16 patch embedding. The paper gives parameter counts, not
widths: those of `ISOTROPIC_ARCHS` are our choice, as counts allow no other multiple of 32. No
weights were published, so parameter names are ours.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NoReturn

from torch import Tensor, nn

from ..registry import MODELS, register
from .arguments import (
    MOST_BLOCKS,
    MOST_CHANNELS,
    check_choice,
    check_int,
    parse_kernel_size,
    parse_out_indices,
    refuse_foreign,
)
from .base import Conv2FormerBase
from .blocks import Block, BlockOptions, LayerNorm, drop_path_rates, embed
from .deploy import DeployedBlock


@dataclass(frozen=True)
class IsotropicArch:
    """One row of the table of variants."""

    channels: int
    depth: int = 18
    kernel_size: int = 11


ISOTROPIC_ARCHS = {
    'small': IsotropicArch(channels=320),  # 23 M parameters with the head; published: 22 to 23 M
    'base': IsotropicArch(channels=640),  # 86 M; published: more than 80 M
}
ISOTROPIC_LETTERS = {f'i{name[0]}': name for name in ISOTROPIC_ARCHS}
PATCH_STRIDE = 16


def plain_patch_embedding(in_channels: int, out_channels: int) -> nn.Conv2d:
    """One 16x16 convolution of stride 16: (N, in_channels, H, W) -> (N, out, H/16, W/16)."""
    return nn.Conv2d(in_channels, out_channels, PATCH_STRIDE, stride=PATCH_STRIDE)


def conv_patch_embedding(in_channels: int, out_channels: int) -> nn.Sequential:
    """Three convolutions of total stride 16, shapes as `plain_patch_embedding`.

    The paper does not describe them. Our choice: the hierarchical network's stem with strides 2, 2
    and 4, and of a quarter of the width, so that the embedding stays a small part of the cost.
    """
    hidden_channels = out_channels // 4
    return nn.Sequential(
        nn.Conv2d(in_channels, hidden_channels, 3, stride=2, padding=1, bias=False),
        nn.GELU(),
        nn.BatchNorm2d(hidden_channels),
        nn.Conv2d(hidden_channels, hidden_channels, 3, stride=2, padding=1, bias=False),
        nn.GELU(),
        nn.BatchNorm2d(hidden_channels),
        nn.Conv2d(hidden_channels, out_channels, 4, stride=4),
    )


PATCH_EMBEDDINGS = {'plain': plain_patch_embedding, 'conv': conv_patch_embedding}


@register(MODELS)
class Conv2FormerIsotropic(Conv2FormerBase):
    """Isotropic Conv2Former: every feature map has stride 16 and the same channels.

    For dense prediction take several blocks' outputs, as from a plain vision transformer, and make
    a pyramid of them with `mmseg.Feature2Pyramid` (docs/classification.md).

    Args:
        arch: 'small' or 'is', 'base' or 'ib', or a dict of `channels` (a multiple of 4) and
            optionally `depth` (18) and `kernel_size` (11).
        patch_embedding: 'plain', a 16x16 convolution, or 'conv', three convolutions.
        out_indices: Blocks whose outputs are returned, in this order: an int or a sequence;
            negatives count from the last block. Blocks after the last one asked for are not built.
        frozen_stages: -1 freezes nothing, 0 the patch embedding, k the embedding and the first k
            blocks with their output norms.
        kernel_size: Odd size of the depthwise convolutions of the modulation, None for the arch's.
        in_channels, fusion, mlp_ratio, drop_path_rate, layer_scale_init_value, out_norm, norm_eval,
            with_cp, recompute, depthwise_conv, out_channels_last, init_cfg: See
            `mmconv2former.Conv2Former`; `norm_eval` is of the BatchNorms of the convolutional
            patch embedding.

    Attributes:
        channels: Channels of each returned feature map.
        strides: Stride of each returned feature map, 16.

    Shapes:
        Input (N, in_channels, H, W), H and W at least 16. Returns a tuple of contiguous
        (N, channels[i], H / 16, W / 16); with the plain embedding an incomplete last patch is left
        out.

    Raises:
        ValueError, TypeError: As `mmconv2former.Conv2Former`.

    Source: arXiv 2211.11943, section 4.1.
    """

    blocks: Any  # nn.ModuleList of Block, which to type checkers holds any modules

    def __init__(
        self,
        arch: str | Mapping = 'small',
        in_channels: int = 3,
        patch_embedding: str = 'plain',
        kernel_size: int | None = None,
        fusion: str = 'hadamard',
        mlp_ratio: float = 4,
        drop_path_rate: float = 0.0,
        layer_scale_init_value: float = 1e-6,
        out_indices: int | Sequence[int] = -1,
        out_norm: bool = True,
        frozen_stages: int = -1,
        norm_eval: bool = False,
        with_cp: bool = False,
        recompute: str = 'elementwise',
        depthwise_conv: str = 'DepthwiseConv',
        out_channels_last: bool = False,
        init_cfg: dict | list[dict] | None = None,
        **foreign: NoReturn,
    ) -> None:
        refuse_foreign(type(self).__name__, foreign)
        super().__init__(
            in_channels, drop_path_rate, out_norm, norm_eval, with_cp, out_channels_last, init_cfg
        )
        variant = parse_isotropic_arch(arch)
        channels, depth = variant.channels, variant.depth
        (size,) = parse_kernel_size(
            variant.kernel_size if kernel_size is None else kernel_size, num_stages=1
        )
        check_choice('patch_embedding', patch_embedding, PATCH_EMBEDDINGS)
        check_int('frozen_stages', frozen_stages, minimum=-1, maximum=depth)
        options = BlockOptions(
            fusion, mlp_ratio, layer_scale_init_value, recompute, depthwise_conv, with_cp
        )
        self.out_indices = parse_out_indices(out_indices, depth)
        self.frozen_stages = frozen_stages
        self.channels = (channels,) * len(self.out_indices)
        self.strides = (PATCH_STRIDE,) * len(self.out_indices)
        self.smallest_input = PATCH_STRIDE

        self.patch_embed = PATCH_EMBEDDINGS[patch_embedding](in_channels, channels)
        rates = drop_path_rates(drop_path_rate, depth)
        self.blocks = nn.ModuleList(
            Block(channels, size, rate, options) for rate in rates[: max(self.out_indices) + 1]
        )
        if out_norm:
            for i in self.out_indices:
                norm = LayerNorm(channels, channels_first=not out_channels_last)
                self.add_module(f'norm{i}', norm)
        self._start()

    def _forward(self, x: Tensor) -> tuple[Tensor, ...]:
        x = embed(self.patch_embed, x)  # (N, H / 16, W / 16, C)
        outputs = {}
        for i, block in enumerate(self.blocks):
            x = block(x)
            if i in self.out_indices:
                outputs[i] = self._output(x, i)
        return tuple(outputs[i] for i in self.out_indices)

    def get_layer_depth(self, param_name: str, prefix: str = '') -> tuple[int, int]:
        """Depth of a parameter for layer-wise learning-rate decay, as of vision transformers.

        The patch embedding is layer 0, each block a layer, all the rest the last.

        Args:
            param_name: Name of a parameter, in the backbone or in the model around it.
            prefix: Prefix of the backbone's parameters in that name, such as `'backbone.'`.

        Returns:
            The layer, from 0, and the number of layers.
        """
        num_layers = 1 + len(self.blocks) + 1
        if param_name.startswith(prefix):
            part, _, rest = param_name[len(prefix) :].partition('.')
            if part == 'patch_embed':
                return 0, num_layers
            if part == 'blocks':
                return 1 + int(rest.split('.')[0]), num_layers
        return num_layers - 1, num_layers

    def _own_blocks(self) -> Iterable[nn.Module]:
        return self.blocks

    def _deploy(self) -> None:
        self.blocks = nn.ModuleList(map(DeployedBlock, self.blocks))

    def _frozen_modules(self) -> list[nn.Module]:
        if self.frozen_stages < 0:
            return []
        return [
            self.patch_embed,
            *self.blocks[: self.frozen_stages],
            *self._frozen_norms(self.frozen_stages),
        ]


def parse_isotropic_arch(arch: str | Mapping) -> IsotropicArch:
    """The `IsotropicArch` of a name, its letters or a dict; see `Conv2FormerIsotropic`."""
    if isinstance(arch, str):
        name = ISOTROPIC_LETTERS.get(arch.lower(), arch.lower())
        if name not in ISOTROPIC_ARCHS:
            raise ValueError(
                f'arch must be one of {", ".join(ISOTROPIC_ARCHS)}, '
                f'{", ".join(ISOTROPIC_LETTERS)} or a dict, got {arch!r}'
            )
        return ISOTROPIC_ARCHS[name]
    if not isinstance(arch, Mapping):
        raise TypeError(f'arch must be a str or a dict, got {arch!r}')
    if 'channels' not in arch or set(arch) - {'channels', 'depth', 'kernel_size'}:
        raise ValueError(
            "arch as a dict must have 'channels', and may have 'depth' and 'kernel_size', "
            f'got {dict(arch)}'
        )
    variant = IsotropicArch(**arch)
    check_int("arch['channels']", variant.channels, minimum=4, maximum=MOST_CHANNELS)
    check_int("arch['depth']", variant.depth, minimum=1, maximum=MOST_BLOCKS)
    if variant.channels % 4:
        raise ValueError(
            "arch['channels'] must be a multiple of 4, as the convolutional patch embedding is "
            f'a quarter as wide, got {variant.channels}'
        )
    return variant
