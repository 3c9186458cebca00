"""Prediction on images and videos, by the tool and by the host libraries' own inferencers."""

import json
import os
import shutil
from pathlib import Path

import cv2
import numpy as np
import pytest
from helpers import ROOT
from helpers.models import (
    CLASSES,
    CLASSIFICATION_MODEL,
    DETECTION_MODEL,
    SEGMENTATION_MODEL,
    save_model,
)
from helpers.pages import read_blocks
from helpers.simulated_graphs import StandIn
from mmdet.apis import DetInferencer
from mmdet.datasets import CocoDataset
from mmengine.registry import init_default_scope
from mmpretrain.apis import ImageClassificationInferencer
from mmseg.apis import MMSegInferencer
from predict import Predictor, find_sources, main
from pycocotools import mask as coco_mask

pytestmark = pytest.mark.usefixtures('in_process')
KINDS = [DETECTION_MODEL, SEGMENTATION_MODEL, CLASSIFICATION_MODEL]


@pytest.fixture(scope='module')
def models(tmp_path_factory):
    """A tiny model of each kind with random weights."""
    folder = tmp_path_factory.mktemp('models')
    return {kind: save_model(kind, folder) for kind in KINDS}


@pytest.fixture
def folder(sample, tmp_path):
    """Two images of the sample, one in a subfolder, beside another file."""
    (tmp_path / 'in put/tief').mkdir(parents=True)
    images = sorted((sample / 'coco/val2017').iterdir())
    shutil.copy(images[0], tmp_path / 'in put/erstes Bild ä.jpg')
    shutil.copy(images[1], tmp_path / 'in put/tief/zwei.jpg')
    (tmp_path / 'in put/notes.txt').write_text('no image')
    return tmp_path / 'in put'


def predict(model, out, *arguments):
    arguments = [model.config, model.checkpoint, *arguments, '--out', out, '--device', 'cpu']
    main([str(argument) for argument in arguments])
    return {
        str(file.relative_to(out / 'json').with_suffix('')): json.loads(file.read_text('utf-8'))
        for file in (out / 'json').rglob('*.json')
    }


def assert_drawn(drawing, image):
    drawing, image = (cv2.imdecode(np.fromfile(p, np.uint8), 1) for p in (drawing, image))
    assert drawing.shape == image.shape
    assert np.abs(drawing.astype(int) - image).max() > 60


def test_detection(models, folder, tmp_path):
    model, out = models[DETECTION_MODEL], tmp_path / 'out'
    inferencer = DetInferencer(str(model.config), str(model.checkpoint), 'cpu')
    (expected,) = inferencer(str(folder / 'tief/zwei.jpg'))['predictions']
    found = predict(model, out, folder, '--score-thr', 0, '--no-deploy')
    assert sorted(found) == ['erstes Bild ä', 'tief/zwei']
    for name, content in found.items():
        assert (content['width'], content['height']) == (64, 64)
        assert_drawn(out / f'pictures/{name}.jpg', folder / f'{name}.jpg')
    instances = found['tief/zwei']['instances']
    assert len(instances) == 20
    assert [instance['label'] for instance in instances] == expected['labels']
    assert [instance['score'] for instance in instances] == pytest.approx(expected['scores'])
    boxes = np.array([instance['box'] for instance in instances])
    np.testing.assert_allclose(boxes, expected['bboxes'], atol=1e-3)
    for instance, mask in zip(instances, expected['masks'], strict=True):
        assert coco_mask.area(instance['mask']) == coco_mask.area(mask)
        assert coco_mask.decode(instance['mask']).shape == (64, 64)
        assert instance['class'] == CocoDataset.METAINFO['classes'][instance['label']]


def test_the_page_calls_the_inferencer_of_mmdet(models, folder, tmp_path, monkeypatch):
    (block,) = (b for b in read_blocks(ROOT / 'docs/predict.md') if b.language == 'python')
    config = tmp_path / 'configs/detection/mask_rcnn_conv2former_t.py'
    config.parent.mkdir(parents=True)
    shutil.copy(models[DETECTION_MODEL].config, config)
    shutil.copy(models[DETECTION_MODEL].checkpoint, tmp_path / 'epoch_36.pth')
    shutil.copy(folder / 'tief/zwei.jpg', tmp_path / 'photo.jpg')
    monkeypatch.chdir(tmp_path)
    exec(block.text, {})
    assert (tmp_path / 'predictions/vis/photo.jpg').exists()


