"""The dry run before the first iteration: what it meets, and what it leaves unchanged."""

import json
import random
import shutil
from contextlib import nullcontext
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from helpers.in_process import refusal_of, with_data, write_tiny_config
from helpers.tiny import WITHOUT_WORKERS, write_config
from helpers.tools import run_tool
from mmdet.evaluation import MultiDatasetsEvaluator
from mmengine.evaluator import BaseMetric, Evaluator
from mmengine.hooks import CheckpointHook, EarlyStoppingHook
from mmengine.runner import ValLoop
from PIL import Image
from torch import nn

from mmconv2former.engine.drawing import spare_metrics
from mmconv2former.engine.dry_run import (
    FILE,
    DryRunError,
    check_wanted,
    is_better_greater,
    largest_input,
    try_validation,
    two_images,
    unchanged_random_numbers,
)
from mmconv2former.engine.lost_files import LostFiles


@pytest.fixture(scope='module')
def detector(sample, tmp_path_factory):
    path = tmp_path_factory.mktemp('detector') / 'tiny.py'
    options = {'model.test_cfg.rcnn.score_thr': 0.5}  # more than an untrained detector predicts
    return write_config(path, 'detection', sample, 1, options=options)


@pytest.fixture(scope='module')
def segmentor(tmp_path_factory):
    return write_tiny_config(tmp_path_factory.mktemp('segmentor') / 'tiny.py')


def segmentation_refusal(segmentor, sample, tmp_path, *options):
    work_dir = tmp_path / 'work'
    arguments = with_data(['train', segmentor], sample, work_dir, *WITHOUT_WORKERS, *options)
    message = refusal_of(*arguments)
    assert not list(work_dir.glob('**/*.pth')), 'an iteration was trained'
    return message


def test_passes_in_one_line_and_stores_nothing(detector, tmp_path):
    output = run_tool('train', detector, '--work-dir', tmp_path, '--cfg-options', 'log_level=INFO',
                      'default_hooks.visualization.draw=True')  # fmt: skip
    (line,) = [line for line in output.splitlines() if 'Dry run' in line]
    assert '2 predictions, 12 metrics, a drawing, a checkpoint of' in line
    assert not (tmp_path / FILE).exists()
    assert output.count('Evaluating bbox') == 1  # the validation's own
    assert not list(tmp_path.glob('*/vis_data/vis_image/*'))
    assert 'Census of the data' in output
    assert 'objects used' in output
    assert 'WARNING - Data:' not in output


def test_annotations_without_a_field(detector, sample, tmp_path):
    content = json.loads((sample / 'coco/annotations/instances_val2017.json').read_text())
    for annotation in content['annotations']:
        del annotation['area']
    path = tmp_path / 'truth.json'
    path.write_text(json.dumps(content))
    option = f'val_evaluator.ann_file={path}'
    message = refusal_of('train', detector, '--work-dir', tmp_path, '--cfg-options', option)
    assert message.startswith('error: ')
    assert "KeyError: 'area'" in message
    assert not list(tmp_path.glob('*.pth'))


def test_metric_that_chooses_the_best_checkpoint(segmentor, sample, tmp_path):
    options = 'val_evaluator.iou_metrics=[mFscore]', 'default_hooks.checkpoint.save_best=mIoU'
    message = segmentation_refusal(segmentor, sample, tmp_path, *options)
    assert "default_hooks.checkpoint.save_best='mIoU' is no metric of val_evaluator" in message
    assert 'mFscore' in message


class OwnLoop(ValLoop):
    pass


@pytest.mark.parametrize(
    ('loop', 'key', 'is_known'),
    [
        (ValLoop, 'mIoU', True),
        (ValLoop, 'other/mIoU', False),
        (OwnLoop, 'other/mIoU', True),
        (OwnLoop, 'other_mIoU', False),
    ],
)
def test_names_before_a_metric_of_other_loops(loop, key, is_known):
    runner = SimpleNamespace(val_loop=loop.__new__(loop), hooks=[EarlyStoppingHook(monitor=key)])
    with nullcontext() if is_known else pytest.raises(DryRunError, match='is no metric of'):
        check_wanted(runner, {'mIoU': 1.0})


@pytest.mark.parametrize(
    ('metric', 'is_known'),
    [('coco/bbox_mAP_50', True), ('coco/AR@100', True), ('accuracy/top1', True), ('accuracy', True),
     ('mIoU', True), ('stop_distance', False), ('loss', False)],
)  # fmt: skip
def test_metrics_that_rise(metric, is_known):
    assert is_better_greater(metric, CheckpointHook()) == is_known


def test_rule_that_keeps_the_worst_checkpoint(segmentor, sample, tmp_path):
    option = 'default_hooks.checkpoint.rule=less'
    message = refusal_of('train', *with_data([segmentor], sample, tmp_path, option))
    assert "default_hooks.checkpoint.rule='less' would keep the worst mIoU" in message


def test_largest_value_that_reaches_the_network():
    class Model(nn.Module):
        def data_preprocessor(self, batch, training):
            assert training
            return dict(inputs=batch['inputs'] / 0.2, labels=torch.tensor([999]))

    batch = dict(inputs=torch.full((2, 3, 4, 4), -200.0))
    assert largest_input(Model(), [batch]) == 1000
    assert largest_input(nn.Identity(), [batch]) == 0


