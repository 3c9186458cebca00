"""The census at the start of a run: parts that agree, a refusal by train.py."""

import json
from types import SimpleNamespace

import pytest
from helpers.in_process import refusal_of
from helpers.tiny import write_config
from mmdet.evaluation import MultiDatasetsEvaluator
from mmengine.evaluator import Evaluator
from torch import nn

from mmconv2former.datasets import census_hook
from mmconv2former.datasets.census_hook import (
    CensusHook,
    compare_truth,
    different_ignored,
    few_outputs,
    ignored_in_training,
    moved_classes,
)
from mmconv2former.datasets.checked import DataError


# ----------------------------------------------------------------------------------- whole commands
@pytest.fixture(scope='module')
def detector(sample, tmp_path_factory):
    return write_config(tmp_path_factory.mktemp('detector') / 'tiny.py', 'detection', sample, 1)


@pytest.fixture(scope='module')
def segmentor(sample, tmp_path_factory):
    return write_config(tmp_path_factory.mktemp('segmentor') / 'tiny.py', 'segmentation', sample, 1)


def with_crowds(sample, folder):
    """An annotation file of the validation images whose objects are all crowded."""
    content = json.loads((sample / 'coco/annotations/instances_val2017.json').read_text())
    for annotation in content['annotations']:
        annotation['iscrowd'] = 1
    path = folder / 'crowds.json'
    path.write_text(json.dumps(content))
    return path


def test_refusal_in_one_line_before_the_first_iteration(detector, sample, tmp_path):
    crowds = with_crowds(sample, tmp_path)
    options = [f'val_dataloader.dataset.ann_file={crowds}', f'val_evaluator.ann_file={crowds}']
    message = refusal_of('train', detector, '--work-dir', tmp_path / 'work', '--cfg-options',
                         *options)  # fmt: skip
    assert message.startswith(f'error: val ({crowds}): no usable object: all ')
    assert message.endswith('skip this check: --no-census')
    assert '\n' not in message
    assert not list(tmp_path.glob('work/*.pth'))
    assert refusal_of('train', detector, '--work-dir', tmp_path / 'work', '--no-census',
                      '--cfg-options', *options) == ''  # fmt: skip


def test_an_error_of_any_kind_ends_all_processes(monkeypatch):
    """The main process counts, the others wait for what it says."""
    sent = []
    monkeypatch.setattr(census_hook, 'broadcast_object_list', sent.extend)
    monkeypatch.setattr(census_hook, 'compare_truth', lambda *_: [][0])
    loop = SimpleNamespace(
        dataloader=SimpleNamespace(dataset=()), evaluator=SimpleNamespace(metrics=[])
    )
    runner = SimpleNamespace(train_dataloader=loop.dataloader, val_loop=loop, model=nn.Module())
    with pytest.raises(DataError, match=r'cannot be counted: IndexError: .*--no-census$') as error:
        CensusHook().before_train(runner)
    assert sent == [[str(error.value)]]


# ------------------------------------------------------------------------------------------- parts
class Head(nn.Module):
    def __init__(self, num_classes, ignore_index=255):
        super().__init__()
        self.num_classes, self.ignore_index = num_classes, ignore_index


def model_of(**heads):
    model = nn.Module()
    for name, head in heads.items():
        model.add_module(name, head)
    return model


def dataset_of(classes=2, **attributes):
    return SimpleNamespace(metainfo=dict(classes='ab'[:classes]), **attributes)


@pytest.mark.parametrize(
    ('train', 'val', 'moved'),
    [
        ('ab', 'ab', None),
        ('ab', 'ba', 'b'),
        ('abc', 'bc', 'b'),
        ('ab', 'a', None),
        ('ab', 'cd', None),
    ],
)
def test_classes_with_another_number(train, val, moved):
    datasets = {
        split: SimpleNamespace(metainfo=dict(classes=classes), ann_file='x')
        for split, classes in (('train', train), ('val', val))
    }
    found = list(moved_classes(datasets))
    assert len(found) == bool(moved)
    assert not moved or found[0].startswith(
        f"class '{moved}' has number 0 in val (x), but 1 in the"
    )