def test_low_scores_are_dropped(models, folder, tmp_path):
    model = models[DETECTION_MODEL]
    everything = predict(model, tmp_path / 'a', folder, '--score-thr', 0, '--no-pictures')
    scores = [item['score'] for item in everything['tief/zwei']['instances']]
    limit = float(np.median(scores))
    found = predict(model, tmp_path / 'b', folder, '--score-thr', limit, '--no-pictures')
    kept = [item['score'] for item in found['tief/zwei']['instances']]
    assert kept == [score for score in scores if score >= limit]
    assert 0 < len(kept) < len(scores)
    assert not (tmp_path / 'b/pictures').exists()


def test_threshold_of_the_config_is_lowered(models, folder, tmp_path):
    """With its own threshold of 1 the detector would find nothing."""
    options = ['--no-pictures', '--cfg-options', 'model.test_cfg.rcnn.score_thr=1.0']
    model, out = models[DETECTION_MODEL], tmp_path / 'out'
    found = predict(model, out, folder, '--score-thr', 0, *options)
    assert found['tief/zwei']['instances']


def test_segmentation(models, folder, tmp_path):
    model, out = models[SEGMENTATION_MODEL], tmp_path / 'out'
    inferencer = MMSegInferencer(
        str(model.config), str(model.checkpoint), dataset_name='ade20k', device='cpu'
    )
    expected = inferencer(str(folder / 'tief/zwei.jpg'))['predictions']
    content = predict(model, out, folder, '--no-deploy')['tief/zwei']
    labels = cv2.imread(str(out / content['labels']), cv2.IMREAD_UNCHANGED)
    np.testing.assert_array_equal(labels, expected + 1)  # 0 is "other" in ADE20K's annotations
    assert sum(item['pixels'] for item in content['classes']) == 64 * 64
    first = content['classes'][0]
    assert first['pixels'] == (labels == first['value']).sum()
    assert inferencer.visualizer.dataset_meta['classes'][first['label']] == first['class']
    assert_drawn(out / 'pictures/tief/zwei.jpg', folder / 'tief/zwei.jpg')


def test_classification(models, folder, tmp_path):
    model, out = models[CLASSIFICATION_MODEL], tmp_path / 'out'
    init_default_scope('mmpretrain')  # another one may remain from other tests
    inferencer = ImageClassificationInferencer(
        str(model.config), str(model.checkpoint), device='cpu'
    )
    (expected,) = inferencer(str(folder / 'tief/zwei.jpg'))
    classes = predict(model, out, folder, '--no-deploy')['tief/zwei']['classes']
    assert [item['class'] for item in classes] == [CLASSES[item['label']] for item in classes]
    assert classes[0]['class'] == expected['pred_class']
    best = np.sort(expected['pred_scores'])[:-6:-1]
    assert [item['score'] for item in classes] == pytest.approx(best.tolist(), rel=1e-5)
    assert_drawn(out / 'pictures/erstes Bild ä.jpg', folder / 'erstes Bild ä.jpg')


def test_cuda_graphs_predict_the_same(simulated, models, folder, tmp_path, monkeypatch):
    """With inputs of one size, as a classifier has; a second size is refused."""
    monkeypatch.setattr('predict.check_cuda_graphs', lambda device: None)
    model = models[CLASSIFICATION_MODEL]
    plain = predict(model, tmp_path / 'plain', folder)
    found = predict(model, tmp_path / 'graphs', folder, '--cuda-graphs')
    assert (StandIn.made, StandIn.replays) == (1, 2)
    for name, content in plain.items():
        for one, other in zip(found[name]['classes'], content['classes'], strict=True):
            assert one == dict(other, score=pytest.approx(other['score'], abs=1e-4))
    cv2.imwrite(str(folder / 'wide.png'), np.zeros((64, 256, 3), np.uint8))
    with pytest.raises(
        SystemExit, match=r'wide\.png: CUDA graphs need inputs of one size: captured'
    ):
        predict(models[DETECTION_MODEL], tmp_path / 'sizes', folder, '--cuda-graphs')


