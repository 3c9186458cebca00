"""Recipes changed, and trained on other data: configs and commands of docs/custom_dataset.md.

The page is the input. Its configs are in a copy of the project that shares recipes and tools, the
data are made from the embedded sample. The commands run as they are, with small models and images.
"""

import json
import re
import shutil
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch
from common.data_layout import BCCD_CLASSES
from common.image_sizes import scale_images
from evidence import narrow_heads
from helpers import ROOT
from helpers.in_process import run_command
from helpers.pages import files_of, read_blocks, write_files
from helpers.tiny import (
    ARCH,
    CHANNELS,
    DETECTION,
    FOUR_ITERATIONS,
    SEGMENTATION,
    WITHOUT_WORKERS,
    scalars,
)
from mmengine.config import Config
from mmengine.registry import DATASETS, METRICS, MODELS, init_default_scope
from mmengine.runner import CheckpointLoader
from mmseg.datasets.transforms import LoadAnnotations
from pycocotools.coco import COCO
from train_public import set_iterations

from mmconv2former.checkpoint.reading import read_state_dict

PAGE = ROOT / 'docs/custom_dataset.md'
COMMANDS = {block.name: block.commands() for block in read_blocks(PAGE) if block.name}

# Ids in no order; the sample also has categories that are not among the classes.
CATEGORIES = {'sports ball': ('ball', 5), 'kite': ('kite', 2), 'pizza': ('food', 9)}
SCENE_LABELS = {120: 1, 150: 2, 121: 255, 143: 255}  # of ADE20K: ball, flag, food, plate
QUICK = ['default_hooks.logger.interval=1', *WITHOUT_WORKERS]


@pytest.fixture(scope='module')
def project(sample, tmp_path_factory):
    """A user's copy of the project with the page's configs, and data in the page's two layouts."""
    project = tmp_path_factory.mktemp('project')
    (project / 'configs').mkdir()
    for path in ('tools', 'configs/_base_', 'configs/detection', 'configs/segmentation'):
        (project / path).symlink_to(ROOT / path)
    write_files(PAGE, project)
    make_shapes(sample / 'coco', project / 'data/shapes')
    make_scenes(sample / 'ade/ADEChallengeData2016', project / 'data/scenes')
    (project / 'photos').mkdir()
    for number, path in enumerate(sorted((sample / 'coco/val2017').iterdir())[:2]):
        shutil.copy(path, project / f'photos/new_{number}.jpg')
    return project


def make_shapes(source, folder):
    """COCO's layout with three other categories."""
    (folder / 'annotations').mkdir(parents=True)
    for split in ('train', 'val'):
        (folder / split).symlink_to(source / f'{split}2017')
        content = json.loads((source / f'annotations/instances_{split}2017.json').read_text())
        names = {category['id']: category['name'] for category in content['categories']}
        annotations = [a for a in content['annotations'] if names[a['category_id']] in CATEGORIES]
        for annotation in annotations:
            annotation['category_id'] = CATEGORIES[names[annotation['category_id']]][1]
        categories = [dict(id=id_, name=name) for name, id_ in CATEGORIES.values()]
        content |= dict(annotations=annotations, categories=categories)
        (folder / f'annotations/{split}.json').write_text(json.dumps(content))


def make_scenes(source, folder):
    """Label images with values 0, 1, 2 and 255."""
    for split, ade_split in (('train', 'training'), ('val', 'validation')):
        (folder / 'masks' / split).mkdir(parents=True)
        (folder / 'images').mkdir(exist_ok=True)
        (folder / 'images' / split).symlink_to(source / 'images' / ade_split)
        for path in (source / 'annotations' / ade_split).iterdir():
            labels = cv2.imread(str(path), cv2.IMREAD_UNCHANGED)
            mask = np.zeros_like(labels)
            for label, new in SCENE_LABELS.items():
                mask[labels == label] = new
            cv2.imwrite(str(folder / 'masks' / split / path.name), mask)


