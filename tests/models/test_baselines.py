"""The paper's baselines have Conv2Former's interface.

Structure is tested on all of them, without values (on the meta device); values and gradients on a
tiny network of each family.
"""

import itertools
import math
import sys
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path

import mmpretrain
import pytest
import timm
import torch
import yaml
from helpers.tiny import without_values
from mmengine.registry import MODELS
from timm.models.focalnet import FocalNet
from torch import nn

from mmconv2former import Baseline
from mmconv2former.models import baselines
from mmconv2former.models.baselines import (
    BASELINES,
    NEW_FOR_DENSE_PREDICTION,
    STRIDES,
    how_to_get_weights,
)

DENSE = [name for name, variant in BASELINES.items() if variant.family.dense is not None]
WIDTHS = (8, 16, 32, 64)
# Small networks of the same classes; EfficientNet-B0 is small enough.
TINY_ARCHS = {
    'convnext_tiny': dict(depths=[2, 1, 4, 1], channels=WIDTHS),
    'swin_tiny': dict(embed_dims=8, depths=[2, 1, 3, 1], num_heads=[1, 2, 2, 2]),
    'hornet_tiny': dict(
        base_dim=8, depths=[1, 1, 4, 1], orders=[2, 3, 3, 3],
        dw_cfg=[dict(type='DW', kernel_size=7)] * 4,
    ),
    'replknet_31b': dict(
        large_kernel_sizes=[13, 9, 7, 7], layers=[1, 1, 3, 1], channels=WIDTHS, small_kernel=5,
        dw_ratio=1,
    ),
}  # fmt: skip
TINY = [*TINY_ARCHS, 'efficientnet_b0', 'deit3_small', 'focalnet_tiny']
ONE_PER_FAMILY = [*TINY, 'vit_base']


@timm.models.register_model
def tiny_focalnet(drop_path_rate=0.0, **_):
    """For which timm's own FocalNets have no arguments."""
    return FocalNet(num_classes=0, embed_dim=8, depths=(2, 1, 4, 1), drop_path_rate=drop_path_rate)


@pytest.fixture
def tiny(monkeypatch):
    """The table with a tiny network of each family."""

    def change(name, **fields):
        monkeypatch.setitem(BASELINES, name, replace(BASELINES[name], **fields))

    for name, arch in TINY_ARCHS.items():
        change(name, arch=arch, channels=WIDTHS)
    vit = replace(baselines.DEIT3, arguments=dict(embed_dim=32, num_heads=2))
    change('deit3_small', family=vit, channels=(32,) * 4)
    change('focalnet_tiny', arch='tiny_focalnet', channels=WIDTHS)
    coatnet = dict(embed_dim=(32, 32, 32, 32), depths=(1, 1, 1, 1), stem_width=(16, 32))
    family = replace(baselines.COATNET, arguments=coatnet)
    change('coatnet_0', family=family, channels=(32,) * 4, classifier_channels=768)


def build_shapes(name, **options):
    with without_values():
        return Baseline(name, **options).eval()


def names_of(module):
    return [name for name, _ in module.named_parameters()]