def test_folded_backbone_predicts_the_same(models, folder, tmp_path):
    options = [folder / 'tief', '--score-thr', 0, '--no-pictures']
    plain, folded = (
        predict(models[DETECTION_MODEL], tmp_path / out, *options, *more)['zwei']['instances']
        for out, more in (('a', ['--no-deploy']), ('b', []))
    )
    for one, other in zip(plain, folded, strict=True):
        assert one['score'] == pytest.approx(other['score'], abs=1e-4)
        np.testing.assert_allclose(one['box'], other['box'], atol=0.01)
    assert plain != folded  # by rounding


def write_video(path, images, rate=10):
    video = cv2.VideoWriter(str(path), cv2.VideoWriter_fourcc(*'mp4v'), rate, (64, 64))
    for image in images:
        video.write(cv2.imread(str(image)))
    video.release()


@pytest.mark.parametrize('kind', KINDS)
def test_video(kind, models, sample, tmp_path):
    write_video(tmp_path / 'der Film.mp4', sorted((sample / 'coco/val2017').iterdir())[:3])
    out = tmp_path / 'out'
    content = predict(models[kind], out, tmp_path / '*.mp4', '--batch-size', 2)['der Film']
    assert [frame['frame'] for frame in content['frames']] == [0, 1, 2]
    assert {'instances', 'classes'} & set(content['frames'][0])
    assert content['frames_per_second'] == 10
    video = cv2.VideoCapture(str(out / 'pictures/der Film.mp4'))
    assert video.get(cv2.CAP_PROP_FPS) == 10
    shapes = [video.read()[1].shape for _ in range(3)]
    assert shapes == [(64, 64, 3)] * 3
    assert not video.read()[0]


def test_video_that_fails_halfway(models, sample, tmp_path, monkeypatch):
    write_video(tmp_path / 'film.mp4', sorted((sample / 'coco/val2017').iterdir())[:3])
    describe, described = Predictor.describe, []

    def fail_at_the_third(self, sample):
        described.append(sample)
        if len(described) == 3:
            raise RuntimeError('out of memory')
        return describe(self, sample)

    monkeypatch.setattr(Predictor, 'describe', fail_at_the_third)
    out = tmp_path / 'out'
    with pytest.raises(SystemExit, match=r'film\.mp4: RuntimeError: out of memory'):
        predict(models[SEGMENTATION_MODEL], out, tmp_path / 'film.mp4')
    frames = json.loads((out / 'json/film.json').read_text())['frames']
    assert [frame['frame'] for frame in frames] == [0, 1]
    video = cv2.VideoCapture(str(out / 'pictures/film.mp4'))
    assert [video.read()[0] for _ in range(3)] == [True, True, False]


