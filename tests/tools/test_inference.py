"""What tools that predict share: the data of a config, drawable images, names of results."""

import numpy as np
import pytest
import torch
from common import inference
from common.inference import UniqueNames, dataset_settings, drawable, settings_of_files
from helpers.in_process import load_tool
from mmdet.structures import DetDataSample
from mmdet.structures.bbox import HorizontalBoxes
from mmdet.structures.mask import BitmapMasks
from mmengine.config import Config
from mmengine.structures import InstanceData, PixelData

LOAD, LABELS, PACK = (dict(type=t) for t in ('LoadImageFromFile', 'LoadAnnotations', 'Pack'))


def dataset(name, *steps):
    return dict(type='Set', ann_file=name, pipeline=[LOAD, *steps, PACK])


def config_with(*datasets, key='test_dataloader'):
    """A config with several datasets in wrappers."""
    wrapped = [
        dict(type='RepeatDataset', times=2, dataset=dict(type='ClassBalancedDataset', dataset=one))
        for one in datasets
    ]
    loader = dict(dataset=dict(type='ConcatDataset', datasets=wrapped))
    return Config({'test_dataloader': None, key: loader}, cfg_text=' ', filename='mine.py')


@pytest.mark.parametrize('key', ['test_dataloader', 'val_dataloader'])
def test_datasets_inside_wrappers(key):
    config = config_with(dataset('a', LABELS), dataset('b'), key=key)
    assert [found.ann_file for found in dataset_settings(config)] == ['a', 'b']
    assert settings_of_files(config).ann_file == 'a'  # annotations make no difference


@pytest.mark.parametrize(
    ('config', 'message'),
    [
        (config_with(dataset('a'), key='train_dataloader'),
         'mine.py has no test_dataloader and no val_dataloader: add one'),
        (config_with(dataset('a'), dataset('b', dict(type='Resize'))),
         'the test datasets of mine.py have different pipelines'),
        (config_with(dataset('a', dict(type='TestTimeAug'))),
         'the test pipeline of mine.py has TestTimeAug'),
    ],
)  # fmt: skip
def test_refuses_configs_that_do_not_say_how_to_read_a_file(config, message):
    with pytest.raises(SystemExit, match=message):
        settings_of_files(config)


def test_a_missing_split_is_named():
    with pytest.raises(SystemExit, match=r'mine.py has no train_dataloader: add one'):
        dataset_settings(config_with(dataset('a')), 'train')


def test_augmentation_of_several_datasets():
    config = config_with(dataset('a'), dataset('b'))
    config.merge_from_dict(
        dict(
            model=dict(type='M'), tta_model=dict(type='T'), tta_pipeline=[dict(type='TestTimeAug')]
        )
    )
    load_tool('test').augment_at_test_time(config)
    assert config.model == dict(type='T', module=dict(type='M'))
    steps = [found.pipeline[0].type for found in dataset_settings(config)]
    assert steps == ['TestTimeAug', 'TestTimeAug']


def test_unique_names():
    names = UniqueNames()
    files = ['a/x.png', 'a/x.jpg', 'a/x_2.jpg', 'b/x.y.png', 'a/x.png']
    assert [names.name(file, file.partition('/')[2]) for file in files] == [
        'x', 'x_2', 'x_2_2', 'x.y', 'x'
    ]  # fmt: skip


@pytest.mark.parametrize(
    ('image', 'expected'),
    [
        (np.array([[0, 9]], np.uint8), [[0, 0, 0], [9, 9, 9]]),
        (np.array([[[0, 4], [9, 4]]], np.uint8), [[0, 0, 0], [9, 9, 9]]),
        (np.array([[[1, 2, 3, 4], [5, 6, 7, 8]]], np.uint8), [[1, 2, 3], [5, 6, 7]]),
        (np.array([[[1.0, 2.0, 255.0]]], np.float32), [[1, 2, 255]]),  # of 8 bits
        (np.array([[1000, 4095]], np.uint16), [[0, 0, 0], [255, 255, 255]]),
        (np.array([[700, 700]], np.uint16), [[0, 0, 0], [0, 0, 0]]),
    ],
)
def test_drawable(image, expected):
    found = drawable(image)
    assert found.dtype == np.uint8
    assert found.tolist() == [expected]


def test_large_drawings_are_reduced(monkeypatch):
    monkeypatch.setattr(inference, 'MOST_DRAWN', 100)
    image = np.arange(20 * 30 * 3, dtype=np.uint8).reshape(20, 30, 3)
    masks = torch.rand(2, 20, 30) > 0.5
    sample = DetDataSample(
        pred_instances=InstanceData(bboxes=torch.full((2, 4), 6.0), masks=masks, labels=[0, 1]),
        gt_instances=InstanceData(
            bboxes=HorizontalBoxes(torch.full((2, 4), 6.0)),
            masks=BitmapMasks(masks.numpy().astype(np.uint8), 20, 30),
        ),
        pred_sem_seg=PixelData(data=torch.arange(600).reshape(1, 20, 30)),
    )
    small, reduced = inference.reduced(image, sample)
    assert small.shape == (7, 10, 3)
    np.testing.assert_array_equal(small, image[::3, ::3])
    torch.testing.assert_close(reduced.pred_instances.bboxes, torch.full((2, 4), 2.0))
    torch.testing.assert_close(reduced.gt_instances.bboxes, torch.full((2, 4), 2.0))
    assert reduced.pred_instances.masks.equal(masks[:, ::3, ::3])
    assert reduced.gt_instances.masks.masks.shape == (2, 7, 10)
    assert reduced.pred_sem_seg.data.equal(sample.pred_sem_seg.data[:, ::3, ::3])
    assert sample.pred_instances.bboxes[0, 0] == 6  # the sample itself is unchanged
    monkeypatch.setattr(inference, 'MOST_DRAWN', 600)
    assert inference.reduced(image, sample)[1] is sample
