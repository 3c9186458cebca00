"""`tools/predict.py` reads images as `tools/test.py` does: predictions of one model are equal."""

import json
import pickle
from pathlib import Path

import cv2
import mmcv
import numpy as np
import pytest
from helpers.models import (
    CLASSES,
    CLASSIFICATION_MODEL,
    DETECTION_MODEL,
    SEGMENTATION_MODEL,
    save_model,
)
from helpers.tools import run_tool
from mmdet.datasets import CocoDataset
from mmengine.config import Config
from PIL import ExifTags, Image
from predict import Predictor

pytestmark = pytest.mark.usefixtures('in_process')
KINDS = [DETECTION_MODEL, SEGMENTATION_MODEL, CLASSIFICATION_MODEL]
AS_STORED = dict(color_type='unchanged', to_float32=True)
# Arguments of LoadImageFromFile, the channels of the network, the images by name.
READINGS = {
    'colour': (dict(), 3, 'rgb.png turned.jpg palette.png cmyk.jpg alpha.png deep.tif pixel.png '
                          'thin.png grey.png'),
    'colour, pillow': (dict(imdecode_backend='pillow'), 3, 'rgb.png turned.jpg grey.png'),
    'as turned': (dict(color_type='color_ignore_orientation'), 3, 'turned.jpg rgb.png'),
    'grey': (dict(color_type='grayscale'), 1, 'grey.png rgb.png turned.jpg'),
    '3 channels as stored': (AS_STORED, 3, 'rgb.png deep.png deep.tif'),
    '1 channel as stored': (AS_STORED, 1, 'grey.png deep_grey.png'),
    '4 channels as stored': (AS_STORED, 4, 'alpha.png deep_alpha.png'),
}  # fmt: skip


