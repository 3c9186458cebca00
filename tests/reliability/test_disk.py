"""A disk that is full, cannot be written to, or is gone, while a run writes its files."""

import errno
import itertools
import os
import re
import shutil
import subprocess
import threading
from contextlib import contextmanager, suppress

import pytest
import torch
from helpers.in_process import refusal_of
from helpers.tiny import tiny_config, write_config
from mmengine.fileio import LocalBackend

from mmconv2former import ReliableRunner
from mmconv2former.engine.runner import CheckpointNotSaved

DISK = 5  # MiB; a checkpoint of the small network has 1.6
needs_root = pytest.mark.skipif(os.geteuid() != 0, reason='only root can mount a file system')


@contextmanager
def small_disk(folder, mebibytes, options=''):
    """A file system in memory."""
    folder.mkdir()
    mount = ['mount', '-t', 'tmpfs', '-o', f'size={mebibytes}m{options}', 'tmpfs', str(folder)]
    result = subprocess.run(mount, capture_output=True, text=True)
    if result.returncode != 0:
        pytest.skip(f'this machine does not let root mount a tmpfs: {result.stderr.strip()}')
    try:
        yield folder
    finally:
        subprocess.run(['umount', '--lazy', str(folder)], check=True)


@pytest.fixture
def config(sample, tmp_path):
    """The config file of a run of eight iterations that keeps all checkpoints."""
    options = {'default_hooks.checkpoint.max_keep_ckpts': -1, 'log_level': 'INFO'}
    return write_config(tmp_path / 'config.py', 'segmentation', sample, 8, 2, options=options)


def checkpoints(work_dir):
    """Iterations of the checkpoints; all must be readable."""
    paths = [*work_dir.glob('*.pth'), *work_dir.glob('.*')]
    found = {path.name: torch.load(path, weights_only=False)['meta']['iter'] for path in paths}
    return sorted(number for name, number in found.items() if name.startswith('iter_'))


@needs_root
def test_full_disk(server, config, tmp_path, fault_report):
    log = tmp_path / 'output.txt'
    with small_disk(tmp_path / 'disk', DISK) as disk:
        work_dir = disk / 'work'
        argv = ['train.py', config, '--work-dir', work_dir, '--resume']
        assert server.run(argv, log) == [1]
        *_, error = log.read_text().strip().splitlines()
        assert error.startswith(f'error: cannot save {work_dir}/')
        assert 'No space left on device' in error
        survivors = checkpoints(work_dir)
        assert survivors
        assert survivors[-1] < 8
        assert (work_dir / 'last_checkpoint').read_text() == f'{work_dir}/iter_{survivors[-1]}.pth'

        subprocess.run(['mount', '-o', 'remount,size=64m', str(disk)], check=True)
        assert server.run(argv, log) == [0], log.read_text()
        assert checkpoints(work_dir)[-1] == 8
    shown = error.replace(str(tmp_path / 'disk'), '...')
    fault_report('Disk', 'file system full (tmpfs)', 1, 1, f'`{shown}`; resumes with more room')


@needs_root
def test_unwritable_work_dir(server, config, tmp_path, fault_report):
    (tmp_path / 'file').write_text('')
    with small_disk(tmp_path / 'disk', 1, ',ro') as disk:
        for fault, work_dir in (
            ('read-only file system', disk / 'work'),
            ('a file in place of the work dir', tmp_path / 'file'),
        ):
            log = tmp_path / f'{work_dir.parent.name}.txt'
            argv = ['train.py', config, '--work-dir', work_dir]
            assert server.run(argv, log) == [1]
            *_, error = log.read_text().strip().splitlines()
            assert error.startswith(f'error: --work-dir {work_dir} cannot be written to: ')
            assert 'Traceback' not in log.read_text()
            fault_report('Disk', fault, 1, 1, f'`{error.replace(str(tmp_path), "...")}`')


WRITES = ['iter_2.pth', 'best_mIoU_iter_2.pth', 'iter_2.pth', 'iter_4.pth', 'best_mIoU_iter_4.pth']


