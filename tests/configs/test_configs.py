"""Every recipe: loads, builds, fits together, covers its schedule, is listed."""

import ast
import re
from copy import deepcopy
from functools import cache
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
import yaml
from common.data_layout import BCCD_CLASSES, BCCD_IMAGES, CAMVID
from helpers import ROOT
from helpers.tiny import SMALL_DETECTION
from make_tables import LEVELS, level, metafiles, models, read_evidence, recipes, task, write_tables
from mmengine.config import Config
from mmengine.optim import build_optim_wrapper
from mmengine.registry import MODELS, init_default_scope

CONFIGS = sorted((ROOT / 'configs').rglob('*.py'))
LEAVES = [path for path in CONFIGS if not {'_base_', 'comparison', 'demo'} & set(path.parts)]
NAMES = [path.stem for path in LEAVES]
ON_PUBLIC_DATA = [path for path in LEAVES if path.stem.endswith(('_bccd', '_camvid'))]
DENSE = [
    path
    for path in LEAVES
    if task(path) in ('detection', 'segmentation') and path not in ON_PUBLIC_DATA
]
CLASSIFICATION = [path for path in LEAVES if path not in DENSE + ON_PUBLIC_DATA]
SEGMENTATION = [path for path in DENSE if path.parent.name == 'segmentation']
DETECTION = [path for path in DENSE if path.parent.name == 'detection']
MARKS = ('_delete_', '_scope_')

PROMISED = {
    'mask_rcnn_conv2former': ('n', 't', 's'),
    'cascade_mask_rcnn_conv2former': ('t', 's', 'b', 'b_in22k', 'l_in22k'),
    'faster_rcnn_conv2former': ('n_bccd', 't_bccd'),
    'upernet_conv2former': ('n', 't', 's', 'b', 'b_in22k', 'l_in22k', 'n_camvid', 't_camvid'),
    'conv2former': (
        *('n_in1k', 't_in1k', 's_in1k', 'b_in1k', 's_in22k', 'b_in22k', 'l_in22k'),
        *(f'{size}_in22k_finetune_in1k' for size in 'sbl'),
        *(f'{size}_in22k_finetune_in1k_384' for size in 'bl'),
        *('is_in1k', 'is_conv_in1k', 'ib_in1k', 'ib_conv_in1k', 't_folders'),
        *(f'{size}_k{kernel_size}_in1k' for size in 'tb' for kernel_size in (5, 7, 9, 15, 21)),
        *(f't_{fusion}_in1k' for fusion in ('sum', 'sigmoid', 'l1', 'linear')),
    ),
}
ARCHS = {'n': 'nano', 't': 'tiny', 's': 'small', 'b': 'base', 'l': 'large'}


@cache
def load(path):
    """A config, which tests do not change."""
    return Config.fromfile(path)


@cache
def build(path):
    """The model without values: what is tested here are its parts."""
    config = deepcopy(load(path))  # detectors change their config
    init_default_scope(config.default_scope)
    with torch.device('meta'):
        return MODELS.build(config.model)


def test_every_promised_recipe_is_there():
    promised = {f'{name}_{size}' for name, sizes in PROMISED.items() for size in sizes}
    assert set(NAMES) == promised
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
        said = ('not trained here', 'nothing published', 'results in docs/public_data.md')
        assert any(text in docstring for text in said)
        if model['Published'] is None:
            assert not re.search(r'\d\.\d', docstring)
        else:
            assert f'{model["Published"]["Value"]}' in docstring
            assert model['Published']['Source'] in docstring


def test_leaves_are_short_and_documented():
    for path in CONFIGS:
        text = path.read_text()
        assert path.parent.name == '_base_' or len(text.splitlines()) <= 15, path
        assert ast.get_docstring(ast.parse(text)), path


