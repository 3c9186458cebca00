"""Conv2Former, a ConvNet in transformer style, as a multi-scale backbone.

Paper: "Conv2Former: A Simple Transformer-Style ConvNet for Visual Recognition", arXiv 2211.11943,
section 3. Parameter names and numerics are those of the published ImageNet checkpoints, which
differ from the paper's text in one place: the feed-forward has a residual 3x3 depthwise
convolution.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain
from typing import Any, NoReturn

from torch import Tensor, nn

from ..registry import MODELS, register
from .arguments import (
    MOST_BLOCKS,
    MOST_CHANNELS,
    MOST_STAGES,
    check_int,
    is_sequence,
    parse_kernel_size,
    parse_out_indices,
    refuse_foreign,
)
from .base import Conv2FormerBase
from .blocks import Block, BlockOptions, Downsample, LayerNorm, Stem, drop_path_rates, embed
from .deploy import DeployedBlock, deployed_downsample, deployed_stem
from .layer_depth import STEM, Location, layer_depth, stage_depth


@dataclass(frozen=True)
class Arch:
    """One row of the table of variants."""

    channels: tuple[int, ...]
    depths: tuple[int, ...]
    kernel_size: int | tuple[int, ...] = 11


# Table 1 of arXiv 2211.11943; `nano` is from the official repository, whose code uses kernel 7.
ARCHS = {
    'nano': Arch(channels=(64, 128, 256, 512), depths=(2, 2, 8, 2), kernel_size=7),
    'tiny': Arch(channels=(72, 144, 288, 576), depths=(3, 3, 12, 3)),
    'small': Arch(channels=(72, 144, 288, 576), depths=(4, 4, 32, 4)),
    'base': Arch(channels=(96, 192, 384, 768), depths=(4, 4, 34, 4)),
    'large': Arch(channels=(128, 256, 512, 1024), depths=(4, 4, 48, 4)),
}
ARCH_LETTERS = {name[0]: name for name in ARCHS}
STEM_STRIDE = 4


@register(MODELS)
class Conv2Former(Conv2FormerBase):
    """Conv2Former backbone with multi-scale outputs.

    Stages after the last one asked for by `out_indices` are not built, so that no parameter is
    unused in training.

    Args:
        arch: A name of `ARCHS`, its first letter, or a dict of `channels` and `depths` (one value
            a stage, as many stages as wished, even channels in the first) and optionally
            `kernel_size`.
        in_channels: Channels of the input image.
        kernel_size: Odd size of the depthwise convolutions of the modulation: None for the arch's
            own, an int, or one int a stage.
        fusion: How the modulation joins its branches, a key of
            `mmconv2former.models.fusion.FUSIONS`: 'hadamard', or one of the
            paper's ablations 'sum', 'sigmoid', 'l1', 'linear'.
        mlp_ratio: Width of the feed-forward's hidden layer, as a multiple of the block's.
        drop_path_rate: Drop path of the last block, in [0, 1); it grows linearly from 0 at the
            first block.
        layer_scale_init_value: Initial value of both layer scales of each block.
        out_indices: Stages whose features are returned, in this order: an int or a sequence;
            negatives count from the last stage.
        out_norm: Whether a LayerNorm `norm{i}` is applied to each returned feature map. The paper
            does not say; on by our choice, as in ConvNeXt's and Swin's dense prediction.
        frozen_stages: -1 freezes nothing, 0 the stem, k the stem and the first k stages with their
            output norms. Frozen parameters get no gradient and frozen norms stay in eval mode.
        norm_eval: Whether the stem's BatchNorms stay in eval mode while training.
        with_cp: Whether each block is recomputed in the backward pass (activation checkpointing),
            for less memory at the price of time.
        recompute: What the backward pass computes again instead of keeping it from the forward
            pass: 'nothing' (most memory, fastest), 'elementwise' (GELU, Hadamard product, sums) or
            'expansion' (these and the feed-forward's first product: least memory). A block with
            another `fusion` or `depthwise_conv` than the defaults, or with hooks or replaced
            layers, is computed layer by layer, where autograd keeps all.
        depthwise_conv: Type name of the modulation's depthwise convolution in the registry; see
            `mmconv2former.ops.DepthwiseConv`. Another than that is called as it is.
        out_channels_last: Whether feature maps on a GPU are in `torch.channels_last` memory, which
            half-precision convolutions behind them would otherwise be copied to. mmcv's RoIAlign,
            which misreads it, is guarded then (`mmconv2former.compat`).
        init_cfg: mmengine's initialisation config. `dict(type='Pretrained', checkpoint=FILE)`
            takes published files as they are; a file that does not fit is an error (see
            `mmconv2former.checkpoint.loading.load_pretrained`, which also takes `prefix` and
            `adapt_kernel`).

    Attributes:
        channels: Channels of each returned feature map.
        strides: Stride of each returned feature map with respect to the input.

    Shapes:
        Input (N, in_channels, H, W), H and W at least the largest stride built (32 for four
        stages). Returns a tuple of contiguous (N, channels[i], h_i, w_i).
        Sizes are H / strides[i] for multiples of the stride and are rounded as the published
        convolutions do otherwise.

    Raises:
        ValueError, TypeError: An argument, or the shape of an input, is not as described above, or
            there are others (`foreign`, which stands for none); the message says what to do.

    Source: arXiv 2211.11943; parameter names as in the published ImageNet checkpoints.
    """

    # Both nn.ModuleList, which to type checkers holds any modules.
    downsample_layers: Any  # of Stem and Downsample
    stages: Any  # of nn.Sequential of Block

    def __init__(
        self,
        arch: str | Mapping = 'tiny',
        in_channels: int = 3,
        kernel_size: int | Sequence[int] | None = None,
        fusion: str = 'hadamard',
        mlp_ratio: float = 4,
        drop_path_rate: float = 0.0,
        layer_scale_init_value: float = 1e-6,
        out_indices: int | Sequence[int] = (0, 1, 2, 3),
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
        variant = parse_arch(arch)
        channels, num_stages = variant.channels, len(variant.depths)
        kernel_sizes = parse_kernel_size(
            variant.kernel_size if kernel_size is None else kernel_size, num_stages
        )
        check_int('frozen_stages', frozen_stages, minimum=-1, maximum=num_stages)
        options = BlockOptions(
            fusion, mlp_ratio, layer_scale_init_value, recompute, depthwise_conv, with_cp
        )
        self.out_indices = parse_out_indices(out_indices, num_stages)
        self.frozen_stages = frozen_stages
        self.depths = variant.depths[: max(self.out_indices) + 1]
        self.channels = tuple(channels[i] for i in self.out_indices)
        self.strides = tuple(STEM_STRIDE * 2**i for i in self.out_indices)
        self.smallest_input = STEM_STRIDE * 2 ** (len(self.depths) - 1)

        self.downsample_layers = nn.ModuleList([Stem(in_channels, channels[0])])
        for i in range(1, len(self.depths)):
            self.downsample_layers.append(Downsample(channels[i - 1], channels[i]))

        # Over the arch's full depth, so that a network cut by `out_indices` is part of the whole.
        rates = iter(drop_path_rates(drop_path_rate, sum(variant.depths)))
        self.stages = nn.ModuleList()
        for i, depth in enumerate(self.depths):
            blocks = [
                Block(channels[i], kernel_sizes[i], next(rates), options) for _ in range(depth)
            ]
            self.stages.append(nn.Sequential(*blocks))

        if out_norm:
            for i in self.out_indices:
                norm = LayerNorm(channels[i], channels_first=not out_channels_last)
                self.add_module(f'norm{i}', norm)
        self._start()

    def _forward(self, x: Tensor) -> tuple[Tensor, ...]:
        outputs: list[Any] = []  # a list by stage: torch 2.4 cannot compile a dict by integers
        for i, (downsample, stage) in enumerate(zip(self.downsample_layers, self.stages)):
            x = embed(downsample, x) if i == 0 else downsample(x)
            x = stage(x)
            outputs.append(self._output(x, i) if i in self.out_indices else None)
        return tuple(outputs[i] for i in self.out_indices)

    def _own_blocks(self) -> Iterable[nn.Module]:
        return chain.from_iterable(self.stages)

    def _deploy(self) -> None:
        stem, *downsamples = self.downsample_layers
        self.downsample_layers = nn.ModuleList(
            [deployed_stem(stem), *map(deployed_downsample, downsamples)]
        )
        self.stages = nn.ModuleList(
            nn.Sequential(*map(DeployedBlock, stage)) for stage in self.stages
        )

    def get_layer_depth(self, param_name: str, prefix: str = '') -> tuple[int, int]:
        """Depth of a parameter for layer-wise learning-rate decay, as mmpretrain's backbones do.

        The stem is layer 0. Each stage forms `num_groups(depth)` layers of consecutive blocks, a
        downsampling counts with the first blocks behind it. What is not of the published
        backbone, that is the output norms and any name without `prefix`, is the last layer, with
        the heads.

        Args:
            param_name: Name of a parameter, in the backbone or in the model around it.
            prefix: Prefix of the backbone's parameters in that name, such as `'backbone.'`.

        Returns:
            The layer, from 0, and the number of layers.
        """
        return layer_depth(self._locate(param_name, prefix), self.depths)

    def get_stage_depth(self, param_name: str, prefix: str = '') -> tuple[int, int]:
        """As `get_layer_depth`, for stage-wise decay: stem, stages one by one, all the rest."""
        return stage_depth(self._locate(param_name, prefix), self.depths)

    def _locate(self, param_name: str, prefix: str) -> Location | None:
        """Stage and block of a parameter; None if it is outside the stages."""
        if param_name.startswith(prefix):
            part, _, rest = param_name[len(prefix) :].partition('.')
            if part == 'downsample_layers':
                index = int(rest.split('.')[0])
                return Location(index, 0) if index > 0 else STEM
            if part == 'stages':
                stage, block = rest.split('.')[:2]
                return Location(int(stage), int(block))
        return None

    def _frozen_modules(self) -> list[nn.Module]:
        if self.frozen_stages < 0:
            return []
        last = self.frozen_stages
        return [
            *self.downsample_layers[: max(last, 1)],
            *self.stages[:last],
            *self._frozen_norms(last),
        ]


def parse_arch(arch: str | Mapping) -> Arch:
    """The `Arch` of a name, a letter or a dict; see `Conv2Former`."""
    if isinstance(arch, str):
        name = ARCH_LETTERS.get(arch.lower(), arch.lower())
        if name not in ARCHS:
            raise ValueError(
                f'arch must be one of {", ".join(ARCHS)}, its first letter '
                f'({", ".join(ARCH_LETTERS)}) or a dict, got {arch!r}'
            )
        return ARCHS[name]
    if not isinstance(arch, Mapping):
        raise TypeError(f'arch must be a str or a dict, got {arch!r}')
    unknown = set(arch) - {'channels', 'depths', 'kernel_size'}
    if unknown or not {'channels', 'depths'} <= set(arch):
        raise ValueError(
            "arch as a dict must have 'channels' and 'depths', and may have 'kernel_size', "
            f'got {dict(arch)}'
        )
    values = {}
    for key in ('channels', 'depths'):
        if not is_sequence(arch[key]):
            raise TypeError(f"arch['{key}'] must be a sequence of ints, got {arch[key]!r}")
        if len(arch[key]) > MOST_STAGES:
            raise ValueError(f"arch['{key}'] must be of at most {MOST_STAGES} stages")
        for value in arch[key]:
            maximum = MOST_CHANNELS if key == 'channels' else MOST_BLOCKS
            check_int(f"arch['{key}']", value, minimum=1, maximum=maximum)
        values[key] = tuple(map(int, arch[key]))
    if not values['channels'] or len(values['channels']) != len(values['depths']):
        raise ValueError(
            "arch['channels'] and arch['depths'] must have one value a stage, "
            f'got channels={values["channels"]} and depths={values["depths"]}'
        )
    if values['channels'][0] % 2:
        raise ValueError(
            "arch['channels'] must begin with an even number, as the stem is half as wide, "
            f'got {values["channels"]}'
        )
    kernel_size = arch.get('kernel_size')
    return Arch(**values) if kernel_size is None else Arch(**values, kernel_size=kernel_size)
