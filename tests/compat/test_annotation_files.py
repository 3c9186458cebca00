"""Annotation files that mmdet and pycocotools misread: order of categories, ids."""

import json
import re
from unittest.mock import patch

import pytest
import torch
from mmdet.datasets.api_wrappers import COCO
from mmengine.registry import DATASETS, METRICS, init_default_scope
from pycocotools import mask as coco_mask

NAMES = ('kite', 'ball', 'food')


@pytest.fixture
def write(tmp_path):
    """Writes a file of six objects in three images, changed; returns its path."""

    def write(change):
        content = dict(
            images=[dict(id=i, file_name=f'{i}.jpg', width=50, height=40) for i in range(3)],
            annotations=[
                dict(id=n + 1, image_id=n // 2, category_id=n % 3 + 5, bbox=[n, 2, 9, 20],
                     area=180, iscrowd=0)
                for n in range(6)
            ],
            categories=[dict(id=n + 5, name=name) for n, name in enumerate(NAMES)],
        )  # fmt: skip
        change(content)
        path = tmp_path / 'truth.json'
        path.write_text(json.dumps(content))
        return str(path)

    return write


def build(path, classes=NAMES):
    init_default_scope('mmdet')
    settings = dict(metainfo=dict(classes=classes), data_prefix=dict(img=''))
    return DATASETS.build(dict(type='CocoDataset', ann_file=path, **settings))


def score_of_truth(dataset):
    metric = METRICS.build(dict(type='CocoMetric', ann_file=dataset.ann_file, metric='bbox'))
    metric.dataset_meta = dataset.metainfo
    for index in range(len(dataset)):
        info = dataset.get_data_info(index)
        prediction = dict(
            bboxes=torch.tensor([item['bbox'] for item in info['instances']]),
            labels=torch.tensor([item['bbox_label'] for item in info['instances']]),
            scores=torch.ones(len(info['instances'])),
        )
        shape = info['height'], info['width']
        sample = dict(img_id=info['img_id'], ori_shape=shape, pred_instances=prediction)
        metric.process({}, [sample])
    return metric.evaluate(len(dataset))['coco/bbox_mAP']


@pytest.mark.parametrize('classes', [NAMES, NAMES[::-1], NAMES[1:]])
@pytest.mark.parametrize('order', [1, -1])
def test_labels_are_numbered_by_name(classes, order, write):
    path = write(lambda content: content.update(categories=content['categories'][::order]))
    dataset = build(path, classes)
    found = [
        classes[item['bbox_label']]
        for index in range(3)
        for item in dataset.get_data_info(index)['instances']
    ]
    assert found == [name for name in 2 * NAMES if name in classes]
    if len(classes) == 3:
        assert score_of_truth(dataset) == 1.0


def test_annotation_ids_from_0(write):
    """pycocotools alone gives less to the truth."""
    path = write(lambda content: [a.update(id=a['id'] - 1) for a in content['annotations']])
    assert score_of_truth(build(path)) == 1.0


def test_ids_used_twice_are_not_hidden(write):
    path = write(lambda content: [a.update(id=0) for a in content['annotations']])
    with pytest.raises(AssertionError, match='not unique'):
        build(path)
    path = write(lambda content: content['images'][1].update(id=0))
    with pytest.raises(ValueError, match=r'truth.json: 1 of 3 images have the id of another'):
        build(path)


@pytest.mark.parametrize(
    ('content', 'message'),
    [
        ('[]', 'a COCO file has one object with the lists images, categories, annotations'),
        ('{"images": {}, "categories": []}', "list 'images' must be a list, got {}"),
        ('{"images": [3], "categories": []}', 'images[0] must be an object, got 3'),
        ('{"images": [], "categories": []}', "its list 'images' is empty"),
    ],
)  # fmt: skip
def test_files_of_another_format(content, message, tmp_path):
    path = tmp_path / 'truth.json'
    path.write_text(content)
    with pytest.raises(ValueError, match=re.escape(message)):
        build(str(path)).full_init()


@pytest.mark.parametrize(
    ('change', 'message'),
    [
        (dict(id=6), 'several categories have the id 6'),
        (dict(name='ball'), "categories [5, 6] are all named 'ball'; rename or remove all but one"),
    ],
)
def test_categories_are_unique(change, message, write):
    path = write(lambda content: content['categories'][0].update(change))
    with pytest.raises(ValueError, match=re.escape(message)):
        build(path).full_init()