@pytest.mark.parametrize('path', DENSE, ids=lambda path: path.stem)
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
    assert all(100 < mean < 130 for mean in config.model.data_preprocessor.mean)  # of 0 to 255
    model = build(path)
    channels = list(model.backbone.channels)
    if path in SEGMENTATION:
        assert list(model.decode_head.in_channels) == channels
        assert model.auxiliary_head.in_channels == channels[model.auxiliary_head.in_index]
        assert model.decode_head.num_classes == model.auxiliary_head.num_classes == 150
    else:
        assert model.neck.in_channels == channels
        strides = config.model.rpn_head.anchor_generator.strides
        assert model.backbone.strides == tuple(strides[:4])


# Parameters in millions with the 1000-class head: published, or by the facts' own count.
COUNTS = {
    'n_in1k': 14.99, 't_in1k': 26.70, 's_in1k': 50.03, 'b_in1k': 90.03, 't_sum_in1k': 26.70,
    's_in22k_finetune_in1k': 50.03, 'b_in22k_finetune_in1k': 88.78, 'b_k7_in1k': 88.78,
    'b_in22k_finetune_in1k_384': 88.78, 'l_in22k_finetune_in1k': 198.89, 'is_in1k': 23.23,
    'ib_in1k': 85.72,
}  # fmt: skip


@pytest.mark.parametrize('path', CLASSIFICATION, ids=lambda path: path.stem)
def test_classifier_s_parts_fit_together(path):
    config, model = load(path), build(path)
    name = path.stem.removeprefix('conv2former_')
    size = name.split('_')[0]
    backbone = config.model.backbone
    assert backbone.arch == ARCHS.get(size, size)
    assert backbone.get('patch_embedding') == {'is': 'plain', 'ib': 'plain'}.get(size) or (
        backbone.patch_embedding == 'conv' and '_conv_' in name
    )
    assert model.backbone.channels[-1] == model.head.in_channels
    assert not model.backbone.out_norm
    num_classes = {'in22k': 21_841, 'folders': 20}.get(name.split('_')[-1], 1000)
    assert model.head.num_classes == num_classes
    logits = model(torch.empty(2, 3, 64, 64, device='meta'))
    assert logits.shape == (2, num_classes)
    if name in COUNTS:
        count = sum(parameter.numel() for parameter in model.parameters())
        assert round(count / 1e6, 2) == COUNTS[name]
    study = re.search(r'_k(\d+)_', path.stem)
    if study:
        assert {b.attn.att[2].kernel_size[0] for s in model.backbone.stages for b in s} == {
            int(study[1])
        }
    if task(path) == 'ablations' and not study:
        assert model.backbone.stages[0][0].attn.fusion == name.split('_')[1]


@pytest.mark.parametrize('path', CLASSIFICATION, ids=lambda path: path.stem)
def test_classification_schedule(path):
    """The published recipe of 1K to the last value; epochs of 22K and of fine-tuning."""
    config = load(path)
    epochs = config.train_cfg.max_epochs
    *warmup, cosine = config.param_scheduler
    assert (cosine.type, cosine.end, cosine.T_max) == (
        'CosineAnnealingLR', epochs, epochs - cosine.begin
    )  # fmt: skip
    optimizer = config.optim_wrapper.optimizer
    batch = config.auto_scale_lr.base_batch_size
    augmentation = [step.type for step in config.train_dataloader.dataset.pipeline]
    if 'finetune' in path.stem or 'folders' in path.stem:
        assert (epochs, batch, optimizer.lr) == (30, 512, 5e-5)
        assert config.model.train_cfg is None
    else:
        assert (epochs, batch, optimizer.lr) == (90 if 'in22k' in path.stem else 300, 1024, 1e-3)
        (warmup,) = warmup
        assert (warmup.type, warmup.begin, warmup.end) == ('LinearLR', 0, 5)
        assert warmup.convert_to_iter_based
        assert warmup.start_factor * optimizer.lr == pytest.approx(1e-6)
        assert (optimizer.type, optimizer.weight_decay) == ('AdamW', 0.05)
        assert [plain(item) for item in config.model.train_cfg.augments] == [
            dict(type='Mixup', alpha=0.8), dict(type='CutMix', alpha=1.0)
        ]  # fmt: skip
        assert config.model.backbone.get('layer_scale_init_value', 1e-6) == 1e-6
        assert not config.get('custom_hooks')  # no EMA
    assert config.model.head.loss == dict(
        type='LabelSmoothLoss', label_smooth_val=0.1, mode='original'
    )
    if 'folders' not in path.stem:
        assert {'RandAugment', 'RandomErasing', 'RandomFlip'} < set(augmentation)
        *_, rand_augment, erasing, _ = config.train_dataloader.dataset.pipeline
        values = [rand_augment[key] for key in ('num_policies', 'magnitude_level', 'magnitude_std')]
        assert values == [2, 9, 0.5]
        assert rand_augment.policies == 'timm_increasing'
        assert (erasing.erase_prob, erasing.mode) == (0.25, 'rand')
    size = 384 if '384' in path.stem else 224
    assert config.train_dataloader.dataset.pipeline[1].scale == size
    gpus = batch // config.train_dataloader.batch_size
    metadata = next(model['Metadata'] for model in models() if model['Name'] == path.stem)
    assert metadata['Batch Size'] == f'{batch} ({gpus} GPUs x {batch // gpus})'
    assert metadata['Epochs'] == epochs


