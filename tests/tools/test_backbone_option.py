"""`--backbone NAME`: a recipe with another backbone, and all else as it was."""

import pytest
import torch
from common.backbones import set_backbone
from helpers import ROOT
from helpers.in_process import with_data
from helpers.pages import write_files
from helpers.tiny import SMALL_DETECTION, SMALL_SEGMENTATION, without_values
from helpers.tools import run_tool
from mmengine.config import Config
from mmengine.optim import build_optim_wrapper
from mmengine.registry import MODELS, init_default_scope

from mmconv2former.models.baselines import BASELINES

DETECTION = 'configs/detection/mask_rcnn_conv2former_t.py'
SEGMENTATION = 'configs/segmentation/upernet_conv2former_t.py'
LEAVES = {
    'mask_rcnn_convnext_t': (DETECTION, 'convnext_tiny'),
    'mask_rcnn_swin_t': (DETECTION, 'swin_tiny'),
    'upernet_convnext_t': (SEGMENTATION, 'convnext_tiny'),
    'upernet_swin_t': (SEGMENTATION, 'swin_tiny'),
}


def load(path, backbone=None):
    config = Config.fromfile(ROOT / path)
    init_default_scope(config.default_scope)
    if backbone is not None:
        set_backbone(config, backbone)
    return config


def test_leaves_are_what_the_option_makes():
    folder = ROOT / 'configs/comparison'
    assert {path.stem for path in folder.glob('*.py')} == set(LEAVES)
    for leaf, (recipe, name) in LEAVES.items():
        assert load(folder / f'{leaf}.py').to_dict() == load(recipe, name).to_dict(), leaf
        assert len((folder / f'{leaf}.py').read_text().splitlines()) <= 15, leaf


@pytest.mark.parametrize('name', ['replknet_31b', 'efficientnet_b5', 'deit3_small'])
@pytest.mark.parametrize(
    'recipe',
    ['detection/cascade_mask_rcnn_conv2former_b', 'segmentation/upernet_conv2former_l_in22k'],
)
def test_only_backbone_and_input_channels_change(name, recipe):
    config, stock = load(f'configs/{recipe}.py', name), load(f'configs/{recipe}.py')
    channels = list(BASELINES[name].channels)
    if 'neck' in config.model:
        assert config.model.pop('neck').pop('in_channels') == channels
        assert stock.model.pop('neck').pop('in_channels') == [96, 192, 384, 768]
    else:
        assert config.model.decode_head.pop('in_channels') == channels
        assert config.model.auxiliary_head.pop('in_channels') == channels[2]
        for head in (stock.model.decode_head, stock.model.auxiliary_head):
            head.pop('in_channels')
    backbone, old = config.model.pop('backbone'), stock.model.pop('backbone')
    assert backbone.drop_path_rate == old.drop_path_rate > 0
    assert backbone.init_cfg.checkpoint == f'pretrain/{name}.pth'
    for key in ('model', 'train_dataloader', 'param_scheduler'):
        assert config[key] == stock[key]


# --------------------------------------------------------------------- what reads the feature maps
@pytest.fixture(scope='module')
def foreign(tmp_path_factory):
    """The configs of docs/use_in_your_config.md, many of which use some stages only."""
    folder = tmp_path_factory.mktemp('foreign')
    write_files(ROOT / 'docs/use_in_your_config.md', folder)
    return folder


