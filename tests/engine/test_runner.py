"""ReliableRunner: a run that was interrupted ends as one that was not."""

import json
import re

import pytest
import torch
from helpers.runs import NOT_REPRODUCED, final, run
from helpers.tiny import scalars, tiny_config
from mmengine.hooks import CheckpointHook, Hook, LoggerHook
from mmengine.runner import CheckpointLoader

from mmconv2former import ReliableRunner
from mmconv2former.checkpoint.reading import CheckpointError
from mmconv2former.engine.runner import checkpoints_of

CASES = {
    # name of the last checkpoint, length, interval, interruptions (iteration, whether in the
    # validation behind it), data workers of the resumed run
    'detection': ('epoch_3.pth', 3, 1, [(4, True), (7, False)], 0),
    'segmentation': ('iter_10.pth', 10, 2, [(1, False), (4, True), (7, False)], 2),
}


@pytest.mark.parametrize('task', CASES)
def test_interrupted_run_ends_as_an_uninterrupted_one(task, sample, tmp_path):
    """With random augmentation, drop path and dropout, whatever the number of workers."""
    last, length, interval, interruptions, workers = CASES[task]
    results = {}
    for name, interrupt_at in (('whole', []), ('interrupted', interruptions)):
        options = {
            'train_dataloader.num_workers': workers if interrupt_at else 0,
            'train_dataloader.persistent_workers': bool(workers and interrupt_at),
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


def assert_equal(actual, expected):
    torch.testing.assert_close(actual, expected, rtol=0, atol=0)


def test_damaged_checkpoint_in_a_moved_work_dir(sample, tmp_path):
    """`last_checkpoint` holds a path that is gone, of a file that was cut off in its new place."""
    run(tiny_config('segmentation', sample, tmp_path / 'old', 4, 2))
    work_dir = (tmp_path / 'old').rename(tmp_path / 'new')
    assert (work_dir / 'last_checkpoint').read_text() == str(tmp_path / 'old/iter_4.pth')
    newest = work_dir / 'iter_4.pth'
    newest.write_bytes(newest.read_bytes()[:-1000])
    assert [path.name for path in checkpoints_of(work_dir)] == ['iter_4.pth', 'iter_2.pth']
    iterations = []

    class Count(Hook):
        def before_train_iter(self, runner, batch_idx, data_batch=None):
            iterations.append(runner.iter)

    config = tiny_config('segmentation', sample, work_dir, 6, 2)
    config.resume = 'auto'
    config.visualizer.name = config.experiment_name
    runner = ReliableRunner.from_cfg(config)
    runner.register_hook(Count())
    runner.train()
    assert iterations == [2, 3, 4, 5]
    assert final(work_dir, 'iter_4.pth')['meta']['iter'] == 4


def test_one_best_checkpoint_for_each_metric(sample, tmp_path):
    hook = {'save_best': ['mIoU', 'aAcc'], 'max_keep_ckpts': 1, 'rule': 'greater'}
    options = {f'default_hooks.checkpoint.{key}': value for key, value in hook.items()}
    run(tiny_config('segmentation', sample, tmp_path, 8, 2, options=options))
    assert [path.name for path in tmp_path.glob('iter_*.pth')] == ['iter_8.pth']
    values = scalars(tmp_path)
    for metric in ('mIoU', 'aAcc'):
        (path,) = tmp_path.glob(f'best_{metric}_*.pth')
        history = {step: value for (name, step), value in values.items() if name == metric}
        assert path.stem == f'best_{metric}_iter_{max(history, key=history.get)}'


def test_all_processes_resume_from_the_same_checkpoint(sample, tmp_path, monkeypatch):
    """The newest is not there for another process, whose problem stands for all."""
    run(tiny_config('segmentation', sample, tmp_path, 4, 2))
    of_others = iter(['iter_4.pth does not exist', None])
    asked = []

    def all_gather_object(problem):
        asked.append(problem)
        return [problem, next(of_others)]

    monkeypatch.setattr('mmconv2former.engine.runner.all_gather_object', all_gather_object)
    config = tiny_config('segmentation', sample, tmp_path, 4, 2)
    config.resume = 'auto'
    runner = ReliableRunner.from_cfg(config)
    runner.optim_wrapper = runner.build_optim_wrapper(runner.optim_wrapper)
    runner.load_or_resume()
    assert runner.iter == 2
    assert asked == [None, None]
    expected = final(tmp_path, 'iter_2.pth')
    assert_equal(runner.model.state_dict(), expected['state_dict'])
    assert_equal(runner.optim_wrapper.state_dict()['state'], expected['optimizer']['state'])


def test_checkpoint_that_no_process_can_do_with_is_the_last(sample, tmp_path, monkeypatch):
    run(tiny_config('segmentation', sample, tmp_path, 4, 2))
    monkeypatch.setattr(
        'mmconv2former.engine.runner.all_gather_object', lambda _: [None, 'not there']
    )
    config = tiny_config('segmentation', sample, tmp_path, 4, 2)
    config.resume = 'auto'
    config.visualizer.name = config.experiment_name = 'again'
    with pytest.raises(CheckpointError, match='not there'):
        ReliableRunner.from_cfg(config).train()


@pytest.mark.parametrize('key', ['model', None])
def test_plain_state_dict_of_other_loaders(key, sample, tmp_path, monkeypatch):
    """Outside of the tools, files are read by mmengine."""
    config = tiny_config('segmentation', sample, tmp_path, 2, 2)
    runner = ReliableRunner.from_cfg(config)
    weights = {name: value + 1 for name, value in runner.model.state_dict().items()}
    content = {key: weights} if key else weights
    monkeypatch.setattr(CheckpointLoader, 'load_checkpoint', lambda *args: content)
    runner.load_checkpoint('file.pth')
    assert_equal(dict(runner.model.state_dict()), weights)


def test_validation_alone_needs_no_training_data(sample, tmp_path):
    options = {
        'train_dataloader.dataset.data_root': str(tmp_path / 'none'),
        'default_hooks.checkpoint.save_best': 'mIoU',
    }
    config = tiny_config('segmentation', sample, tmp_path, 2, 2, options=options)
    assert ReliableRunner.from_cfg(config).val().keys() == {'aAcc', 'mIoU', 'mAcc'}
    assert not list(tmp_path.glob('*.pth'))


@pytest.mark.parametrize('is_main', [True, False])
def test_metrics_are_written_by_the_first_process_only(is_main, sample, tmp_path, monkeypatch):
    """Several that write the same file at once leave no JSON."""
    monkeypatch.setattr('mmconv2former.engine.hooks.is_main_process', lambda: is_main)
    config = tiny_config('segmentation', sample, tmp_path, 2, 2)
    metrics = ReliableRunner.from_cfg(config).test()
    files = [json.loads(path.read_text()) for path in tmp_path.glob('*/*.json')]
    assert len(files) == is_main
    for content in files:
        assert content.keys() >= metrics.keys() == {'aAcc', 'mIoU', 'mAcc'}


def test_log_of_a_validation_has_metrics_only(sample, tmp_path):
    config = tiny_config('segmentation', sample, tmp_path, 4, 2)
    config.visualizer.name = config.experiment_name
    runner = ReliableRunner.from_cfg(config)
    lines = []

    class Log(Hook):
        priority = 'LOWEST'

        def after_val_epoch(self, runner, metrics=None):
            _, line = runner.log_processor.get_log_after_epoch(runner, 3, 'val')
            lines.append(re.findall(r'(\w+): ', line))

    runner.register_hook(Log())
    runner.train()
    assert lines == [['aAcc', 'mIoU', 'mAcc', 'data_time', 'time']] * 2


def test_hooks_of_mmengine_given_as_classes_are_ours_too(sample, tmp_path):
    """As configs that are Python have them."""
    config = tiny_config('segmentation', sample, tmp_path, 2, 2)
    hooks = dict(
        checkpoint=dict(type=CheckpointHook, interval=2), logger=dict(type=LoggerHook, interval=1)
    )
    runner = ReliableRunner.from_cfg(config)
    runner._hooks.clear()
    runner.register_default_hooks(hooks)
    names = {type(hook).__name__ for hook in runner.hooks}
    assert {'ReliableCheckpointHook', 'ReliableLoggerHook'} <= names
    assert not {'CheckpointHook', 'LoggerHook'} & names


def test_hooks_of_ours_can_be_turned_off(sample, tmp_path):
    config = tiny_config('segmentation', sample, tmp_path, 2, 2)
    names = {type(hook).__name__ for hook in ReliableRunner.from_cfg(config).hooks}
    assert {'SeedHook', 'FiniteLossHook', 'ReliableCheckpointHook', 'ReliableLoggerHook'} <= names
    config.default_hooks.seed = None
    config.experiment_name += '_'
    assert 'SeedHook' not in {type(hook).__name__ for hook in ReliableRunner.from_cfg(config).hooks}