def write_images(folder):
    """Images of all kinds that the libraries read."""
    noise = np.random.default_rng(0)
    size = (40, 56)  # H, W

    def random(*channels, depth=8):
        values = noise.integers(0, 2**depth, (size[0] // 4, size[1] // 4, *channels))
        return np.kron(values, np.ones((4, 4, 1)[: values.ndim])).astype(
            np.uint8 if depth == 8 else np.uint16
        )

    cv2.imwrite(str(folder / 'deep.png'), random(3, depth=12))
    cv2.imwrite(str(folder / 'deep.tif'), random(3, depth=16))
    cv2.imwrite(str(folder / 'deep_grey.png'), random(depth=16))
    cv2.imwrite(str(folder / 'deep_alpha.png'), random(4, depth=16))
    cv2.imwrite(str(folder / 'alpha.png'), random(4))
    image = Image.fromarray(random(3))
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = 6
    image.save(folder / 'turned.jpg', exif=exif)
    image.save(folder / 'rgb.png')
    image.convert('L').save(folder / 'grey.png')
    image.convert('P').save(folder / 'palette.png')
    image.convert('CMYK').save(folder / 'cmyk.jpg')
    image.resize((1, 1)).save(folder / 'pixel.png')
    image.resize((100, 2)).save(folder / 'thin.png')


@pytest.fixture(scope='module')
def images(tmp_path_factory):
    folder = tmp_path_factory.mktemp('images')
    write_images(folder)
    return folder


@pytest.fixture(scope='module')
def models(tmp_path_factory):
    """Makes a tiny model of a kind for images of some channels."""
    made = {}

    def model(kind, channels):
        if (kind, channels) not in made:
            folder = tmp_path_factory.mktemp('model')
            preprocessor = 'model.data_preprocessor'
            if kind == CLASSIFICATION_MODEL:
                preprocessor = 'data_preprocessor'
            changes = {
                'model.backbone.in_channels': channels,
                f'{preprocessor}.mean': [100.0] * channels if channels < 4 else None,
                f'{preprocessor}.std': [60.0] * channels if channels < 4 else None,
            }
            if kind == CLASSIFICATION_MODEL:
                changes[f'{preprocessor}.num_classes'] = len(CLASSES)
            elif channels != 3:
                changes[f'{preprocessor}.bgr_to_rgb'] = False
            made[kind, channels] = save_model(kind, folder, changes)
        return made[kind, channels]

    return model


def config_of(kind, model, reading, folder, names):
    """The model's config with the named images as its test data; writes what these need."""
    config = Config.fromfile(model.config)
    shapes = {
        name: mmcv.imread(folder / name, flag=reading.get('color_type', 'color')).shape[:2]
        for name in names
    }
    data = dict(data_root=str(folder))
    if kind == DETECTION_MODEL:
        images = [
            dict(id=i, file_name=name, height=shapes[name][0], width=shapes[name][1])
            for i, name in enumerate(names)
        ]
        categories = [dict(id=i, name=n) for i, n in enumerate(CocoDataset.METAINFO['classes'])]
        content = dict(images=images, annotations=[], categories=categories)
        (folder / 'coco.json').write_text(json.dumps(content))
        data |= dict(ann_file='coco.json', data_prefix=dict(img=''))
    elif kind == SEGMENTATION_MODEL:
        (folder / 'names.txt').write_text('\n'.join(names))
        for name, shape in shapes.items():
            Image.fromarray(np.zeros(shape, np.uint8)).save(folder / f'{name}.labels.png')
        prefix = dict(img_path='', seg_map_path='')
        data |= dict(ann_file='names.txt', data_prefix=prefix)
        data |= dict(img_suffix='', seg_map_suffix='.labels.png')
    else:
        (folder / 'names.txt').write_text('\n'.join(f'{name} 0' for name in names))
        pipeline = config.test_dataloader.dataset.pipeline
        pipeline[1].backend = 'cv2'  # Pillow resizes only uint8
        data |= dict(type='CustomDataset', ann_file='names.txt', data_prefix='', classes=CLASSES)
        data |= dict(pipeline=pipeline, _delete_=True)
    config.merge_from_dict(dict(test_dataloader=dict(dataset=data, batch_size=1, num_workers=0,
                                                     persistent_workers=False)))  # fmt: skip
    config.test_dataloader.dataset.pipeline[0].update(reading)
    config.test_evaluator = []  # only the dump
    return config


def assert_drawn(folder, shapes):
    """Both tools drew the images as the network sees them, not black, under the same names."""
    for tool in ('drawn', 'out/pictures'):
        assert {path.stem for path in (folder / tool).iterdir()} == shapes.keys()
        for name, shape in shapes.items():
            drawing = cv2.imread(str(folder / tool / f'{name}.jpg'))
            assert drawing.std() > 10
            if tool == 'out/pictures':  # the others have the ground truth beside, or are enlarged
                assert drawing.shape[:2] == shape


@pytest.mark.parametrize(
    ('kind', 'reading'),
    [
        (kind, reading)
        for kind in KINDS
        for reading in (READINGS if kind == SEGMENTATION_MODEL else ('colour', 'as turned'))
    ],
)
def test_predictions_are_equal(kind, reading, images, models, tmp_path):
    settings, channels, names = READINGS[reading]
    names = names.split()
    if kind == SEGMENTATION_MODEL and 'pixel.png' in names:
        names.remove('pixel.png')  # mmseg reads labels of one pixel as a number
    model = models(kind, channels)
    config = config_of(kind, model, settings, images, names)
    path = tmp_path / 'config.py'
    config.dump(path)
    is_drawn = kind == SEGMENTATION_MODEL or reading == 'as turned'  # drawing takes long
    run_tool('test', path, model.checkpoint, '--work-dir', tmp_path, '--out', tmp_path / 'test.pkl',
             *(['--show-dir', tmp_path / 'drawn'] if is_drawn else []))  # fmt: skip
    samples = pickle.loads((tmp_path / 'test.pkl').read_bytes())
    assert [Path(sample['img_path']).name for sample in samples] == names
    run_tool('predict', path, model.checkpoint, *(images / name for name in names), '--out',
             tmp_path / 'out', '--device', 'cpu', '--no-deploy', '--score-thr', 0,
             *([] if is_drawn else ['--no-pictures']))  # fmt: skip
    files = {file.stem: json.loads(file.read_text()) for file in tmp_path.glob('out/json/*')}
    found = {Path(content['image']).name: content for content in files.values()}
    assert sorted(found) == sorted(names)
    if is_drawn:
        assert_drawn(tmp_path, {n: (c['height'], c['width']) for n, c in files.items()})
    for name, sample in zip(names, samples, strict=True):
        content = found[name]
        assert (content['height'], content['width']) == tuple(sample['ori_shape'])
        if kind == DETECTION_MODEL:
            expected = sample['pred_instances']
            instances = content['instances']
            assert [item['box'] for item in instances] == expected['bboxes'].tolist()
            assert [item['score'] for item in instances] == expected['scores'].tolist()
            assert [item['label'] for item in instances] == expected['labels'].tolist()
            masks = [mask['counts'].decode() for mask in expected['masks']]
            assert [item['mask']['counts'] for item in instances] == masks
            assert len(instances) > 0
        elif kind == SEGMENTATION_MODEL:
            labels = cv2.imread(str(tmp_path / 'out' / content['labels']), cv2.IMREAD_UNCHANGED)
            np.testing.assert_array_equal(labels, sample['pred_sem_seg']['data'][0] + 1)
        else:
            scores = {item['label']: item['score'] for item in content['classes']}
            best = sample['pred_score'].topk(5)
            assert scores == dict(zip(best.indices.tolist(), best.values.tolist()))


@pytest.fixture(scope='module')
def film(tmp_path_factory):
    """A colour video of two frames."""
    path = tmp_path_factory.mktemp('film') / 'film.mp4'
    video = cv2.VideoWriter(str(path), cv2.VideoWriter.fourcc(*'mp4v'), 10, (64, 64))
    for value in (50, 200):
        video.write(np.full((64, 64, 3), (value, 0, 255 - value), np.uint8))
    video.release()
    return path


@pytest.mark.parametrize('reading', ['grey', '3 channels as stored'])
def test_frames_are_read_like_files(reading, film, images, models, tmp_path):
    settings, channels, _ = READINGS[reading]
    model = models(SEGMENTATION_MODEL, channels)
    config = config_of(SEGMENTATION_MODEL, model, settings, images, ['rgb.png'])
    predictor = Predictor(config, str(model.checkpoint), 'cpu', 0.0)
    _, frame = cv2.VideoCapture(str(film)).read()
    cv2.imwrite(str(tmp_path / 'frame.png'), frame)
    loaded, prepared = predictor.load(tmp_path / 'frame.png'), predictor.prepare(frame)
    assert loaded['inputs'].dtype == prepared['inputs'].dtype
    np.testing.assert_array_equal(loaded['inputs'], prepared['inputs'])


def test_inputs_of_other_channels_are_refused(film, images, models, tmp_path):
    """And listed; the others are predicted, and no file of half a video is left."""
    settings, channels, _ = READINGS['4 channels as stored']
    model = models(SEGMENTATION_MODEL, channels)
    config = config_of(SEGMENTATION_MODEL, model, settings, images, ['alpha.png'])
    path = tmp_path / 'config.py'
    config.dump(path)
    inputs = [images / 'rgb.png', images / 'alpha.png', film]
    output = run_tool('predict', path, model.checkpoint, *inputs, '--out', tmp_path / 'out',
                      '--device', 'cpu', succeeds=False)  # fmt: skip
    assert '1 of 3 inputs predicted' in output
    for what in ('rgb.png', 'film.mp4'):
        reason = 'it has 3 channels after loading, the network takes 4 (color_type of'
        assert f'{what}: {reason}' in output
    assert [path.name for path in (tmp_path / 'out/json').iterdir()] == ['alpha.json']


def test_binary_head(images, tmp_path):
    """With `out_channels=1`, also if the dataset has one class; too large images are listed."""
    heads = {f'model.{head}_head.out_channels': 1 for head in ('decode', 'auxiliary')}
    heads |= {key.replace('out_channels', 'num_classes'): 1 for key in heads}
    heads['model.decode_head.threshold'] = 0.5
    model = save_model(SEGMENTATION_MODEL, tmp_path, heads)
    config = Config.fromfile(model.config)
    meta = dict(classes=['crack'], palette=[[255, 0, 0]])
    config.test_dataloader.dataset.update(type='BaseSegDataset', metainfo=meta)
    config.dump(tmp_path / 'binary.py')
    run_tool('predict', tmp_path / 'binary.py', model.checkpoint, images / 'rgb.png', '--out',
             tmp_path / 'out', '--device', 'cpu')  # fmt: skip
    (content,) = (json.loads(file.read_text()) for file in (tmp_path / 'out/json').iterdir())
    assert {0: 'crack', 1: '1'}.items() >= {(c['label'], c['class']) for c in content['classes']}
    labels = cv2.imread(str(tmp_path / 'out' / content['labels']), cv2.IMREAD_UNCHANGED)
    assert sorted(np.unique(labels)) == sorted(c['value'] for c in content['classes'])


def test_drawings_of_several_datasets_have_names_of_their_own(models, tmp_path):
    """x.png and x.jpg of one dataset, x.png of another; with test-time augmentation too."""
    model = models(SEGMENTATION_MODEL, 3)
    parts = []
    for part, names in {'a': ['x.png', 'x.jpg'], 'b': ['x.png']}.items():
        (tmp_path / part).mkdir()
        for name in names:
            Image.new('RGB', (32, 32)).save(tmp_path / part / name)
        config = config_of(SEGMENTATION_MODEL, model, {}, tmp_path / part, names)
        parts.append(config.test_dataloader.dataset.to_dict())
    config.test_dataloader.dataset = dict(type='ConcatDataset', datasets=parts)
    config.tta_pipeline[1].transforms[0] = [dict(type='Resize', scale=(32, 32), keep_ratio=True)]
    config.dump(tmp_path / 'config.py')
    run_tool('test', tmp_path / 'config.py', model.checkpoint, '--tta', '--work-dir', tmp_path,
             '--show-dir', tmp_path / 'drawn')  # fmt: skip
    drawn = {
        str(path.relative_to(tmp_path / 'drawn')) for path in (tmp_path / 'drawn').rglob('*.*')
    }
    assert drawn == {'a/x.jpg', 'a/x_2.jpg', 'b/x.jpg'}
