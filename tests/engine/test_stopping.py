"""A run that is asked to stop saves, and continues later as if it had not been asked."""

import signal
from types import SimpleNamespace

import pytest
import torch
from helpers.runs import NOT_REPRODUCED, run
from helpers.tiny import scalars, tiny_config
from mmengine.hooks import CheckpointHook, Hook
from torch.utils.data import DataLoader

from mmconv2former import ReliableRunner
from mmconv2former.engine import stopping
from mmconv2former.engine.hooks import EPOCH_POSITION, ReliableCheckpointHook
from mmconv2former.engine.stopping import SIGNALS, STOPPED, StoppingHook, command, make_patient


class Batches(Hook):
    """Remembers the numbers of the batches."""

    def __init__(self):
        self.numbers = []

    def before_train_iter(self, runner, batch_idx, data_batch=None):
        self.numbers.append(batch_idx)


def terminate(runner):
    signal.raise_signal(signal.SIGTERM)


def start(config, resume=False):
    """Trains; returns the numbers of the batches, and the exit code of a run that was stopped."""
    config = config.copy()
    config.update(resume='auto' if resume else False, experiment_name=f'{config.experiment_name}_')
    config.visualizer.name = config.experiment_name
    runner = ReliableRunner.from_cfg(config)
    batches = Batches()
    runner.register_hook(batches)
    try:
        runner.train()
    except SystemExit as stop:
        return batches.numbers, stop.code
    return batches.numbers, None


def last(work_dir):
    return torch.load((work_dir / 'last_checkpoint').read_text(), weights_only=False)


def files(work_dir):
    return {path.name for path in work_dir.iterdir() if not path.is_dir()}


@pytest.fixture(scope='module')
def whole(sample, tmp_path_factory):
    """Finished runs by task, three of four iterations each."""
    folders = {}
    for task, length, interval in (('detection', 2, 1), ('segmentation', 8, 4)):
        folders[task] = tmp_path_factory.mktemp(task)
        run(tiny_config(task, sample, folders[task], length, interval))
    return folders


@pytest.mark.parametrize(
    ('task', 'point', 'count', 'saved', 'batches'),
    [
        ('detection', 'before_train_iter', 6, 'iter_6.pth', [2, 3]),  # within an epoch
        ('detection', 'before_train_iter', 4, 'epoch_1.pth', [0, 1, 2, 3]),  # at its end
        ('detection', 'before_val_iter', 2, 'epoch_1.pth', [0, 1, 2, 3]),
        ('segmentation', 'before_train_iter', 6, 'iter_6.pth', None),
        ('segmentation', 'before_train_iter', 4, 'iter_4.pth', None),
        ('segmentation', 'before_val_iter', 2, 'iter_4.pth', None),
    ],
)
def test_a_resumed_run_equals_an_uninterrupted_one(
    task, point, count, saved, batches, whole, sample, tmp_path, at_moment, capfd
):
    length, interval = {'detection': (2, 1), 'segmentation': (8, 4)}[task]
    config = tiny_config(task, sample, tmp_path, length, interval)
    handlers = [signal.getsignal(number) for number in SIGNALS]
    at_moment(**{point: (count, terminate)})
    assert start(config)[1] == STOPPED
    assert [signal.getsignal(number) for number in SIGNALS] == handlers
    said = capfd.readouterr().err
    assert (
        f'stopped by SIGTERM after iteration {"6" if "6" in saved else "4"}; resume with:' in said
    )
    assert (tmp_path / 'last_checkpoint').read_text() == str(tmp_path / saved)

    found, code = start(config, resume=True)
    assert code is None
    if batches is not None:
        assert found == batches
    for part in ('state_dict', 'optimizer'):
        expected = last(whole[task])[part]
        torch.testing.assert_close(last(tmp_path)[part], expected, rtol=0, atol=0)
    assert files(tmp_path) == files(whole[task])
    logged = [
        {key: value for key, value in scalars(folder).items() if key[0] not in NOT_REPRODUCED}
        for folder in (tmp_path, whole[task])
    ]
    assert logged[0] == logged[1]
    assert EPOCH_POSITION not in last(tmp_path)['message_hub']['runtime_info']


def test_another_batch_size_continues_at_the_same_place(sample, tmp_path, at_moment):
    config = tiny_config('detection', sample, tmp_path, 1)
    at_moment(before_train_iter=(2, terminate))  # of four
    assert start(config)[1] == STOPPED
    config.train_dataloader.batch_size = 4
    assert start(config, resume=True) == ([1], None)  # of two batches
    log = ''.join(path.read_text() for path in tmp_path.glob('*/*.log'))
    assert 'batch size 4 (checkpoint: 2). The run continues at the same place in its epoch' in log
    assert 'which now has 2 iterations' in log


def test_signals_of_a_run_that_cannot_save_are_left_alone(monkeypatch):
    hook, before = StoppingHook(), signal.getsignal(signal.SIGTERM)
    for is_training, other in ((True, CheckpointHook()), (False, ReliableCheckpointHook())):
        runner = SimpleNamespace(is_training=is_training, hooks=[other], work_dir='.')
        hook.before_run(runner)
        assert signal.getsignal(signal.SIGTERM) is before


def test_the_command_to_resume_with(monkeypatch):
    monkeypatch.setattr('sys.argv', ['tools/train.py', 'a b.py'])
    assert command() == "python tools/train.py 'a b.py' --resume"
    monkeypatch.setenv(stopping.COMMAND, 'tools/dist_train.sh CONFIG 2 --resume')
    assert command() == 'tools/dist_train.sh CONFIG 2 --resume'
    monkeypatch.setenv(stopping.COMMAND, "train.py 'a b.py' --resume work/epoch_3.pth --amp")
    assert command() == "train.py 'a b.py' --resume --amp"


def test_a_worker_that_its_process_ends_has_not_crashed():
    """As torch's own; torch reports other exit codes with a traceback at the end of a run."""
    loader = DataLoader(range(4), num_workers=1, persistent_workers=True)
    make_patient(loader)
    iterator = iter(loader)
    next(iterator)
    (worker,) = iterator._workers
    worker.terminate()
    worker.join()
    assert worker.exitcode == 0
