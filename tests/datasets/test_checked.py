"""Errors of datasets name the file, the entry and the field."""

import copy
import json

import pytest
from helpers.tiny import tiny_config
from mmengine.registry import init_default_scope

from mmconv2former.datasets.checked import CheckedDataset, DataError

IMAGE, OBJECT = 3, 5  # entries that lose a field


@pytest.mark.parametrize(
    ('part', 'index', 'field', 'entry'),
    [
        ('annotations', OBJECT, 'area', ' in the annotation with id 6'),
        ('annotations', OBJECT, 'bbox', ' in the annotation with id 6'),
        ('annotations', OBJECT, 'category_id', ' in the annotation with id 6'),
        ('annotations', OBJECT, 'image_id', ' in the annotation with id 6'),
        ('images', IMAGE, 'file_name', ' in the entry with id 4'),
        ('images', IMAGE, 'width', ' in the entry with id 4'),
        ('images', IMAGE, 'id', ''),
        ('categories', 0, 'name', ' in the entry with id 1'),
        (None, None, 'categories', ''),
    ],
)
def test_missing_field_is_named(part, index, field, entry, sample, tmp_path):
    settings = copy.deepcopy(tiny_config('detection', sample, tmp_path, 1).train_dataloader.dataset)
    content = json.loads((sample / 'coco' / settings.ann_file).read_text())
    (content if part is None else content[part][index]).pop(field)
    settings.ann_file = str(tmp_path / 'broken.json')
    (tmp_path / 'broken.json').write_text(json.dumps(content))
    init_default_scope('mmdet')
    with pytest.raises(DataError) as caught:
        CheckedDataset(settings)
    said = str(caught.value)
    assert said.startswith(f'cannot read dataset CocoDataset ({tmp_path}/broken.json)')
    assert said.endswith(f"KeyError: field '{field}' is missing{entry}")
