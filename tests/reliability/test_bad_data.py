"""Bad data in the recipes' pipelines: handled as mmdet and mmseg do, or refused by name.

Each fault is put into a copy of the embedded sample. Its training split is then loaded as in
training and as in evaluation.
"""

import copy
import json
import os
import pickle
import re
import shutil
import signal
from functools import cache
from pathlib import Path
from types import SimpleNamespace

import cv2
import numpy as np
import pytest
import torch
from common.cli import run_errors
from helpers.tiny import tiny_config, write_config
from helpers.tools import run_tool
from mmengine.dataset import Compose
from mmengine.registry import MODELS, TRANSFORMS, init_default_scope
from PIL import ExifTags, Image

from mmconv2former import ReliableRunner
from mmconv2former.datasets.checked import CheckedDataset, CheckedPipeline, DataError

NAME = '000000000001'
DATA = {'detection': ('coco', 'coco'), 'segmentation': ('ade', 'ade/ADEChallengeData2016')}
IMAGES = {'detection': 'train2017', 'segmentation': 'images/training'}
COUNT = 4  # images of the training split that are loaded, the faulty one among them


# ------------------------------------------------------------------------------------ the faults
def image_of(task, root):
    return root / IMAGES[task] / f'{NAME}.jpg'


def labels_of(root):
    return root / f'annotations/training/{NAME}.png'


def with_image(change):
    """The fault of changing the image, of either task."""
    return lambda task, root: change(image_of(task, root))


def with_labels(change):
    return lambda task, root: change(labels_of(root))


def with_annotations(change):
    """The fault of changing the content of COCO's annotation file of the training split."""

    def edit(task, root):
        path = root / 'annotations/instances_train2017.json'
        content = json.loads(path.read_text())
        change(content)
        path.write_text(json.dumps(content))

    return edit


def with_object(**fields):
    """The fault of changing the first object of the image."""
    return with_annotations(lambda content: content['annotations'][0].update(fields))


def keep(share):
    """Keeps the first part of a file."""
    return lambda path: path.write_bytes(path.read_bytes()[: int(path.stat().st_size * share)])


def save_as(format, convert):
    """Converts an image and saves it under the same name, whatever its format."""

    def write(path):
        with Image.open(path) as image:
            changed = convert(image)
        changed.save(path, format)

    return write


def sixteen_bits(image):
    return Image.fromarray(np.asarray(image.convert('L')).astype(np.uint16) * 257)


def of_size(width, height):
    """The fault of an image of this size, with annotations and labels that fit."""

    def change(task, root):
        pixels = np.random.default_rng(0).integers(0, 255, (height, width, 3), np.uint8)
        cv2.imwrite(str(image_of(task, root)), pixels)
        if task == 'segmentation':
            cv2.imwrite(str(labels_of(root)), np.full((height, width), 5, np.uint8))
            return

        def edit(content):
            content['images'][0].update(width=width, height=height)
            objects = [a for a in content['annotations'] if a['image_id'] == 1]
            for annotation in objects[1:]:
                content['annotations'].remove(annotation)
            polygon = [0, 0, width, 0, width, height, 0, height]
            objects[0].update(
                bbox=[0, 0, width, height], segmentation=[polygon], area=width * height, iscrowd=0
            )

        with_annotations(edit)(task, root)

    return change


def write_labels(change):
    """The fault of other labels, computed from the right ones."""

    def write(path):
        cv2.imwrite(str(path), change(cv2.imread(str(path), cv2.IMREAD_UNCHANGED)))

    return with_labels(write)


def one_label_of_151(labels):
    labels = labels.copy()
    labels[20:40] = 151
    return labels


