"""The networks that the paper compares with, each in Conv2Former's place.

Section 4 of arXiv 2211.11943 compares with ConvNeXt, Swin, HorNet, RepLKNet, DeiT, EfficientNet,
FocalNet, CoAtNet and others. None is implemented here: mmpretrain or timm build them, and
`Baseline` makes them give what Conv2Former gives, that is feature maps of strides 4, 8, 16 and
32, and the depth of each parameter. docs/baselines.md tells how to use it.

The file reads from data to code: where parameters of a family belong, families, table, backbone.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from importlib import import_module
from types import ModuleType

from mmengine.model import BaseModule
from torch import Tensor, nn

from ..registry import MODELS, WEIGHT_INITIALIZERS, register
from .arguments import check_number, parse_out_indices
from .conv2former import Conv2Former

STRIDES = (4, 8, 16, 32)
ALL_STAGES = tuple(range(len(STRIDES)))
# The parts of mmseg's Feature2Pyramid that make each stride of one map of stride 16.
PYRAMID_PARTS = ('upsample_4x', 'upsample_2x', 'identity', 'downsample_2x')
PIP_NAMES = {
    'mmpretrain': 'onedl-mmpretrain (or mmpretrain, of the original releases)',
    'mmseg': 'onedl-mmsegmentation (or mmsegmentation, of the original releases)',
    'timm': 'timm',
}

# ------------------------------------------------- stage and block of a parameter, by its name
# As `Conv2Former._locate`: stage -1 is the stem, None is no part of the stages; a downsampling
# counts with the first block behind it.
Location = tuple[int | None, int]
STEM = (-1, 0)
ELSEWHERE = (None, 0)


def locate_convnext(name: str) -> Location:
    """Of ConvNeXt and HorNet."""
    match name.split('.'):
        case ['downsample_layers', '0', *_]:
            return STEM
        case ['downsample_layers', stage, *_]:
            return int(stage), 0
        case ['stages', stage, block, *_]:
            return int(stage), int(block)
    return ELSEWHERE


def locate_swin(name: str) -> Location:
    """Stage and block of a parameter of mmpretrain's Swin."""
    match name.split('.'):
        case ['patch_embed', *_]:
            return STEM
        case ['stages', stage, 'downsample', *_]:
            return int(stage) + 1, 0
        case ['stages', stage, 'blocks', block, *_]:
            return int(stage), int(block)
    return ELSEWHERE


def locate_replknet(name: str) -> Location:
    """Stage and block of a parameter of mmpretrain's RepLKNet; a block is two of its blocks."""
    match name.split('.'):
        case ['stem', *_]:
            return STEM
        case ['transitions', stage, *_]:
            return int(stage) + 1, 0
        case ['stages', stage, 'blocks', half, *_]:  # large kernel and feed-forward in turn
            return int(stage), int(half) // 2
    return ELSEWHERE


def locate_efficientnet(name: str) -> Location:
    """Stage and block of a parameter of mmpretrain's EfficientNet."""
    match name.split('.'):
        case ['layers', '0' | '1', *_]:  # all before stride 4
            return STEM
        case ['layers', '2' | '3' | '4' | '5' as layer, block, *_]:
            return int(layer) - 2, int(block)
    return ELSEWHERE


def locate_vit(name: str) -> Location:
    """A quarter of the twelve blocks counts as a stage."""
    match name.split('.'):
        case ['patch_embed' | 'pos_embed' | 'cls_token', *_]:
            return STEM
        case ['blocks', block, *_]:
            return divmod(int(block), 3)
    return ELSEWHERE


def locate_focalnet(name: str) -> Location:
    """Stage and block of a parameter of timm's FocalNet."""
    match name.split('.'):
        case ['stem', *_]:
            return STEM
        case ['layers', stage, 'downsample', *_]:
            return int(stage), 0
        case ['layers', stage, 'blocks', block, *_]:
            return int(stage), int(block)
    return ELSEWHERE


def locate_coatnet(name: str) -> Location:
    """Stage and block of a parameter of timm's CoAtNet."""
    match name.split('.'):
        case ['stem', *_]:
            return STEM
        case ['stages', stage, 'blocks', block, *_]:
            return int(stage), int(block)
    return ELSEWHERE


