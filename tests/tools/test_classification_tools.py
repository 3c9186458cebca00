"""Classification with the tools, and its checkpoints in the dense recipes."""

import json
import pickle
import re
import shutil
from pathlib import Path
from statistics import mode

import cv2
import numpy as np
import pytest
import torch
from common.cli import check_files
from helpers import ROOT
from helpers.checkpoints import published_state_dict
from helpers.in_process import run_command
from helpers.pages import read_blocks
from helpers.tiny import WITHOUT_WORKERS
from helpers.tools import run_tool
from mmengine.config import Config
from mmengine.registry import MODELS, init_default_scope
from mmengine.visualization import Visualizer

from mmconv2former.checkpoint.reading import read_state_dict
from mmconv2former.models.conv2former import ARCHS

PAGE = ROOT / 'docs/classification.md'
CONFIG = 'configs/classification/conv2former_n_in1k.py'
QUICK = [
    'train_cfg.max_epochs=1',
    'default_hooks.logger.interval=1',
    'train_dataloader.batch_size=4',
    'train_dataloader.num_workers=1',
    'train_dataloader.dataset.pipeline.1.scale=64',
    'val_dataloader.num_workers=1',
    'test_dataloader.num_workers=1',
    'randomness.seed=0',
]


@pytest.fixture(scope='module')
def crops(sample, tmp_path_factory):
    """Objects of the embedded sample, as a classification dataset."""
    folder = tmp_path_factory.mktemp('crops') / 'objects'
    options = ['--classes', 2, '--max-objects', 4, '--min-side', 12]
    run_tool('crop_objects', sample / 'coco', folder, *options)
    return folder


@pytest.fixture(scope='module')
def trained(crops, tmp_path_factory):
    """Work dir of two iterations, and the log."""
    work_dir = tmp_path_factory.mktemp('trained')
    arguments = ['--data-root', crops, '--work-dir', work_dir, '--cfg-options', *QUICK]
    return work_dir, run_tool('train', CONFIG, *arguments)


def test_crops(crops, sample):
    lines = (crops / 'meta/train.txt').read_text().splitlines()
    annotations = json.loads((sample / 'coco/annotations/instances_train2017.json').read_text())
    objects = {item['id']: item for item in annotations['annotations']}
    names = {item['id']: item['name'] for item in annotations['categories']}
    assert len(lines) == 8
    labels = set()
    for line in lines:
        path, label = re.fullmatch(r'(.+\.jpg) (\d)', line).groups()
        height, width = cv2.imread(str(crops / 'train' / path)).shape[:2]
        object_ = objects[int(path.rsplit('_', 1)[1].removesuffix('.jpg'))]
        assert names[object_['category_id']] == path.split('/')[0]
        assert 12 <= object_['bbox'][2] <= width <= 1.2 * object_['bbox'][2] + 1
        assert 12 <= object_['bbox'][3] <= height <= 1.2 * object_['bbox'][3] + 1
        labels.add((path.split('/')[0], int(label)))
    names = sorted(path.name for path in (crops / 'train').iterdir())
    assert labels == set(zip(names, range(2)))
    assert names == sorted(path.name for path in (crops / 'val').iterdir())


def test_crops_of_odd_annotations(sample, tmp_path):
    """Without `iscrowd`; boxes outside of their image have no crop; no half folder is left."""
    source = shutil.copytree(sample / 'coco', tmp_path / 'source')
    path = source / 'annotations/instances_val2017.json'
    content = json.loads(path.read_text())
    for annotation in content['annotations']:
        del annotation['iscrowd']
        annotation['bbox'] = [-500, 10, 40, 40]
    train = json.loads(path.with_name('instances_train2017.json').read_text())['annotations']
    most = mode(annotation['category_id'] for annotation in train)
    content['annotations'][0].update(bbox=[10, 10, 40, 40], category_id=most)
    path.write_text(json.dumps(content))
    arguments = ['crop_objects', source, tmp_path / 'new', '--classes', 3, '--min-side', 12]
    assert 'val: 1 objects' in run_tool(*arguments)
    for image in (source / 'val2017').iterdir():
        image.unlink()
    arguments[2] = tmp_path / 'other'
    assert 'is missing or not an image' in run_tool(*arguments, succeeds=False)
    assert {path.name for path in tmp_path.iterdir()} == {'source', 'new'}