# --------------------------------------------------------------------------------------- the table
BOTH, DETECTION, SEGMENTATION = ('detection', 'segmentation'), ('detection',), ('segmentation',)
# Name, tasks, fault, words of the refusal (which must name the file too) or None if it is handled,
# what the user sees then.
NO_OBJECTS = "its list 'annotations' is missing or empty"
FAULTS = [
    ('JPEG cut in its header', BOTH, with_image(keep(0.1)), ['truncated or broken'],
     ''),
    ('JPEG cut in its body', BOTH, with_image(keep(0.7)), ['truncated or broken'], ''),
    ('image is missing', DETECTION, with_image(lambda path: path.unlink()), ['No such file'], ''),
    ('image is missing', SEGMENTATION, with_image(lambda path: path.unlink()), None,
     'not trained on: the list is what the folder holds'),
    ('image of no bytes', BOTH, with_image(keep(0)), [], ''),
    ('16-bit PNG', BOTH, with_image(save_as('PNG', sixteen_bits)), None, 'trained on, in 8 bits'),
    ('RGBA PNG', BOTH, with_image(save_as('PNG', lambda p: p.convert('RGBA'))), None,
     'trained on, without transparency'),
    ('CMYK JPEG', BOTH, with_image(save_as('JPEG', lambda p: p.convert('CMYK'))), None,
     'trained on, as RGB'),
    ('image of 1x1 pixel', DETECTION, of_size(1, 1), None, 'trained on and evaluated, enlarged'),
    ('image of 1x1 pixel', SEGMENTATION, of_size(1, 1), [], ''),
    ('image of 10000x20 pixels', BOTH, of_size(10_000, 20), None,
     'trained on and evaluated, padded to 32 pixels'),
    ('image of 20x10000 pixels', BOTH, of_size(20, 10_000), None,
     'trained on and evaluated, padded to 32 pixels'),
    ('JSON cut in half', DETECTION,
     lambda task, root: keep(0.5)(root / 'annotations/instances_train2017.json'),
     ['cannot read dataset', 'instances_train2017.json', 'is no valid JSON'], ''),
    ('category that the file has not', DETECTION, with_object(category_id=12), None,
     'this object is left out'),
    ('category renamed in the file', DETECTION,
     with_annotations(lambda content: content['categories'][0].update(name='human')),
     ['instances_train2017.json has 79 of the 80 classes'], ''),
    ('empty box', DETECTION, with_object(bbox=[5, 5, 0, 0]), None, 'this object is left out'),
    ('inverted box', DETECTION, with_object(bbox=[30, 30, -9, -9]), None,
     'this object is left out'),
    ('box of NaN', DETECTION, with_object(bbox=[5, 5, float('nan'), 4]),
     ['train2017.json: annotation 1 has bbox [5, 5, nan, 4]'], ''),
    ('box without end', DETECTION, with_object(bbox=[5, 5, float('inf'), 4]),
     ['train2017.json: annotation 1 has bbox [5, 5, inf, 4]'], ''),
    ('polygon of two points', DETECTION, with_object(segmentation=[[1, 1, 20, 20]]), None,
     'this object is ignored'),
    ('mask outside the image', DETECTION,
     with_object(segmentation=[[100, 100, 120, 100, 120, 120]]), None,
     'trained on, its mask is empty'),
    ('object without a mask', DETECTION, with_object(segmentation=[]),
     ["field 'mask' (COCO: 'segmentation') is missing"], ''),
    ('mask of another size', DETECTION, with_object(segmentation=dict(size=[9, 9], counts='Q2')),
     ['train2017.json: annotation 1 has a mask of size [9, 9], its image has height 64'], ''),
    ('no image has objects', DETECTION,
     with_annotations(lambda content: content['annotations'].clear()),
     ['instances_train2017.json', NO_OBJECTS], ''),
    ('image of another size than annotated', DETECTION,
     with_image(save_as('JPEG', lambda p: p.resize((80, 48)))),
     ['has shape (48, 80), annotations say (64, 64)'], ''),
    ('label 151', SEGMENTATION, write_labels(one_label_of_151), ['labels [150] are not a class'],
     ''),
    ('labels of 16 bits', SEGMENTATION, write_labels(lambda labels: labels.astype(np.uint16)),
     ['one channel of 8 bits'], ''),
    ('labels as RGB', SEGMENTATION, write_labels(lambda labels: np.dstack([labels] * 3)),
     ['one channel of 8 bits'], ''),
    ('labels of another size', SEGMENTATION, write_labels(lambda labels: labels[:, :32]),
     ['labels have shape (64, 32), the image has (64, 64)'], ''),
    ('labels are missing', SEGMENTATION, with_labels(lambda path: path.unlink()), [], ''),
    ('labels cut off', SEGMENTATION, with_labels(keep(0.5)), [], ''),
]  # fmt: skip
CASES = [(task, *fault) for fault in FAULTS for task in fault[1]]