# --------------------------------------------------------------------------------------- families
@dataclass(frozen=True)
class Family:
    """What the sizes of a network have in common.

    Attributes:
        source: Of the published numbers.
        library: Which builds it, 'mmpretrain' or 'timm'.
        locate: Stage and block of a parameter of the library's network.
        arguments: Of the library's network, for every task.
        dense: Further ones for dense prediction; None if the network has one input size only.
        classification: Further ones for classification.
        taps: Of timm's networks: whose outputs are taken, stages or blocks.
        is_single_scale: Whether all of these have stride 16.
        classifier_only: A part of mmpretrain's network that dense prediction has no use for.
        no_weight_decay: Names, or parts of names, that the published recipes do not decay, beside
            norms, biases and all else of one dimension.
    """

    source: str
    library: str
    locate: Callable[[str], Location]
    arguments: dict = field(default_factory=dict)
    dense: dict | None = field(default_factory=dict)
    classification: dict = field(default_factory=dict)
    taps: tuple[int, ...] = ()
    is_single_scale: bool = False
    classifier_only: str | None = None
    no_weight_decay: tuple[str, ...] = ()


TRUNCATED_NORMAL = dict(type='TruncNormal', layer='Linear', std=0.02, bias=0.0)
# Norms on maps; mmpretrain's default is published for classification, one norm behind the pooling.
NORM_ON_MAPS = dict(out_indices=(0, 1, 2, 3), gap_before_final_norm=False)
LAST_STAGE = dict(out_indices=(3,))

CONVNEXT = Family(
    source='arXiv 2201.03545',
    library='mmpretrain',
    locate=locate_convnext,
    arguments=dict(type='ConvNeXt'),
    dense=NORM_ON_MAPS,
    classification=LAST_STAGE,
)
SWIN = Family(
    source='arXiv 2103.14030, github.com/microsoft/Swin-Transformer',
    library='mmpretrain',
    locate=locate_swin,
    arguments=dict(type='SwinTransformer', init_cfg=[TRUNCATED_NORMAL]),
    dense=dict(out_indices=(0, 1, 2, 3), pad_small_map=True),  # any map is padded to whole windows
    classification=LAST_STAGE,
    no_weight_decay=('relative_position_bias',),
)
HORNET = Family(
    source='arXiv 2207.14284, github.com/raoyongming/HorNet',
    library='mmpretrain',
    locate=locate_convnext,
    arguments=dict(
        type='HorNet',
        # As in mmpretrain's recipes; the class by itself has layer scales of 1e-5.
        init_cfg=[TRUNCATED_NORMAL, dict(type='Constant', layer='LayerScale', val=1e-6)],
    ),
    dense=NORM_ON_MAPS,
    classification=LAST_STAGE,
)
REPLKNET = Family(
    source='arXiv 2203.06717, github.com/DingXiaoH/RepLKNet-pytorch',
    library='mmpretrain',
    locate=locate_replknet,
    arguments=dict(type='RepLKNet'),
    dense=dict(out_indices=(0, 1, 2, 3)),
    classification=LAST_STAGE,
)
EFFICIENTNET = Family(
    source='arXiv 1905.11946',
    library='mmpretrain',
    locate=locate_efficientnet,
    arguments=dict(type='EfficientNet'),
    dense=dict(out_indices=(2, 3, 4, 5)),
    classification=dict(out_indices=(6,)),
    classifier_only='layers.6',  # 1x1 convolution to 1280 channels and more
)
DEIT3 = Family(
    source='arXiv 2204.07118, github.com/facebookresearch/deit',
    library='timm',  # in mmpretrain's DeiT3 the second norm of each block is never used
    locate=locate_vit,
    dense=dict(dynamic_img_size=True, dynamic_img_pad=True),
    taps=(2, 5, 8, 11),
    is_single_scale=True,
    no_weight_decay=('pos_embed', 'cls_token'),
)
VIT = Family(
    source='arXiv 2012.12877 (DeiT), table 1 of arXiv 2103.14030',
    library='timm',
    locate=locate_vit,
    dense=DEIT3.dense,
    taps=DEIT3.taps,
    is_single_scale=True,
    no_weight_decay=DEIT3.no_weight_decay,
)
FOCALNET = Family(
    source='arXiv 2203.11926, github.com/microsoft/FocalNet',
    library='timm',
    locate=locate_focalnet,
    taps=(0, 1, 2, 3),
)
COATNET = Family(
    source='arXiv 2106.04803',
    library='timm',
    locate=locate_coatnet,
    dense=None,  # its tables of relative positions are of the training size
    no_weight_decay=('relative_position_bias',),
)


