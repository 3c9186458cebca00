"""Layer-wise decay: properties that hold for every size, both types, any optimizer."""

import logging
import sys
from types import SimpleNamespace

import pytest
import torch
from mmengine.logging import MMLogger
from mmengine.optim import AmpOptimWrapper, build_optim_wrapper
from mmengine.runner import Runner
from torch import nn

from mmconv2former import Conv2Former, LayerDecayOptimWrapperConstructor
from mmconv2former.engine.layer_decay import DEPTH_METHODS
from mmconv2former.models.conv2former import ARCHS, num_groups
from mmconv2former.ops.dispatch import is_autocast_enabled


class Model(nn.Module):
    def __init__(self, backbone):
        super().__init__()
        self.backbone = backbone
        self.head = nn.Linear(2, 3)


def build(model, optimizer=None, **options):
    optimizer = optimizer or dict(type='AdamW', lr=1e-4, weight_decay=0.05)
    config = dict(
        optimizer=optimizer, constructor='mmconv2former.LayerDecayOptimWrapperConstructor'
    )
    return build_optim_wrapper(model, config | dict(paramwise_cfg=dict(options))).optimizer


def by_name(model, optimizer):
    """The optimizer's group of each parameter; fails if a parameter is in two groups."""
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    groups = [(names[id(p)], g) for g in optimizer.param_groups for p in g['params']]
    assert len(dict(groups)) == len(groups)
    return dict(groups)


def in_order_of_data_flow(backbone):
    """Names of the backbone's parameters from input to output, without output norms."""
    for i in range(len(backbone.stages)):
        for part in (f'downsample_layers.{i}', f'stages.{i}'):
            for name, _ in backbone.get_submodule(part).named_parameters():
                yield f'{part}.{name}'


# Number of layers: stem, groups of blocks (max(1, depth // 3), at most 9, in each stage), the rest.
NUM_LAYERS = {'nano': 7, 'tiny': 9, 'small': 14, 'base': 14, 'large': 14}


@pytest.mark.parametrize('arch', ARCHS)
@pytest.mark.parametrize('decay_type', DEPTH_METHODS)
def test_rates_rise_from_stem_to_head(arch, decay_type):
    with torch.device('meta'):
        model = Model(Conv2Former(arch))
    groups = by_name(model, build(model, decay_rate=0.7, decay_type=decay_type))
    assert set(groups) == {name for name, _ in model.named_parameters()}
    scales = [groups[f'backbone.{n}']['lr'] / 1e-4 for n in in_order_of_data_flow(model.backbone)]
    assert scales == sorted(scales)
    assert all(0 < scale < 1 for scale in scales)
    num_layers = NUM_LAYERS[arch] if decay_type == 'layer_wise' else 6
    assert scales[0] == pytest.approx(0.7 ** (num_layers - 1))
    assert scales[-1] == pytest.approx(0.7)
    assert groups['backbone.downsample_layers.0.0.weight']['lr'] < min(
        group['lr'] for name, group in groups.items() if 'downsample_layers.0' not in name
    )
    for name in ('head.weight', 'backbone.norm0.weight', 'backbone.norm3.bias'):
        assert groups[name]['lr'] == pytest.approx(1e-4)
    for name, parameter in model.named_parameters():
        assert groups[name]['weight_decay'] == (0 if parameter.dim() == 1 else 0.05), name


@pytest.mark.parametrize('arch', ARCHS)
def test_layers_are_consecutive_and_even(arch):
    with torch.device('meta'):
        backbone = Conv2Former(arch)
    depths = [backbone.get_layer_depth(n, '')[0] for n in in_order_of_data_flow(backbone)]
    assert sorted(set(depths)) == list(range(NUM_LAYERS[arch] - 1))
    for stage, depth in enumerate(backbone.depths):
        layers = [
            backbone.get_layer_depth(f'stages.{stage}.{j}.attn.v.weight')[0] for j in range(depth)
        ]
        sizes = [layers.count(layer) for layer in sorted(set(layers))]
        assert len(sizes) == num_groups(depth)
        assert max(sizes) - min(sizes) <= 1
        assert min(sizes) >= min(depth, 3)


