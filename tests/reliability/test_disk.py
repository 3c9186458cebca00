"""A disk that is full, or cannot be written to, while checkpoints are saved."""

import errno
import itertools
import os
import subprocess
from contextlib import contextmanager

import pytest
import torch
from helpers.tiny import tiny_config
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


def segmentation(sample, work_dir, **options):
    config = tiny_config('segmentation', sample, work_dir, length=8, interval=2, options=options)
    config.default_hooks.checkpoint.max_keep_ckpts = -1
    return config


def checkpoints(work_dir):
    """Iterations of the checkpoints; all must be readable."""
    paths = [*work_dir.glob('*.pth'), *work_dir.glob('.*')]
    found = {path.name: torch.load(path, weights_only=False)['meta']['iter'] for path in paths}
    return sorted(number for name, number in found.items() if name.startswith('iter_'))


@needs_root
def test_full_disk(server, sample, tmp_path, fault_report):
    config = segmentation(sample, 'unused')
    config.pop('experiment_name')
    config.dump(tmp_path / 'config.py')
    log = tmp_path / 'output.txt'
    with small_disk(tmp_path / 'disk', DISK) as disk:
        work_dir = disk / 'work'
        argv = ['train.py', tmp_path / 'config.py', '--work-dir', work_dir, '--resume']
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
def test_unwritable_work_dir(server, sample, tmp_path, fault_report):
    config = segmentation(sample, 'unused')
    config.dump(tmp_path / 'config.py')
    (tmp_path / 'file').write_text('')
    with small_disk(tmp_path / 'disk', 1, ',ro') as disk:
        for fault, work_dir in (
            ('read-only file system', disk / 'work'),
            ('a file in place of the work dir', tmp_path / 'file'),
        ):
            log = tmp_path / f'{work_dir.parent.name}.txt'
            argv = ['train.py', tmp_path / 'config.py', '--work-dir', work_dir]
            assert server.run(argv, log) == [1]
            *_, error = log.read_text().strip().splitlines()
            assert error.startswith(f'error: --work-dir {work_dir} cannot be written to: ')
            assert 'Traceback' not in log.read_text()
            fault_report('Disk', fault, 1, 1, f'`{error.replace(str(tmp_path), "...")}`')


WRITES = ['iter_2.pth', 'best_mIoU_iter_2.pth', 'iter_2.pth', 'iter_4.pth', 'best_mIoU_iter_4.pth']


@pytest.mark.parametrize(
    ('failing', 'left'),
    [
        (1, {'iter_2.pth'}),
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
    config = segmentation(sample, tmp_path / 'work')
    config.default_hooks.checkpoint.max_keep_ckpts = 1
    config.default_hooks.dry_run = None
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