def test_images_of_several_sizes_in_a_batch(detector, segmentor, sample, tmp_path):
    """mmdet pads them, mmseg cannot. The third image is the first one of another size."""
    options = 'val_dataloader.batch_size=2', 'val_dataloader.dataset.indices=None'
    assert refusal_of('train', detector, '--work-dir', tmp_path / 'detector', '--cfg-options',
                      options[0]) == ''  # fmt: skip
    data = tmp_path / 'sample'
    shutil.copytree(sample, data)
    for kind in ('images', 'annotations'):
        folder = data / 'ade/ADEChallengeData2016' / kind / 'validation'
        path = sorted(folder.iterdir())[2]
        with Image.open(path) as image:
            image.resize((40, 64), Image.Resampling.NEAREST).save(path)
    message = segmentation_refusal(segmentor, data, tmp_path, *options)
    assert message.startswith('error: dry run, validation of ')
    assert message.count('.jpg') == 2
    assert 'AssertionError: The image size in a batch' in message


@pytest.fixture
def no_palette(monkeypatch):
    """Drawings fail."""

    def fail(*args, **kwargs):
        raise IndexError('palette')

    monkeypatch.setattr('mmseg.visualization.SegLocalVisualizer.add_datasample', fail)


def test_failing_drawing(segmentor, sample, tmp_path, no_palette):
    options = ('default_hooks.visualization.draw=True',)
    message = segmentation_refusal(segmentor, sample, tmp_path, *options)
    assert '.jpg: IndexError: palette. Training would fail there later.' in message
    assert '--no-dry-run' in message


def test_metrics_survive_a_failing_drawing(segmentor, sample, tmp_path, no_palette):
    arguments = ['test', segmentor, 'none', '--show-dir', 'drawings']
    output = run_tool(*with_data(arguments, sample, tmp_path, *WITHOUT_WORKERS))
    assert 'cannot draw: IndexError: palette' in output
    assert output.count('cannot draw') == 1
    (path,) = tmp_path.glob('*/*.json')
    assert 'mIoU' in json.loads(path.read_text())


def test_a_disk_without_room_for_a_checkpoint(detector, tmp_path, monkeypatch):
    def fail(*args, **kwargs):
        raise OSError(28, 'No space left on device')

    monkeypatch.setattr('mmengine.runner.runner.save_checkpoint', fail)
    message = refusal_of('train', detector, '--work-dir', tmp_path)
    assert 'cannot save' in message
    assert 'No space left on device' in message


def test_random_numbers_are_unchanged():
    def drawn():
        return random.random(), np.random.rand(), torch.rand(1).item()

    with unchanged_random_numbers():
        first = drawn()
    assert drawn() == first


@pytest.mark.parametrize('error', [ValueError('no palette'), OSError('disk full')])
def test_one_failing_drawing_is_the_last(error):
    """Those that cannot be written are lost, which an evaluation says at its end."""
    calls, lost = [], LostFiles(print)

    class FailingVisualizationHook:
        def after_val_iter(self):
            calls.append('val')
            raise error

        def after_test_iter(self):
            calls.append('test')

    hook = FailingVisualizationHook()
    spare_metrics(hook, lost)
    hook.after_test_iter()
    hook.after_val_iter()
    hook.after_val_iter()
    assert calls == ['test', 'val']
    assert bool(lost.reasons) == isinstance(error, OSError)
    with pytest.raises(type(error), match=str(error)):
        type(hook).after_val_iter(hook)


class Dataset(list):
    def get_data_info(self, index):
        return self[index]


def test_two_images_of_different_sizes_are_chosen():
    sizes = [dict(width=4, height=3)] * 5 + [dict(width=3, height=4)] * 2
    assert two_images(Dataset(sizes)) == [0, 5]
    assert two_images(Dataset(sizes[:4])) == [0, 3]
    assert two_images(Dataset(sizes[:1])) == [0]
    assert two_images(sizes) == [0, 6]


class FirstTruth(BaseMetric):
    """Keeps the truth of its first evaluation, as CocoMetric without `ann_file` does."""

    default_prefix = ''
    truth = None

    def process(self, data_batch, data_samples):
        self.results.extend(data_samples)

    def compute_metrics(self, results):
        self.truth = self.truth or list(results)
        return {'images': len(self.truth)}


def test_metrics_forget_the_dry_run():
    model = torch.nn.Linear(1, 1)
    model.val_step = lambda batch: batch
    metric = FirstTruth()
    evaluator = Evaluator([metric])
    runner = SimpleNamespace(
        model=model, hooks=[], val_loop=SimpleNamespace(evaluator=evaluator, fp16=False)
    )
    assert '1 metrics' in try_validation(runner, [['a'], ['b']])
    runner.val_loop.evaluator = MultiDatasetsEvaluator([metric], ['a'])  # of its part of the data
    assert '0 metrics' in try_validation(runner, [['a'], ['b']])
    assert metric.results == []
    assert metric.truth is None
    metric.process({}, ['a', 'b', 'c'])
    assert evaluator.evaluate(3) == {'images': 3}
