"""The networks that the paper compares with, as backbones for the same recipes.

Section 4 of arXiv 2211.11943 compares with ConvNeXt, Swin, HorNet, RepLKNet, DeiT, EfficientNet,
FocalNet, CoAtNet and others. mmpretrain or timm builds them; `Baseline` returns what Conv2Former
returns: feature maps of strides 4, 8, 16 and 32, and the depth of each parameter.
docs/baselines.md shows how to use it.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from importlib import import_module
from types import ModuleType

from torch import Tensor, nn

from ..registry import MODELS, WEIGHT_INITIALIZERS, register
from .arguments import check_number, parse_out_indices
from .base import PretrainedModule
from .layer_depth import STEM, Location, StagedBackbone

STRIDES = (4, 8, 16, 32)
ALL_STAGES = tuple(range(len(STRIDES)))
# The parts of mmseg's Feature2Pyramid that turn a map of stride 16 into each stride.
PYRAMID_PARTS = ('upsample_4x', 'upsample_2x', 'identity', 'downsample_2x')
PIP_NAMES = {
    'mmpretrain': 'onedl-mmpretrain (or mmpretrain, of the original releases)',
    'mmseg': 'onedl-mmsegmentation (or mmsegmentation, of the original releases)',
    'timm': 'timm',
}


# --------------------------------------------------------------------------------------- families
@dataclass(frozen=True)
class Family:
    """What the sizes of a network have in common.

    Attributes:
        source: Source of the published numbers.
        library: Library that builds it, 'mmpretrain' or 'timm'.
        parameters: Regular expression that locates a parameter by its name in the library's
            network. Its groups: `stem`; `stage` and `block`; `before` and `after`, the stage that a
            downsampling precedes or follows. A network without stages has `block` alone.
        first_stage: Number of the first stage in these names.
        modules_per_block: Number of numbered modules of the library that form a block.
        blocks_per_stage: In a network without stages: number of blocks that count as a stage.
        arguments: Arguments of the library's network, for every task.
        dense: Further arguments for dense prediction; None if the input size is fixed.
        classification: Further arguments for classification.
        taps: For timm's networks: the stages or blocks whose outputs are taken.
        is_single_scale: Whether all of these have stride 16.
        classifier_only: A part of mmpretrain's network that dense prediction does not use.
        layer_scale_argument: The argument with the initial value of its layer scales, if any.
        no_weight_decay: Parts of names of parameters that the published recipes do not decay, in
            addition to norms, biases and other one-dimensional parameters.
    """

    source: str
    library: str
    parameters: str
    first_stage: int = 0
    modules_per_block: int = 1
    blocks_per_stage: int | None = None
    arguments: dict = field(default_factory=dict)
    dense: dict | None = field(default_factory=dict)
    classification: dict = field(default_factory=dict)
    taps: tuple[int, ...] = ()
    is_single_scale: bool = False
    classifier_only: str | None = None
    layer_scale_argument: str | None = None
    no_weight_decay: tuple[str, ...] = ()

    def locate(self, name: str) -> Location | None:
        """Stage and block of a parameter; None if it is outside the stages."""
        match = re.match(self.parameters, name)
        if match is None:
            return None
        found = {key: value for key, value in match.groupdict().items() if value is not None}
        if 'stem' in found:
            return STEM
        block = int(found.get('block', 0)) // self.modules_per_block
        if self.blocks_per_stage is not None:
            return Location(*divmod(block, self.blocks_per_stage))
        if 'after' in found:
            return Location(int(found['after']) + 1 - self.first_stage, 0)
        return Location(int(found.get('before', found.get('stage', 0))) - self.first_stage, block)


CONVNEXT_PARAMETERS = (
    r'(?P<stem>downsample_layers\.0)\.|downsample_layers\.(?P<before>\d+)\.'
    r'|stages\.(?P<stage>\d+)\.(?P<block>\d+)\.'
)
TRUNCATED_NORMAL = dict(type='TruncNormal', layer='Linear', std=0.02, bias=0.0)
FOUR_STAGES = dict(out_indices=(0, 1, 2, 3))
# mmpretrain's default is for classification: one norm, after the pooling.
FOUR_NORMALIZED_STAGES = dict(out_indices=(0, 1, 2, 3), gap_before_final_norm=False)
LAST_STAGE = dict(out_indices=(3,))
VIT_SETTINGS: dict = dict(
    library='timm',  # in mmpretrain's DeiT3 the second norm of each block is never used
    parameters=r'(?P<stem>patch_embed|pos_embed|cls_token)|blocks\.(?P<block>\d+)\.',
    blocks_per_stage=3,  # a quarter of twelve
    dense=dict(dynamic_img_size=True, dynamic_img_pad=True),
    taps=(2, 5, 8, 11),
    is_single_scale=True,
    no_weight_decay=('pos_embed', 'cls_token'),
)

CONVNEXT = Family(
    source='arXiv 2201.03545',
    library='mmpretrain',
    parameters=CONVNEXT_PARAMETERS,
    arguments=dict(type='ConvNeXt'),
    dense=FOUR_NORMALIZED_STAGES,
    classification=LAST_STAGE,
    layer_scale_argument='layer_scale_init_value',
)
SWIN = Family(
    source='arXiv 2103.14030, github.com/microsoft/Swin-Transformer',
    library='mmpretrain',
    parameters=r'(?P<stem>patch_embed)\.|stages\.(?P<after>\d+)\.downsample\.'
    r'|stages\.(?P<stage>\d+)\.blocks\.(?P<block>\d+)\.',
    arguments=dict(type='SwinTransformer', init_cfg=[TRUNCATED_NORMAL]),
    dense=dict(FOUR_STAGES, pad_small_map=True),  # any map is padded to whole windows
    classification=LAST_STAGE,
    no_weight_decay=('relative_position_bias',),
)
HORNET = Family(
    source='arXiv 2207.14284, github.com/raoyongming/HorNet',
    library='mmpretrain',
    parameters=CONVNEXT_PARAMETERS,
    arguments=dict(
        type='HorNet',
        # As in mmpretrain's recipes; the class itself has layer scales of 1e-5.
        init_cfg=[TRUNCATED_NORMAL, dict(type='Constant', layer='LayerScale', val=1e-6)],
    ),
    dense=FOUR_NORMALIZED_STAGES,
    classification=LAST_STAGE,
)
REPLKNET = Family(
    source='arXiv 2203.06717, github.com/DingXiaoH/RepLKNet-pytorch',
    library='mmpretrain',
    parameters=r'(?P<stem>stem)\.|transitions\.(?P<after>\d+)\.'
    r'|stages\.(?P<stage>\d+)\.blocks\.(?P<block>\d+)\.',
    modules_per_block=2,  # large kernel and feed-forward in turn
    arguments=dict(type='RepLKNet'),
    dense=FOUR_STAGES,
    classification=LAST_STAGE,
)
EFFICIENTNET = Family(
    source='arXiv 1905.11946',
    library='mmpretrain',
    parameters=r'(?P<stem>layers\.[01])\.|layers\.(?P<stage>[2-5])\.(?P<block>\d+)\.',
    first_stage=2,  # layers 0 and 1 are before stride 4
    arguments=dict(type='EfficientNet'),
    dense=dict(out_indices=(2, 3, 4, 5)),
    classification=dict(out_indices=(6,)),
    classifier_only='layers.6',  # 1x1 convolution to 1280 or more channels
)
DEIT3 = Family(source='arXiv 2204.07118, github.com/facebookresearch/deit', **VIT_SETTINGS)
VIT = Family(source='arXiv 2012.12877 (DeiT), table 1 of arXiv 2103.14030', **VIT_SETTINGS)
FOCALNET = Family(
    source='arXiv 2203.11926, github.com/microsoft/FocalNet',
    library='timm',
    parameters=r'(?P<stem>stem)\.|layers\.(?P<before>\d+)\.downsample\.'
    r'|layers\.(?P<stage>\d+)\.blocks\.(?P<block>\d+)\.',
    taps=(0, 1, 2, 3),
)
COATNET = Family(
    source='arXiv 2106.04803',
    library='timm',
    parameters=r'(?P<stem>stem)\.|stages\.(?P<stage>\d+)\.blocks\.(?P<block>\d+)\.',
    dense=None,  # its tables of relative positions have the training size
    no_weight_decay=('relative_position_bias',),
)


# ------------------------------------------------------------------------------------------ table
@dataclass(frozen=True)
class Variant:
    """One network: how to build it, and its published numbers on ImageNet-1K.

    Attributes:
        family: What it has in common with the other sizes.
        arch: mmpretrain's name of the size, or timm's of the model.
        channels: Channels of the four feature maps.
        weights: The library's name of its ImageNet-1K weights, or a URL; None if it has none.
        parameters: In millions, with the 1000-class head; None if only published with another head.
        flops: In billions of multiply-adds, at `size`.
        top1: Accuracy in per cent, trained on ImageNet-1K alone and tested at `size`; None if not
            published.
        size: Side of the input in pixels.
        classifier_channels: Input channels of its last linear layer, if not `channels[-1]`.
    """

    family: Family
    arch: str
    channels: tuple[int, int, int, int]
    weights: str | None
    parameters: float | None
    flops: float
    top1: float | None
    size: int = 224
    classifier_channels: int | None = None

    @property
    def linear_channels(self) -> int:
        """Input channels of the last linear layer of the classifier."""
        return self.classifier_channels or self.channels[-1]


def doubled(channels: int) -> tuple[int, int, int, int]:
    """Channels of four stages, each twice as wide as the previous one."""
    return channels, 2 * channels, 4 * channels, 8 * channels


C64, C96, C128, C192 = map(doubled, (64, 96, 128, 192))
# The file itself: `mmpretrain.get_model` cannot read mmpretrain's configs of RepLKNet.
REPLKNET_31B_WEIGHTS = (
    'https://mmassets.onedl.ai/mmclassification/v0/replknet/'
    'replknet-31B_3rdparty_in1k_20221118-fd08e268.pth'
)
B0, B3, B4, B5, B6 = (
    f'efficientnet-{size}_3rdparty_8xb32-aa_in1k' for size in ('b0', 'b3', 'b4', 'b5', 'b6')
)
DEIT3_S, DEIT3_B, DEIT_B = (
    f'{name}_patch16_224' for name in ('deit3_small', 'deit3_base', 'deit_base')
)
# fmt: off
BASELINES = {
    'convnext_tiny': Variant(CONVNEXT, 'tiny', C96, 'convnext-tiny_32xb128_in1k', 29, 4.5, 82.1),
    'convnext_small': Variant(CONVNEXT, 'small', C96, 'convnext-small_32xb128_in1k', 50, 8.7, 83.1),
    'convnext_base': Variant(CONVNEXT, 'base', C128, 'convnext-base_3rdparty_in1k', 89, 15.4, 83.8),
    'convnext_large': Variant(
        CONVNEXT, 'large', C192, 'convnext-large_3rdparty_in1k', 198, 34.4, 84.3),
    'swin_tiny': Variant(SWIN, 'tiny', C96, 'swin-tiny_3rdparty_in1k', 29, 4.5, 81.3),
    'swin_small': Variant(SWIN, 'small', C96, 'swin-small_3rdparty_in1k', 50, 8.7, 83.0),
    'swin_base': Variant(SWIN, 'base', C128, 'swin-base_3rdparty_in1k', 88, 15.4, 83.5),
    'swin_large': Variant(SWIN, 'large', C192, None, 197, 34.5, None),
    'hornet_tiny': Variant(HORNET, 'tiny', C64, 'hornet-tiny_3rdparty_in1k', 22, 4.0, 82.8),
    'hornet_small': Variant(HORNET, 'small', C96, 'hornet-small_3rdparty_in1k', 50, 8.8, 83.8),
    'hornet_base': Variant(HORNET, 'base', C128, 'hornet-base_3rdparty_in1k', 87, 15.6, 84.2),
    'hornet_large': Variant(HORNET, 'large', C192, None, None, 34.8, None),
    'replknet_31b': Variant(REPLKNET, '31B', C128, REPLKNET_31B_WEIGHTS, 79, 15.3, 83.5),
    'replknet_31l': Variant(REPLKNET, '31L', C192, None, 172, 96.0, None, 384),
    'efficientnet_b0': Variant(
        EFFICIENTNET, 'b0', (24, 40, 112, 320), B0, 5.3, 0.39, 77.1, 224, 1280),
    'efficientnet_b3': Variant(
        EFFICIENTNET, 'b3', (32, 48, 136, 384), B3, 12, 1.8, 81.6, 300, 1536),
    'efficientnet_b4': Variant(
        EFFICIENTNET, 'b4', (32, 56, 160, 448), B4, 19, 4.2, 82.9, 380, 1792),
    'efficientnet_b5': Variant(
        EFFICIENTNET, 'b5', (40, 64, 176, 512), B5, 30, 9.9, 83.6, 456, 2048),
    'efficientnet_b6': Variant(
        EFFICIENTNET, 'b6', (40, 72, 200, 576), B6, 43, 19, 84.0, 528, 2304),
    'deit3_small': Variant(DEIT3, DEIT3_S, (384,) * 4, f'{DEIT3_S}.fb_in1k', 22.0, 4.6, 81.4),
    'deit3_base': Variant(DEIT3, DEIT3_B, (768,) * 4, f'{DEIT3_B}.fb_in1k', 86.6, 17.5, 83.8),
    'vit_base': Variant(VIT, DEIT_B, (768,) * 4, f'{DEIT_B}.fb_in1k', 86, 17.5, 81.8),
    'focalnet_tiny': Variant(
        FOCALNET, 'focalnet_tiny_lrf', C96, 'focalnet_tiny_lrf.ms_in1k', 28.6, 4.5, 82.3),
    'focalnet_small': Variant(
        FOCALNET, 'focalnet_small_lrf', C96, 'focalnet_small_lrf.ms_in1k', 50.3, 8.7, 83.5),
    'focalnet_base': Variant(
        FOCALNET, 'focalnet_base_lrf', C128, 'focalnet_base_lrf.ms_in1k', 88.7, 15.4, 83.9),
    'coatnet_0': Variant(COATNET, 'coatnet_0_224', C96, None, 25, 4.2, 81.6),
    'coatnet_1': Variant(COATNET, 'coatnet_1_224', C96, None, 42, 8.4, 83.3),
    'coatnet_2': Variant(COATNET, 'coatnet_2_224', C128, None, 75, 15.7, 84.1),
    'coatnet_3': Variant(COATNET, 'coatnet_3_224', C192, None, 168, 34.7, 84.5),
}
# fmt: on

# Output norms of the earlier stages, which ImageNet networks do not have.
NEW_FOR_DENSE_PREDICTION = re.compile(r'(stages\.[0-2]\.norm|norm[0-2])\..+')


def find_baseline(name: str) -> Variant:
    """The row of the table.

    Raises:
        ValueError: There is no row of this name; the message lists all names.
    """
    if name not in BASELINES:
        raise ValueError(f'baseline must be one of {", ".join(BASELINES)}, got {name!r}')
    return BASELINES[name]


def how_to_get_weights(name: str) -> str:
    """What to do when the file with a baseline's ImageNet weights is missing."""
    variant = find_baseline(name)
    library, weights, path = variant.family.library, variant.weights, f'pretrain/{name}.pth'
    if weights is None:
        start = f'{library} has no ImageNet-1K weights of {name}: bring a file'
    elif '://' in weights:
        start = f'Download {weights} to {path}'
    else:
        model = (f"timm.create_model('{weights}', pretrained=True)" if library == 'timm'
                 else f"mmpretrain.get_model('{weights}', pretrained=True).backbone")  # fmt: skip
        code = f"import torch, {library}; torch.save({model}.state_dict(), '{path}')"
        start = f'With a network connection: python -c "{code}"'
    return (
        f'{start}. To train from random weights instead, set model.backbone.init_cfg=None '
        '(on the command line: --cfg-options model.backbone.init_cfg=None).'
    )