@pytest.mark.parametrize(
    ('option', 'value', 'message'),
    [
        ('--classes', 81, r'--classes 81: .* has objects of \d+ categories'),
        ('--min-side', 0, '--min-side: must be at least 1, got 0'),
    ],
)
def test_crops_refused(sample, tmp_path, option, value, message):
    arguments = ['crop_objects', sample / 'coco', tmp_path / 'x', option, value]
    assert re.search(message, run_tool(*arguments, succeeds=False))
    assert not (tmp_path / 'x').exists()


def test_trains_and_evaluates(trained):
    work_dir, log = trained
    checkpoint = torch.load(work_dir / 'epoch_1.pth', weights_only=False)
    assert checkpoint['meta']['iter'] == 2
    (rate,) = {group['initial_lr'] for group in checkpoint['optimizer']['param_groups']}
    assert rate == 1e-3
    assert re.search(r'Epoch\(val\) \[1\].*accuracy/top1: \d', log)
    assert list(work_dir.glob('best_accuracy_top1_epoch_1.pth'))


def test_missing_data_is_reported_before_anything_is_built(tmp_path):
    output = run_tool('train', CONFIG, '--work-dir', tmp_path, succeeds=False)
    assert re.search(r'error: data are missing:\s+data/imagenet \(train_dataloader\)', output)


@pytest.mark.parametrize(
    ('settings', 'missing'),
    [
        (dict(type='ImageNet', split='train'), ''),
        (dict(type='ImageNet', split='val', ann_file='meta/val.txt'), '/meta/val.txt'),
        (dict(type='CustomDataset', data_prefix='train'), '/train'),
        (dict(type='mmpretrain.CUB', split='test'), ''),
        (dict(type='RepeatDataset', times=2, dataset=dict(type='CUB', split='test')), ''),
        *((dict(type=name, split='test'), None) for name in
          ('CIFAR10', 'MNIST', 'FashionMNIST', 'mmpretrain.CIFAR100')),
        (dict(type='CIFAR100', split='test', download=False), ''),
    ],
)  # fmt: skip
def test_files_that_datasets_need(settings, missing, tmp_path):
    """Those in the config, else the root; none if the dataset downloads its files."""
    root = tmp_path / 'data'
    leaf = settings.get('dataset', settings) | dict(data_root=str(root))
    dataset = settings | dict(dataset=leaf) if 'dataset' in settings else leaf
    dataloader = dict(dataset=dataset, batch_size=2)
    config = Config(dict(default_scope='mmpretrain', model={}, train_dataloader=dataloader))
    if missing is None:
        check_files(config, ['train_dataloader'])
        return
    with pytest.raises(SystemExit, match=rf'missing:\s+{root}{missing} \(train_dataloader\)'):
        check_files(config, ['train_dataloader'])
    for folder in ('train', 'val', 'meta'):
        (root / folder).mkdir(parents=True)
    (root / 'meta/val.txt').touch()
    check_files(config, ['train_dataloader'])


@pytest.mark.parametrize(
    'recipe', ['detection/mask_rcnn_conv2former_n', 'segmentation/upernet_conv2former_n']
)
def test_checkpoint_is_a_start_for_dense_prediction(trained, recipe):
    checkpoint = trained[0] / 'epoch_1.pth'
    config = Config.fromfile(ROOT / f'configs/{recipe}.py')
    config.model.backbone.init_cfg.checkpoint = str(checkpoint)
    init_default_scope(config.default_scope)
    model = MODELS.build(config.model)
    model.backbone.init_weights()
    state = torch.load(checkpoint, weights_only=False)['state_dict']
    loaded = {
        name: value
        for name, value in model.backbone.state_dict().items()
        if not re.match(r'norm\d', name)
    }
    assert len(loaded) == sum(name.startswith('backbone.') for name in state)
    for name, value in loaded.items():
        assert torch.equal(value, state[f'backbone.{name}']), name