@pytest.mark.parametrize(
    ('failing', 'left'),
    [
        pytest.param(1, {'iter_2.pth'}, marks=pytest.mark.slow),
        (3, {'iter_2.pth', 'best_mIoU_iter_2.pth'}),
        (4, {'iter_4.pth', 'best_mIoU_iter_2.pth'}),
    ],
    ids=['first best', 'second checkpoint', 'second best'],
)
def test_writer_that_fails_in_the_middle(
    failing, left, sample, tmp_path, monkeypatch, fault_report
):
    """With one checkpoint and one best kept: each stays until its successor is written."""
    scores = itertools.count(1)
    monkeypatch.setattr(
        'mmseg.evaluation.IoUMetric.compute_metrics', lambda *_: {'mIoU': float(next(scores))}
    )
    put, writes = LocalBackend.put, []

    def full(self, content, path):
        writes.append(path)
        if len(writes) <= failing:
            return put(self, content, path)
        put(self, content[: len(content) // 2], path)
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(LocalBackend, 'put', full)
    options = {'default_hooks.checkpoint.max_keep_ckpts': 1, 'default_hooks.dry_run': None}
    config = tiny_config('segmentation', sample, tmp_path / 'work', 8, 2, options=options)
    config.visualizer.name = config.experiment_name
    runner = ReliableRunner.from_cfg(config)
    name = WRITES[failing]
    with pytest.raises(CheckpointNotSaved, match=f'cannot save .*{name}: .*No space left'):
        runner.train()
    assert {path.name for path in tmp_path.glob('work/*.pth')} == left
    (newest,) = checkpoints(tmp_path / 'work')
    assert (tmp_path / 'work/last_checkpoint').read_text().endswith(f'/iter_{newest}.pth')
    seen = f'`cannot save .../{name}: [Errno 28] No space left on device`'
    fault_report('Disk', f'half of {name} written', 1, 1, seen)


# ------------------------------------------------------------------------------------ other files
def fill(disk):
    with suppress(OSError), (disk / 'filler').open('ab', buffering=0) as file:
        while file.write(bytes(512)):
            pass


@needs_root
def test_evaluation_on_a_full_disk(in_process, config, tmp_path, at_moment, capfd, fault_report):
    """Its metrics are shown; then it ends with an error."""
    with small_disk(tmp_path / 'disk', 1) as disk:
        at_moment(before_test=(1, lambda _: fill(disk)))
        error = refusal_of('test', config, 'none', '--work-dir', disk / 'work', '--out',
                           disk / 'predictions.pkl', '--show-dir', 'drawn')  # fmt: skip
        assert not (disk / 'predictions.pkl').exists()
    output = ''.join(capfd.readouterr())
    assert 'aAcc' in output
    assert 'Traceback' not in output
    assert error.startswith('error: the evaluation is complete, but not all was written: ')
    found = error.count('No space left on device')
    for name in ('log', 'metrics in', 'drawings of', 'predictions'):
        reported = name in error
        shown = f'metrics; `error: the evaluation is complete, but not all was written: {name} ...`'
        fault_report('Disk', f'full during an evaluation: {name.split()[0]}', 1, reported, shown)
        assert reported, error
    assert found == 4


@needs_root
def test_training_on_a_disk_that_is_full_for_a_while(
    in_process, config, tmp_path, at_moment, monkeypatch, capfd, fault_report
):
    """Logs, scalars and drawings are no reason to end."""
    monkeypatch.setattr('threading.excepthook', threading.__excepthook__)  # pytest has its own
    options = [
        'train_cfg.max_iters=4', 'train_cfg.val_interval=1', 'param_scheduler.1.end=4',
        'default_hooks.checkpoint.interval=4', 'default_hooks.visualization.draw=True',
        'default_hooks.visualization.interval=1', 'default_hooks.checkpoint.save_best=None',
    ]  # fmt: skip
    with small_disk(tmp_path / 'disk', DISK) as disk:
        at_moment(
            before_train_iter=(1, lambda _: fill(disk)),
            after_train_iter=(3, lambda _: (disk / 'filler').unlink()),
        )
        work_dir = disk / 'work'
        arguments = ['--work-dir', work_dir, '--no-dry-run', '--tensorboard']
        assert refusal_of('train', config, *arguments, '--cfg-options', *options) == ''
        assert [path.name for path in work_dir.glob('*.pth')] == ['iter_4.pth']
    output = ''.join(capfd.readouterr())
    assert 'Traceback' not in output
    for name in ('LocalVisBackend in', 'log'):
        count = len(re.findall(f'{name} .* cannot be written: .*No space left on device', output))
        shown = f'`{name} ... cannot be written: [Errno 28] No space left on device. The run ...`'
        what = name.removesuffix(' in')
        fault_report('Disk', f'full for three iterations: {what}', 1, count == 1, shown)
        assert count == 1


def test_work_dir_that_is_removed(in_process, config, tmp_path, at_moment, capfd, fault_report):
    work_dir = tmp_path / 'work'
    at_moment(after_train_iter=(3, lambda _: shutil.rmtree(work_dir)))
    error = refusal_of('train', config, '--work-dir', work_dir, '--no-dry-run')
    is_said = error == (
        f'error: iteration 3: the folder {work_dir} is gone: removed, or its disk is not mounted; '
        'this run ends and saves nothing there'
    )
    fault_report('Disk', 'the work dir is removed during training', 1, is_said, f'`{error}`')
    assert is_said, error
    assert not work_dir.exists()
    assert 'Traceback' not in ''.join(capfd.readouterr())


def test_evaluation_whose_work_dir_is_removed(
    in_process, config, tmp_path, at_moment, capfd, fault_report
):
    work_dir = tmp_path / 'work'
    at_moment(before_test=(1, lambda _: shutil.rmtree(work_dir)))
    error = refusal_of('test', config, 'none', '--work-dir', work_dir)
    assert list(work_dir.glob('*/*.json'))
    is_said = error.startswith('error: the evaluation is complete, but not all was written: log ')
    shown = f'metrics; `{error}`'
    fault_report('Disk', 'the work dir is removed during an evaluation', 1, is_said, shown)
    assert is_said, error