# ------------------------------------------------------------------------------ structure, of all
@pytest.mark.parametrize('name', DENSE)
def test_states_its_channels_strides_and_depths(name):
    backbone = build_shapes(name)
    assert backbone.strides == STRIDES
    assert backbone.channels == BASELINES[name].channels
    for height, width in ((64, 96), (70, 99)):
        features = backbone(torch.empty(1, 3, height, width, device='meta'))
        for feature, channels, stride in zip(features, backbone.channels, STRIDES, strict=True):
            assert feature.shape[1] == channels
            for side, length in zip(feature.shape[2:], (height, width)):
                assert math.floor(length / stride) <= side <= math.ceil(length / stride)
            assert feature.is_contiguous()
    for method, last in (
        (backbone.get_layer_depth, sum(max(1, min(9, d // 3)) for d in backbone.depths) + 1),
        (backbone.get_stage_depth, 5),
    ):
        found = {param_name: method(param_name) for param_name in names_of(backbone)}
        own_norms = not name.startswith('efficientnet')
        assert {depth for depth, _ in found.values()} == set(range(last + own_norms))
        assert {count for _, count in found.values()} == {last + 1}
        with_heads = [param_name for param_name, (depth, _) in found.items() if depth == last]
        assert all('norm' in n or n.startswith('pyramid.') for n in with_heads)


@pytest.mark.parametrize('name', BASELINES)
def test_has_the_published_number_of_parameters(name):
    backbone = build_shapes(name, classification=True)
    head = nn.Linear(*backbone.channels, 1000, device='meta')
    count = sum(p.numel() for module in (backbone, head) for p in module.parameters())
    if BASELINES[name].parameters is not None:
        assert count / 1e6 == pytest.approx(BASELINES[name].parameters, rel=0.03)


@pytest.mark.parametrize('name', ['convnext_tiny', 'convnext_small'])
def test_layers_of_convnext_are_the_published_ones(name):
    """By mmpretrain's own rule, which fits ConvNeXt's depths only."""
    backbone = build_shapes(name)
    for param_name in names_of(backbone.body):
        depth = backbone.get_layer_depth(f'backbone.body.{param_name}', 'backbone.')
        assert depth == backbone.body.get_layer_depth(param_name)


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
    backbone = build_shapes(name)
    num_layers, expected = EXPECTED[name]
    assert set(expected) <= set(names_of(backbone))
    for param_name, (layer, stage) in expected.items():
        prefixed = f'backbone.{param_name}'
        assert backbone.get_layer_depth(prefixed, 'backbone.') == (layer, num_layers), param_name
        assert backbone.get_stage_depth(prefixed, 'backbone.') == (stage, 6), param_name
    assert backbone.get_layer_depth('neck.convs.0.weight', 'backbone.')[0] == num_layers - 1


@pytest.mark.parametrize('name', ONE_PER_FAMILY)
def test_weights_of_the_library_fit(name):
    """Names and shapes of what `how_to_get_weights` saves are those of the network."""
    with without_values():
        if BASELINES[name].family.library == 'timm':
            saved = timm.create_model(BASELINES[name].weights)
        elif name == 'replknet_31b':
            saved = MODELS.build(dict(type='mmpretrain.RepLKNet', arch='31B'))
        else:
            saved = mmpretrain.get_model(BASELINES[name].weights).backbone
    shapes = {key: value.shape for key, value in saved.state_dict().items()}
    for classification in (True, False):
        body = build_shapes(name, classification=classification).body.state_dict()
        new = body.keys() - shapes.keys()
        assert all(body[key].shape == shapes[key] for key in body.keys() - new)
        assert not classification or not new
        assert all(NEW_FOR_DENSE_PREDICTION.fullmatch(key) for key in new)


def test_names_of_weights_are_the_library_s():
    known = {'timm': timm.list_models(pretrained=True), 'mmpretrain': mmpretrain.list_models()}
    for name, variant in BASELINES.items():
        if variant.weights is not None and name != 'replknet_31b':
            assert variant.weights in known[variant.family.library], name
            assert f"'{variant.weights}', pretrained=True" in how_to_get_weights(name)
    assert 'no ImageNet-1K weights of coatnet_0' in how_to_get_weights('coatnet_0')


def test_url_of_weights_is_the_library_s():
    (folder,) = find_spec('mmpretrain').submodule_search_locations
    metafile = yaml.safe_load(Path(folder, '.mim/configs/replknet/metafile.yml').read_text())
    url = BASELINES['replknet_31b'].weights
    assert Path(url).name in {Path(model['Weights']).name for model in metafile['Models']}
    assert f'Download {url} to pretrain/replknet_31b.pth' in how_to_get_weights('replknet_31b')


# --------------------------------------------------------------------- values, of tiny networks
@pytest.mark.parametrize('out_indices', [(3, 0, -2), 3])
@pytest.mark.parametrize('name', TINY)
def test_returns_the_stages_asked_for(name, out_indices, tiny):
    """The same maps as the network with all stages, in the order asked for; nothing is unused."""
    torch.manual_seed(0)
    full, part = Baseline(name).eval(), Baseline(name, out_indices=out_indices).eval()
    # The names of what is left are the same: a checkpoint of one fits the other.
    assert part.load_state_dict(full.state_dict(), strict=False).missing_keys == []
    stages = (out_indices,) if isinstance(out_indices, int) else [i % 4 for i in out_indices]
    x = torch.randn(1, 3, 70, 96)
    with torch.no_grad():
        expected = full(x)
    features = part(x)
    assert part.strides == tuple(STRIDES[i] for i in stages)
    assert part.channels == tuple(feature.shape[1] for feature in features)
    for feature, stage in zip(features, stages, strict=True):
        torch.testing.assert_close(feature, expected[stage])
        assert feature.is_contiguous()
    sum(feature.sum() for feature in features).backward()
    assert [n for n, p in part.named_parameters() if p.grad is None] == []
    assert part.depths == full.depths


@pytest.mark.parametrize(
    ('name', 'classification'), [*itertools.product(TINY, [False, True]), ('coatnet_0', True)]
)
def test_every_parameter_gets_a_gradient(name, classification, tiny):
    """Otherwise distributed training stops, with a message about unused parameters."""
    torch.manual_seed(0)
    backbone = Baseline(name, classification=classification)
    backbone.init_weights()
    # Fixed for these, as DeiT-3 and CoAtNet have tables of positions and Swin has 7x7 windows.
    is_fixed = classification and name in ('deit3_small', 'coatnet_0', 'swin_tiny')
    features = backbone(torch.randn(2, 3, *((224, 224) if is_fixed else (64, 96))))
    assert [feature.shape[1] for feature in features] == list(backbone.channels)
    sum((feature * torch.randn_like(feature)).sum() for feature in features).backward()
    assert [n for n, p in backbone.named_parameters() if p.grad is None or not p.grad.any()] == []


@pytest.mark.parametrize('name', TINY)
def test_positions_and_depths_follow_the_data(name, tiny):
    """A changed corner moves the features of that corner most; depths rise from the stem on."""
    torch.manual_seed(0)
    backbone = Baseline(name).eval()
    depths = []
    for module_name, module in backbone.body.named_modules():
        for param_name, _ in [*module.named_parameters(recurse=False)][:1]:
            depth, count = backbone.get_layer_depth(f'body.{module_name}.{param_name}')
            if depth < count - 1:
                module.register_forward_hook(lambda *_, depth=depth: depths.append(depth))
    image = torch.randn(1, 3, 96, 128)
    changed = image.clone()
    changed[..., -8:, -8:] += 3
    with torch.no_grad():
        features = backbone(image)
        assert depths == sorted(depths)
        assert (depths[0], len(set(depths))) == (0, count - 1)
        for one, other in zip(features, backbone(changed)):
            difference = (one - other).abs().mean(1)[0]
            row, column = divmod(int(difference.argmax()), difference.shape[1])
            assert row >= difference.shape[0] * 3 // 4 - 1, difference.shape
            assert column >= difference.shape[1] * 3 // 4 - 1, difference.shape


@pytest.mark.parametrize('name', ['hornet_tiny', 'swin_tiny', 'focalnet_tiny'])
def test_drop_path_grows_to_the_rate(name, tiny):
    backbone = Baseline(name, drop_path_rate=0.5)
    rates = [m.drop_prob for m in backbone.modules() if 'DropPath' in type(m).__name__]
    assert rates[-1] == pytest.approx(0.5)
    assert rates == sorted(rates)
    assert backbone.eval() is backbone
    assert not backbone.body.training


@pytest.mark.parametrize('classification', [False, True])
@pytest.mark.parametrize(('name', 'prefix'), [('convnext_tiny', 'backbone.'), ('deit3_small', '')])
def test_weights_are_loaded(name, prefix, classification, tiny, tmp_path):
    """Files as the libraries save them: a whole model of mmpretrain's, a network of timm's."""
    torch.manual_seed(7)
    saved = Baseline(name, classification=True).body.state_dict()
    path = tmp_path / 'weights.pth'
    torch.save({'state_dict': {f'{prefix}{key}': value for key, value in saved.items()}}, path)
    init_cfg = dict(type='Pretrained', checkpoint=str(path))
    backbone = Baseline(name, classification=classification, init_cfg=init_cfg)
    backbone.init_weights()
    loaded = backbone.body.state_dict()
    common = loaded.keys() & saved.keys()
    assert all(torch.equal(loaded[key], saved[key]) for key in common)
    assert all('norm' in key for key in loaded.keys() - common)
    assert len(common) > 60


def test_weights_of_another_network_are_refused(tiny, tmp_path):
    path = tmp_path / 'weights.pth'
    torch.save(Baseline('focalnet_tiny').body.state_dict(), path)
    for checkpoint, error, message in (
        (str(path), ValueError, 'does not fit this SwinTransformer'),
        ('none.pth', FileNotFoundError, r"none.pth' .*get_model\('swin-tiny_3rdparty_in1k'"),
    ):
        init_cfg = dict(type='Pretrained', checkpoint=checkpoint)
        with pytest.raises(error, match=message):
            Baseline('swin_tiny', init_cfg=init_cfg).init_weights()


# ----------------------------------------------------------------------------------------- errors
@pytest.mark.parametrize(
    ('settings', 'message'),
    [
        (dict(name='slak_tiny'), r"one of convnext_tiny, .*coatnet_3, got 'slak_tiny'"),
        (dict(name='coatnet_0'), 'coatnet_0 is for classification only'),
        (
            dict(name='swin_tiny', drop_path_rate=1),
            'must be at least 0 and below 1, got 1',
        ),
        (dict(name='swin_tiny', init_cfg=dict(type='Normal')), "type 'Pretrained', got .*Normal"),
        (dict(name='swin_tiny', out_indices=(1, 4)), 'out_indices must be from -4 to 3, got 4'),
        (
            dict(name='swin_tiny', out_indices=(3, -1)),
            r'at least one stage and none twice, got \(3, -1\)',
        ),
        (dict(name='swin_tiny', options=dict(out_indices=(3,))), 'set out_indices of the baseline'),
        (dict(name='swin_tiny', out_indices=(0, 1)), r'include the last stage, 3, .* \(0, 1\)'),
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
        build_shapes(name)