def test_prefix():
    backbone = Conv2Former('nano')
    assert backbone.get_layer_depth('backbone.stages.0.1.mlp.fc1.bias', 'backbone.') == (1, 7)
    assert backbone.get_layer_depth('neck.stages.0.1.mlp.fc1.bias', 'backbone.') == (6, 7)
    assert backbone.get_stage_depth('backbone.downsample_layers.2.1.bias', 'backbone.') == (3, 6)


def test_frozen_parameters_are_absent():
    model = Model(Conv2Former('nano', frozen_stages=2))
    groups = by_name(model, build(model, decay_rate=0.9))
    assert set(groups) == {n for n, p in model.named_parameters() if p.requires_grad}
    assert not any('stages.1.' in name for name in groups)


@pytest.mark.parametrize(
    'optimizer',
    [
        dict(type='SGD', lr=0.1, momentum=0.9, weight_decay=1e-4),
        dict(type='SGD', lr=0.1),
        dict(type='RMSprop', lr=0.1, weight_decay=0.0),
    ],
)
def test_other_optimizers(optimizer):
    model = Model(Conv2Former('nano', out_indices=(0, 1)))
    groups = by_name(model, build(model, optimizer, decay_rate=0.5))
    assert groups['backbone.downsample_layers.0.0.weight']['lr'] == pytest.approx(0.1 * 0.5**3)
    before = model.backbone.norm0.weight.clone()
    wrapper = LayerDecayOptimWrapperConstructor(
        dict(optimizer=optimizer, accumulative_counts=2), dict(decay_rate=0.5)
    )(model)
    for _ in range(2):
        loss = sum(out.square().mean() for out in model.backbone(torch.randn(1, 3, 32, 32)))
        wrapper.update_params(loss)
        is_unchanged = torch.equal(before, model.backbone.norm0.weight)
        assert is_unchanged == (wrapper._inner_count == 1)


def test_mixed_precision_and_accumulation(monkeypatch):
    """With the AmpOptimWrapper of mmengine, which asks for CUDA, in bfloat16 on the CPU."""
    module = sys.modules[AmpOptimWrapper.__module__]
    monkeypatch.setattr(module, 'is_cuda_available', lambda: True)
    model = Model(Conv2Former('nano', out_indices=(0, 1), layer_scale_init_value=1.0))
    config = dict(
        type='AmpOptimWrapper',
        dtype='bfloat16',
        accumulative_counts=2,
        clip_grad=dict(max_norm=1.0),
        optimizer=dict(type='AdamW', lr=1e-3, weight_decay=0.05),
    )
    wrapper = LayerDecayOptimWrapperConstructor(config, dict(decay_rate=0.5))(model)
    assert isinstance(wrapper, AmpOptimWrapper)
    before = {name: value.clone() for name, value in model.backbone.named_parameters()}
    for step in range(2):
        with wrapper.optim_context(model):
            outputs = model.backbone(torch.randn(1, 3, 32, 32))
            assert is_autocast_enabled('cpu')
            loss = sum(output.float().square().mean() for output in outputs)
        wrapper.update_params(loss)
        changed = {
            n for n, value in model.backbone.named_parameters() if (value != before[n]).any()
        }
        assert changed == (set(before) if step == 1 else set())
    moved = {n: (v - before[n]).abs().max().item() for n, v in model.backbone.named_parameters()}
    # The first step of AdamW moves each weight by about its rate.
    assert moved['downsample_layers.0.0.weight'] == pytest.approx(1e-3 * 0.5**3, rel=0.05)
    assert moved['norm0.weight'] == pytest.approx(1e-3, rel=0.05)