# ---------------------------------------------------------------------------------- what they cause
@pytest.fixture(scope='module')
def small(tmp_path_factory):
    """The embedded sample with few images."""
    folder = tmp_path_factory.mktemp('small')
    run_tool('make_sample.py', folder, '--train', COUNT, '--val', 1, '--size', 64)
    return folder


@cache
def recipe(task):
    return tiny_config(task, Path('sample'), 'work_dir', length=1, images=COUNT)


def loader_of(task, root, phase, workers=0, full_size=False):
    """The data loader of training or evaluation, over the first images of the training split."""
    config = recipe(task)
    settings = copy.deepcopy(config[f'{phase}_dataloader'])
    train = config.train_dataloader.dataset
    dataset = dict(data_root=f'{root}/', indices=COUNT, data_prefix=train.data_prefix)
    if task == 'detection':
        dataset['ann_file'] = train.ann_file
    settings.dataset.update(dataset)
    if full_size and task == 'detection':
        for step in settings.dataset.pipeline:
            if step['type'] == 'Resize':
                step['scale'] = (1333, 480 if phase == 'train' else 800)
    settings.update(num_workers=workers, timeout=60 if workers else 0)  # seconds: none may hang
    init_default_scope(config.default_scope)
    return ReliableRunner.build_dataloader(settings, seed=0)


def load_all(loader):
    """Paths of the images that are loaded, of as many samples as the dataset has."""
    iterator = iter(loader)
    paths = []
    try:
        while len(paths) < len(loader.dataset):
            batch = next(iterator)
            assert all(torch.isfinite(image.float()).all() for image in batch['inputs'])
            paths += [sample.img_path for sample in batch['data_samples']]
    finally:
        if loader.num_workers:  # else the garbage collector would wait five seconds for each
            iterator._shutdown_workers()
    return paths


@pytest.mark.parametrize(
    ('task', 'fault', 'tasks', 'inject', 'refusal', 'seen'),
    CASES,
    ids=[f'{case[0]}: {case[1]}' for case in CASES],
)
def test_bad_data(task, fault, tasks, inject, refusal, seen, small, tmp_path, fault_report, slow):
    kind, folder = DATA[task]
    root = shutil.copytree(small / folder, tmp_path / f'ein Ordner, größer 图, {kind}')
    inject(task, root)
    runs = [('train', 0), ('val', 0)] + [('train', 2)] * slow
    for phase, workers in runs:
        # Evaluation does not drop images without objects.
        is_handled = refusal is None or (phase == 'val' and NO_OBJECTS in refusal)
        message, paths = None, []
        try:
            paths = load_all(
                loader_of(task, root, phase, workers, full_size=fault.startswith('image of'))
            )
        except DataError as error:
            message = str(error)
        assert (message is None) == is_handled, message or 'was not refused'
        if is_handled:
            assert len(set(paths)) >= COUNT - 1
        else:
            assert ('instances_train2017.json' if 'json' in str(refusal) else NAME) in message
            assert all(words in message for words in refusal), message
            assert '\n' not in message
            seen = 'error: ' + message.replace(f'{root}/', '')
    fault_report('Data', f'{fault} ({task})', len(runs), len(runs), seen)


# ------------------------------------------------------------------------------------ data workers
def kill_worker(results):
    if torch.utils.data.get_worker_info() is not None:
        os.kill(os.getpid(), signal.SIGKILL)
    return results


