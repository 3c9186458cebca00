"""Prediction on pictures and videos, by the tool and by the host libraries' own inferencers."""

import json
import shutil

import cv2
import numpy as np
import pytest
import torch
from demo import CONFIG as DETECTION
from demo import MODEL
from helpers import ROOT
from helpers.simulated_graphs import StandIn
from mmdet.apis import DetInferencer
from mmengine.config import Config, DictAction
from mmengine.model import revert_sync_batchnorm
from mmengine.registry import MODELS, init_default_scope
from mmpretrain.apis import ImageClassificationInferencer
from mmseg.apis import MMSegInferencer
from predict import find_sources, main
from pycocotools import mask as coco_mask

pytestmark = pytest.mark.usefixtures('guarded')

SEGMENTATION = 'configs/segmentation/upernet_conv2former_n.py'
CLASSIFICATION = 'configs/classification/conv2former_n_in1k.py'
SCALE = 'test_dataloader.dataset.pipeline.1.scale=(64,64)'
CLASSES = ['Auto', 'Käse', 'Haus', 'Baum', 'See', 'Ei', 'Uhr']
OPTIONS = {
    DETECTION: [
        *MODEL,
        SCALE,
        'model.backbone.arch=nano',
        'model.neck.in_channels=[64,128,256,512]',
        'model.test_cfg.rcnn.score_thr=0.0',  # else untrained weights predict nothing
        'model.test_cfg.rcnn.max_per_img=10',
    ],
    SEGMENTATION: [
        SCALE,
        'model.backbone.init_cfg=None',
        'model.backbone.layer_scale_init_value=0.1',
        'model.decode_head.channels=32',
        'model.auxiliary_head.channels=32',
        'model.test_cfg.crop_size=(64,64)',
        'model.test_cfg.stride=(42,42)',
    ],
    CLASSIFICATION: [
        'model.backbone.layer_scale_init_value=0.1',
        f'model.head.num_classes={len(CLASSES)}',
        'test_dataloader.dataset.pipeline.1.scale=64',
        'test_dataloader.dataset.pipeline.2.crop_size=64',
    ],
}


def config_of(path, *options):
    """The config in small, as `--cfg-options` changes it."""
    config = Config.fromfile(ROOT / path)
    pairs = (option.split('=', 1) for option in (*OPTIONS[path], *options))
    config.merge_from_dict({key: DictAction._parse_iterable(value) for key, value in pairs})
    return config


@pytest.fixture(scope='module')
def checkpoints(tmp_path_factory):
    """A checkpoint of each config, of initial weights that are not all alike."""
    folder = tmp_path_factory.mktemp('checkpoints')
    files = {}
    for index, path in enumerate(OPTIONS):
        torch.manual_seed(0)
        config = config_of(path)
        init_default_scope(config.default_scope)
        model = revert_sync_batchnorm(MODELS.build(config.model))
        for parameter in model.parameters():
            parameter.data += 0.05 * torch.randn_like(parameter)
        files[path] = folder / f'{index}.pth'
        meta = dict(dataset_meta=dict(classes=CLASSES)) if path == CLASSIFICATION else {}
        torch.save(dict(state_dict=model.state_dict(), meta=meta), files[path])
    return files


@pytest.fixture
def folder(sample, tmp_path):
    """Two pictures of the sample, one below the other, beside what is none."""
    (tmp_path / 'in put/tief').mkdir(parents=True)
    pictures = sorted((sample / 'coco/val2017').iterdir())
    shutil.copy(pictures[0], tmp_path / 'in put/erstes Bild ä.jpg')
    shutil.copy(pictures[1], tmp_path / 'in put/tief/zwei.jpg')
    (tmp_path / 'in put/notes.txt').write_text('no picture')
    return tmp_path / 'in put'


def predict(path, checkpoints, out, *arguments):
    options = ['--device', 'cpu', '--cfg-options', *OPTIONS[path]]
    main([str(ROOT / path), str(checkpoints[path]), *map(str, arguments), '--out', str(out),
          *options])  # fmt: skip
    return {
        str(file.relative_to(out / 'json').with_suffix('')): json.loads(file.read_text('utf-8'))
        for file in (out / 'json').rglob('*.json')
    }


