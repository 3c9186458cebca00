"""The embedded sample: the same each time, valid in both layouts, as varied as it says."""

import cv2
import numpy as np
import pytest
from helpers.tools import run_tool
from mmdet.datasets import CocoDataset
from mmseg.datasets import ADE20KDataset
from pycocotools.coco import COCO

SPLITS = {'train2017': ('training', 40), 'val2017': ('validation', 6)}
ADE_OBJECTS = {'sports ball': 'ball', 'stop sign': 'signboard', 'kite': 'flag', 'donut': 'plate',
               'pizza': 'food'}  # fmt: skip


def files_of(folder):
    return {p.relative_to(folder): p.read_bytes() for p in folder.rglob('*') if p.is_file()}


def test_is_deterministic(sample, tmp_path):
    options = ['--train', '40', '--val', '6', '--size', '64']
    run_tool('make_sample.py', tmp_path / 'again', *options)
    assert files_of(tmp_path / 'again') == files_of(sample)
    run_tool('make_sample.py', tmp_path / 'again', *options, '--seed', '1')
    assert files_of(tmp_path / 'again') != files_of(sample)


@pytest.mark.parametrize('split', SPLITS)
def test_coco_annotations_agree_with_images_and_labels(sample, split):
    ade_split, count = SPLITS[split]
    coco = COCO(sample / f'coco/annotations/instances_{split}.json')
    assert len(coco.imgs) == count
    ade = sample / 'ade/ADEChallengeData2016'
    names = {category['id']: category['name'] for category in coco.cats.values()}
    assert list(names.values()) == list(CocoDataset.METAINFO['classes'])
    assert (names[1], names[37], names[90]) == ('person', 'sports ball', 'toothbrush')
    ade_labels = [name.strip() for name in ADE20KDataset.METAINFO['classes']]
    for image in coco.imgs.values():
        path = sample / 'coco' / split / image['file_name']
        pixels = cv2.imread(str(path), cv2.IMREAD_UNCHANGED)
        assert pixels.shape[:2] == (image['height'], image['width']) == (64, 64)
        assert (ade / 'images' / ade_split / path.name).read_bytes() == path.read_bytes()
        labels = cv2.imread(str(ade / 'annotations' / ade_split / f'{path.stem}.png'), 0)
        assert labels.shape == (64, 64)
        assert 1 <= labels.min() <= labels.max() <= 150
        taken = np.zeros((64, 64), int)
        for annotation in coco.loadAnns(coco.getAnnIds(image['id'])):
            mask = coco.annToMask(annotation).astype(bool)
            taken += mask
            assert annotation['area'] == mask.sum() > 0
            ys, xs = np.nonzero(mask)
            box = [xs.min(), ys.min(), np.ptp(xs) + 1, np.ptp(ys) + 1]
            assert annotation['bbox'] == box
            expected = ade_labels.index(ADE_OBJECTS[names[annotation['category_id']]]) + 1
            assert (labels[mask] == expected).all()
        assert taken.max() <= 1  # masks of what is visible do not overlap


def test_has_the_edge_cases_of_real_data(sample):
    coco = COCO(sample / 'coco/annotations/instances_train2017.json')
    assert any(not coco.getAnnIds(image_id) for image_id in coco.imgs)
    assert any(annotation['iscrowd'] for annotation in coco.anns.values())
    folder = sample / 'coco/train2017'
    shapes = {cv2.imread(str(p), cv2.IMREAD_UNCHANGED).ndim for p in folder.iterdir()}
    assert shapes == {2, 3}


def test_is_not_trivial(sample):
    coco = COCO(sample / 'coco/annotations/instances_train2017.json')
    objects = [a for a in coco.anns.values() if not a['iscrowd']]
    sides = np.sqrt([a['bbox'][2] * a['bbox'][3] for a in objects])
    assert sides.min() < 0.2 * 64
    assert sides.max() > 0.5 * 64
    assert len(objects) > 3 * len(coco.imgs)
    assert len({a['category_id'] for a in objects}) == 5


def test_replaces_only_its_own_folder(tmp_path):
    (tmp_path / 'precious').write_text('data')
    output = run_tool('make_sample.py', tmp_path, succeeds=False)
    assert 'is not a sample' in output.splitlines()[-1]
    assert (tmp_path / 'precious').read_text() == 'data'


@pytest.mark.parametrize(('option', 'value'), [('--train', 0), ('--val', 0), ('--size', 10)])
def test_bad_arguments(option, value, tmp_path):
    output = run_tool('make_sample.py', tmp_path / 'new', option, value, succeeds=False)
    assert f'{option}: must be at least' in output
    assert not (tmp_path / 'new').exists()