@pytest.mark.parametrize(
    ('recipe', 'name'),
    [
        ('dino', 'convnext_tiny'),
        ('dino', 'deit3_small'),
        ('deformable_detr', 'swin_tiny'),
        ('rtmdet', 'efficientnet_b0'),
        ('retinanet', 'focalnet_tiny'),
    ],
)
def test_a_recipe_of_three_levels_keeps_its_strides(recipe, name, foreign):
    config = load(foreign / f'{recipe}.py', name)
    assert config.model.backbone.out_indices == (1, 2, 3)
    assert config.model.neck.in_channels == list(BASELINES[name].channels[1:])
    config.model.backbone.init_cfg = None
    with without_values():
        backbone, neck = (MODELS.build(config.model[part]).eval() for part in ('backbone', 'neck'))
        features = backbone(torch.empty(1, 3, 64, 128))
        levels = neck(features)
    sizes = [(64 // stride, 128 // stride) for stride in (8, 16, 32)]
    assert [tuple(feature.shape[2:]) for feature in features] == sizes
    assert [tuple(level.shape[2:]) for level in levels[:3]] == sizes


@pytest.mark.parametrize(
    ('recipe', 'part', 'channels'),
    [('mask2former_instances', 'panoptic_head', [96, 192, 384, 768]), ('simsiam', 'neck', 768)],
)
def test_other_readers_get_their_channels(recipe, part, channels, foreign):
    assert load(foreign / f'{recipe}.py', 'swin_tiny').model[part].in_channels == channels


@pytest.mark.parametrize(
    ('out_indices', 'head', 'expected'),
    [
        (
            (0, 1, 2, 3),
            dict(in_channels=[72, 144, 288, 576]),
            dict(in_channels=[96, 192, 384, 768]),
        ),
        ((0, 1, 2, 3), dict(in_channels=576), dict(in_channels=768)),
        (
            (0, 1, 2, 3),
            dict(in_channels=288, in_index=2),
            dict(in_channels=384, in_index=2),
        ),
        (
            (0, 1, 2, 3),
            dict(in_channels=576, in_index=-1, c1_in_channels=72),
            dict(in_channels=768, in_index=-1, c1_in_channels=96),
        ),
        # `in_index` counts outputs, not stages
        (
            (0, 2, 3),
            dict(in_channels=[72, 288, 576], in_index=[0, 1, 2]),
            dict(in_channels=[96, 384, 768], in_index=[0, 1, 2]),
        ),
        ((0, 2, 3), dict(in_channels=288, in_index=1), dict(in_channels=384, in_index=1)),
    ],
)
def test_heads_of_mmseg_get_their_channels(out_indices, head, expected):
    config = load(SEGMENTATION)
    config.model.backbone.out_indices = out_indices
    config.model.decode_head = head
    config.model.auxiliary_head = [head, dict(head)]
    set_backbone(config, 'swin_tiny')
    assert config.model.decode_head == expected
    assert config.model.auxiliary_head == [expected, expected]


def test_of_several_necks_the_first_reads():
    config = load(DETECTION)
    config.model.neck = [config.model.neck, dict(type='BFP', in_channels=256, num_levels=5)]
    set_backbone(config, 'convnext_tiny')
    assert [neck.in_channels for neck in config.model.neck] == [[96, 192, 384, 768], 256]


def test_refusals():
    config = load(DETECTION)
    config.model.backbone.out_indices = (0, 1, 2)
    with pytest.raises(SystemExit, match=r'error: --backbone swin_tiny: out_indices .* last'):
        set_backbone(config, 'swin_tiny')
    config = Config(dict(model=dict(type='Other', backbone=dict(type='ResNet'))))
    with pytest.raises(SystemExit, match='has no neck and no decode_head'):
        set_backbone(config, 'swin_tiny')
    output = run_tool('train.py', SEGMENTATION, '--backbone', 'slak_tiny', succeeds=False)
    assert "invalid choice: 'slak_tiny'" in output
    assert 'convnext_tiny' in output


# --------------------------------------------------------------------------------------- training
@pytest.mark.parametrize('decay_type', ['layer_wise', 'stage_wise'])
def test_learning_rates_and_weight_decay(decay_type):
    config = load('configs/comparison/mask_rcnn_swin_t.py')
    config.optim_wrapper.paramwise_cfg.update(decay_type=decay_type, decay_rate=0.5)
    with without_values():
        model = MODELS.build(config.model)
    names = {id(p): name for name, p in model.named_parameters()}
    groups = build_optim_wrapper(model, config.optim_wrapper).optimizer.param_groups
    of = {names[id(p)]: group for group in groups for p in group['params']}
    assert set(of) == set(names.values())
    layers = 7 if decay_type == 'layer_wise' else 6
    last_block = 'backbone.body.stages.3.blocks.1'
    for name, rate in (
        ('backbone.body.patch_embed.projection.weight', 1e-4 * 0.5 ** (layers - 1)),
        (f'{last_block}.ffn.layers.1.weight', 1e-4 * 0.5),
        ('backbone.body.norm3.weight', 1e-4),
        ('neck.fpn_convs.0.conv.weight', 1e-4),
    ):
        assert of[name]['lr'] == rate, name
    table = of[f'{last_block}.attn.w_msa.relative_position_bias_table']
    assert (table['lr'], table['weight_decay']) == (1e-4 * 0.5, 0)
    assert of[f'{last_block}.attn.w_msa.qkv.weight']['weight_decay'] == 0.05


def test_detector_learns():
    from mmdet.testing import demo_mm_inputs  # imports what the other tests do not need

    torch.manual_seed(0)
    model = MODELS.build(load(SMALL_DETECTION, 'efficientnet_b0').model)
    inputs = demo_mm_inputs(1, [(3, 96, 160)], num_items=[3], num_classes=80, with_mask=True)
    losses = model(**model.data_preprocessor(inputs, True), mode='loss')
    assert {'loss_rpn_cls', 'loss_bbox', 'loss_mask'} <= set(losses)
    total, _ = model.parse_losses(losses)
    total.backward()
    assert torch.isfinite(total)
    assert [n for n, p in model.backbone.named_parameters() if p.grad is None] == []


def test_classifier_learns():
    from mmpretrain.structures import DataSample

    torch.manual_seed(0)
    config = load('configs/classification/conv2former_t_in1k.py')
    config.model.train_cfg = None  # labels stay integers
    set_backbone(config, 'efficientnet_b0')
    assert config.model.backbone.drop_path_rate == 0.1
    assert 'init_cfg' not in config.model.backbone  # the recipe starts from random weights
    model = MODELS.build(config.model)
    assert model.head.fc.weight.shape == (1000, 1280)
    assert model.head.loss_module.label_smooth_val == 0.1
    samples = [DataSample().set_gt_label(label) for label in (3, 5)]
    model(torch.randn(2, 3, 64, 64), samples, mode='loss')['loss'].backward()
    assert [n for n, p in model.named_parameters() if p.grad is None] == []
    assert len(model(torch.randn(2, 3, 64, 64), samples, mode='predict')) == 2


def test_train_and_test(sample, tmp_path):
    options = with_data(['--backbone', 'efficientnet_b0'], sample, tmp_path)
    run_tool('train.py', SMALL_SEGMENTATION, *options)
    weights = torch.load(tmp_path / 'iter_4.pth', weights_only=False)['state_dict']
    assert 'backbone.body.layers.5.4.expand_conv.conv.weight' in weights
    assert 'mIoU' in run_tool('test.py', SMALL_SEGMENTATION, tmp_path / 'iter_4.pth', *options)
