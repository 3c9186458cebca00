"""Two runs in one work dir, and what dead ones leave there."""

import json
import os
import subprocess
import threading

import pytest
from helpers.in_process import refusal_of
from helpers.tiny import tiny_config

from mmconv2former.engine import work_dir
from mmconv2former.engine.work_dir import LOCK, FolderLock, WorkDirError

AREA = 'Processes'


@pytest.fixture(autouse=True)
def impatient(monkeypatch):
    monkeypatch.setattr(work_dir, 'BEAT', 0.1)
    monkeypatch.setattr(work_dir, 'PATIENCE', 1.0)


@pytest.fixture
def process():
    """A living process of this machine."""
    with subprocess.Popen(['sleep', '60']) as process:
        yield process
        process.kill()


def lock_of(pid, **changes):
    owner = dict(host='node7', machine=work_dir.machine(), pid=pid, start=work_dir.start_of(pid),
                 since='2026-01-02 03:04:05')  # fmt: skip
    return json.dumps(owner | changes)


def listing(folder):
    return {path: path.stat().st_mtime_ns for path in folder.rglob('*')}


def test_a_second_run_is_refused_and_leaves_nothing(
    process, in_process, sample, tmp_path, fault_report
):
    config = tiny_config('segmentation', sample, 'unused', 2)
    config.dump(tmp_path / 'config.py')
    work = tmp_path / 'work'
    work.mkdir()
    (work / 'config.py').write_text('# of the first run')
    (work / LOCK).write_text(lock_of(process.pid))
    before = listing(work)
    error = refusal_of('train', tmp_path / 'config.py', '--work-dir', work)
    refused = error.startswith(
        f'error: {work} is in use by another training run (host node7, process {process.pid}, '
        'since 2026-01-02 03:04:05). '
    )
    survived = refused and listing(work) == before
    fault_report(AREA, 'a second run in the work dir', 1, survived, f'`{error}`')
    assert refused, error
    assert '--take-over' in error
    assert listing(work) == before


def other_machine(**changes):
    return lock_of(1, machine='other', start='1', **changes)


DEAD = {
    'a dead process': lambda pid: lock_of(2**22 + 1, start='1'),
    'a process whose number another one has now': lambda pid: lock_of(pid, start='1'),
    'a process without a start (written by hand)': lambda pid: lock_of(pid, start=None),
    'a run on another machine that touches it no more': lambda pid: other_machine(),
    'nobody: an empty file': lambda pid: '',
    'nobody: half a file': lambda pid: other_machine()[:20],
    'nobody: other JSON': lambda pid: '[{"pid": 1}]',
    'nobody: no text': lambda pid: '\udcff\udcfe\x00',
}


@pytest.mark.parametrize('kind', DEAD)
def test_locks_of_dead_runs(kind, process, tmp_path, fault_report):
    (tmp_path / LOCK).write_text(DEAD[kind](process.pid), errors='surrogateescape')
    for name in ('.checkpoint.partial', '.checkpoint.1-2.partial', 'iter_2.pth'):
        (tmp_path / name).touch()
    said = []
    lock = FolderLock(tmp_path)
    lock.acquire(warn=said.append)
    survived = lock.is_held() and set(os.listdir(tmp_path)) == {LOCK, 'iter_2.pth'}
    lock.release()
    is_watched = 'machine' in kind or 'nobody' in kind
    seen = f'`{said[0]}`' if said else 'nothing: the run starts'
    fault_report(AREA, f'a lock of {kind}', 1, survived, seen)
    assert survived
    assert bool(said) == is_watched


def test_a_lock_of_a_living_run_on_another_machine(tmp_path, fault_report):
    (tmp_path / LOCK).write_text(other_machine())
    ended = threading.Event()

    def beat():
        while not ended.wait(0.1):
            os.utime(tmp_path / LOCK)

    thread = threading.Thread(target=beat)
    thread.start()
    try:
        with pytest.raises(WorkDirError, match='host node7, process 1') as error:
            FolderLock(tmp_path).acquire(warn=lambda line: None)
    finally:
        ended.set()
        thread.join()
    fault_report(AREA, 'a lock of a living run on another machine', 1, 1, f'`{error.value}`')


def test_a_run_whose_work_dir_is_taken(
    in_process, sample, tmp_path, monkeypatch, process, fault_report
):
    """It saves nothing more, and leaves the lock of the other."""
    config = tiny_config('segmentation', sample, 'unused', 4, 2)
    config.dump(tmp_path / 'config.py')
    work = tmp_path / 'work'
    stock = FolderLock.problem

    def taken(self):
        if (work / 'iter_2.pth').exists():
            (work / LOCK).write_text(lock_of(process.pid))
        return stock(self)

    monkeypatch.setattr(FolderLock, 'problem', taken)
    error = refusal_of('train', tmp_path / 'config.py', '--work-dir', work)
    is_said = f'another training run took {work} (host node7, process {process.pid}' in error
    survived = is_said and json.loads((work / LOCK).read_text())['pid'] == process.pid
    fault_report(AREA, '--take-over by a second run', 1, survived, f'`{error}`')
    assert survived, error
    assert [path.name for path in work.glob('*.pth')] == ['iter_2.pth']


def test_a_folder_that_cannot_be_locked(tmp_path, monkeypatch, fault_report):
    monkeypatch.setattr(work_dir.os, 'open', lambda *_: (_ for _ in ()).throw(OSError(28, 'full')))
    with pytest.raises(WorkDirError, match=f'cannot lock {tmp_path}') as error:
        FolderLock(tmp_path).acquire()
    fault_report(AREA, 'no room for a lock', 1, 1, f'`{error.value}`')