# ------------------------------------------------------------------------------------------ table
@dataclass(frozen=True)
class Published:
    """Numbers of ImageNet-1K, from the family's source.

    Attributes:
        parameters: In millions, with the 1000-class head; None if only found with another head.
        flops: In billions of multiply-adds, at `size`.
        top1: Per cent, trained on ImageNet-1K alone and tested at `size`.
        size: Side of the input in pixels.
    """

    parameters: float | None
    flops: float
    top1: float | None
    size: int = 224


@dataclass(frozen=True)
class Variant:
    """One row of the table.

    Attributes:
        family: What it has in common with others.
        arch: mmpretrain's name of the size, or timm's of the model.
        channels: Of the four feature maps; of CoAtNet's, stage by stage.
        weights: The library's name of its ImageNet-1K weights, or their address; None if it has
            none.
        published: Numbers of the source.
        classifier_channels: What the linear layer of the classifier reads, if not `channels[-1]`.
    """

    family: Family
    arch: str
    channels: tuple[int, int, int, int]
    weights: str | None
    published: Published
    classifier_channels: int | None = None

    @property
    def linear_channels(self) -> int:
        """Channels before the last linear layer of its classifier."""
        return self.classifier_channels or self.channels[-1]


def doubled(channels: int) -> tuple[int, int, int, int]:
    """Channels of four stages that double from each to the next."""
    return channels, 2 * channels, 4 * channels, 8 * channels


