"""Errors of datasets name the file, the entry and the field."""

import copy
import json

import pytest
from helpers.tiny import tiny_config
from mmengine.registry import init_default_scope

from mmconv2former import ReliableRunner
from mmconv2former.datasets.checked import CheckedDataset, DataError

IMAGE, OBJECT = 3, 5  # entries that lose a field


@pytest.fixture
def settings(sample, tmp_path):
    """The data loader of a detector's training."""
    init_default_scope('mmdet')
    return copy.deepcopy(tiny_config('detection', sample, tmp_path, 1, images=4).train_dataloader)


@pytest.mark.parametrize(
    ('part', 'index', 'field', 'message'),
    [
        ('annotations', OBJECT, 'area', "field 'area' is missing in the annotation with id 6"),
        ('annotations', OBJECT, 'bbox', "field 'bbox' is missing in the annotation with id 6"),
        ('images', IMAGE, 'file_name', "field 'file_name' is missing in the entry with id 4"),
        ('images', IMAGE, 'width', "field 'width' is missing in the entry with id 4"),
        ('annotations', OBJECT, 'category_id', "'category_id' is missing in annotations[5] (id 6)"),
        ('annotations', OBJECT, 'image_id', "field 'image_id' is missing in annotations[5] (id 6)"),
        ('annotations', OBJECT, 'id', "field 'id' is missing in annotations[5]"),
        ('images', IMAGE, 'id', "field 'id' is missing in images[3]"),
        ('categories', 0, 'name', "field 'name' is missing in categories[0] (id 1)"),
        ('categories', 0, 'id', "field 'id' is missing in categories[0]"),
        (None, None, 'categories', "list 'categories' is missing; the file has ["),
        (None, None, 'images', "list 'images' is missing; the file has ["),
        (None, None, 'annotations', "its list 'annotations' is missing or empty"),
    ],
)  # fmt: skip
def test_missing_field_is_named(part, index, field, message, settings, sample, tmp_path):
    settings = settings.dataset
    content = json.loads((sample / 'coco' / settings.ann_file).read_text())
    (content if part is None else content[part][index]).pop(field)
    settings.ann_file = str(tmp_path / 'broken.json')
    (tmp_path / 'broken.json').write_text(json.dumps(content))
    with pytest.raises(DataError) as caught:
        CheckedDataset(settings)
    said = str(caught.value)
    assert said.startswith(f'cannot read dataset CocoDataset ({tmp_path}/broken.json)')
    assert message in said


def test_classes_are_named_once(settings):
    settings.dataset.metainfo = dict(classes=('kite', 'kite', 'pizza'))
    with pytest.raises(DataError, match="classes of CocoDataset have 'kite' twice"):
        CheckedDataset(settings.dataset)


@pytest.mark.parametrize('name', ['CLASSES', 'Palette', 'clases'])
def test_names_without_effect_in_metainfo(name, settings):
    settings.dataset.metainfo = {name: ('ball', 'kite')}
    with pytest.raises(DataError, match=f"CocoDataset has '{name}', which has no effect: write '"):
        CheckedDataset(settings.dataset)


def test_less_than_one_batch(settings):
    settings.update(batch_size=16, drop_last=True)
    settings.pop('batch_sampler')
    with pytest.raises(DataError, match='no batch of 16 can be made of 4 samples'):
        ReliableRunner.build_dataloader(settings, seed=0)