@pytest.mark.parametrize('field', ['image_id', 'category_id'])
def test_annotations_of_what_is_not_in_the_file(field, write):
    path = write(lambda content: content['annotations'][2].update({field: 99}))
    with patch('mmconv2former.compat.annotation_files.print_log') as log:
        assert score_of_truth(build(path)) == 1.0
    (message,) = [call.args[0] for call in log.call_args_list]  # once for dataset and metric
    assert f'{path}: 1 of 6 annotations are not used: their {field} is not in' in message
    assert message.endswith('such as 99 of annotation 3')


def test_images_without_annotations_can_be_predicted(write):
    path = write(lambda content: content.pop('annotations'))
    assert len(build(path)) == 3


def test_images_without_objects_are_known(write):
    path = write(lambda content: content['annotations'].clear())
    assert build(path).all_images == ['0.jpg', '1.jpg', '2.jpg']


def mask(**changes):
    return lambda content: content['annotations'][3].update(changes)


@pytest.mark.parametrize(
    ('change', 'problem'),
    [
        (mask(segmentation=[[1, 1, float('nan'), 1, 9, 9]]), 'annotation 4 has polygon [1, 1, nan'),
        (mask(segmentation=[[1, 1, 1e308, 1, 9, 9]]), 'annotation 4 has polygon [1, 1, 1e+308'),
        (mask(segmentation=[[1, 1, '9', 1, 9, 9]]), "annotation 4 has polygon [1, 1, '9'"),
        (mask(segmentation=[{}]), 'annotation 4 has polygon {}'),
        (mask(bbox=[0, 0, 4]), 'annotation 4 has bbox [0, 0, 4]'),
        (mask(bbox=None), 'annotation 4 has bbox None'),
        (mask(iscrowd=2), 'annotation 4 has iscrowd 2, neither 0 nor 1'),
        (mask(id='4'), "an annotation has the id '4', which is no number"),
        (mask(id=2**53), 'an annotation has the id 9007199254740992, which is no number'),
        (
            mask(segmentation=dict(size=[40, 50], counts=3)),
            'annotation 4 has a mask whose counts are not those of its size',
        ),
        (
            mask(segmentation=dict(size=[10**6, 10**6], counts=[10**12])),
            'annotation 4 has a mask of size [1000000, 1000000], its image has height 40, width 50',
        ),
        (
            mask(segmentation=dict(size=[40, 50], counts=[10**12])),
            'annotation 4 has a mask whose counts are not those of its size',
        ),
        (
            lambda content: content['images'][1].update(height=10**6, width=10**6),
            'image 1 has height 1000000, width 1000000',
        ),
        (lambda content: content['images'][1].update(height=-3), 'image 1 has height -3, width 50'),
    ],
)
def test_numbers_are_checked_before_pycocotools_sees_them(change, problem, write):
    path = write(change)
    for read in (lambda: build(path).full_init(), lambda: score_of_truth(build(path))):
        with pytest.raises(ValueError, match=r'; correct or remove it$') as caught:
            read()
        assert str(caught.value).startswith(f'{path}: {problem}')


def test_evaluation_without_iscrowd_and_with_polygons_of_two_points(write):
    """mmdet trains with such files; pycocotools alone fails."""

    def change(content):
        for annotation in content['annotations']:
            del annotation['iscrowd']
            annotation['segmentation'] = [[1, 1, 20, 20]]

    dataset = build(write(change))
    assert score_of_truth(dataset) == 1.0
    truth = COCO(dataset.ann_file)
    assert coco_mask.area(truth.annToRLE(truth.anns[1])) == 0


def test_masks_of_both_kinds_are_read(write):
    """As lists of counts, and compressed."""
    counts = dict(size=[40, 50], counts=[400, 100, 1500])
    compressed = coco_mask.frPyObjects(counts, 40, 50)
    compressed['counts'] = compressed['counts'].decode()
    for segmentation in (counts, compressed, [[1, 1, 9, 1, 9, 9]]):
        assert score_of_truth(build(write(mask(segmentation=segmentation)))) == 1