# The file itself: `mmpretrain.get_model` cannot read mmpretrain's configs of RepLKNet.
REPLKNET_31B_WEIGHTS = (
    'https://mmassets.onedl.ai/mmclassification/v0/replknet/'
    'replknet-31B_3rdparty_in1k_20221118-fd08e268.pth'
)
BASELINES = {
    'convnext_tiny': Variant(
        CONVNEXT, 'tiny', doubled(96), 'convnext-tiny_32xb128_in1k', Published(29, 4.5, 82.1)
    ),
    'convnext_small': Variant(
        CONVNEXT, 'small', doubled(96), 'convnext-small_32xb128_in1k', Published(50, 8.7, 83.1)
    ),
    'convnext_base': Variant(
        CONVNEXT, 'base', doubled(128), 'convnext-base_3rdparty_in1k', Published(89, 15.4, 83.8)
    ),
    'convnext_large': Variant(
        CONVNEXT, 'large', doubled(192), 'convnext-large_3rdparty_in1k', Published(198, 34.4, 84.3)
    ),
    'swin_tiny': Variant(
        SWIN, 'tiny', doubled(96), 'swin-tiny_3rdparty_in1k', Published(29, 4.5, 81.3)
    ),
    'swin_small': Variant(
        SWIN, 'small', doubled(96), 'swin-small_3rdparty_in1k', Published(50, 8.7, 83.0)
    ),
    'swin_base': Variant(
        SWIN, 'base', doubled(128), 'swin-base_3rdparty_in1k', Published(88, 15.4, 83.5)
    ),
    'swin_large': Variant(SWIN, 'large', doubled(192), None, Published(197, 34.5, None)),
    'hornet_tiny': Variant(
        HORNET, 'tiny', doubled(64), 'hornet-tiny_3rdparty_in1k', Published(22, 4.0, 82.8)
    ),
    'hornet_small': Variant(
        HORNET, 'small', doubled(96), 'hornet-small_3rdparty_in1k', Published(50, 8.8, 83.8)
    ),
    'hornet_base': Variant(
        HORNET, 'base', doubled(128), 'hornet-base_3rdparty_in1k', Published(87, 15.6, 84.2)
    ),
    'hornet_large': Variant(HORNET, 'large', doubled(192), None, Published(None, 34.8, None)),
    'replknet_31b': Variant(
        REPLKNET, '31B', doubled(128), REPLKNET_31B_WEIGHTS, Published(79, 15.3, 83.5)
    ),
    'replknet_31l': Variant(
        REPLKNET, '31L', doubled(192), None, Published(172, 96.0, None, size=384)
    ),
    'efficientnet_b0': Variant(
        EFFICIENTNET,
        'b0',
        (24, 40, 112, 320),
        'efficientnet-b0_3rdparty_8xb32-aa_in1k',
        Published(5.3, 0.39, 77.1),
        1280,
    ),
    'efficientnet_b3': Variant(
        EFFICIENTNET,
        'b3',
        (32, 48, 136, 384),
        'efficientnet-b3_3rdparty_8xb32-aa_in1k',
        Published(12, 1.8, 81.6, size=300),
        1536,
    ),
    'efficientnet_b4': Variant(
        EFFICIENTNET,
        'b4',
        (32, 56, 160, 448),
        'efficientnet-b4_3rdparty_8xb32-aa_in1k',
        Published(19, 4.2, 82.9, size=380),
        1792,
    ),
    'efficientnet_b5': Variant(
        EFFICIENTNET,
        'b5',
        (40, 64, 176, 512),
        'efficientnet-b5_3rdparty_8xb32-aa_in1k',
        Published(30, 9.9, 83.6, size=456),
        2048,
    ),
    'efficientnet_b6': Variant(
        EFFICIENTNET,
        'b6',
        (40, 72, 200, 576),
        'efficientnet-b6_3rdparty_8xb32-aa_in1k',
        Published(43, 19, 84.0, size=528),
        2304,
    ),
    'deit3_small': Variant(
        DEIT3,
        'deit3_small_patch16_224',
        (384,) * 4,
        'deit3_small_patch16_224.fb_in1k',
        Published(22.0, 4.6, 81.4),
    ),
    'deit3_base': Variant(
        DEIT3,
        'deit3_base_patch16_224',
        (768,) * 4,
        'deit3_base_patch16_224.fb_in1k',
        Published(86.6, 17.5, 83.8),
    ),
    'vit_base': Variant(
        VIT,
        'deit_base_patch16_224',
        (768,) * 4,
        'deit_base_patch16_224.fb_in1k',
        Published(86, 17.5, 81.8),
    ),
    'focalnet_tiny': Variant(
        FOCALNET,
        'focalnet_tiny_lrf',
        doubled(96),
        'focalnet_tiny_lrf.ms_in1k',
        Published(28.6, 4.5, 82.3),
    ),
    'focalnet_small': Variant(
        FOCALNET,
        'focalnet_small_lrf',
        doubled(96),
        'focalnet_small_lrf.ms_in1k',
        Published(50.3, 8.7, 83.5),
    ),
    'focalnet_base': Variant(
        FOCALNET,
        'focalnet_base_lrf',
        doubled(128),
        'focalnet_base_lrf.ms_in1k',
        Published(88.7, 15.4, 83.9),
    ),
    'coatnet_0': Variant(COATNET, 'coatnet_0_224', doubled(96), None, Published(25, 4.2, 81.6)),
    'coatnet_1': Variant(COATNET, 'coatnet_1_224', doubled(96), None, Published(42, 8.4, 83.3)),
    'coatnet_2': Variant(COATNET, 'coatnet_2_224', doubled(128), None, Published(75, 15.7, 84.1)),
    'coatnet_3': Variant(COATNET, 'coatnet_3_224', doubled(192), None, Published(168, 34.7, 84.5)),
}

# Output norms of the earlier stages, which ImageNet networks do not have.
NEW_FOR_DENSE_PREDICTION = re.compile(r'(stages\.[0-2]\.norm|norm[0-2])\..+')


def find_baseline(name: str) -> Variant:
    """The row of the table.

    Raises:
        ValueError: There is none of this name; the message lists all.
    """
    if name not in BASELINES:
        raise ValueError(f'baseline must be one of {", ".join(BASELINES)}, got {name!r}')
    return BASELINES[name]


def how_to_get_weights(name: str) -> str:
    """What to do when the file with a baseline's ImageNet weights is missing."""
    variant = find_baseline(name)
    path = f'pretrain/{name}.pth'
    if variant.weights is None:
        start = f'{variant.family.library} has no ImageNet-1K weights of {name}: bring a file'
    elif '://' in variant.weights:
        start = f'Download {variant.weights} to {path}'
    elif variant.family.library == 'timm':
        start = (
            'With a network connection: python -c "import torch, timm; '
            f"torch.save(timm.create_model('{variant.weights}', pretrained=True).state_dict(), "
            f"'{path}')\""
        )
    else:
        start = (
            'With a network connection: python -c "import torch, mmpretrain; '
            f"torch.save(mmpretrain.get_model('{variant.weights}', pretrained=True)"
            f".backbone.state_dict(), '{path}')\""
        )
    return (
        f'{start}. To train from random weights instead, set model.backbone.init_cfg=None '
        '(on the command line: --cfg-options model.backbone.init_cfg=None).'
    )


