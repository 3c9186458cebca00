"""`--backbone NAME`: a recipe with one of the paper's baselines instead of Conv2Former.

Only this file knows what a recipe needs for another backbone. The configs in configs/comparison
have the same result in writing, for OpenMMLab's own tools, which have no such flag; a test compares
them.
"""

from __future__ import annotations

from collections.abc import Sequence

from mmengine.config import Config, ConfigDict

from mmconv2former.models.baselines import ALL_STAGES, find_baseline, parse_stages

# Settings that any classification head of mmpretrain has.
CLASSIFIER_SETTINGS = ('num_classes', 'loss', 'topk', 'cal_acc')
# Heads that read feature maps if there is no neck.
HEADS = ('decode_head', 'auxiliary_head', 'panoptic_head')


def set_backbone(config: Config, name: str) -> None:
    """Replaces the backbone of a recipe with a baseline and adapts the parts that read its maps.

    Schedule, augmentation, drop path and heads stay, and an initial layer scale that the recipe
    names. If the recipe starts from pretrained weights, the baseline's are expected in
    `pretrain/NAME.pth`. A classifier gets global average pooling and
    a linear layer, as all baselines were published with, and keeps its loss. For dense prediction
    the baseline returns the stages that the old backbone returned (its `out_indices`).

    Raises:
        ValueError: There is no baseline of this name.
        SystemExit: The recipe has no neck or head that reads feature maps, or needs stages that a
            baseline cannot return.
    """
    variant = find_baseline(name)
    model = config.model
    model.pop('pretrained', None)  # mmseg passes it on to the backbone
    old = model.backbone
    model.backbone = dict(
        type='mmconv2former.Baseline', name=name, drop_path_rate=old.get('drop_path_rate', 0.0)
    )
    layer_scale = variant.family.layer_scale_argument
    if layer_scale is not None and 'layer_scale_init_value' in old:
        model.backbone.options = {layer_scale: old.layer_scale_init_value}
    if old.get('init_cfg') is not None:
        model.backbone.init_cfg = dict(type='Pretrained', checkpoint=f'pretrain/{name}.pth')

    if model.type == 'ImageClassifier':
        model.backbone.classification = True
        model.neck = dict(type='GlobalAveragePooling')
        kept = {key: model.head[key] for key in CLASSIFIER_SETTINGS if key in model.head}
        model.head = dict(type='LinearClsHead', in_channels=variant.linear_channels, **kept)
    elif readers := readers_of(model):
        try:
            stages = parse_stages(old.get('out_indices', ALL_STAGES))
        except (TypeError, ValueError) as error:
            raise SystemExit(f'error: --backbone {name}: {error}') from None
        if stages != ALL_STAGES:
            model.backbone.out_indices = stages
        for reader in readers:
            set_channels(reader, [variant.channels[i] for i in stages])
    else:
        raise SystemExit(
            f'error: --backbone: {config.filename} has no neck and no {", no ".join(HEADS)}'
        )

    custom_keys = {part: dict(decay_mult=0.0) for part in variant.family.no_weight_decay}
    if custom_keys:
        config.merge_from_dict({'optim_wrapper.paramwise_cfg': dict(custom_keys=custom_keys)})


def readers_of(model: ConfigDict) -> list[ConfigDict]:
    """The parts of a model that read the backbone's feature maps."""
    neck = model.get('neck')
    if neck:
        return [neck[0] if isinstance(neck, list) else neck]  # the next neck reads the first
    heads = [model.get(name) or [] for name in HEADS]
    return [head for item in heads for head in (item if isinstance(item, list) else [item])]


def set_channels(reader: ConfigDict, channels: Sequence[int]) -> None:
    """Sets the input channels of a neck or head.

    It reads all feature maps if it had several numbers. Otherwise it reads the last one or, in
    mmseg's heads, those that `in_index` names.
    """
    reads_all = isinstance(reader.get('in_channels'), (list, tuple))
    index = reader.get('in_index', range(len(channels)) if reads_all else -1)
    is_one = isinstance(index, int)
    reader.in_channels = channels[index] if is_one else [channels[i] for i in index]
    if 'c1_in_channels' in reader:  # DeepLabV3+ also reads the first map
        reader.c1_in_channels = channels[0]
