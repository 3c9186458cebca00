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
from typing import Any

from torch import Tensor, nn

from ..registry import MODELS, register
from .arguments import check_int, parse_arch, parse_kernel_size, with_arguments_of
from .base import Conv2FormerBase
from .blocks import Downsample, Stage, Stem, drop_path_rates, embed
from .layer_depth import STEM, Location, StagedBackbone


@dataclass(frozen=True)
class Arch:
    """One row of the table of variants: one value for each stage."""

    channels: Sequence[int]
    depths: Sequence[int]
    kernel_size: int | Sequence[int] = 11

    def __post_init__(self) -> None:
        if not len(self.channels) == len(self.depths) > 0:
            raise ValueError(f'arch must have one value of channels and depths a stage, got {self}')
        for value in (*self.channels, *self.depths):
            check_int('channels and depths of arch', value, minimum=1)
        if self.channels[0] % 2:
            raise ValueError(
                'channels of arch must begin with an even number, as the stem is half as wide, '
                f'got {self.channels}'
            )


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
class Conv2Former(StagedBackbone, Conv2FormerBase):
    """Conv2Former backbone with multi-scale outputs.

    Args:
        arch: A name of `ARCHS`, its first letter, or a dict of `channels` and `depths` (one value
            for each stage; any number of stages; even channels in the first) and optionally
            `kernel_size`.
        kernel_size: Odd size of the modulation's depthwise convolutions: None for the default of
            the arch, an int, or one int for each stage.
        out_indices: Stages whose features are returned, in this order: an int or a sequence;
            negatives count from the last stage. Later stages are not built, so that no parameter
            is unused in training.
        in_channels: Channels of the input image.
        fusion: How the modulation joins its branches, a key of
            `mmconv2former.models.fusion.FUSIONS`: 'hadamard', or one of the paper's ablations
            'sum', 'sigmoid', 'l1', 'linear'.
        mlp_ratio: Width of the feed-forward's hidden layer, as a multiple of the block's.
        drop_path_rate: Drop path of the last block, in [0, 1); grows linearly from 0 at the first.
        layer_scale_init_value: Initial value of both layer scales of each block.
        out_norm: Whether a LayerNorm `norm{i}` is applied to each returned feature map. The paper
            does not say; on is our choice, as in ConvNeXt's and Swin's dense prediction.
        frozen_stages: -1 freezes nothing, 0 the stem, k the stem and the first k stages with their
            output norms. Frozen parts get no gradient and stay in eval mode.
        norm_eval: Whether the stem's BatchNorms stay in eval mode while training.
        with_cp: Whether the backward pass recomputes each block (activation checkpointing), which
            needs the least memory and more time.
        recompute: What the backward pass recomputes inside a block: 'nothing' (most memory,
            fastest), 'elementwise' (GELU, Hadamard product, sums) or 'expansion' (these and the
            feed-forward's first convolution). Has no effect on blocks that run layer by layer: with
            another `fusion` or `depthwise_conv`, with hooks or replaced layers.
        depthwise_conv: Registered type of the modulation's depthwise convolution, called with
            (N, H, W, C); see `mmconv2former.ops.DepthwiseConv`.
        init_cfg: mmengine's initialisation config. `dict(type='Pretrained', checkpoint=FILE)`
            reads published files unchanged and raises an error if one does not fit; further keys
            are arguments of `mmconv2former.checkpoint.loading.load_pretrained`, such as `prefix`
            and `adapt_kernel`.

    Attributes:
        channels: Channels of each returned feature map.
        strides: Stride of each returned feature map with respect to the input.

    Shapes:
        Input (N, in_channels, H, W), H and W at least the largest stride built (32 for four
        stages). Returns a tuple of contiguous (N, channels[i], H / strides[i], W / strides[i]);
        sizes that are not multiples of the stride are rounded as the published convolutions do.

    Raises:
        ValueError, TypeError: An argument or the shape of an input is not as described; the message
            says what is allowed.

    Source: arXiv 2211.11943; parameter names as in the published ImageNet checkpoints.
    """

    # Both are nn.ModuleList; type checkers cannot tell the modules of one.
    downsample_layers: Any  # a Stem, then one Downsample before each further stage
    stages: Any  # Stage

    @with_arguments_of(Conv2FormerBase)
    def __init__(
        self,
        arch: str | Mapping = 'tiny',
        kernel_size: int | Sequence[int] | None = None,
        out_indices: int | Sequence[int] = (0, 1, 2, 3),
        **shared: Any,
    ) -> None:
        super().__init__(**shared)
        variant = parse_arch(arch, ARCHS, ARCH_LETTERS)
        channels, num_stages = variant.channels, len(variant.depths)
        kernel_sizes = parse_kernel_size(
            variant.kernel_size if kernel_size is None else kernel_size, num_stages
        )
        strides = [STEM_STRIDE * 2**i for i in range(num_stages)]
        self._set_outputs(out_indices, channels, strides)
        self.depths = tuple(variant.depths[: max(self.out_indices) + 1])
        self.smallest_input = strides[len(self.depths) - 1]

        stem = Stem(self.in_channels, channels[0], hidden_channels=channels[0] // 2)
        self.downsample_layers = nn.ModuleList([stem])
        for i in range(1, len(self.depths)):
            self.downsample_layers.append(Downsample(channels[i - 1], channels[i]))
        # Rates for the arch's full depth, so that a network cut by `out_indices` has the same ones.
        rates = iter(drop_path_rates(self.drop_path_rate, sum(variant.depths)))
        self.stages = nn.ModuleList()
        for i, depth in enumerate(self.depths):
            blocks = [self._block(channels[i], kernel_sizes[i], next(rates)) for _ in range(depth)]
            self.stages.append(Stage(*blocks))
        self._finish()

    def _forward(self, x: Tensor) -> tuple[Tensor, ...]:  # (N, in_channels, H, W)
        outputs: list[Any] = []  # for all stages: torch 2.4 cannot compile a dict by integers
        for i, (downsample, stage) in enumerate(zip(self.downsample_layers, self.stages)):
            x = embed(downsample, x) if i == 0 else downsample(x)  # (N, H / s, W / s, C)
            x = stage(x)
            outputs.append(self._output(x, i) if i in self.out_indices else None)
        return tuple(outputs[i] for i in self.out_indices)

    def _blocks(self) -> Iterable[nn.Module]:
        # A stage in a wrapper, such as torch.compile's, is called as a whole.
        return chain.from_iterable(s for s in self.stages if isinstance(s, nn.Sequential))

    def _stages_to_freeze(self, number: int) -> list[nn.Module]:
        return [*self.downsample_layers[: max(number, 1)], *self.stages[:number]]

    def _locate(self, param_name: str) -> Location | None:
        match param_name.split('.'):
            case ['downsample_layers', '0', *_]:
                return STEM
            case ['downsample_layers', stage, *_]:
                return Location(int(stage), 0)
            case ['stages', stage, block, *_]:
                return Location(int(stage), int(block))
        return None