def test_detection(checkpoints, folder, tmp_path):
    out = tmp_path / 'out'
    found = predict(DETECTION, checkpoints, out, folder, '--score-thr', 0.001)
    assert sorted(found) == ['erstes Bild ä', 'tief/zwei']
    for name, content in found.items():
        assert (content['width'], content['height']) == (64, 64)
        assert content['instances']
        for instance in content['instances']:
            left, top, right, bottom = instance['box']
            assert 0 <= left <= right <= 64
            assert 0 <= top <= bottom <= 64
            assert instance['score'] >= 0.001
            assert coco_mask.decode(instance['mask']).shape == (64, 64)
        picture = cv2.imdecode(np.fromfile(out / f'pictures/{name}.jpg', np.uint8), 1)
        source = cv2.imdecode(np.fromfile(folder / f'{name}.jpg', np.uint8), 1)
        assert picture.shape == source.shape
        assert np.abs(picture.astype(int) - source).max() > 60


def test_as_the_inferencer_of_mmdet(checkpoints, folder, tmp_path):
    """Which works by the path of a config; masks are compared as areas."""
    config = tmp_path / 'small.py'
    config_of(DETECTION).dump(config)
    inferencer = DetInferencer(str(config), str(checkpoints[DETECTION]), 'cpu')
    (expected,) = inferencer(str(folder / 'tief/zwei.jpg'))['predictions']
    content = predict(DETECTION, checkpoints, tmp_path / 'out', folder / 'tief', '--score-thr', 0,
                      '--no-deploy', '--no-pictures')['zwei']  # fmt: skip
    found = content['instances']
    assert [instance['label'] for instance in found] == expected['labels']
    assert [instance['score'] for instance in found] == pytest.approx(expected['scores'])
    boxes = np.array([instance['box'] for instance in found])
    np.testing.assert_allclose(boxes, expected['bboxes'], atol=1e-3)
    areas = [coco_mask.area(instance['mask']) for instance in found]
    assert areas == [coco_mask.area(mask) for mask in expected['masks']]
    names = {instance['label']: instance['class'] for instance in found}
    assert all(inferencer.model.dataset_meta['classes'][i] == names[i] for i in names)
    assert not (tmp_path / 'out/pictures').exists()


def test_segmentation(checkpoints, folder, tmp_path):
    config = tmp_path / 'small.py'
    config_of(SEGMENTATION).dump(config)
    inferencer = MMSegInferencer(
        str(config), str(checkpoints[SEGMENTATION]), dataset_name='ade20k', device='cpu'
    )
    expected = inferencer(str(folder / 'tief/zwei.jpg'))['predictions']
    out = tmp_path / 'out'
    content = predict(SEGMENTATION, checkpoints, out, folder, '--no-deploy')['tief/zwei']
    labels = cv2.imread(str(out / content['labels']), cv2.IMREAD_UNCHANGED)
    np.testing.assert_array_equal(labels, expected + 1)  # 0 is "other" in ADE20K's annotations
    assert sum(item['pixels'] for item in content['classes']) == 64 * 64
    first = content['classes'][0]
    assert first['pixels'] == (labels == first['value']).sum()
    assert inferencer.visualizer.dataset_meta['classes'][first['label']] == first['class']
    assert cv2.imread(str(out / 'pictures/tief/zwei.jpg')).shape == (64, 64, 3)


def test_classification(checkpoints, folder, tmp_path):
    config = tmp_path / 'small.py'
    config_of(CLASSIFICATION).dump(config)
    init_default_scope('mmpretrain')  # another one is left over from other tests
    inferencer = ImageClassificationInferencer(
        str(config), str(checkpoints[CLASSIFICATION]), device='cpu'
    )
    (expected,) = inferencer(str(folder / 'tief/zwei.jpg'))
    found = predict(CLASSIFICATION, checkpoints, tmp_path / 'out', folder, '--no-deploy')
    classes = found['tief/zwei']['classes']
    assert [item['class'] for item in classes] == [CLASSES[item['label']] for item in classes]
    assert classes[0]['class'] == expected['pred_class']
    best = np.sort(expected['pred_scores'])[:-6:-1]
    assert [item['score'] for item in classes] == pytest.approx(best.tolist(), rel=1e-5)
    assert (tmp_path / 'out/pictures/erstes Bild ä.jpg').stat().st_size > 500