def test_unreadable_inputs_are_listed_and_the_others_predicted(models, folder, tmp_path, capsys):
    (folder / 'a.jpg').write_text('no image')
    whole = (folder / 'tief/zwei.jpg').read_bytes()
    (folder / 'cut off.jpg').write_bytes(whole[: len(whole) // 2])
    (folder / 'film.mp4').write_bytes(b'no film')
    cv2.imwrite(str(folder / 'thin.png'), np.zeros((2, 200, 3), np.uint8))
    (tmp_path / 'out/json').mkdir(parents=True)
    (tmp_path / 'out/json/tief').write_text('not a folder')
    with pytest.raises(SystemExit) as stop:
        predict(models[SEGMENTATION_MODEL], tmp_path / 'out', folder, '--batch-size', 3)
    first, *lines = str(stop.value).splitlines()
    assert first == 'error: these could not be predicted:'
    for line, message in zip(
        lines,
        [
            'a.jpg: AssertionError: failed to load image',
            'cut off.jpg: the file is truncated or broken: image file is truncated',
            'zwei.jpg: FileExistsError: ',
            'film.mp4: OpenCV finds no frames in it',
        ],
        strict=True,
    ):
        assert message in line
    assert '2 of 6 inputs predicted' in capsys.readouterr().out
    names = {path.name for path in (tmp_path / 'out/json').rglob('*.json')}
    assert names == {'erstes Bild ä.json', 'thin.json'}  # padded to 32 rows


def test_name_that_is_not_utf_8(models, folder, tmp_path):
    """As of archives from systems in Latin-1."""
    name = os.fsdecode(b'caf\xe9.jpg')
    shutil.copy(folder / 'tief/zwei.jpg', folder / name)
    found = predict(models[SEGMENTATION_MODEL], tmp_path / 'out', folder)
    assert sorted(found) == ['caf\udce9', 'erstes Bild ä', 'tief/zwei']
    assert found['caf\udce9']['image'] == str(folder / name)


def test_inputs(folder, tmp_path, monkeypatch):
    shutil.copy(folder / 'tief/zwei.jpg', folder / 'tief/zwei.png')
    (folder / 'out/pictures').mkdir(parents=True)
    shutil.copy(folder / 'tief/zwei.jpg', folder / 'out/pictures/result.jpg')
    monkeypatch.chdir(folder)
    found = find_sources(['tief/*', 'tief/zwei.jpg', '.', str(folder)], folder / 'out')
    assert [(str(source.path.relative_to(folder)), source.name) for source in found] == [
        ('tief/zwei.jpg', 'zwei'),
        ('tief/zwei.png', 'zwei_2'),
        ('erstes Bild ä.jpg', 'erstes Bild ä'),
    ]
    (folder / '[1].jpg').write_bytes(b'')
    assert [source.name for source in find_sources(['[1].jpg'], tmp_path)] == ['[1]']
    (folder / 'film.mp4').symlink_to(folder / 'notes.txt')  # as DVC stores files
    assert find_sources(['film.mp4'], tmp_path)[0].is_video


@pytest.mark.parametrize('inputs', [['.'], ['tief'], ['tief/zwei.jpg']])
def test_results_beside_the_inputs(inputs, folder, monkeypatch):
    monkeypatch.chdir(folder)
    assert 'zwei' in find_sources(inputs, Path())[-1].name
    assert 'zwei' in find_sources(inputs, Path('tief'))[-1].name


@pytest.mark.parametrize('kind', ['pictures', 'labels'])
def test_inputs_are_not_overwritten(kind, folder, monkeypatch):
    monkeypatch.chdir(folder)
    name = f'{kind}/zwei.{"jpg" if kind == "pictures" else "png"}'
    (folder / kind).mkdir()
    shutil.copy(folder / 'tief/zwei.jpg', name)
    for text in (name, kind):
        with pytest.raises(SystemExit, match=f'error: input {text} has only results in'):
            find_sources([text], Path())


REFUSALS = {
    'input': (['nowhere.jpg'], 'error: input nowhere.jpg does not exist'),
    'pattern': (['nowhere/*.jpg'], 'error: input nowhere/*.jpg has no images and no videos'),
    'device': (['FOLDER', '--device', 'tpu'], 'error: --device tpu cannot be used: Expected one'),
    'score': (['FOLDER', '--score-thr', '2'], '--score-thr must be between 0 and 1, got 2'),
    'output': (['FOLDER', '--out', str(ROOT / 'Makefile')], 'cannot be a folder: File exists'),
    'batch size': (['FOLDER', '--batch-size', '0'], '--batch-size: must be at least 1, got 0'),
}  # fmt: skip


@pytest.mark.parametrize('case', REFUSALS)
def test_refuses_with_one_message(case, models, folder, tmp_path, capsys):
    arguments, message = REFUSALS[case]
    arguments = [str(folder) if argument == 'FOLDER' else argument for argument in arguments]
    model = models[DETECTION_MODEL]
    with pytest.raises(SystemExit) as stop:
        main([str(model.config), str(model.checkpoint), '--out', str(tmp_path / 'out'), *arguments])
    assert message in f'{stop.value}{capsys.readouterr().err}'
    assert not (tmp_path / 'out').exists()


def test_refuses_checkpoints_of_other_networks(models, folder, tmp_path):
    (tmp_path / 'text.pth').write_text('no checkpoint')
    for checkpoint, message in {
        models[SEGMENTATION_MODEL].checkpoint: 'does not fit this MaskRCNN',
        tmp_path / 'text.pth': 'cannot be read',
        tmp_path / 'none.pth': 'none.pth.* does not exist',
    }.items():
        arguments = [models[DETECTION_MODEL].config, checkpoint, folder, '--out', tmp_path / 'out']
        with pytest.raises(SystemExit, match=message):
            main([str(argument) for argument in arguments])


def test_links_among_results_are_not_followed(models, folder, tmp_path):
    out, image = tmp_path / 'out', folder / 'tief/zwei.jpg'
    before = image.read_bytes()
    (out / 'pictures').mkdir(parents=True)
    (out / 'pictures/zwei.jpg').symlink_to(image)
    predict(models[DETECTION_MODEL], out, image)
    assert image.read_bytes() == before
    assert not (out / 'pictures/zwei.jpg').is_symlink()
