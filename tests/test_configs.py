"""Every recipe: loads, builds, fits together, covers its schedule."""

import ast
from pathlib import Path

import pytest
from conftest import ROOT
from mmengine.config import Config
from mmengine.hub import get_config
from mmengine.optim import build_optim_wrapper
from mmengine.registry import MODELS, init_default_scope

MARKS = ('_delete_', '_scope_')
LEAVES = sorted(path for path in (ROOT / 'configs').rglob('*.py') if '_base_' not in path.parts)
NAMES = [path.stem for path in LEAVES]


def load(path):
    config = Config.fromfile(path)
    init_default_scope(config.default_scope)
    return config


def test_names_are_unique():
    assert len(set(NAMES)) == len(NAMES) > 0


@pytest.mark.parametrize('path', LEAVES, ids=NAMES)
def test_leaf_is_short_and_documented(path):
    assert len(path.read_text().splitlines()) <= 15
    assert ast.get_docstring(ast.parse(path.read_text()))


@pytest.mark.parametrize('path', LEAVES, ids=NAMES)
def test_parts_fit_together(path):
    config = load(path)
    assert config.model.backbone.init_cfg.type == 'Pretrained'
    assert Path(config.model.backbone.init_cfg.checkpoint).parent == Path('pretrain')
    assert not {'depth', 'style', 'num_stages', 'norm_cfg'} & set(config.model.backbone)
    model = MODELS.build(config.model)
    assert model.neck.in_channels == list(model.backbone.channels)
    assert model.backbone.strides == tuple(config.model.rpn_head.anchor_generator.strides[:4])
    assert (model.data_preprocessor.mean.flatten() > 100).all()  # of pixels from 0 to 255
    optimizer = build_optim_wrapper(model, config.optim_wrapper).optimizer
    assert all(
        0 < group['lr'] <= config.optim_wrapper.optimizer.lr for group in optimizer.param_groups
    )


@pytest.mark.parametrize('path', LEAVES, ids=NAMES)
def test_schedule_covers_the_training(path):
    config = load(path)
    warmup, steps = config.param_scheduler
    assert (warmup.begin, warmup.by_epoch) == (0, False)
    assert (steps.begin, steps.end) == (0, config.train_cfg.max_epochs)
    assert all(0 < step < steps.end for step in steps.milestones)
    # what the base's comment says
    iterations = 117266 // config.auto_scale_lr.base_batch_size + 1
    assert (iterations, iterations * config.train_cfg.max_epochs) == (7330, 263880)
    assert config.train_dataloader.batch_size * 8 == config.auto_scale_lr.base_batch_size


@pytest.mark.parametrize('path', LEAVES, ids=NAMES)
def test_every_path_to_data_begins_with_the_data_root(path):
    config = load(path)
    for loader in (config.train_dataloader, config.val_dataloader, config.test_dataloader):
        assert loader.dataset.data_root == config.data_root
    for evaluator in (config.val_evaluator, config.test_evaluator):
        assert evaluator.ann_file.startswith(config.data_root)


def test_mask_rcnn_t_follows_convnext_s_recipe():
    ours = load(ROOT / 'configs/detection/mask_rcnn_conv2former_t.py')
    theirs = get_config('mmdet::convnext/mask-rcnn_convnext-t-p4-w7_fpn_amp-ms-crop-3x_coco.py')
    for key in ('param_scheduler', 'train_dataloader', 'test_dataloader', 'test_evaluator'):
        assert plain(ours[key]) == plain(theirs[key]), key
    assert ours.train_cfg == theirs.train_cfg
    assert plain(ours.optim_wrapper.optimizer) == plain(theirs.optim_wrapper.optimizer)
    for key in ('decay_rate', 'decay_type'):
        assert ours.optim_wrapper.paramwise_cfg[key] == theirs.optim_wrapper.paramwise_cfg[key]
    for part in ('data_preprocessor', 'rpn_head', 'roi_head', 'train_cfg', 'test_cfg'):
        assert plain(ours.model[part]) == plain(theirs.model[part]), part


def plain(value):
    """Without `None`s and merging marks, which say nothing, and with lists for tuples."""
    if isinstance(value, dict):
        return {k: plain(v) for k, v in value.items() if v is not None and k not in MARKS}
    return [plain(item) for item in value] if isinstance(value, (list, tuple)) else value