@pytest.fixture(scope='module')
def small_project(project, tmp_path_factory):
    """The same, with small models and images in the page's configs."""
    folder = tmp_path_factory.mktemp('small')
    for path in ('tools', 'data', 'photos'):
        (folder / path).symlink_to(project / path)
    (folder / 'configs/custom').mkdir(parents=True)
    for name in ('mask_rcnn_shapes', 'mask_rcnn_shapes_from_coco', 'upernet_scenes'):
        path = project / f'configs/custom/{name}.py'
        with pytest.MonkeyPatch.context() as monkeypatch:
            monkeypatch.chdir(project)
            shrunk(Config.fromfile(path)).dump(folder / 'configs/custom' / path.name)
    return folder


def shrunk(config):
    scale_images(config, 64)
    config.model.backbone.update(arch=ARCH)
    if 'init_cfg' in config.model.backbone:
        config.model.backbone.init_cfg = None
    config.merge_from_dict(DETECTION if 'roi_head' in config.model else SEGMENTATION)
    if 'roi_head' in config.model:
        config.model.test_cfg.rpn.max_per_img = 40
        config.model.test_cfg.rcnn.max_per_img = 100
        config.train_dataloader.dataset.indices = 4
        config.train_cfg.val_interval = 2
    return config


@pytest.fixture
def run(small_project, monkeypatch, capfd, guarded):
    """Runs a command of the page in this process, with options; returns what it printed."""
    monkeypatch.chdir(small_project)

    def run(command, options=()):
        return run_command(command, [*QUICK, *options], monkeypatch, capfd)

    return run


def load(name, project, monkeypatch):
    monkeypatch.chdir(project)
    config = Config.fromfile(f'configs/custom/{name}.py')
    init_default_scope(config.default_scope)
    return config


def test_page_names_its_files():
    assert {name.split('/')[-1] for name in files_of(PAGE)} == {
        'mask_rcnn_12_epochs.py', 'mask_rcnn_shapes.py', 'cascade_mask_rcnn_shapes.py',
        'mask_rcnn_shapes_from_coco.py', 'upernet_scenes.py', 'upernet_void.py',
    }  # fmt: skip
    assert set(COMMANDS) == {'detection', 'fine-tuning', 'segmentation', 'public'}


def test_shorter_schedule(project, monkeypatch):
    config = load('mask_rcnn_12_epochs', project, monkeypatch)
    assert config.train_cfg.max_epochs == config.param_scheduler[1].end == 12
    assert len(config.param_scheduler) == 2
    assert (config.train_dataloader.batch_size, config.optim_wrapper.optimizer.lr) == (4, 5e-5)
    assert config.optim_wrapper.optimizer.type == 'AdamW'


@pytest.mark.parametrize('name', ['mask_rcnn_shapes', 'cascade_mask_rcnn_shapes'])
def test_heads_have_the_classes(name, project, monkeypatch):
    config = load(name, project, monkeypatch)
    with torch.device('meta'):
        model = MODELS.build(config.model)
    heads = model.roi_head.bbox_head
    heads = heads if isinstance(heads, torch.nn.ModuleList) else [heads]
    assert len(heads) == (3 if 'cascade' in name else 1)
    for head in heads:
        assert head.fc_cls.out_features == 3 + 1
    masks = model.roi_head.mask_head
    for head in masks if isinstance(masks, torch.nn.ModuleList) else [masks]:
        assert head.conv_logits.out_channels == 3
    if 'cascade' in name:  # the base's other values remain
        deviations = [head.bbox_coder.stds[0] for head in heads]
        assert deviations == [0.1, 0.05, 0.033]
        assert heads[0].reg_decoded_bbox