def test_cuda_graphs_predict_the_same(simulated, checkpoints, folder, tmp_path, monkeypatch):
    """One size as the classifier's pipeline makes it, and pictures of several of a detector."""
    monkeypatch.setattr('predict.check_cuda_graphs', lambda device: None)
    plain = predict(CLASSIFICATION, checkpoints, tmp_path / 'plain', folder)
    found = predict(CLASSIFICATION, checkpoints, tmp_path / 'graphs', folder, '--cuda-graphs')
    assert (StandIn.made, StandIn.replays) == (1, 2)
    for name, content in plain.items():
        for one, other in zip(found[name]['classes'], content['classes']):
            assert one == dict(other, score=pytest.approx(other['score'], abs=1e-4))
    cv2.imwrite(str(folder / 'wide.png'), np.zeros((64, 256, 3), np.uint8))
    with pytest.raises(
        SystemExit, match=r'wide\.png: CUDA graphs need inputs of one size: captured'
    ):
        predict(DETECTION, checkpoints, tmp_path / 'sizes', folder, '--cuda-graphs')


def test_form_for_inference_predicts_the_same(checkpoints, folder, tmp_path):
    options = ['--score-thr', 0, '--no-pictures']
    plain = predict(DETECTION, checkpoints, tmp_path / 'a', folder, *options, '--no-deploy')
    deployed = predict(DETECTION, checkpoints, tmp_path / 'b', folder, *options)
    for name, content in plain.items():
        for one, other in zip(content['instances'], deployed[name]['instances'], strict=True):
            assert one['score'] == pytest.approx(other['score'], abs=1e-4)
            np.testing.assert_allclose(one['box'], other['box'], atol=0.01)
    first, second = (
        predict(SEGMENTATION, checkpoints, tmp_path / out, folder, '--no-pictures', *option)
        for out, option in (('c', ['--no-deploy']), ('d', []))
    )
    for name in first:
        one, other = (
            cv2.imread(str(tmp_path / out / f'labels/{name}.png'), cv2.IMREAD_UNCHANGED)
            if name.isascii()
            else np.zeros(1)
            for out in 'cd'
        )
        assert (one != other).mean() < 0.002  # rounding decides where two classes are as likely
    assert second.keys() == first.keys()


def write_video(path, pictures, rate=10):
    video = cv2.VideoWriter(str(path), cv2.VideoWriter_fourcc(*'mp4v'), rate, (64, 64))
    for picture in pictures:
        video.write(cv2.imread(str(picture)))
    video.release()


def read_video(path):
    video = cv2.VideoCapture(str(path))
    frames = []
    while (frame := video.read())[0]:
        frames.append(frame[1])
    return frames, video.get(cv2.CAP_PROP_FPS)


@pytest.mark.parametrize('path', OPTIONS)
def test_video(path, checkpoints, sample, tmp_path):
    pictures = sorted((sample / 'coco/val2017').iterdir())[:5]
    write_video(tmp_path / 'der Film.mp4', pictures)
    out = tmp_path / 'out'
    found = predict(path, checkpoints, out, tmp_path / '*.mp4', '--batch-size', 2)
    content = found['der Film']
    assert [frame['frame'] for frame in content['frames']] == [0, 1, 2, 3, 4]
    assert {'instances', 'classes'} & set(content['frames'][0])
    frames, rate = read_video(out / 'pictures/der Film.mp4')
    assert (len(frames), rate) == (5, 10)
    assert content['frames_per_second'] == 10
    assert frames[0].shape == (64, 64, 3)


