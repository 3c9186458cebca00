"""Layer-wise decay: properties that hold for every size, both types, any optimizer."""

import pytest
import torch
from mmengine.logging import MMLogger
from mmengine.optim import build_optim_wrapper
from torch import nn

from mmconv2former import Conv2Former
from mmconv2former.engine.layer_decay import DEPTH_METHODS
from mmconv2former.models.conv2former import ARCHS

ADAMW = dict(type='AdamW', lr=1e-4, weight_decay=0.05)


class Model(nn.Module):
    def __init__(self, **options):
        super().__init__()
        self.backbone = Conv2Former(**{'arch': 'nano', 'out_indices': (0, 1)} | options)
        self.head = nn.Linear(2, 3)


def build(model, optimizer=ADAMW, **options):
    config = dict(
        optimizer=optimizer,
        constructor='mmconv2former.LayerDecayOptimWrapperConstructor',
        paramwise_cfg=options,
    )
    return build_optim_wrapper(model, config)


def by_name(model, wrapper):
    """The group of each parameter; fails if a parameter is in two groups."""
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    groups = [(names[id(p)], g) for g in wrapper.optimizer.param_groups for p in g['params']]
    assert len(dict(groups)) == len(groups)
    return dict(groups)


def in_order_of_data_flow(backbone):
    """Names of the backbone's parameters from input to output, without output norms."""
    for i in range(len(backbone.stages)):
        for part in (f'downsample_layers.{i}', f'stages.{i}'):
            for name, _ in backbone.get_submodule(part).named_parameters():
                yield f'{part}.{name}'


# Stem, groups of blocks (depth // 3, but 1 to 9, in each stage), everything else.
NUM_LAYERS = {'nano': 7, 'tiny': 9, 'small': 14, 'base': 14, 'large': 14}


@pytest.mark.parametrize('arch', ARCHS)
@pytest.mark.parametrize('decay_type', DEPTH_METHODS)
def test_rates_rise_from_stem_to_head(arch, decay_type):
    with torch.device('meta'):
        model = Model(arch=arch, out_indices=(0, 1, 2, 3))
    groups = by_name(model, build(model, decay_rate=0.7, decay_type=decay_type))
    assert set(groups) == {name for name, _ in model.named_parameters()}
    scales = [groups[f'backbone.{n}']['lr'] / 1e-4 for n in in_order_of_data_flow(model.backbone)]
    assert scales == sorted(scales)
    num_layers = NUM_LAYERS[arch] if decay_type == 'layer_wise' else 6
    expected = [0.7**power for power in range(num_layers - 1, 0, -1)]
    assert sorted(set(scales)) == pytest.approx(expected)
    for name in ('head.weight', 'backbone.norm0.weight', 'backbone.norm3.bias'):
        assert groups[name]['lr'] == pytest.approx(1e-4)
    for name, parameter in model.named_parameters():
        assert groups[name]['weight_decay'] == (0 if parameter.dim() == 1 else 0.05), name


@pytest.mark.parametrize('arch', ARCHS)
def test_layers_are_even(arch):
    with torch.device('meta'):
        backbone = Conv2Former(arch)
    for stage, depth in enumerate(backbone.depths):
        layers = [
            backbone.get_layer_depth(f'stages.{stage}.{j}.attn.v.weight')[0] for j in range(depth)
        ]
        sizes = [layers.count(layer) for layer in sorted(set(layers))]
        assert max(sizes) - min(sizes) <= 1
        assert min(sizes) >= min(depth, 3)


def test_prefix():
    backbone = Conv2Former('nano')
    assert backbone.get_layer_depth('backbone.stages.0.1.mlp.fc1.bias', 'backbone.') == (1, 7)
    assert backbone.get_layer_depth('neck.stages.0.1.mlp.fc1.bias', 'backbone.') == (6, 7)
    assert backbone.get_stage_depth('backbone.downsample_layers.2.1.bias', 'backbone.') == (3, 6)


def test_parameters_that_are_frozen_or_shared():
    model = Model(out_indices=(0, 1, 2, 3), frozen_stages=2)
    model.other_head = nn.Linear(2, 3)
    model.other_head.weight = model.head.weight
    groups = by_name(model, build(model, decay_rate=0.9))
    assert set(groups) == {n for n, p in model.named_parameters() if p.requires_grad}
    assert not any('stages.1.' in name for name in groups)


def test_optimizer_without_weight_decay():
    groups = by_name(model := Model(), build(model, dict(type='SGD', lr=0.1), decay_rate=0.5))
    assert groups['backbone.downsample_layers.0.0.weight']['lr'] == pytest.approx(0.1 * 0.5**3)
    assert groups['head.weight']['lr'] == pytest.approx(0.1)


def test_custom_keys_multiply_with_the_decay():
    model = Model(out_indices=0)
    options = dict(custom_keys={'att.2': dict(lr_mult=0.1, decay_mult=0.0)})
    groups = by_name(model, build(model, decay_rate=0.5, **options))
    kernel = groups['backbone.stages.0.0.attn.att.2.weight']
    assert kernel['lr'] == pytest.approx(1e-4 * 0.1 * 0.5)
    assert kernel['weight_decay'] == 0


def test_log_has_one_table_instead_of_a_line_for_each_parameter(tmp_path):
    file = tmp_path / 'log.txt'
    logger = MMLogger.get_instance('in_use', log_file=str(file))
    logger.info('first')  # it remembers that it is enabled
    build(Model(out_indices=(0, 1, 2, 3)), decay_rate=0.9)
    logger.info('last')
    text = file.read_text()
    assert 'Parameter groups' in text
    assert '0.5314' in text  # 0.9 ** 6, the stem
    assert 'last' in text
    assert len(text.splitlines()) < 25


BAD = [
    (dict(), ADAMW, 'decay_rate must be a number in \\(0, 1\\], got None'),
    (dict(decay_rate=0), ADAMW, 'decay_rate .* got 0'),
    (dict(decay_rate=1.1), ADAMW, 'decay_rate .* got 1.1'),
    (dict(decay_rate='0.9'), ADAMW, "decay_rate .* got '0.9'"),
    (dict(decay_rate=0.9, decay_type='block'), ADAMW, "decay_type .* 'stage_wise'.*got 'block'"),
    (dict(decay_rate=0.9), dict(type='AdamW'), r'set optim_wrapper\.optimizer\.lr'),
]


@pytest.mark.parametrize(('options', 'optimizer', 'message'), BAD)
def test_bad_options(options, optimizer, message):
    with pytest.raises(ValueError, match=message):
        build(Model(), optimizer, **options)


def test_backbone_without_depths():
    message = r"method get_layer_depth.* got \{'backbone': 'Linear'\} in ModuleDict"
    with pytest.raises(TypeError, match=message):
        build(nn.ModuleDict(dict(backbone=nn.Linear(1, 1))), decay_rate=0.9)
    with pytest.raises(TypeError, match='got no module named backbone in Sequential'):
        build(nn.Sequential(nn.Linear(1, 1)), decay_rate=0.9)