@pytest.mark.parametrize('name', ['mask_rcnn_shapes', 'cascade_mask_rcnn_shapes'])
@pytest.mark.parametrize('split', ['train', 'val'])
def test_labels_are_those_of_the_file(name, split, project, monkeypatch):
    config = load(name, project, monkeypatch)
    dataset = DATASETS.build(config[f'{split}_dataloader'].dataset)
    truth = COCO(project / f'data/shapes/annotations/{split}.json')
    names = {category['id']: category['name'] for category in truth.cats.values()}
    seen = set()
    for index in range(len(dataset)):
        info = dataset.get_data_info(index)
        found = [dataset.metainfo['classes'][i['bbox_label']] for i in info['instances']]
        annotations = truth.loadAnns(truth.getAnnIds(info['img_id']))
        assert found == [names[annotation['category_id']] for annotation in annotations]
        seen |= set(found)
    assert seen == {'ball', 'kite', 'food'}


def test_detection_is_trained_and_evaluated_at_one_size(project, monkeypatch):
    config = load('mask_rcnn_shapes', project, monkeypatch)
    trained = config.train_dataloader.dataset.pipeline[2].scales
    assert config.test_dataloader.dataset.pipeline[1].scale == max(trained) == (1066, 640)


def test_void_label_is_named_everywhere(project, monkeypatch):
    config = load('upernet_void', project, monkeypatch)
    places = [config.model.decode_head, config.model.auxiliary_head]
    for part in ('val', 'test'):
        places += [config[f'{part}_evaluator'], config[f'{part}_dataloader'].dataset]
    places.append(config.train_dataloader.dataset)
    assert {place.ignore_index for place in places} == {config.model.data_preprocessor.seg_pad_val}


def predictions(project, name):
    """JSON, drawing and original of each new image, after a prediction into a folder."""
    folder = project / 'predictions' / name
    photos = sorted((project / 'photos').iterdir())
    assert [path.stem for path in photos] == sorted(p.stem for p in (folder / 'json').iterdir())
    for photo in photos:
        content = json.loads((folder / f'json/{photo.stem}.json').read_text())
        drawing, image = cv2.imread(str(folder / 'pictures' / photo.name)), cv2.imread(str(photo))
        assert drawing.shape == image.shape
        yield content, drawing.astype(float), image.astype(float)


def make_certain(work_dir, layer, values):
    """Makes a layer of the newest checkpoint give the same output for everything."""
    path = Path((work_dir / 'last_checkpoint').read_text())
    checkpoint = CheckpointLoader.load_checkpoint(str(path), 'cpu')
    checkpoint['state_dict'][f'{layer}.weight'].zero_()
    checkpoint['state_dict'][f'{layer}.bias'].copy_(torch.tensor(values))
    torch.save(checkpoint, path)


def test_detection(run, small_project):
    project = small_project
    train, resume, evaluate, predict = COMMANDS['detection']
    work_dir = project / 'work_dirs/mask_rcnn_shapes'
    run(train, ['train_cfg.max_epochs=1'])
    assert (work_dir / 'epoch_1.pth').exists()
    output = run(resume, ['train_cfg.max_epochs=2'])
    assert 'resumed epoch: 1' in output
    logged = scalars(work_dir)
    assert all(np.isfinite(logged['loss', iteration]) for iteration in range(1, 5))
    # From batch 16 to 2; the warm-up starts at a thousandth, the stem is layer 0 of 6.
    assert logged['lr', 1] == pytest.approx(1e-4 * 2 / 16 * 0.001 * 0.95**5)
    assert 0 <= logged['coco/segm_mAP', 2] <= 1

    output = run(evaluate)
    assert 'coco/bbox_mAP' in output
    images = list(work_dir.glob('*/pictures/*.jpg'))
    assert len(images) == 6
    assert all(cv2.imread(str(image)) is not None for image in images)

    # For ball, kite, food and none; hardly trained weights predict nothing with certainty.
    make_certain(work_dir, 'roi_head.bbox_head.fc_cls', np.log([0.45, 0.05, 0.4, 0.1]))
    run(predict)
    for content, drawing, image in predictions(project, 'shapes'):
        found = {(item['label'], item['class'], round(item['score'], 2), 'mask' in item)
                 for item in content['instances']}  # fmt: skip
        assert found == {(0, 'ball', 0.45, True), (2, 'food', 0.4, True)}
        assert np.abs(drawing - image).max() > 60