def test_official_file_is_evaluated_as_it_is(crops, tmp_path):
    """As `load_from`, and as `init_cfg` of backbone and head, it gives the same scores."""
    state = published_state_dict(ARCHS['nano'], num_classes=1000)
    state['pred.weight'] = 10 * state['pred.weight']  # so that scores differ
    torch.save(dict(state_dict=state, arch='conv2former_n'), tmp_path / 'official.pth.tar')
    common = ['--data-root', crops, '--cfg-options', *WITHOUT_WORKERS]
    initial = f'init_cfg.checkpoint={tmp_path}/official.pth.tar'
    routes = {
        'load_from': (tmp_path / 'official.pth.tar', []),
        'init_cfg': (
            'none',
            [f'model.{part}.{option}' for part in ('backbone', 'head')
             for option in (initial, 'init_cfg.type=Pretrained')],
        ),
    }  # fmt: skip
    scores = []
    for route, (checkpoint, options) in routes.items():
        out = tmp_path / f'{route}.pkl'
        command = [CONFIG, checkpoint, '--out', out, '--work-dir', tmp_path, *common, *options]
        run_tool('test', *command)
        scores.append([item['pred_score'] for item in pickle.loads(out.read_bytes())])
    assert len(scores[0]) == len((crops / 'meta/val.txt').read_text().splitlines())
    torch.testing.assert_close(*scores)
    assert scores[0][0].max() > 2 / 1000  # the initial weights' are all about 1 / 1000


FOLDERS = 'configs/classification/conv2former_t_folders.py'
QUICK_FOLDERS = [
    *QUICK,
    'model.backbone.arch=nano',
    'model.backbone.init_cfg=None',
    'model.head.init_cfg=None',
    'model.head.in_channels=512',
    'model.head.num_classes=2',
]


def test_own_image_folders(crops, tmp_path, monkeypatch, capfd, in_process):
    """The page's commands: trained, evaluated with drawings, predicted with the folders' names."""
    (commands,) = [block.commands() for block in read_blocks(PAGE) if block.name == 'folders']
    train, evaluate, predict = commands
    (tmp_path / 'data').mkdir()
    (tmp_path / 'photos').mkdir()
    for path, target in {
        'tools': ROOT / 'tools', 'configs': ROOT / 'configs', 'data/flowers': crops
    }.items():  # fmt: skip
        (tmp_path / path).symlink_to(target)
    shutil.copy(next((crops / 'val').rglob('*.jpg')), tmp_path / 'photos/new.jpg')
    monkeypatch.chdir(tmp_path)

    options = QUICK_FOLDERS
    assert 'accuracy/top1' in run_command(train, options, monkeypatch, capfd)
    work_dir = tmp_path / 'work_dirs/conv2former_t_folders'
    state = read_state_dict(str(work_dir / 'epoch_1.pth'))
    assert state['head.pred.weight'].shape == (2, 1280)

    assert 'accuracy/top1' in run_command(evaluate, options, monkeypatch, capfd)
    names = sorted(path.name for path in (crops / 'val').iterdir())
    assert sorted(path.name for path in next(work_dir.glob('*/pictures')).iterdir()) == names

    run_command(predict, options, monkeypatch, capfd)
    content = json.loads((tmp_path / 'predictions/flowers/json/new.json').read_text())
    assert {item['label']: item['class'] for item in content['classes']} == dict(enumerate(names))
    assert sum(item['score'] for item in content['classes']) == pytest.approx(1)
    drawing = cv2.imread(str(tmp_path / 'predictions/flowers/pictures/new.jpg'))
    image = cv2.imread(str(tmp_path / 'photos/new.jpg'))
    assert drawing.shape == image.shape
    assert np.abs(drawing.astype(float) - image).max() > 60


