"""The paper's baselines: each gives what Conv2Former gives, and fits every recipe by its name."""

import math
import sys
from importlib.util import find_spec
from pathlib import Path

import mmpretrain
import pytest
import timm
import torch
import yaml
from common.cli import set_backbone
from evidence import count_flops, segmentation_size
from helpers import ROOT
from helpers.pages import write_files
from helpers.tools import run_tool
from make_tables import BACKBONES, OURS, backbone_names, read_evidence
from mmengine.config import Config
from mmengine.optim import build_optim_wrapper
from mmengine.registry import MODELS, init_default_scope
from torch import nn

from mmconv2former import Baseline
from mmconv2former.checkpoint.reading import CheckpointNotFound
from mmconv2former.models.baselines import BASELINES, STRIDES, how_to_get_weights

DENSE = [name for name, variant in BASELINES.items() if variant.family.dense is not None]
ONE_PER_FAMILY = [
    'convnext_tiny', 'swin_tiny', 'hornet_tiny', 'replknet_31b', 'efficientnet_b0', 'deit3_small',
    'vit_base', 'focalnet_tiny',
]  # fmt: skip
LEAVES = {
    'mask_rcnn_convnext_t': ('detection/mask_rcnn_conv2former_t', 'convnext_tiny'),
    'mask_rcnn_swin_t': ('detection/mask_rcnn_conv2former_t', 'swin_tiny'),
    'upernet_convnext_t': ('segmentation/upernet_conv2former_t', 'convnext_tiny'),
    'upernet_swin_t': ('segmentation/upernet_conv2former_t', 'swin_tiny'),
}


def load(path):
    config = Config.fromfile(ROOT / 'configs' / f'{path}.py')
    init_default_scope(config.default_scope)
    return config