@pytest.fixture
def public_project(small_project, real_samples):
    """The project with BCCD and CamVid, and their recipes with small images and heads."""
    for name, path in (
        ('bccd', 'detection/faster_rcnn_conv2former_t_bccd.py'),
        ('camvid', 'segmentation/upernet_conv2former_t_camvid.py'),
    ):
        if not (real_samples / 'public' / name).is_dir():
            pytest.skip(f'MMCONV2FORMER_SAMPLES has no public/{name}')
        (small_project / 'data' / name).symlink_to(real_samples / 'public' / name)
        config = Config.fromfile(ROOT / 'configs' / path)
        scale_images(config, 96)
        narrow_heads(config.model)
        set_iterations(config, 4)
        if name == 'bccd':
            config.model.backbone.arch = ARCH
            config.model.neck.in_channels = CHANNELS
            config.model.test_cfg.rcnn.score_thr = 0.0
        for part in ('train', 'val', 'test'):
            config[f'{part}_dataloader'].dataset.indices = 4
        config.train_dataloader.batch_size = 2
        config.randomness.seed = 0
        (small_project / 'configs' / path).parent.mkdir(exist_ok=True)
        config.dump(small_project / 'configs' / path)
    return small_project


def test_public(run, public_project):
    train, evaluate, draw, predict, train_other, evaluate_other = COMMANDS['public']
    work_dir = public_project / 'work_dirs/faster_rcnn_conv2former_t_bccd'
    run(train)
    logged = scalars(work_dir)
    assert all(np.isfinite(value) for (name, _), value in logged.items() if name == 'loss')
    *_, score = (value for (name, _), value in logged.items() if name == 'coco/bbox_mAP')
    assert 0 <= score <= 1
    assert 'coco/bbox_mAP' in run(evaluate)
    assert len(list(work_dir.glob('*/drawings/**/*.jpg'))) == 4
    run(draw)
    assert cv2.imread(str(public_project / 'bccd.jpg')) is not None
    run(predict)
    for content, _, _ in predictions(public_project, 'bccd'):
        assert {item['class'] for item in content['instances']} <= set(BCCD_CLASSES)
    run(train_other)
    assert 'mIoU' in run(evaluate_other)


@pytest.fixture
def coco_detector(small_project):
    """A checkpoint for COCO's 80 classes, where the page's config looks for it."""
    config = shrunk(Config.fromfile(ROOT / 'configs/detection/mask_rcnn_conv2former_t.py'))
    init_default_scope('mmdet')
    torch.manual_seed(1)
    model = MODELS.build(config.model)
    path = small_project / 'work_dirs/mask_rcnn_conv2former_t/epoch_36.pth'
    path.parent.mkdir(parents=True)
    torch.save(dict(state_dict=model.state_dict(), meta={}), path)
    return model.state_dict()


def test_fine_tuning_from_coco(run, small_project, coco_detector):
    """With a learning rate of zero, the weights after training are those that were loaded."""
    (train,) = COMMANDS['fine-tuning']
    options = ['train_cfg.max_epochs=1', 'optim_wrapper.optimizer.lr=0.0']
    output = run(train, options)
    path = small_project / 'work_dirs/mask_rcnn_shapes_from_coco/epoch_1.pth'
    trained = read_state_dict(str(path))
    new = {f'roi_head.bbox_head.fc_{part}.{kind}' for part in ('cls', 'reg')
           for kind in ('weight', 'bias')}  # fmt: skip
    new |= {f'roi_head.mask_head.conv_logits.{kind}' for kind in ('weight', 'bias')}
    assert {n for n, value in trained.items() if value.shape != coco_detector[n].shape} == new
    said = re.search(r'(\d+) of (\d+) tensors of MaskRCNN; initial values kept', output)
    assert int(said[2]) - int(said[1]) == len(new)
    for name, value in trained.items():
        if name not in new and not name.split('.')[-1].startswith(('running', 'num_batches')):
            torch.testing.assert_close(value, coco_detector[name], rtol=0, atol=0)