@pytest.mark.parametrize('path', LEAVES, ids=NAMES)
def test_optimizer_groups_are_valid(path):
    config, model = load(path), build(path)
    groups = build_optim_wrapper(model, config.optim_wrapper).optimizer.param_groups
    base_rate = config.optim_wrapper.optimizer.lr
    assert all(0 < group['lr'] <= base_rate for group in groups)
    # A fused step has launches for each.
    assert len({(group['lr'], group['weight_decay']) for group in groups}) == len(groups)
    in_groups = [id(p) for group in groups for p in group['params']]
    assert sorted(in_groups) == sorted(id(parameter) for parameter in model.parameters())
    decay = config.optim_wrapper.paramwise_cfg.decay_rate
    rates = {id(p): group['lr'] for group in groups for p in group['params']}
    is_isotropic = hasattr(model.backbone, 'blocks')
    blocks = model.backbone.blocks if is_isotropic else model.backbone.stages[-1]
    last_block = blocks[-1].mlp.fc2.weight
    assert rates[id(last_block)] == pytest.approx(base_rate * decay)


@pytest.mark.parametrize('path', DENSE, ids=lambda path: path.stem)
def test_length_and_batch_of_dense_recipes(path):
    """engine/test_schedule.py says whether the schedule covers the length."""
    config = load(path)
    unit, length = ('max_epochs', 36) if path in DETECTION else ('max_iters', 160_000)
    assert config.train_cfg[unit] == length
    assert config.default_hooks.checkpoint.interval == config.train_cfg.val_interval
    assert config.train_dataloader.batch_size * 8 == config.auto_scale_lr.base_batch_size == 16


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


