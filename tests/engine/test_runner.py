"""ReliableRunner: an interrupted run ends like an uninterrupted one."""

import json
import re
import shutil

import pytest
import torch
from helpers.runs import NOT_REPRODUCED, final, run
from helpers.tiny import scalars, tiny_config
from mmengine.hooks import CheckpointHook, Hook, LoggerHook

from mmconv2former import ReliableRunner
from mmconv2former.checkpoint.reading import CheckpointError
from mmconv2former.engine.work_dir import checkpoints_of


def assert_equal(actual, expected):
    torch.testing.assert_close(actual, expected, rtol=0, atol=0)


@pytest.fixture
def segmentation(sample, tmp_path):
    """Makes the config of a run of `length` iterations in `tmp_path`."""

    def make(length=2, interval=2, **options):
        config = tiny_config('segmentation', sample, tmp_path, length, interval, options=options)
        config.visualizer.name = config.experiment_name
        return config

    return make


# ------------------------------------------------------------------------------------------ resume
CASES = {
    # name of the last checkpoint, length, interval, interruptions (iteration, whether in the
    # validation after it), data workers of the resumed run
    'detection': ('epoch_2.pth', 2, 1, [(4, True), (7, False)], 0),
    'segmentation': ('iter_8.pth', 8, 2, [(1, False), (4, True), (7, False)], 2),
}


@pytest.mark.parametrize('task', CASES)
def test_interrupted_run_ends_like_an_uninterrupted_one(task, sample, tmp_path):
    """With random augmentation, drop path and dropout, for any number of workers."""
    last, length, interval, interruptions, workers = CASES[task]
    results = {}
    for name, interrupt_at in (('whole', []), ('interrupted', interruptions)):
        options = {
            'train_dataloader.num_workers': workers if interrupt_at else 0,
            'train_dataloader.persistent_workers': bool(workers and interrupt_at),
            'val_dataloader.dataset.indices': 2,
        }
        config = tiny_config(task, sample, tmp_path / name, length, interval, options=options)
        run(config, interrupt_at)
        results[name] = final(tmp_path / name, last), scalars(tmp_path / name)
    (whole, log), (interrupted, other_log) = results.values()
    assert_equal(interrupted['state_dict'], whole['state_dict'])
    assert_equal(interrupted['optimizer'], whole['optimizer'])
    assert interrupted['param_schedulers'] == whole['param_schedulers']
    expected = {key: value for key, value in log.items() if key[0] not in NOT_REPRODUCED}
    assert {key: other_log.get(key) for key in expected} == expected
    assert any(name == 'lr' for name, _ in expected)


def test_damaged_checkpoint_in_a_moved_work_dir(finished, segmentation, tmp_path):
    """`last_checkpoint` names an old path; the file of that name was truncated in the new place."""
    work_dir = shutil.copytree(finished, tmp_path, dirs_exist_ok=True)
    assert (work_dir / 'last_checkpoint').read_text() == str(finished / 'iter_4.pth')
    newest = work_dir / 'iter_4.pth'
    newest.write_bytes(newest.read_bytes()[:-1000])
    assert [path.name for path in checkpoints_of(work_dir)] == ['iter_4.pth', 'iter_2.pth']
    iterations = []

    class Count(Hook):
        def before_train_iter(self, runner, batch_idx, data_batch=None):
            iterations.append(runner.iter)

    config = segmentation(4)
    config.resume = 'auto'
    runner = ReliableRunner.from_cfg(config)
    runner.register_hook(Count())
    runner.train()
    assert iterations == [2, 3]
    assert final(work_dir, 'iter_4.pth')['meta']['iter'] == 4


def test_all_processes_resume_from_the_same_checkpoint(
    finished, segmentation, tmp_path, monkeypatch
):
    """Another process cannot read the newest, or any: its problem counts for all."""
    shutil.copytree(finished, tmp_path, dirs_exist_ok=True)
    of_others = iter(['iter_4.pth does not exist', None])
    asked = []

    def all_gather_object(problem):
        asked.append(problem)
        return [problem, next(of_others, 'not there')]

    monkeypatch.setattr('mmconv2former.engine.runner.all_gather_object', all_gather_object)
    config = segmentation(4)
    config.resume = 'auto'
    runner = ReliableRunner.from_cfg(config)
    runner.optim_wrapper = runner.build_optim_wrapper(runner.optim_wrapper)
    runner.load_or_resume()
    assert runner.iter == 2
    assert asked == [None, None]
    expected = final(tmp_path, 'iter_2.pth')
    assert_equal(runner.model.state_dict(), expected['state_dict'])
    assert_equal(runner.optim_wrapper.state_dict()['state'], expected['optimizer']['state'])
    runner._has_loaded = False
    with pytest.raises(CheckpointError, match='not there'):
        runner.load_or_resume()


# -------------------------------------------------------------------------------------------- load
@pytest.mark.parametrize('key', ['model', None])
def test_loads_plain_state_dicts(key, segmentation, tmp_path):
    runner = ReliableRunner.from_cfg(segmentation())
    weights = {name: value + 1 for name, value in runner.model.state_dict().items()}
    torch.save({key: weights} if key else weights, tmp_path / 'file.pth')
    runner.load_checkpoint(str(tmp_path / 'file.pth'))
    assert_equal(dict(runner.model.state_dict()), weights)