def parse_stages(out_indices: int | Sequence[int]) -> tuple[int, ...]:
    """Stages from 0 whose feature maps a baseline gives, none twice, in the given order.

    Raises:
        TypeError, ValueError: They are not as `Conv2Former` takes them, or the last stage, which a
            library always builds, is not among them: its parameters would never get a gradient.
    """
    stages = parse_out_indices(out_indices, len(STRIDES))
    if ALL_STAGES[-1] not in stages:
        raise ValueError(
            f'out_indices of a baseline must name the last stage, {ALL_STAGES[-1]}, because '
            f'the whole network is built, got {out_indices!r}'
        )
    return stages


# --------------------------------------------------------------------------------------- backbone
@register(MODELS)
class Baseline(BaseModule):
    """A network of mmpretrain or timm that gives what Conv2Former gives.

    For dense prediction: a tuple of contiguous feature maps (N, channels[i], H / s, W / s) of
    strides s = strides[i], which are 4, 8, 16, 32 or those of them that `out_indices` asks for,
    sizes rounded down or up as the network pads. Each map is normalised,
    as Conv2Former's are: by the library's own norm where it has one (ConvNeXt, Swin and HorNet a
    LayerNorm, RepLKNet a BatchNorm, EfficientNet the BatchNorm that ends its blocks), else by a
    LayerNorm (FocalNet, DeiT-3, ViT). The single scale of DeiT-3 and ViT becomes a pyramid by
    mmseg's `Feature2Pyramid`, from the ends of the four quarters of their blocks; position
    embeddings are interpolated to the size of the input.

    For classification: the network as published up to its linear layer, a tuple of one tensor
    (N, C, h, w), where h and w are 1 if the network pools by itself.

    The library is imported when a network is built. What a baseline states: `channels`, for dense
    prediction `strides` and `out_indices`, and `get_layer_depth` and `get_stage_depth`, which are
    Conv2Former's rule on the network's own stages and blocks.

    Args:
        name: A key of `BASELINES`.
        drop_path_rate: Of the last block, from 0 at the first one.
        classification: See above.
        out_indices: For dense prediction: stages whose feature maps are returned, in this order,
            as Conv2Former's; the last stage, 3 or -1, must be one. DeiT-3 and ViT have as stages
            the levels of their pyramid. Maps not asked for have no norm and no pyramid.
        options: Further arguments for the library, such as mmpretrain's `dict(with_cp=True)`.
        init_cfg: None, or `dict(type='Pretrained', checkpoint=..., prefix=...)` with a file of the
            library, which must fit: see `how_to_get_weights` and `mmconv2former.checkpoint`.

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
        stages = parse_stages(out_indices)
        if classification and stages != ALL_STAGES:
            raise ValueError(
                f'out_indices is for dense prediction: with classification=True {name} has one '
                f'output, got {out_indices!r}'
            )
        own_arguments = family.classification if classification else family.dense
        if own_arguments is None:
            raise ValueError(
                f'{name} is for classification only (classification=True): its tables of relative '
                'positions are of the training size, so it takes no other input'
            )
        self.name = name
        self.pretrained = init_cfg
        self.classification = classification
        self.ascending = sorted(stages)  # as the libraries give them, whatever was asked for
        self.taps: tuple[int, ...] = ()
        arguments = dict(family.arguments, drop_path_rate=drop_path_rate)
        arguments.update(own_arguments)
        if not classification:
            if family.taps:
                self.taps = tuple(family.taps[i] for i in self.ascending)
            else:
                arguments['out_indices'] = [arguments['out_indices'][i] for i in self.ascending]
        arguments.update(options or {})
        if family.library == 'timm':
            timm = import_library('timm', name)
            self.body = timm.create_model(variant.arch, num_classes=0, **arguments)
        else:
            models = import_library('mmpretrain.registry', name).MODELS
            self.body = models.build(dict(arguments, arch=variant.arch, _scope_='mmpretrain'))

        self.norms = self.pyramid = None
        if classification:
            self.channels = (variant.linear_channels,)
        else:
            self.out_indices = stages
            self.channels = tuple(variant.channels[i] for i in stages)
            self.strides = tuple(STRIDES[i] for i in stages)
            self._remove_classifier(family)
            if self.taps:
                layer_norm = import_library('timm.layers', name).LayerNorm2d
                self.norms = nn.ModuleDict(
                    {str(i): layer_norm(variant.channels[i]) for i in self.ascending}
                )
            if family.is_single_scale:
                necks = import_library('mmseg.models.necks', name)
                # GroupNorm instead of SyncBN: needs neither a large batch nor a GPU.
                norm = dict(type='GN', num_groups=32)
                pyramid = necks.Feature2Pyramid(variant.channels[0], norm_cfg=norm)
                parts = [PYRAMID_PARTS[i] for i in self.ascending]
                self.pyramid = nn.ModuleDict({part: getattr(pyramid, part) for part in parts})

        self._locate_in_body = family.locate
        depths: dict[int, int] = {}
        for param_name, _ in self.body.named_parameters():
            stage, block = family.locate(param_name)
            if stage is not None and stage >= 0:
                depths[stage] = max(depths.get(stage, 0), block + 1)
        self.depths = tuple(depths[stage] for stage in sorted(depths))

    def init_weights(self) -> None:
        """The library's own initialisation, then the pretrained weights, which must fit.

        Raises:
            FileNotFoundError, ValueError: See `mmconv2former.checkpoint.loading.load_pretrained`.
        """
        if self.is_init:
            return
        super().init_weights()
        if self.pretrained is not None:
            checkpoint = self.pretrained['checkpoint']
            if '://' not in checkpoint and not os.path.isfile(checkpoint):
                raise FileNotFoundError(
                    f'checkpoint {checkpoint!r} does not exist. {how_to_get_weights(self.name)}'
                )
            may_miss = None if self.classification else NEW_FOR_DENSE_PREDICTION
            prefix = self.pretrained.get('prefix')
            load = dict(type='mmconv2former.Pretrained', checkpoint=checkpoint, prefix=prefix)
            WEIGHT_INITIALIZERS.build({**load, 'may_miss': may_miss})(self.body)

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:  # (N, 3, H, W)
        if self.norms is not None:
            maps = self.body.forward_intermediates(
                x, indices=list(self.taps), intermediates_only=True
            )
            maps = [norm(feature) for norm, feature in zip(self.norms.values(), maps)]
        else:
            maps = self.body(x)
        if self.classification:
            feature = maps if isinstance(maps, Tensor) else maps[-1]
            return (feature if feature.dim() == 4 else feature[..., None, None],)
        if self.pyramid is not None:
            # Patches reach over the image's lower and right edge; what lies beyond it is cut.
            strides = [STRIDES[i] for i in self.ascending]
            sizes = [(-(-x.shape[2] // stride), -(-x.shape[3] // stride)) for stride in strides]
            scaled = [part(feature) for part, feature in zip(self.pyramid.values(), maps)]
            maps = [feature[..., :h, :w] for feature, (h, w) in zip(scaled, sizes)]
        by_stage = dict(zip(self.ascending, maps))
        return tuple(by_stage[i].contiguous() for i in self.out_indices)

    # The same rule on the same two facts, `depths` and `_locate`: decay is on equal terms.
    get_layer_depth = Conv2Former.get_layer_depth
    get_stage_depth = Conv2Former.get_stage_depth

    def _locate(self, param_name: str, prefix: str) -> Location:
        prefix += 'body.'
        if not param_name.startswith(prefix):
            return ELSEWHERE
        return self._locate_in_body(param_name[len(prefix) :])

    def _remove_classifier(self, family: Family) -> None:
        """Removes what no feature map depends on: distributed training wants a gradient for all."""
        if self.taps:
            self.body.prune_intermediate_layers(list(self.taps), prune_norm=True)
        if family.classifier_only is not None:
            parent, _, child = family.classifier_only.rpartition('.')
            delattr(self.body.get_submodule(parent), child)


def import_library(module: str, name: str) -> ModuleType:
    """Imports what builds a baseline.

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