# ------------------------------------------------------------------------------------- one by one
@pytest.mark.parametrize('name', DENSE)
def test_states_its_channels_strides_and_depths(name):
    backbone = Baseline(name).eval()
    with torch.no_grad():
        features = backbone(torch.randn(1, 3, 64, 96))
    assert backbone.strides == STRIDES
    assert [tuple(feature.shape) for feature in features] == [
        (1, channels, 64 // stride, 96 // stride)
        for channels, stride in zip(backbone.channels, backbone.strides)
    ]
    assert all(feature.is_contiguous() for feature in features)
    names = [param_name for param_name, _ in backbone.named_parameters()]
    for method, last in (
        (backbone.get_layer_depth, sum(max(1, min(9, d // 3)) for d in backbone.depths) + 1),
        (backbone.get_stage_depth, 5),
    ):
        found = {param_name: method(param_name) for param_name in names}
        assert {depth for depth, _ in found.values()} == set(range(last + 1)) - (
            {last} if name.startswith('efficientnet') else set()  # has no norms of its own
        )
        assert {count for _, count in found.values()} == {last + 1}
        with_the_heads = [param_name for param_name in names if found[param_name][0] == last]
        assert all('norm' in n or n.startswith('pyramid.') for n in with_the_heads)


@pytest.mark.parametrize('name', BASELINES)
def test_has_the_published_number_of_parameters(name):
    variant = BASELINES[name]
    backbone = Baseline(name, classification=True)
    head = nn.Linear(*backbone.channels, 1000)
    parameters = sum(p.numel() for module in (backbone, head) for p in module.parameters())
    if variant.published.parameters is not None:
        assert parameters / 1e6 == pytest.approx(variant.published.parameters, rel=0.03)


@pytest.mark.parametrize('name', ONE_PER_FAMILY)
def test_takes_any_size_of_input(name):
    backbone = Baseline(name).eval()
    with torch.no_grad():
        features = backbone(torch.randn(1, 3, 70, 99))
    for feature, stride in zip(features, STRIDES):
        for found, side in zip(feature.shape[2:], (70, 99)):
            assert math.floor(side / stride) <= found <= math.ceil(side / stride)


@pytest.mark.parametrize('name', ONE_PER_FAMILY)
@pytest.mark.parametrize('out_indices', [(1, 2, 3), (3, 0, -2), 3])
def test_gives_the_stages_asked_for(name, out_indices):
    """The very maps of the whole one, in the order asked for, and every parameter is used."""
    torch.manual_seed(0)
    whole, part = Baseline(name).eval(), Baseline(name, out_indices=out_indices).eval()
    # Names of what is left are the same: a checkpoint of one serves the other.
    assert part.load_state_dict(whole.state_dict(), strict=False).missing_keys == []
    stages = (out_indices,) if isinstance(out_indices, int) else [i % 4 for i in out_indices]
    x = torch.randn(1, 3, 70, 96)
    with torch.no_grad():
        expected = whole(x)
    features = part(x)
    assert part.strides == tuple(STRIDES[i] for i in stages)
    assert part.channels == tuple(feature.shape[1] for feature in features)
    assert len(features) == len(stages)
    for feature, stage in zip(features, stages):
        torch.testing.assert_close(feature, expected[stage])
        assert feature.is_contiguous()
    sum(feature.sum() for feature in features).backward()
    assert [n for n, p in part.named_parameters() if p.grad is None] == []
    assert part.depths == whole.depths


@pytest.mark.parametrize('name', ONE_PER_FAMILY)
def test_position_of_features_is_that_of_the_pixels(name):
    """A change in one corner moves the feature of that corner most, on every level."""
    torch.manual_seed(0)
    backbone = Baseline(name).eval()
    image = torch.randn(1, 3, 96, 128)
    changed = image.clone()
    changed[..., -8:, -8:] += 3
    with torch.no_grad():
        for one, other in zip(backbone(image), backbone(changed)):
            difference = (one - other).abs().mean(1)[0]
            row, column = divmod(int(difference.argmax()), difference.shape[1])
            assert row >= difference.shape[0] * 3 // 4 - 1, difference.shape
            assert column >= difference.shape[1] * 3 // 4 - 1, difference.shape


@pytest.mark.parametrize('name', ONE_PER_FAMILY)
@pytest.mark.parametrize('classification', [False, True])
def test_every_parameter_gets_a_gradient(name, classification):
    """Else distributed training stops, with a message about unused parameters."""
    torch.manual_seed(0)
    backbone = Baseline(name, classification=classification)
    backbone.init_weights()
    size = (224, 224) if classification else (64, 96)
    features = backbone(torch.randn(2, 3, *size))
    sum((feature * torch.randn_like(feature)).sum() for feature in features).backward()
    assert [n for n, p in backbone.named_parameters() if p.grad is None] == []
    assert [n for n, p in backbone.named_parameters() if not p.grad.any()] == []


def test_every_parameter_of_coatnet_gets_a_gradient():
    backbone = Baseline('coatnet_0', classification=True)
    (feature,) = backbone(torch.randn(2, 3, 224, 224))
    assert feature.shape == (2, 768, 1, 1)
    (feature * torch.randn_like(feature)).sum().backward()
    assert [n for n, p in backbone.named_parameters() if p.grad is None or not p.grad.any()] == []


@pytest.mark.parametrize('name', ['hornet_tiny', 'swin_tiny', 'focalnet_tiny'])
def test_modes_chain_and_drop_path_works(name):
    backbone = Baseline(name, drop_path_rate=0.5)
    assert backbone.eval() is backbone
    assert backbone.train() is backbone
    assert backbone.body.training
    rates = [m.drop_prob for m in backbone.modules() if 'DropPath' in type(m).__name__]
    assert rates[-1] == pytest.approx(0.5)
    assert rates == sorted(rates)


# ------------------------------------------------------------------------------- depths and rates
@pytest.mark.parametrize('name', ['convnext_tiny', 'convnext_small'])
def test_layers_of_convnext_are_the_published_ones(name):
    """By mmpretrain's own rule, which fits ConvNeXt's depths only."""
    backbone = Baseline(name)
    for param_name, _ in backbone.body.named_parameters():
        assert backbone.get_layer_depth(
            f'backbone.body.{param_name}', 'backbone.'
        ) == backbone.body.get_layer_depth(param_name)


# Number of layers, layer and stage of some parameters; a stage of 2, 3 or 6 blocks has 1, 1 or 2.
EXPECTED = {
    'swin_tiny': (7, {
        'body.patch_embed.projection.weight': (0, 0),
        'body.stages.0.blocks.1.attn.w_msa.qkv.weight': (1, 1),
        'body.stages.0.downsample.reduction.weight': (2, 2),
        'body.stages.2.blocks.2.norm1.weight': (3, 3),
        'body.stages.2.blocks.3.norm1.weight': (4, 3),
        'body.stages.3.blocks.1.norm1.weight': (5, 4),
        'body.norm0.weight': (6, 5),
    }),
    'replknet_31b': (11, {
        'body.stem.3.conv.weight': (0, 0),
        'body.transitions.1.0.conv.weight': (3, 3),
        'body.stages.2.blocks.5.preffn_bn.weight': (3, 3),
        'body.stages.2.blocks.6.pw1.conv.weight': (4, 3),
        'body.stages.2.blocks.35.preffn_bn.weight': (8, 3),
        'body.stages.3.blocks.0.pw1.conv.weight': (9, 4),
        'body.stages.3.norm.weight': (10, 5),
    }),
    'efficientnet_b0': (7, {
        'body.layers.1.0.depthwise_conv.conv.weight': (0, 0),
        'body.layers.2.0.expand_conv.conv.weight': (1, 1),
        'body.layers.4.2.expand_conv.conv.weight': (3, 3),
        'body.layers.4.3.expand_conv.conv.weight': (4, 3),
        'body.layers.5.4.expand_conv.conv.weight': (5, 4),
    }),
    'deit3_small': (6, {
        'body.pos_embed': (0, 0),
        'body.blocks.2.attn.qkv.weight': (1, 1),
        'body.blocks.3.attn.qkv.weight': (2, 2),
        'body.blocks.11.mlp.fc2.weight': (4, 4),
        'norms.3.weight': (5, 5),
        'pyramid.upsample_4x.0.weight': (5, 5),
    }),
    'focalnet_tiny': (7, {
        'body.stem.proj.weight': (0, 0),
        'body.layers.1.downsample.proj.weight': (2, 2),
        'body.layers.2.blocks.3.mlp.fc1.weight': (4, 3),
        'body.layers.3.blocks.1.mlp.fc1.weight': (5, 4),
        'norms.0.weight': (6, 5),
    }),
}  # fmt: skip


@pytest.mark.parametrize('name', EXPECTED)
def test_layers_and_stages(name):
    backbone = Baseline(name)
    num_layers, expected = EXPECTED[name]
    assert set(expected) <= {param_name for param_name, _ in backbone.named_parameters()}
    for param_name, (layer, stage) in expected.items():
        prefixed = f'backbone.{param_name}'
        assert backbone.get_layer_depth(prefixed, 'backbone.') == (layer, num_layers), param_name
        assert backbone.get_stage_depth(prefixed, 'backbone.') == (stage, 6), param_name
    assert backbone.get_layer_depth('neck.convs.0.weight', 'backbone.')[0] == num_layers - 1


@pytest.mark.parametrize('name', ONE_PER_FAMILY)
def test_depths_rise_in_the_order_of_computation(name):
    backbone = Baseline(name).eval()
    depths = []
    for module_name, module in backbone.body.named_modules():
        params = [n for n, _ in module.named_parameters(recurse=False)]
        if params:
            depth, count = backbone.get_layer_depth(f'body.{module_name}.{params[0]}')
            if depth < count - 1:
                module.register_forward_hook(lambda *_, depth=depth: depths.append(depth))
    with torch.no_grad():
        backbone(torch.randn(1, 3, 64, 64))
    assert depths == sorted(depths)
    assert (depths[0], len(set(depths))) == (0, count - 1)


@pytest.mark.parametrize('decay_type', ['layer_wise', 'stage_wise'])
def test_learning_rates_and_weight_decay_in_a_recipe(decay_type):
    config = load('comparison/mask_rcnn_swin_t')
    config.optim_wrapper.paramwise_cfg.update(decay_type=decay_type, decay_rate=0.5)
    model = MODELS.build(config.model)
    names = {id(p): name for name, p in model.named_parameters()}
    groups = build_optim_wrapper(model, config.optim_wrapper).optimizer.param_groups
    of = {names[id(p)]: group for group in groups for p in group['params']}
    assert set(of) == set(names.values())
    layers = 7 if decay_type == 'layer_wise' else 6
    assert of['backbone.body.patch_embed.projection.weight']['lr'] == 1e-4 * 0.5 ** (layers - 1)
    assert of['backbone.body.stages.3.blocks.1.ffn.layers.1.weight']['lr'] == 1e-4 * 0.5
    assert (
        of['backbone.body.norm3.weight']['lr'] == of['neck.fpn_convs.0.conv.weight']['lr'] == 1e-4
    )
    table = of['backbone.body.stages.3.blocks.1.attn.w_msa.relative_position_bias_table']
    assert (table['lr'], table['weight_decay']) == (1e-4 * 0.5, 0)
    assert of['backbone.body.stages.3.blocks.1.attn.w_msa.qkv.weight']['weight_decay'] == 0.05


# ---------------------------------------------------------------------------------------- weights
def test_names_of_weights_are_the_libraries():
    known = {'timm': timm.list_models(pretrained=True), 'mmpretrain': mmpretrain.list_models()}
    for name, variant in BASELINES.items():
        if variant.weights is not None and name != 'replknet_31b':
            assert variant.weights in known[variant.family.library], name
            assert f"'{variant.weights}', pretrained=True" in how_to_get_weights(name)
    assert 'no ImageNet-1K weights of coatnet_0' in how_to_get_weights('coatnet_0')


def test_address_of_weights_is_the_library_s():
    (folder,) = find_spec('mmpretrain').submodule_search_locations
    metafile = yaml.safe_load(Path(folder, '.mim/configs/replknet/metafile.yml').read_text())
    files = {Path(model['Weights']).name for model in metafile['Models']}
    address = BASELINES['replknet_31b'].weights
    assert Path(address).name in files
    assert f'Download {address} to pretrain/replknet_31b.pth' in how_to_get_weights('replknet_31b')


def library_state_dict(name):
    """What `how_to_get_weights` saves, but of random weights."""
    variant = BASELINES[name]
    torch.manual_seed(7)
    if variant.family.library == 'timm':
        return timm.create_model(variant.weights, pretrained=False).state_dict()
    if name == 'replknet_31b':
        return MODELS.build(dict(type='mmpretrain.RepLKNet', arch='31B')).state_dict()
    return mmpretrain.get_model(variant.weights, pretrained=False).backbone.state_dict()


@pytest.mark.parametrize('name', [name for name in ONE_PER_FAMILY if name != 'vit_base'])
def test_weights_of_the_library_load_as_they_are(name, tmp_path):
    path = tmp_path / 'weights.pth'
    saved = library_state_dict(name)
    prefix = '' if name.startswith('deit3') else 'backbone.'  # as of a whole mmpretrain model
    torch.save({'state_dict': {f'{prefix}{key}': value for key, value in saved.items()}}, path)
    for classification in (False, True):
        init_cfg = dict(type='Pretrained', checkpoint=str(path))
        backbone = Baseline(name, classification=classification, init_cfg=init_cfg)
        backbone.init_weights()
        loaded = backbone.body.state_dict()
        common = set(loaded) & set(saved)
        assert all(torch.equal(loaded[key], saved[key]) for key in common)
        new = set(loaded) - common
        assert not new if classification else all('norm' in key for key in new)
        assert len(common) > 100


def test_weights_of_another_network_are_refused(tmp_path):
    path = tmp_path / 'weights.pth'
    torch.save(Baseline('focalnet_tiny').body.state_dict(), path)
    backbone = Baseline('swin_tiny', init_cfg=dict(type='Pretrained', checkpoint=str(path)))
    with pytest.raises(ValueError, match='does not fit this SwinTransformer'):
        backbone.init_weights()
    backbone = Baseline('swin_tiny', init_cfg=dict(type='Pretrained', checkpoint='none.pth'))
    with pytest.raises(
        FileNotFoundError, match=r"none.pth' .*get_model\('swin-tiny_3rdparty_in1k'"
    ):
        backbone.init_weights()


# ----------------------------------------------------------------------------------------- errors
@pytest.mark.parametrize(
    ('settings', 'message'),
    [
        (dict(name='slak_tiny'), r"one of convnext_tiny, .*coatnet_3, got 'slak_tiny'"),
        (dict(name='coatnet_0'), 'coatnet_0 is for classification only'),
        (dict(name='swin_tiny', drop_path_rate=1), 'drop_path_rate must be below 1, got 1'),
        (
            dict(name='swin_tiny', init_cfg=dict(type='Normal')),
            "of type 'Pretrained', got .*Normal",
        ),
        (dict(name='swin_tiny', out_indices=(1, 4)), 'out_indices must be from -4 to 3, got 4'),
        (dict(name='swin_tiny', out_indices=(3, -1)), r'not name a stage twice, got \(3, -1\)'),
        (
            dict(name='swin_tiny', out_indices=(0, 1, 2)),
            r'must name the last stage, 3, .* got \(0, 1, 2\)',
        ),
        (
            dict(name='swin_tiny', out_indices=(3,), classification=True),
            r'classification=True swin_tiny has one output, got \(3,\)',
        ),
    ],
)
def test_bad_arguments(settings, message):
    with pytest.raises(ValueError, match=message):
        MODELS.build(dict(type='mmconv2former.Baseline', **settings))


@pytest.mark.parametrize(
    ('library', 'name', 'package'),
    [
        ('timm', 'focalnet_tiny', 'timm'),
        ('mmpretrain', 'swin_tiny', 'onedl-mmpretrain'),
        ('mmseg', 'deit3_small', 'onedl-mmsegmentation'),
    ],
)
def test_missing_library_is_named(library, name, package, monkeypatch):
    class Missing:
        def find_spec(self, module, *_):
            if module.split('.')[0] == library:
                raise ModuleNotFoundError(f'No module named {library}', name=library)

    for module in [module for module in sys.modules if module.split('.')[0] == library]:
        monkeypatch.delitem(sys.modules, module)
    monkeypatch.setattr(sys, 'meta_path', [Missing(), *sys.meta_path])
    message = f'{name} needs {library}, which is not installed: pip install {package}'
    with pytest.raises(ModuleNotFoundError, match=message):
        Baseline(name)


# ---------------------------------------------------------------------------------------- recipes
@pytest.mark.parametrize('leaf', LEAVES)
def test_a_leaf_is_the_recipe_with_its_backbone(leaf):
    """And so it is short, and equal in all else."""
    assert len((ROOT / f'configs/comparison/{leaf}.py').read_text().splitlines()) <= 15
    recipe, name = LEAVES[leaf]
    expected = load(recipe)
    set_backbone(expected, name)
    assert load(f'comparison/{leaf}').to_dict() == expected.to_dict()


def test_every_leaf_is_tested():
    assert {path.stem for path in (ROOT / 'configs/comparison').glob('*.py')} == set(LEAVES)


@pytest.mark.parametrize('name', ['replknet_31b', 'efficientnet_b5', 'deit3_small'])
@pytest.mark.parametrize(
    'recipe',
    ['detection/cascade_mask_rcnn_conv2former_b', 'segmentation/upernet_conv2former_l_in22k'],
)
def test_channels_reach_what_reads_them(name, recipe):
    config, stock = load(recipe), load(recipe)
    set_backbone(config, name)
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
    assert config.model == stock.model
    assert config.train_dataloader == stock.train_dataloader
    assert config.param_scheduler == stock.param_scheduler


@pytest.fixture(scope='module')
def foreign(tmp_path_factory):
    """The configs of docs/use_in_your_config.md, of which many ask for some stages only."""
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
    config = Config.fromfile(foreign / f'{recipe}.py')
    init_default_scope(config.default_scope)
    assert config.model.backbone.out_indices == (1, 2, 3)
    set_backbone(config, name)
    assert config.model.neck.in_channels == list(BASELINES[name].channels[1:])
    config.model.backbone.init_cfg = None
    backbone, neck = (MODELS.build(config.model[part]).eval() for part in ('backbone', 'neck'))
    with torch.no_grad():
        features = backbone(torch.randn(1, 3, 64, 128))
        levels = neck(features)
    assert backbone.strides == (8, 16, 32)
    sizes = [(64 // stride, 128 // stride) for stride in (8, 16, 32)]
    assert [tuple(feature.shape[2:]) for feature in features] == sizes
    assert [tuple(level.shape[2:]) for level in levels[:3]] == sizes


def test_heads_read_the_stages_that_there_are():
    """`in_index` of a head counts outputs, not stages."""
    config = load('segmentation/upernet_conv2former_t')
    config.model.backbone.out_indices = (0, 2, 3)
    config.model.decode_head.in_index = [0, 1, 2]
    config.model.auxiliary_head.in_index = 1
    set_backbone(config, 'convnext_tiny')
    assert config.model.backbone.out_indices == (0, 2, 3)
    assert config.model.decode_head.in_channels == [96, 384, 768]
    assert config.model.auxiliary_head.in_channels == 384


@pytest.mark.parametrize(
    ('recipe', 'part', 'channels'),
    [('mask2former_instances', 'panoptic_head', [96, 192, 384, 768]), ('simsiam', 'neck', 768)],
)
def test_what_reads_feature_maps_is_told_their_channels(recipe, part, channels, foreign):
    config = Config.fromfile(foreign / f'{recipe}.py')
    set_backbone(config, 'swin_tiny')
    assert config.model[part].in_channels == channels


@pytest.mark.parametrize(
    ('head', 'expected'),
    [
        (dict(in_channels=[72, 144, 288, 576]), dict(in_channels=[96, 192, 384, 768])),
        (dict(in_channels=576), dict(in_channels=768)),
        (dict(in_channels=288, in_index=2), dict(in_channels=384, in_index=2)),
        (
            dict(in_channels=576, in_index=-1, c1_in_channels=72),
            dict(in_channels=768, in_index=-1, c1_in_channels=96),
        ),
    ],
)
def test_heads_of_mmseg_are_told_their_channels(head, expected):
    config = load('segmentation/upernet_conv2former_t')
    config.model.decode_head = head
    set_backbone(config, 'swin_tiny')
    assert config.model.decode_head == expected


def test_of_several_necks_and_auxiliary_heads():
    config = load('segmentation/upernet_conv2former_t')
    config.model.auxiliary_head = [dict(config.model.auxiliary_head, in_index=i) for i in (1, 2)]
    set_backbone(config, 'convnext_tiny')
    assert [head.in_channels for head in config.model.auxiliary_head] == [192, 384]
    config = load('detection/mask_rcnn_conv2former_t')
    config.model.neck = [config.model.neck, dict(type='BFP', in_channels=256, num_levels=5)]
    set_backbone(config, 'convnext_tiny')
    assert [neck.in_channels for neck in config.model.neck] == [[96, 192, 384, 768], 256]


def test_stages_that_a_baseline_cannot_give_are_one_error():
    config = load('detection/mask_rcnn_conv2former_t')
    config.model.backbone.out_indices = (0, 1, 2)
    with pytest.raises(SystemExit, match=r'error: --backbone swin_tiny: out_indices .* last'):
        set_backbone(config, 'swin_tiny')


def test_mask_rcnn_learns_with_a_baseline():
    from mmdet.testing import demo_mm_inputs

    torch.manual_seed(0)
    config = load('detection/mask_rcnn_conv2former_t')
    set_backbone(config, 'deit3_small')
    config.model.backbone.init_cfg = None
    model = MODELS.build(config.model)
    inputs = demo_mm_inputs(1, [(3, 96, 160)], num_items=[3], num_classes=80, with_mask=True)
    losses = model(**model.data_preprocessor(inputs, True), mode='loss')
    total = sum(
        sum(value) if isinstance(value, list) else value
        for key, value in losses.items()
        if 'loss' in key
    )
    total.backward()
    assert {'loss_rpn_cls', 'loss_bbox', 'loss_mask'} <= set(losses)
    assert torch.isfinite(total)
    assert [n for n, p in model.backbone.named_parameters() if p.grad is None] == []


def test_classifier_learns_with_a_baseline():
    from mmpretrain.structures import DataSample

    torch.manual_seed(0)
    for name, channels in (('efficientnet_b0', 1280), ('convnext_tiny', 768)):
        config = load('classification/conv2former_t_in1k')
        config.model.train_cfg = None  # labels stay whole numbers
        set_backbone(config, name)
        assert config.model.backbone.drop_path_rate == 0.1
        assert 'init_cfg' not in config.model.backbone  # the recipe is trained from random weights
        model = MODELS.build(config.model)
        assert model.head.fc.weight.shape == (1000, channels)
        assert model.head.loss_module.label_smooth_val == 0.1
        samples = [DataSample().set_gt_label(label) for label in (3, 5)]
        losses = model(torch.randn(2, 3, 64, 64), samples, mode='loss')
        losses['loss'].backward()
        assert [n for n, p in model.named_parameters() if p.grad is None] == []
        assert len(model(torch.randn(2, 3, 64, 64), samples, mode='predict')) == 2


def test_recipe_without_a_place_for_feature_maps():
    config = Config(dict(model=dict(type='Other', backbone=dict(type='ResNet'))))
    with pytest.raises(SystemExit, match='has no neck and no decode_head'):
        set_backbone(config, 'swin_tiny')


def test_missing_weights_are_asked_for():
    backbone = MODELS.build(load('comparison/upernet_swin_t').model.backbone)
    with pytest.raises(CheckpointNotFound, match=r'swin_tiny.pth.*swin-tiny_3rdparty_in1k'):
        backbone.init_weights()


def test_train_and_test_with_the_flag(sample, tmp_path):
    recipe = 'configs/segmentation/upernet_conv2former_n.py'
    options = [
        '--data-root', sample / 'ade/ADEChallengeData2016', '--backbone', 'efficientnet_b0',
        '--work-dir', tmp_path, '--cfg-options', *segmentation_size(64),
        'model.decode_head.channels=32', 'model.auxiliary_head.channels=32',
        'train_cfg.max_iters=2', 'train_cfg.val_interval=2', 'param_scheduler.1.begin=0',
        'param_scheduler.0.end=1', 'param_scheduler.1.end=2',
        'default_hooks.checkpoint.interval=2', 'default_hooks.logger.interval=1',
    ]  # fmt: skip
    run_tool('train.py', recipe, *options, 'model.backbone.init_cfg=None')
    weights = torch.load(tmp_path / 'iter_2.pth', weights_only=False)['state_dict']
    assert 'backbone.body.layers.5.4.expand_conv.conv.weight' in weights
    output = run_tool('test.py', recipe, tmp_path / 'iter_2.pth', *options)
    assert 'mIoU' in output


def test_unknown_backbone_is_answered_with_the_known_ones():
    recipe = 'configs/segmentation/upernet_conv2former_n.py'
    output = run_tool('train.py', recipe, '--backbone', 'slak_tiny', succeeds=False)
    assert "invalid choice: 'slak_tiny'" in output
    assert 'convnext_tiny' in output


# ----------------------------------------------------------------------------------------- counts
def test_attention_is_counted():
    """Of one head of ViT on 14x14 patches and a class token, against the textbook's formula."""

    class Attention(nn.Module):
        def forward(self, x):
            return nn.functional.scaled_dot_product_attention(x, x, x)

    assert count_flops(Attention(), torch.randn(1, 6, 197, 64)) == 6 * 197 * 197 * 64 * 2


def test_counts_are_the_published_ones():
    """Of every baseline, by the program that counts ours."""
    evidence = read_evidence(ROOT / 'docs/evidence.json')[BACKBONES]
    assert list(evidence) == sorted(backbone_names())
    for name, variant in BASELINES.items():
        counted = evidence[name]['classification']
        published = variant.published
        assert counted['size'] == [published.size, published.size]
        tolerance = {'coatnet': 0.10, 'efficientnet': 0.08}.get(name.split('_')[0], 0.03)
        assert counted['flops'] / 1e9 == pytest.approx(published.flops, rel=tolerance), name
    for name in ('conv2former_small', 'conv2former_base'):  # whose own head costs next to nothing
        counted = evidence[name]['classification']['flops'] / 1e9
        assert counted == pytest.approx(OURS[name].flops, rel=0.01)