def test_automatic_scaling_keeps_the_ratios():
    model = Model(Conv2Former('nano'))
    config = dict(
        optimizer=dict(type='AdamW', lr=1e-4, weight_decay=0.05),
        constructor='mmconv2former.LayerDecayOptimWrapperConstructor',
        paramwise_cfg=dict(decay_rate=0.7),
    )
    wrapper = build_optim_wrapper(model, config)
    before = [group['lr'] for group in wrapper.optimizer.param_groups]
    runner = SimpleNamespace(
        _train_dataloader=dict(batch_size=4),
        world_size=1,
        param_schedulers=[],
        logger=logging.getLogger(),
    )
    Runner.scale_lr(runner, wrapper, dict(enable=True, base_batch_size=16))
    after = [group['lr'] for group in wrapper.optimizer.param_groups]
    assert after == pytest.approx([rate / 4 for rate in before])


def test_custom_keys_multiply_with_the_decay():
    model = Model(Conv2Former('nano', out_indices=0))
    options = dict(custom_keys={'att.2': dict(lr_mult=0.1, decay_mult=0.0)})
    groups = by_name(model, build(model, decay_rate=0.5, **options))
    kernel = groups['backbone.stages.0.0.attn.att.2.weight']
    assert kernel['lr'] == pytest.approx(1e-4 * 0.1 * 0.5)
    assert kernel['weight_decay'] == 0


def test_one_table_is_logged(caplog, monkeypatch):
    records = []
    monkeypatch.setattr(
        'mmconv2former.engine.layer_decay.print_log', lambda text, **_: records.append(text)
    )
    with caplog.at_level(logging.INFO):
        build(Model(Conv2Former('nano')), decay_rate=0.9)
    assert not caplog.records
    (text,) = records
    assert len(text.splitlines()) < 25
    assert '0.5314' in text  # 0.9 ** 6, the stem


def test_only_one_table_is_logged_by_a_logger_in_use(tmp_path):
    """As in a run, whose logger has logged before: it remembers that it may."""
    file = tmp_path / 'log.txt'
    logger = MMLogger.get_instance('in_use', log_file=str(file))
    logger.info('first')
    build(Model(Conv2Former('nano')), decay_rate=0.9)
    logger.info('last')
    text = file.read_text()
    assert 'paramwise_options' not in text
    assert 'Parameter groups' in text
    assert 'last' in text


def test_shared_parameters_are_in_one_group():
    model = Model(Conv2Former('nano', out_indices=0))
    model.other_head = nn.Linear(2, 3)
    model.other_head.weight = model.head.weight
    groups = by_name(model, build(model, decay_rate=0.9))
    assert set(groups) == {name for name, _ in model.named_parameters()}


BAD = [
    (dict(), 'decay_rate must be a number in \\(0, 1\\], got None'),
    (dict(decay_rate=0), 'decay_rate .* got 0'),
    (dict(decay_rate=1.1), 'decay_rate .* got 1.1'),
    (dict(decay_rate='0.9'), "decay_rate .* got '0.9'"),
    (dict(decay_rate=0.9, decay_type='block'), "decay_type .* 'stage_wise'.*got 'block'"),
    (dict(decay_rate=0.9, num_layers=6), 'num_layers .* comes from the backbone'),
]


@pytest.mark.parametrize(('options', 'message'), BAD)
def test_bad_options(options, message):
    with pytest.raises(ValueError, match=message):
        build(Model(Conv2Former('nano')), **options)


def test_decay_needs_a_rate():
    model, optimizer = Model(Conv2Former('nano')), dict(type='AdamW', weight_decay=0.05)
    with pytest.raises(ValueError, match=r'decay_rate=0.9 needs optim_wrapper\.optimizer\.lr'):
        build(model, optimizer, decay_rate=0.9)
    rates = {group['lr'] for group in build(model, optimizer, decay_rate=1).param_groups}
    assert rates == {1e-3}  # torch's default


@pytest.mark.parametrize(
    ('model', 'message'),
    [
        (Model(nn.Linear(1, 1)), r"method get_layer_depth.* got \{'backbone': 'Linear'\} in Model"),
        (nn.Sequential(nn.Linear(1, 1)), 'got no module named backbone in Sequential'),
    ],
)
def test_backbone_without_depths(model, message):
    with pytest.raises(TypeError, match=message):
        build(model, decay_rate=0.9)