def test_weights_are_read_once(finished, segmentation, monkeypatch):
    """Initial weights and `load_from` before the data are loaded, and not again."""
    path = str(finished / 'iter_4.pth')
    expected = final(finished, 'iter_4.pth')['state_dict']
    in_backbone = {n[9:]: value + 1 for n, value in expected.items() if n.startswith('backbone.')}
    torch.save(in_backbone, finished / 'backbone.pth')
    init_cfg = dict(type='Pretrained', checkpoint=str(finished / 'backbone.pth'))
    config = segmentation(load_from=path)
    config.model.backbone.init_cfg = init_cfg
    read = []

    def read_checkpoint(checkpoint, *args):
        read.append(checkpoint)
        return torch.load(checkpoint, weights_only=False)

    monkeypatch.setattr('mmconv2former.checkpoint.reading.read_checkpoint', read_checkpoint)
    runner = ReliableRunner.from_cfg(config)
    runner.preflight(training=True)
    assert_equal(dict(runner.model.backbone.state_dict()), in_backbone)
    assert read == [init_cfg['checkpoint'], path]
    runner._init_model_weights()
    runner.load_or_resume()
    assert_equal(dict(runner.model.state_dict()), dict(expected))
    assert len(read) == 2


# ------------------------------------------------------------------------------------------- hooks
def test_one_best_checkpoint_for_each_metric(segmentation, tmp_path):
    hook = {'save_best': ['mIoU', 'aAcc'], 'max_keep_ckpts': 1, 'rule': 'greater'}
    options = {f'default_hooks.checkpoint.{key}': value for key, value in hook.items()}
    run(segmentation(6, **options, **{'val_dataloader.dataset.indices': 2}))
    assert [path.name for path in tmp_path.glob('iter_*.pth')] == ['iter_6.pth']
    values = scalars(tmp_path)
    for metric in ('mIoU', 'aAcc'):
        (path,) = tmp_path.glob(f'best_{metric}_*.pth')
        history = {step: value for (name, step), value in values.items() if name == metric}
        assert path.stem == f'best_{metric}_iter_{max(history, key=history.get)}'


def test_validation_alone_needs_no_training_data(segmentation, tmp_path):
    options = {
        'train_dataloader.dataset.data_root': str(tmp_path / 'none'),
        'default_hooks.checkpoint.save_best': 'mIoU',
    }
    runner = ReliableRunner.from_cfg(segmentation(**options))
    assert runner.val().keys() == {'aAcc', 'mIoU', 'mAcc'}
    assert not list(tmp_path.glob('*.pth'))


@pytest.mark.parametrize('is_main', [True, False])
def test_metrics_are_written_by_the_first_process_only(
    is_main, segmentation, tmp_path, monkeypatch
):
    """Several that write the same file at once leave invalid JSON."""
    monkeypatch.setattr('mmconv2former.engine.hooks.is_main_process', lambda: is_main)
    metrics = ReliableRunner.from_cfg(segmentation()).test()
    files = [json.loads(path.read_text()) for path in tmp_path.glob('*/*.json')]
    assert len(files) == is_main
    for content in files:
        assert content.keys() >= metrics.keys() == {'aAcc', 'mIoU', 'mAcc'}


def test_log_of_a_validation_has_metrics_only(segmentation):
    runner = ReliableRunner.from_cfg(segmentation(4))
    lines = []

    class Log(Hook):
        priority = 'LOWEST'

        def after_val_epoch(self, runner, metrics=None):
            _, line = runner.log_processor.get_log_after_epoch(runner, 3, 'val')
            lines.append(re.findall(r'(\w+): ', line))

    runner.register_hook(Log())
    runner.train()
    assert lines == [['aAcc', 'mIoU', 'mAcc', 'data_time', 'time']] * 2


def hook_names(runner):
    return {type(hook).__name__ for hook in runner.hooks}


def test_hooks_are_ours_and_can_be_turned_off(segmentation):
    """Also hooks of mmengine that are given as classes, as Python configs have them."""
    config = segmentation()
    config.default_hooks.seed = None
    runner = ReliableRunner.from_cfg(config)
    ours = {'ReliableCheckpointHook', 'ReliableLoggerHook'}
    assert {'FiniteLossHook', *ours} <= hook_names(runner)
    assert 'SeedHook' not in hook_names(runner)
    runner._hooks.clear()
    runner.register_default_hooks(
        dict(checkpoint=dict(type=CheckpointHook, interval=2), logger=dict(type=LoggerHook))
    )
    assert {'SeedHook', *ours} <= hook_names(runner)
    assert not {'CheckpointHook', 'LoggerHook'} & hook_names(runner)
    runner._hooks.clear()
    runner.register_default_hooks(dict(checkpoint=dict(type='mmengine.CheckpointHook')))
    assert ours <= hook_names(runner)