def scene_labels(config, split):
    """Labels of a split as the network sees them, and those in the files."""
    dataset = DATASETS.build(config[f'{split}_dataloader'].dataset)
    for index in range(len(dataset)):
        info = dataset.get_data_info(index)
        (load_labels,) = [s for s in dataset.pipeline.transforms if isinstance(s, LoadAnnotations)]
        yield load_labels(info)['gt_seg_map'], cv2.imread(info['seg_map_path'], 0)


@pytest.mark.parametrize('split', ['train', 'val'])
def test_masks_are_the_labels(split, project, monkeypatch):
    config = load('upernet_scenes', project, monkeypatch)
    seen = set()
    for labels, file_labels in scene_labels(config, split):
        assert (labels == file_labels).all()
        seen |= set(np.unique(labels))
    assert seen == {0, 1, 2, 255}


def test_labels_from_one(project, monkeypatch):
    config = load('upernet_scenes', project, monkeypatch)
    config.train_dataloader.dataset.reduce_zero_label = True
    for labels, file_labels in scene_labels(config, 'train'):
        assert (labels[file_labels == 0] == 255).all()
        assert (labels[file_labels == 2] == 1).all()


def test_truth_has_full_score_in_the_segmentor_s_evaluator(project, monkeypatch):
    config = load('upernet_scenes', project, monkeypatch)
    dataset = DATASETS.build(config.val_dataloader.dataset)
    metric = METRICS.build(config.val_evaluator)
    metric.dataset_meta = dataset.metainfo
    for index in range(len(dataset)):
        truth = dataset[index]['data_samples'].gt_sem_seg.data
        sample = dict(pred_sem_seg=dict(data=truth % 255), gt_sem_seg=dict(data=truth))
        metric.process({}, [sample])
    assert metric.evaluate(len(dataset))['mIoU'] == 100


def test_segmentation(run, small_project, slow):
    project = small_project
    train, resume, evaluate, evaluate_in_scales, predict = COMMANDS['segmentation']
    work_dir = project / 'work_dirs/upernet_scenes'
    run(train, [*FOUR_ITERATIONS, 'train_cfg.max_iters=2'])
    output = run(resume, FOUR_ITERATIONS)
    assert 'resumed epoch: 0, iter: 2' in output
    logged = scalars(work_dir)
    assert all(np.isfinite(logged['loss', iteration]) for iteration in range(1, 5))
    assert 0 <= logged['mIoU', 4] <= 100

    output = run(evaluate)
    assert re.search(r'\|\s+ground\s+\|.*\|\s+ball\s+\|.*\|\s+kite\s+\|', output, re.DOTALL)
    images = list(work_dir.glob('*/pictures/*.jpg'))
    assert len(images) == 6
    assert all(cv2.imread(str(image)) is not None for image in images)
    if slow:
        assert 'mIoU' in run(evaluate_in_scales)

    make_certain(work_dir, 'decode_head.conv_seg', [0.0, 0.0, 1.0])
    run(predict)
    for content, drawing, image in predictions(project, 'scenes'):
        assert content['classes'] == [
            {'label': 2, 'class': 'kite', 'value': 2, 'pixels': 64 * 64, 'share': 1.0}
        ]
        labels = cv2.imread(str(project / 'predictions/scenes' / content['labels']), -1)
        assert (labels == 2).all()
        painted = 0.2 * image + 0.8 * np.array([80, 160, 0])  # the palette's colour, as BGR
        assert np.median(np.abs(drawing - painted)) < 8  # but where the name is written