def parse_stages(out_indices: int | Sequence[int]) -> tuple[int, ...]:
    """Stages, from 0, whose feature maps a baseline returns, in the given order.

    Raises:
        TypeError, ValueError: `Conv2Former` would not take them either, or the last stage is not
            among them: the library always builds it, and its parameters would get no gradient.
    """
    stages = parse_out_indices(out_indices, len(STRIDES))
    if ALL_STAGES[-1] not in stages:
        raise ValueError(
            f'out_indices of a baseline must include the last stage, {ALL_STAGES[-1]}, because '
            f'the whole network is built, got {out_indices!r}'
        )
    return stages


# --------------------------------------------------------------------------------------- backbone
@register(MODELS)
class Baseline(StagedBackbone, PretrainedModule):
    """A network of mmpretrain or timm with Conv2Former's interface.

    For dense prediction it returns a tuple of contiguous feature maps (N, channels[i], H / s,
    W / s) of strides s = strides[i], sizes rounded down or up as the network pads. Each map is
    normalised: by the library's own norm (ConvNeXt, Swin and HorNet: LayerNorm; RepLKNet:
    BatchNorm; EfficientNet: the BatchNorm at the end of its blocks), otherwise by a LayerNorm added
    here (FocalNet, DeiT-3, ViT). DeiT-3 and ViT have one scale: mmseg's `Feature2Pyramid` makes
    four from the outputs of the four quarters of their blocks, and position embeddings are
    interpolated to the size of the input.

    For classification it is the published network up to its linear layer, and returns a tuple of
    one tensor (N, C, h, w), where h and w are 1 if the network pools by itself.

    The library is imported when a network is built.

    Args:
        name: A key of `BASELINES`.
        drop_path_rate: Drop path of the last block, in [0, 1); it grows linearly from 0 at the
            first block.
        classification: Whether to build the classification network, see above.
        options: Further arguments of the library's network, such as mmpretrain's
            `dict(with_cp=True)`.
        init_cfg: None, or `dict(type='Pretrained', checkpoint=..., prefix=...)` with a file of the
            library, which must fit: see `how_to_get_weights` and `mmconv2former.checkpoint`.
        out_indices: For dense prediction: the stages whose feature maps are returned, in this
            order; the last stage, 3 or -1, must be one of them. The stages of DeiT-3 and ViT are
            the levels of their pyramid. Norms and pyramid levels of other maps are not built.

    Attributes:
        channels: Channels of each returned feature map.
        strides: Stride of each returned feature map; for dense prediction only.

    Raises:
        ValueError, TypeError: `name`, `drop_path_rate`, `out_indices` or `init_cfg` is not as
            above, or the network is for classification only.
        ModuleNotFoundError: The library is not installed; the message names the pip package.
    """

    channels: tuple[int, ...]

    def __init__(
        self,
        name: str,
        drop_path_rate: float = 0.0,
        classification: bool = False,
        options: dict | None = None,
        init_cfg: dict | None = None,
        out_indices: int | Sequence[int] = ALL_STAGES,
    ) -> None:
        super().__init__()
        variant = find_baseline(name)
        family = variant.family
        check_number('drop_path_rate', drop_path_rate, minimum=0, below=1)
        if init_cfg is not None and init_cfg.get('type') != 'Pretrained':
            raise ValueError(f"init_cfg must be None or of type 'Pretrained', got {init_cfg}")
        if 'out_indices' in (options or {}):
            raise ValueError('set out_indices of the baseline, not of its options')
        self.name = name
        self.pretrained = init_cfg
        self.classification = classification
        self.out_indices = parse_stages(out_indices)
        self.ascending = sorted(self.out_indices)  # the order in which the libraries return maps
        self.taps = [family.taps[i] for i in self.ascending] if family.taps else []

        arguments = dict(family.arguments, drop_path_rate=drop_path_rate)
        if classification:
            arguments.update(family.classification)
        elif family.dense is None:
            raise ValueError(
                f'{name} is for classification only (classification=True): its tables of relative '
                'positions have the training size, so it takes no other input'
            )
        else:
            arguments.update(family.dense)
            if 'out_indices' in arguments:
                arguments['out_indices'] = [arguments['out_indices'][i] for i in self.ascending]
        arguments.update(options or {})
        if family.library == 'timm':
            timm = import_library('timm', name)
            self.body = timm.create_model(variant.arch, num_classes=0, **arguments)
        else:
            models = import_library('mmpretrain.registry', name).MODELS
            self.body = models.build(dict(arguments, arch=variant.arch, _scope_='mmpretrain'))

        locations = [family.locate(param_name) for param_name, _ in self.body.named_parameters()]
        blocks: dict[int, int] = {}
        for stage, block in filter(None, locations):
            blocks[stage] = max(blocks.get(stage, 0), block + 1)
        self.depths = tuple(blocks[stage] for stage in sorted(blocks) if stage >= 0)

        self.norms: nn.ModuleDict | None = None
        self.pyramid: nn.ModuleDict | None = None
        if classification:
            self.channels = (variant.linear_channels,)
        else:
            self.channels = tuple(variant.channels[i] for i in self.out_indices)
            self.strides = tuple(STRIDES[i] for i in self.out_indices)
            self._prepare_dense(variant)

    def _prepare_dense(self, variant: Variant) -> None:
        """Adds norms and a pyramid; removes unused parts, which would get no gradient."""
        family = variant.family
        if family.classifier_only is not None:
            parent, _, child = family.classifier_only.rpartition('.')
            delattr(self.body.get_submodule(parent), child)
        if self.taps:
            self.body.prune_intermediate_layers(self.taps, prune_norm=True)
            layer_norm = import_library('timm.layers', self.name).LayerNorm2d
            self.norms = nn.ModuleDict(
                {str(i): layer_norm(variant.channels[i]) for i in self.ascending}
            )
        if family.is_single_scale:
            necks = import_library('mmseg.models.necks', self.name)
            # GroupNorm instead of SyncBN: needs neither a large batch nor a GPU.
            norm = dict(type='GN', num_groups=32)
            pyramid = necks.Feature2Pyramid(variant.channels[0], norm_cfg=norm)
            parts = [PYRAMID_PARTS[i] for i in self.ascending]
            self.pyramid = nn.ModuleDict({part: getattr(pyramid, part) for part in parts})

    def load_pretrained_weights(self) -> None:
        """Loads the pretrained weights, which must fit, into the library's network.

        Raises:
            FileNotFoundError, ValueError: See `mmconv2former.checkpoint.loading.load_pretrained`.
        """
        if self.pretrained is not None:
            load = dict(
                type='mmconv2former.Pretrained',
                checkpoint=self.pretrained['checkpoint'],
                prefix=self.pretrained.get('prefix'),
                may_miss=None if self.classification else NEW_FOR_DENSE_PREDICTION,
                how_to_get=how_to_get_weights(self.name),
            )
            WEIGHT_INITIALIZERS.build(load)(self.body)

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:  # (N, 3, H, W)
        if self.norms is not None:
            maps = self.body.forward_intermediates(x, indices=self.taps, intermediates_only=True)
            maps = [norm(feature) for norm, feature in zip(self.norms.values(), maps)]
        else:
            maps = self.body(x)
        if self.classification:
            feature = maps if isinstance(maps, Tensor) else maps[-1]
            return (feature if feature.dim() == 4 else feature[..., None, None],)
        if self.pyramid is not None:
            # Patches extend beyond the image's lower and right edge; crop what is outside.
            height, width = x.shape[2:]
            maps = [
                part(feature)[..., : -(-height // STRIDES[i]), : -(-width // STRIDES[i])]
                for part, feature, i in zip(self.pyramid.values(), maps, self.ascending)
            ]
        by_stage = dict(zip(self.ascending, maps))
        return tuple(by_stage[i].contiguous() for i in self.out_indices)

    def _locate(self, param_name: str) -> Location | None:
        if not param_name.startswith('body.'):
            return None
        return find_baseline(self.name).family.locate(param_name.removeprefix('body.'))


def import_library(module: str, name: str) -> ModuleType:
    """Imports the library that builds a baseline.

    Raises:
        ModuleNotFoundError: It is not installed; the message names the pip package.
    """
    library = module.split('.')[0]
    try:
        return import_module(module)
    except ModuleNotFoundError as error:
        if error.name != library:
            raise
        raise ModuleNotFoundError(
            f'baseline {name} needs {library}, which is not installed: '
            f'pip install {PIP_NAMES[library]}',
            name=library,
        ) from error