def test_trained_classifier_needs_no_pretrained_weights(crops, tmp_path):
    """The recipe's backbone and head start from a file that is not needed any more."""
    options = [option for option in QUICK_FOLDERS if 'init_cfg' not in option]
    config = Config.fromfile(ROOT / FOLDERS)
    config.merge_from_dict(
        {'model.backbone.arch': 'nano', 'model.head.in_channels': 512, 'model.head.num_classes': 2}
    )
    for part in ('backbone', 'head'):
        assert not Path(config.model[part].init_cfg.checkpoint).exists()
    init_default_scope('mmpretrain')
    checkpoint = tmp_path / 'trained.pth'
    torch.save(dict(state_dict=MODELS.build(config.model).state_dict()), checkpoint)
    places = ['--data-root', crops, '--work-dir', tmp_path]
    run_tool('test', FOLDERS, checkpoint, *places, '--cfg-options', *options)
    (metrics,) = tmp_path.glob('*/*.json')
    assert 0 <= json.loads(metrics.read_text())['accuracy/top1'] <= 100


@pytest.fixture
def evaluate_folders(crops, tmp_path):
    """Runs test.py with options on images of the same names in two classes; returns the images.

    One of them exists as .jpg and .png.
    """
    for folder in (crops / 'val').iterdir():
        (tmp_path / 'data/val' / folder.name).mkdir(parents=True)
        for number, path in enumerate(sorted(folder.iterdir())):
            shutil.copy(path, tmp_path / f'data/val/{folder.name}/{number}.jpg')
        cv2.imwrite(str(tmp_path / f'data/val/{folder.name}/0.png'), cv2.imread(str(path)))

    def evaluate(*options):
        places = ['--data-root', tmp_path / 'data', '--work-dir', tmp_path / 'work']
        run_tool('test', FOLDERS, 'none', *options, *places, '--cfg-options', *QUICK_FOLDERS)
        return sorted((tmp_path / 'data/val').rglob('*.*'))

    return evaluate


def test_draws_classes_on_the_images(evaluate_folders, tmp_path):
    """In their true colours: below the text, the drawing equals the image."""
    images = evaluate_folders('--show-dir', 'images')
    (folder,) = (tmp_path / 'work').glob('*/images')
    assert len(list(folder.rglob('*.*'))) == len(images) > 2
    for path in images:
        name = path.relative_to(tmp_path / 'data/val').with_suffix('')
        drawing = cv2.imread(f'{folder / name}{"_2" if path.suffix == ".png" else ""}.jpg')
        height, width = drawing.shape[:2]
        assert min(height, width) == 224
        image = cv2.resize(cv2.imread(str(path)), (width, height))
        difference = np.abs(drawing.astype(float) - image).mean(axis=(1, 2))
        assert difference[height // 4 :].mean() < 3
        assert difference[: height // 10].mean() > 10
        assert np.abs(image[..., ::-1].astype(float) - drawing).mean() > 6


def test_shows_in_a_window(evaluate_folders, tmp_path, monkeypatch):
    shown = []
    monkeypatch.setattr(
        Visualizer, 'show', lambda self, image, **options: shown.append(options | {'image': image})
    )
    images = evaluate_folders('--show', '--wait-time', 0.5)
    names = [path.relative_to(tmp_path / 'data/val').as_posix() for path in images]
    assert sorted(options['win_name'] for options in shown) == sorted(names)
    assert {options['wait_time'] for options in shown} == {0.5}
    assert all(options['image'].std() > 0 for options in shown)
    assert not [*(tmp_path / 'work').rglob('*.jpg'), *(tmp_path / 'work').rglob('*.png')]


def test_switches_of_the_evaluation():
    """The options in docs/classification.md change the settings they should."""
    page = PAGE.read_text()
    crop, mean, std = re.search(
        r'`(\S+scale=233)`.*`(data_preprocessor.mean=\S+) (data_preprocessor.std=\S+)`', page, re.S
    ).groups()
    config = Config.fromfile(ROOT / CONFIG)
    assert config.test_dataloader.dataset.pipeline[1].scale == 256
    assert config.data_preprocessor.mean == [123.675, 116.28, 103.53]
    options = {}
    for option in (crop, mean, std):
        key, value = option.split('=')
        options[key] = json.loads(value)
    config.merge_from_dict(options)
    resize = config.test_dataloader.dataset.pipeline[1]
    assert (resize.type, resize.scale) == ('ResizeEdge', round(224 / 0.96))
    assert config.data_preprocessor.mean == config.data_preprocessor.std == [127.5] * 3