def test_killed_data_worker(small, fault_report):
    loader = loader_of('segmentation', small / DATA['segmentation'][1], 'train', workers=2)
    loader.dataset.pipeline.transforms.append(kill_worker)
    words = r'error: DataLoader worker .*Use fewer workers'
    with pytest.raises(SystemExit, match=words) as error, run_errors(traceback=False):
        next(iter(loader))
    message = re.sub(r'pid(\(s\))? [\d, ]+', 'pid N', str(error.value))
    fault_report('Data', 'a data worker is killed (out of memory)', 1, 1, message)


def collate_badly(samples):
    raise KeyError('gt_label')


def test_error_of_a_data_worker():
    loader = torch.utils.data.DataLoader([0], num_workers=1, collate_fn=collate_badly)
    words = r"^error: in a data worker: KeyError: 'gt_label' \(--traceback shows where\)$"
    with pytest.raises(SystemExit, match=words), run_errors(traceback=False):
        next(iter(loader))
    with pytest.raises(KeyError, match='collate_badly'), run_errors(traceback=True):
        next(iter(loader))


def test_refusal_ends_a_real_run_in_one_line(small, tmp_path, fault_report):
    """From a data worker of `tools/train.py` to its last line."""
    root = shutil.copytree(small / DATA['segmentation'][1], tmp_path / 'ade')
    for path in (root / 'annotations/training').iterdir():
        cv2.imwrite(str(path), np.full((64, 64), 151, np.uint8))
    options = {f'{part}_dataloader.dataset.data_root': f'{root}/' for part in ('train', 'val')}
    options['train_dataloader.num_workers'] = 2
    config = write_config(tmp_path / 'config.py', 'segmentation', small, 4, options=options)
    output = run_tool('train.py', config, '--work-dir', tmp_path / 'run', succeeds=False)
    last_line = output.splitlines()[-1]
    fault_report('Data', 'label 151, through tools/train.py', 1, 1,
                 last_line.replace(f'{root}/', ''))  # fmt: skip
    assert last_line.startswith(f'error: image {root}/images/training/')
    assert 'labels [150] are not a class' in last_line
    assert 'Traceback' not in output
    assert not list(tmp_path.glob('run/*.pth'))


@pytest.mark.parametrize(('width', 'height'), [(10_000, 20), (20, 10_000)])
def test_thin_images_are_segmented(width, height, small, tmp_path):
    """Sliding windows over an image that is thinner than the backbone's smallest input."""
    root = shutil.copytree(small / DATA['segmentation'][1], tmp_path / 'ade')
    of_size(width, height)('segmentation', root)
    config = recipe('segmentation')
    init_default_scope('mmseg')
    torch.manual_seed(0)
    model = MODELS.build(config.model).eval()
    loader = loader_of('segmentation', root, 'val')
    batch = next(iter(loader))
    assert min(batch['inputs'][0].shape[1:]) < 32
    with torch.no_grad():
        (result,) = model.val_step(batch)
    assert result.pred_sem_seg.data.shape == (1, height, width)
    # Other images are not padded, so published numbers stay.
    other = list(loader)[1]
    with torch.no_grad():
        (padded,) = model.val_step(copy.deepcopy(other))
        model.data_preprocessor.test_cfg = None
        (plain,) = model.val_step(other)
    assert torch.equal(padded.seg_logits.data, plain.seg_logits.data)
    assert padded.seg_logits.data.shape[1:] == (64, 64)


# ---------------------------------------------------------------------------------- the dataset
def test_attributes_are_those_of_the_wrapped_dataset(small):
    dataset = loader_of('detection', small / 'coco', 'train').dataset
    assert isinstance(dataset, CheckedDataset)
    assert len(dataset) == len(dataset.dataset) == COUNT
    assert dataset.metainfo == dataset.dataset.metainfo
    assert isinstance(dataset.pipeline, CheckedPipeline)
    copied = pickle.loads(pickle.dumps(dataset))  # to data workers that are spawned
    assert copied.get_data_info(0) == dataset.get_data_info(0)
    with pytest.raises(AttributeError, match='no_such'):
        _ = dataset.no_such
    dataset.pipeline = Compose([])  # as hooks of mmdet and mmpretrain replace it
    assert isinstance(dataset.dataset.pipeline, CheckedPipeline)
    assert dataset[0]['img_path'] == dataset.get_data_info(0)['img_path']