@pytest.mark.parametrize('path', ON_PUBLIC_DATA, ids=lambda path: path.stem)
def test_recipes_on_public_data(path):
    config, model = load(path), build(path)
    backbone = config.model.backbone
    assert backbone.arch == ARCHS[path.stem.split('conv2former_')[1][0]]
    assert backbone.get('init_cfg') is None
    assert backbone.layer_scale_init_value == 0.1
    assert config.optim_wrapper.paramwise_cfg.decay_rate == 1.0
    warmup, decay = config.param_scheduler
    assert (warmup.begin, warmup.end, decay.end) == (0, decay.begin, config.train_cfg.max_iters)
    interval = config.train_cfg.val_interval
    assert config.train_cfg.max_iters % interval == 0
    assert config.default_hooks.checkpoint.interval == interval
    channels = list(model.backbone.channels)
    # what the bases' comments say
    batch = config.train_dataloader.batch_size
    images, epochs = (205, 234) if 'bccd' in path.stem else (367, 262)
    assert round(config.train_cfg.max_iters * batch / images) == epochs
    metadata = next(model['Metadata'] for model in models() if model['Name'] == path.stem)
    assert metadata['Iterations'] == config.train_cfg.max_iters
    assert metadata['Batch Size'] == batch == config.auto_scale_lr.base_batch_size
    if 'camvid' in path.stem:
        heads = (model.decode_head, model.auxiliary_head)
        assert list(model.decode_head.in_channels) == channels
        assert model.auxiliary_head.in_channels == channels[2]
        assert {head.num_classes for head in heads} == {CAMVID.void} == {len(CAMVID.classes)}
        loaders = [config[f'{part}_dataloader'].dataset for part in ('train', 'val', 'test')]
        evaluators = [config.val_evaluator, config.test_evaluator]
        crop = config.train_dataloader.dataset.pipeline[3]
        ignoring = [config.model.decode_head, config.model.auxiliary_head, *loaders, *evaluators]
        assert {part.ignore_index for part in (*ignoring, crop)} == {CAMVID.void}
        assert config.model.data_preprocessor.seg_pad_val == CAMVID.void
        assert config.model.data_preprocessor.size == crop.crop_size
        assert {loader.data_prefix.img_path for loader in loaders} == {
            f'images/{name}' for name in CAMVID.images
        }
    else:
        assert model.neck.in_channels == channels
        assert model.roi_head.bbox_head.num_classes == len(BCCD_CLASSES)
        assert config.metainfo.classes == BCCD_CLASSES
        assert [
            config[f'{part}_dataloader'].dataset.ann_file for part in ('train', 'val', 'test')
        ] == [f'ImageSets/Main/{split}.txt' for split in BCCD_IMAGES]


@pytest.mark.parametrize('path', LEAVES, ids=NAMES)
def test_data_are_below_the_data_root_and_loaded_by_workers_that_stay(path):
    config = load(path)
    is_evaluated = '_in22k' not in path.stem or config.val_cfg is not None
    parts = ('train', 'val', 'test') if is_evaluated else ('train',)
    for part in parts:
        loader = config[f'{part}_dataloader']
        assert loader.dataset.data_root == config.data_root
        assert loader.num_workers >= 2
        assert loader.persistent_workers
        assert loader.pin_memory
    for part in parts[1:]:
        evaluator = config[f'{part}_evaluator']
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
    theirs = deepcopy(load(Path(find_spec(library).submodule_search_locations[0], path)))
    ours = deepcopy(load(recipes()[name]))
    for settings in (ours, theirs):
        for key in ('train_dataloader', 'test_dataloader'):
            for of_speed in ('num_workers', 'pin_memory'):  # ours are more
                settings[key].pop(of_speed, None)
            for step in settings[key].dataset.get('pipeline', ()):
                step.pop('reduce_zero_label', None)  # the dataset has it, too
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
    if library == 'mmseg':  # pads images that are too small for the backbone
        assert ours.model.data_preprocessor.pop('test_cfg') == dict(size=(32, 32))
    assert plain(ours.model) == plain(theirs.model)


def plain(value):
    """Without `None`s and merging marks, which say nothing, and with lists for tuples."""
    if isinstance(value, dict):
        return {k: plain(v) for k, v in value.items() if v is not None and k not in MARKS}
    return [plain(item) for item in value] if isinstance(value, (list, tuple)) else value


def test_tables_are_up_to_date():
    assert write_tables(dry_run=True) == []


def test_demo_has_the_recipe_s_backbone():
    config, recipe = load(ROOT / SMALL_DETECTION), load(recipes()['mask_rcnn_conv2former_n'])
    assert config.model.backbone.type == recipe.model.backbone.type
    assert config.model.backbone.arch == recipe.model.backbone.arch
    assert config.model.neck.in_channels == recipe.model.neck.in_channels
    build(ROOT / SMALL_DETECTION)


def test_evidence_is_complete():
    """Every recipe stepped on real data, and one of each kind fits it."""
    evidence = read_evidence(ROOT / 'docs/evidence.json')
    levels = {name: level(evidence[name]) for name in recipes()}
    assert set(levels.values()) <= set(LEVELS[1:])
    for kind in PROMISED:
        found = [LEVELS.index(levels[name]) for name in levels if name.startswith(kind)]
        assert max(found) >= 2, kind
    assert all(evidence[name]['cost']['parameters'] > 1e7 for name in recipes())