def test_what_cannot_be_read_is_named_and_the_rest_goes_on(checkpoints, folder, tmp_path, capsys):
    (folder / 'a.jpg').write_text('no picture')
    whole = (folder / 'tief/zwei.jpg').read_bytes()
    (folder / 'cut off.jpg').write_bytes(whole[: len(whole) // 2])
    (folder / 'film.mp4').write_bytes(b'no film')
    cv2.imwrite(str(folder / 'thin.png'), np.zeros((2, 200, 3), np.uint8))
    with pytest.raises(SystemExit) as stop:
        predict(SEGMENTATION, checkpoints, tmp_path / 'out', folder, '--batch-size', 3)
    message = str(stop.value)
    assert message.startswith('error: these could not be predicted:')
    assert 'a.jpg: cannot be read: cannot identify' in message
    assert 'cut off.jpg: cannot be read: image file is truncated' in message
    assert 'film.mp4: cannot be read: OpenCV finds no frames' in message
    assert len(message.splitlines()) == 4
    assert '3 of 6 inputs predicted' in capsys.readouterr().out
    names = {path.name for path in (tmp_path / 'out/json').rglob('*.json')}
    assert len(names) == 3
    assert 'thin.json' in names  # padded to the least that the backbone takes


def test_inputs(folder, tmp_path, monkeypatch):
    shutil.copy(folder / 'tief/zwei.jpg', folder / 'tief/zwei.png')
    (folder / 'out').mkdir()
    shutil.copy(folder / 'tief/zwei.jpg', folder / 'out/result.jpg')
    monkeypatch.chdir(folder)
    found = find_sources(['tief/*', 'tief/zwei.jpg', '.', str(folder)], folder / 'out')
    assert [(str(source.path.relative_to(folder)), source.name) for source in found] == [
        ('tief/zwei.jpg', 'zwei'),
        ('tief/zwei.png', 'zwei_2'),
        ('erstes Bild ä.jpg', 'erstes Bild ä'),
    ]
    (folder / '[1].jpg').write_bytes(b'')
    assert [source.name for source in find_sources(['[1].jpg'], tmp_path)] == ['[1]']


REFUSALS = {
    'input': (['nowhere.jpg'], 'error: input nowhere.jpg does not exist'),
    'pattern': (['nowhere/*.jpg'], 'error: input nowhere/*.jpg has no pictures and no videos'),
    'device': (['FOLDER', '--device', 'tpu'], 'error: --device tpu cannot be used: Expected one'),
    'size': (
        ['FOLDER', '--cfg-options', *OPTIONS[DETECTION], 'model.backbone.arch=small',
         'model.neck.in_channels=[72,144,288,576]'],
        'does not fit this MaskRCNN: channels is (64, 128, 256, 512) in the file, '
        '(72, 144, 288, 576) in the model',
    ),
    'depth': (
        # A file with all the names and shapes of a shallower network.
        ['FOLDER', '--cfg-options', *(o for o in OPTIONS[DETECTION] if 'arch' not in o),
         'model.backbone.arch._delete_=True', 'model.backbone.arch.depths=[2,2,7,2]',
         'model.backbone.kernel_size=7',
         'model.backbone.arch.channels=[64,128,256,512]'],
        'depths is (2, 2, 8, 2) in the file, (2, 2, 7, 2) in the model',
    ),
    'head': (
        ['FOLDER', '--cfg-options', *OPTIONS[DETECTION], 'model.roi_head.bbox_head.num_classes=3'],
        'shapes differ, such as roi_head.bbox_head.fc_cls.weight is (81, 256) in the file, '
        '(4, 256) in the model',
    ),
}  # fmt: skip


@pytest.mark.parametrize('case', REFUSALS)
def test_refuses_with_one_message(case, checkpoints, folder, tmp_path):
    arguments, message = REFUSALS[case]
    arguments = [str(folder) if argument == 'FOLDER' else argument for argument in arguments]
    with pytest.raises(SystemExit) as stop:
        main([str(ROOT / DETECTION), str(checkpoints[DETECTION]), '--out', str(tmp_path / 'out'),
              *arguments])  # fmt: skip
    assert message in str(stop.value)
    assert not (tmp_path / 'out').exists()


def test_refuses_checkpoints_of_other_networks(checkpoints, folder, tmp_path):
    (tmp_path / 'text.pth').write_text('no checkpoint')
    cases = {
        checkpoints[SEGMENTATION]: 'does not fit this MaskRCNN',
        tmp_path / 'text.pth': 'cannot be read',
        tmp_path / 'none.pth': 'none.pth.* does not exist',
    }
    for checkpoint, message in cases.items():
        with pytest.raises(SystemExit, match=message):
            predict(DETECTION, {DETECTION: checkpoint}, tmp_path / 'out', folder)


@pytest.mark.parametrize(
    ('options', 'message'),
    [
        (['--score-thr', '2'], '--score-thr must be from 0 to 1'),
        (['--batch-size', '0'], '--batch-size must be at least 1'),
        (['--score-thr', '0.5'], '--score-thr is for detectors only'),
    ],
)
def test_refuses_options(options, message, checkpoints, folder, tmp_path, capsys):
    with pytest.raises(SystemExit):
        predict(SEGMENTATION, checkpoints, tmp_path / 'out', folder, *options)
    assert message in capsys.readouterr().err