def test_datasets_in_wrappers_are_checked_too(small, tmp_path):
    config = recipe('detection').train_dataloader.dataset
    root = shutil.copytree(small / 'coco', tmp_path / 'coco')
    config = dict(config, data_root=f'{root}/')
    init_default_scope('mmdet')
    repeated = dict(type='RepeatDataset', times=2, dataset=config)
    dataset = CheckedDataset(dict(type='ConcatDataset', datasets=[repeated, config]))
    assert len(dataset) == 3 * COUNT
    (root / 'train2017' / f'{NAME}.jpg').unlink()
    with pytest.raises(DataError, match=f'{NAME}.jpg'):
        [dataset[i] for i in range(len(dataset))]


def test_message_of_a_worker_is_the_message():
    trace = 'Caught DataError in DataLoader worker process 0.\nOriginal Traceback\n  File "x"\n'
    assert str(DataError(f'{trace}mmconv2former.datasets.checked.DataError: image a.jpg: b\n')) == (
        'image a.jpg: b'
    )


@pytest.mark.parametrize('color_type', ['color', 'unchanged'])
def test_sizes_are_those_of_the_loaded_image(color_type, tmp_path):
    """OpenCV rotates a JPEG as its EXIF data say, unless it loads it unchanged."""
    image, labels = tmp_path / 'a.jpg', tmp_path / 'a.png'
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = 6
    Image.new('RGB', (40, 30)).save(image, exif=exif)
    init_default_scope('mmseg')
    transforms = [
        dict(type='LoadImageFromFile', color_type=color_type), dict(type='LoadAnnotations'),
    ]  # fmt: skip
    dataset = SimpleNamespace(metainfo=dict(classes=('a',)), ignore_index=255)
    pipeline = CheckedPipeline(Compose([TRANSFORMS.build(item) for item in transforms]), dataset)
    height, width = (40, 30) if color_type == 'color' else (30, 40)

    def load(size, **annotated):
        Image.new('L', size).save(labels)
        common = dict(img_path=str(image), seg_map_path=str(labels), seg_fields=[])
        return pipeline(dict(common, reduce_zero_label=False, **annotated))

    assert load((width, height), width=width, height=height)['img'].shape == (height, width, 3)
    words = rf'labels have shape \({width}, {height}\), the image has \({height}, {width}\)'
    with pytest.raises(DataError, match=words):
        load((height, width))
    words = rf'image has shape \({height}, {width}\), annotations say \({width}, {height}\)'
    with pytest.raises(DataError, match=words):
        load((width, height), width=height, height=width)


def test_complete_jpegs_with_appended_data_are_taken(tmp_path):
    path = tmp_path / 'image.jpg'
    Image.new('RGB', (40, 30)).save(path)
    path.write_bytes(path.read_bytes() + bytes(5000))
    assert CheckedPipeline(lambda data: data, None)(dict(img_path=str(path)))


def test_only_labels_of_classes_have_one_channel(tmp_path):
    """Panoptic labels number segments, in three."""
    Image.new('RGB', (40, 30), (7, 1, 0)).save(tmp_path / 'a.png')
    data = dict(seg_map_path=str(tmp_path / 'a.png'))
    panoptic = SimpleNamespace(metainfo=dict(classes=('a',)))
    assert CheckedPipeline(dict, panoptic)(data) == data
    semantic = SimpleNamespace(metainfo=dict(classes=('a',)), ignore_index=255)
    assert CheckedPipeline(dict, semantic)(data) == data  # read by a transform of the user's
    init_default_scope('mmseg')
    loader = dict(type='LoadAnnotations')
    for step in (loader, dict(type='TestTimeAug', transforms=[[loader]])):
        pipeline = Compose([TRANSFORMS.build(step)])
        with pytest.raises(DataError, match="one channel of 8 bits, got Pillow mode 'RGB'"):
            CheckedPipeline(pipeline, semantic)(data)
