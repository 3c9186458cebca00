"""Every recipe: loads, builds, fits together, covers its schedule, is listed."""

import ast
import re
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
import yaml
from conftest import ROOT
from make_tables import LEVELS, level, metafiles, models, read_evidence, recipes, write_tables
from mmengine.config import Config
from mmengine.optim import build_optim_wrapper
from mmengine.registry import MODELS, init_default_scope

CONFIGS = sorted((ROOT / 'configs').rglob('*.py'))
LEAVES = [path for path in CONFIGS if not {'_base_', 'comparison'} & set(path.parts)]
NAMES = [path.stem for path in LEAVES]
SEGMENTATION = [path for path in LEAVES if path.parent.name == 'segmentation']
DETECTION = [path for path in LEAVES if path.parent.name == 'detection']
MARKS = ('_delete_', '_scope_')

PROMISED = {
    'mask_rcnn_conv2former': ('n', 't', 's'),
    'cascade_mask_rcnn_conv2former': ('t', 's', 'b', 'b_in22k', 'l_in22k'),
    'upernet_conv2former': ('n', 't', 's', 'b', 'b_in22k', 'l_in22k'),
}
ARCHS = {'n': 'nano', 't': 'tiny', 's': 'small', 'b': 'base', 'l': 'large'}


def load(path):
    config = Config.fromfile(path)
    init_default_scope(config.default_scope)
    return config


def build(config):
    """The model without values: what is tested here are its parts."""
    with torch.device('meta'):
        return MODELS.build(config.model)


def test_every_promised_recipe_is_there():
    promised = {f'{name}_{size}' for name, sizes in PROMISED.items() for size in sizes}
    assert set(NAMES) == promised


def test_names_are_unique():
    assert len({path.stem for path in CONFIGS}) == len(CONFIGS)


def test_metafiles_list_every_recipe_once():
    assert sorted(recipes().values()) == LEAVES
    assert len(models()) == len(LEAVES)
    for path in metafiles():
        content = yaml.safe_load(path.read_text())
        names = {collection['Name'] for collection in content['Collections']}
        assert {model['In Collection'] for model in content['Models']} <= names
        assert {(ROOT / model['Config']).parent for model in content['Models']} == {path.parent}


def test_published_numbers_are_the_same_everywhere():
    for model in models():
        docstring = ast.get_docstring(ast.parse((ROOT / model['Config']).read_text()))
        assert 'not trained here' in docstring
        if model['Published'] is None:
            assert not re.search(r'\d\.\d', docstring)
        else:
            assert f'{model["Published"]["Value"]}' in docstring
            assert model['Published']['Source'] in docstring


@pytest.mark.parametrize('path', LEAVES, ids=NAMES)
def test_leaf_is_short_and_documented(path):
    assert len(path.read_text().splitlines()) <= 15
    assert ast.get_docstring(ast.parse(path.read_text()))


@pytest.mark.parametrize('path', LEAVES, ids=NAMES)
def test_parts_fit_together(path):
    config = load(path)
    size, *weights = path.stem.split('conv2former_')[1].split('_')
    backbone = config.model.backbone
    assert backbone.arch == ARCHS[size]
    assert backbone.get('kernel_size') == (7 if (size, weights) == ('b', ['in22k']) else None)
    assert backbone.init_cfg.type == 'Pretrained'
    assert (
        backbone.init_cfg.checkpoint == f'pretrain/{"_".join(["conv2former", size, *weights])}.pth'
    )
    assert not {'depth', 'style', 'num_stages', 'norm_cfg'} & set(backbone)
    assert all(100 < mean < 130 for mean in config.model.data_preprocessor.mean)  # of 0 to 255
    model = build(config)
    channels = list(model.backbone.channels)
    if path in SEGMENTATION:
        assert list(model.decode_head.in_channels) == channels
        assert model.auxiliary_head.in_channels == channels[model.auxiliary_head.in_index]
        assert model.decode_head.num_classes == model.auxiliary_head.num_classes == 150
    else:
        assert model.neck.in_channels == channels
        strides = config.model.rpn_head.anchor_generator.strides
        assert model.backbone.strides == tuple(strides[:4])


@pytest.mark.parametrize('path', LEAVES, ids=NAMES)
def test_optimizer_groups_are_valid(path):
    config = load(path)
    model = build(config)
    optimizer = build_optim_wrapper(model, config.optim_wrapper).optimizer
    base_rate = config.optim_wrapper.optimizer.lr
    assert all(0 < group['lr'] <= base_rate for group in optimizer.param_groups)
    in_groups = [id(p) for group in optimizer.param_groups for p in group['params']]
    assert sorted(in_groups) == sorted(id(parameter) for parameter in model.parameters())
    decay = config.optim_wrapper.paramwise_cfg.decay_rate
    rates = {id(p): group['lr'] for group in optimizer.param_groups for p in group['params']}
    last_block = model.backbone.stages[-1][-1].mlp.fc2.weight
    assert rates[id(last_block)] == pytest.approx(base_rate * decay)


@pytest.mark.parametrize('path', DETECTION, ids=lambda path: path.stem)
def test_detection_schedule_covers_the_training(path):
    config = load(path)
    warmup, steps = config.param_scheduler
    assert (warmup.begin, warmup.by_epoch) == (0, False)
    assert (steps.begin, steps.end) == (0, config.train_cfg.max_epochs)
    assert all(0 < step < steps.end for step in steps.milestones)
    # what the base's comment says
    iterations = 117266 // config.auto_scale_lr.base_batch_size + 1
    assert (iterations, iterations * config.train_cfg.max_epochs) == (7330, 263880)
    assert config.train_dataloader.batch_size * 8 == config.auto_scale_lr.base_batch_size