def test_heads_with_fewer_outputs_than_classes():
    heads = model_of(bbox_head=nn.ModuleList([Head(2), Head(1)]), rpn_head=Head(1))
    (found,) = few_outputs(dict(train=dataset_of()), heads)
    assert found.startswith('model.bbox_head.1.num_classes=1, but train has 2 classes')
    assert not list(few_outputs(dict(train=dataset_of(1)), heads))
    assert not list(few_outputs(dict(train=dataset_of(return_classes=True)), heads))


@pytest.mark.parametrize(
    ('dataset', 'head', 'metric', 'agree'),
    [
        (255, 255, 255, True),
        (0, 255, 255, False),
        (0, 0, 255, False),
        (0, 255, 0, False),
        (0, 0, 0, True),
        (255, 0, 0, True),  # mmseg's HSIDrive recipe
        (255, 0, 255, False),
    ],
)
def test_ignored_label(dataset, head, metric, agree):
    model = model_of(decode_head=Head(2, head), auxiliary_head=Head(2, head))
    found = list(
        different_ignored(
            dict(train=dataset_of(ignore_index=dataset)),
            ignored_in_training(model),
            [SimpleNamespace(ignore_index=metric)],
        )
    )
    assert not found if agree else found[0].startswith('ignore_index differs: ')


def truth(*images, **attributes):
    """A metric with an annotation file of images with these ids."""
    infos = {id_: dict(id=id_, file_name=f'a/{id_}.jpg') for id_ in images}
    settings = dict(
        annotation_file='truth.json', imgs=infos, anns=infos, cat_img_map={1: [*images]}
    )
    return SimpleNamespace(_coco_api=SimpleNamespace(**{**settings, **attributes}))


class Images:
    """A dataset of images with these ids."""

    ann_file, all_images = 'data.json', ()

    def __init__(self, *images, folder='b'):
        self.infos = [dict(img_id=id_, img_path=f'{folder}/{id_}.jpg') for id_ in images]
        self.cat_img_map = {1: [*images], 2: []}

    def __len__(self):
        return len(self.infos)

    def get_data_info(self, index):
        return self.infos[index]


def loop_of(dataset, metric):
    evaluator = Evaluator([])
    evaluator.metrics = [metric]
    return SimpleNamespace(dataloader=SimpleNamespace(dataset=dataset), evaluator=evaluator)


@pytest.mark.parametrize(
    ('metric', 'problem', 'oddity'),
    [
        (truth(1, 2), '', ''),
        (truth(1, 3), 'has other images than val_dataloader: 1 of 2 are not in it', ''),
        (truth(1, 2, imgs={i: dict(file_name=f'{i}.png') for i in (1, 2)}), 'has other images', ''),
        (truth(1, 2, anns={}), 'has no annotations: format_only=True', ''),
        (truth(1, 2, 3), '', 'has 1 images that val_dataloader does not load'),
        (truth(1, 2, cat_img_map={1: [1, 1]}), '', 'has other objects than data.json'),
        (SimpleNamespace(_coco_api=None), '', ''),
    ],
)  # fmt: skip
def test_annotation_file_of_a_metric(metric, problem, oddity):
    problems, oddities = compare_truth('val', loop_of(Images(1, 2), metric))
    for found, expected in ((problems, problem), (oddities[:1], oddity)):
        assert len(found) == bool(expected)
        assert not expected or f'val_evaluator.ann_file truth.json {expected}' in found[0]


def test_written_predictions_need_no_truth():
    metric = truth(anns={})
    metric.format_only = True
    assert compare_truth('test', loop_of(Images(1, 2), metric)) == ([], [])


def test_metrics_of_several_datasets_have_their_own_images():
    loop = loop_of(Images(1, 2), truth(1, 3))
    evaluator = MultiDatasetsEvaluator([], ['a', 'b'])
    evaluator.metrics, loop.evaluator = loop.evaluator.metrics, evaluator
    assert compare_truth('test', loop) == ([], [])


def test_evaluation_alone_compares_its_parts(segmentor, tmp_path):
    option = 'test_dataloader.dataset.ignore_index=0'
    arguments = ['--work-dir', tmp_path, '--cfg-options', option]
    message = refusal_of('test', segmentor, 'none', *arguments)
    assert (
        'ignore_index differs: 255 in test_evaluator (IoUMetric), 0 in test_dataloader' in message
    )