@pytest.mark.parametrize('path', SEGMENTATION, ids=lambda path: path.stem)
def test_segmentation_schedule_covers_the_training(path):
    config = load(path)
    warmup, poly = config.param_scheduler
    assert (warmup.begin, warmup.end) == (0, poly.begin)
    assert poly.end == config.train_cfg.max_iters == 160_000
    assert config.train_cfg.max_iters % config.train_cfg.val_interval == 0
    assert config.default_hooks.checkpoint.interval == config.train_cfg.val_interval
    # what the base's comment says
    batch = config.auto_scale_lr.base_batch_size
    assert f'{config.train_cfg.max_iters * batch / 20_210:.1f}' == '126.7'
    assert config.train_dataloader.batch_size * 8 == batch


@pytest.mark.parametrize('path', SEGMENTATION, ids=lambda path: path.stem)
def test_crop_is_one_size_throughout(path):
    config = load(path)
    side = 640 if 'in22k' in path.stem else 512
    assert config.model.data_preprocessor.size == (side, side)
    assert config.model.test_cfg.crop_size == (side, side)
    assert config.model.test_cfg.stride == (side * 2 // 3, side * 2 // 3)
    resize, crop = config.train_dataloader.dataset.pipeline[2:4]
    assert (resize.scale, crop.crop_size) == ((4 * side, side), (side, side))
    for loader in (config.val_dataloader, config.test_dataloader):
        assert loader.dataset.pipeline[1].scale == (4 * side, side)
    scales = [resize.scale for resize in config.tta_pipeline[1].transforms[0]]
    assert [scale[1] / side for scale in scales] == [0.5, 0.75, 1.0, 1.25, 1.5, 1.75]


@pytest.mark.parametrize('path', LEAVES, ids=NAMES)
def test_every_path_to_data_begins_with_the_data_root(path):
    config = load(path)
    for loader in (config.train_dataloader, config.val_dataloader, config.test_dataloader):
        assert loader.dataset.data_root == config.data_root
    for evaluator in (config.val_evaluator, config.test_evaluator):
        assert evaluator.get('ann_file', config.data_root).startswith(config.data_root)


# Ours and the published one of ConvNeXt that it follows
FOLLOWED = {
    'mask_rcnn_conv2former_t': 'mmdet/.mim/configs/convnext/'
    'mask-rcnn_convnext-t-p4-w7_fpn_amp-ms-crop-3x_coco.py',
    'cascade_mask_rcnn_conv2former_t': 'mmdet/.mim/configs/convnext/'
    'cascade-mask-rcnn_convnext-t-p4-w7_fpn_4conv1fc-giou_amp-ms-crop-3x_coco.py',
    'cascade_mask_rcnn_conv2former_s': 'mmdet/.mim/configs/convnext/'
    'cascade-mask-rcnn_convnext-s-p4-w7_fpn_4conv1fc-giou_amp-ms-crop-3x_coco.py',
    'upernet_conv2former_t': 'mmseg/.mim/configs/convnext/'
    'convnext-tiny_upernet_8xb2-amp-160k_ade20k-512x512.py',
    'upernet_conv2former_b': 'mmseg/.mim/configs/convnext/'
    'convnext-base_upernet_8xb2-amp-160k_ade20k-512x512.py',
    'upernet_conv2former_l_in22k': 'mmseg/.mim/configs/convnext/'
    'convnext-large_upernet_8xb2-amp-160k_ade20k-640x640.py',
}


@pytest.mark.parametrize('name', FOLLOWED)
def test_follows_convnext_s_recipe(name):
    library, path = FOLLOWED[name].split('/', 1)
    theirs = load(Path(find_spec(library).submodule_search_locations[0], path))
    ours = load(recipes()[name])
    for key in ('param_scheduler', 'train_dataloader', 'test_dataloader', 'test_evaluator'):
        assert plain(ours[key]) == plain(theirs[key]), key
    assert ours.train_cfg == theirs.train_cfg
    assert plain(ours.optim_wrapper.optimizer) == plain(theirs.optim_wrapper.optimizer)
    for key in ('decay_rate', 'decay_type'):
        assert ours.optim_wrapper.paramwise_cfg[key] == theirs.optim_wrapper.paramwise_cfg[key]
    ours.model.pop('backbone')
    theirs.model.pop('backbone')
    for model in (ours.model, theirs.model):
        for part in ('neck', 'decode_head', 'auxiliary_head'):
            model.get(part, {}).pop('in_channels', None)  # the backbone's
    assert plain(ours.model) == plain(theirs.model)


def plain(value):
    """Without `None`s and merging marks, which say nothing, and with lists for tuples."""
    if isinstance(value, dict):
        return {k: plain(v) for k, v in value.items() if v is not None and k not in MARKS}
    return [plain(item) for item in value] if isinstance(value, (list, tuple)) else value


def test_tables_are_up_to_date():
    assert write_tables(dry_run=True) == []


def test_level_says_what_was_shown():
    fit = dict(metric='mIoU', goal=60.0, metrics=dict(mIoU=59.9))
    assert level({}) == 'builds'
    assert level(dict(steps={})) == 'steps on real data'
    assert level(dict(steps={}, fit=fit)) == 'steps on real data'
    assert level(dict(steps={}, fit=fit | dict(goal=59.0))) == 'fits real data'


def test_evidence_is_complete():
    """Every recipe stepped on real data, and one of each kind fits it."""
    evidence = read_evidence(ROOT / 'docs/evidence.json')
    levels = {name: level(evidence[name]) for name in recipes()}
    assert set(levels.values()) <= set(LEVELS[1:])
    for kind in PROMISED:
        assert LEVELS[2] in {levels[name] for name in levels if name.startswith(kind)}, kind
    assert all(evidence[name]['cost']['parameters'] > 1e7 for name in recipes())
