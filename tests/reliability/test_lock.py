"""Two runs in one work dir, and what dead ones leave there."""

import json
import multiprocessing
import os
import subprocess
import threading
import time

import pytest
from helpers.in_process import refusal_of
from helpers.tiny import write_config

from mmconv2former.engine import work_dir
from mmconv2former.engine.work_dir import LOCK, FolderLock, WorkDirError, lock_folder

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
    config = write_config(tmp_path / 'config.py', 'segmentation', sample, 2)
    work = tmp_path / 'work'
    work.mkdir()
    (work / 'config.py').write_text('# of the first run')
    (work / LOCK).write_text(lock_of(process.pid))
    before = listing(work)
    error = refusal_of('train', config, '--work-dir', work)
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


def killed(process):
    """The lock of a process that has ended, and that nobody has waited for yet."""
    text = lock_of(process.pid)
    process.kill()
    os.waitid(os.P_PID, process.pid, os.WEXITED | os.WNOWAIT)
    return text


DEAD = {
    'a dead process': killed,
    'a process whose number another one has now': lambda living: lock_of(living.pid, start='1'),
    'a process without a start (written by hand)': lambda living: lock_of(living.pid, start=None),
    'a run on another machine that touches it no more': lambda _: other_machine(),
    'nobody: an empty file': lambda _: '',
    'nobody: half a file': lambda _: other_machine()[:20],
    'nobody: other JSON': lambda _: '[{"pid": 1}]',
    'nobody: no text': lambda _: '\udcff\udcfe\x00',
}


@pytest.mark.parametrize('kind', DEAD)
def test_locks_of_dead_runs(kind, process, tmp_path, fault_report):
    (tmp_path / LOCK).write_text(DEAD[kind](process), errors='surrogateescape')
    for name in ('.checkpoint.partial', '.checkpoint.1-2.partial', 'iter_2.pth'):
        (tmp_path / name).touch()
    said = []
    lock = FolderLock(tmp_path)
    lock.acquire(warn=said.append)
    survived = lock.is_held() and set(os.listdir(tmp_path)) == {LOCK, 'iter_2.pth'}
    lock.release()
    assert not (tmp_path / LOCK).exists()
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
    config = write_config(tmp_path / 'config.py', 'segmentation', sample, 4, 2)
    work = tmp_path / 'work'
    stock = FolderLock.problem

    def taken(self):
        if (work / 'iter_2.pth').exists():
            (work / LOCK).write_text(lock_of(process.pid))
        return stock(self)

    monkeypatch.setattr(FolderLock, 'problem', taken)
    error = refusal_of('train', config, '--work-dir', work)
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


# --------------------------------------------------------------------------------- the lock itself
@pytest.fixture
def lock(tmp_path):
    lock = FolderLock(tmp_path)
    lock.acquire()
    yield lock
    lock.release()


def test_the_file_is_touched(lock):
    os.utime(lock.path, (0, 0))
    deadline = time.monotonic() + 10
    while lock.path.stat().st_mtime < 1:
        assert time.monotonic() < deadline
        time.sleep(0.02)


def test_take_over(lock, tmp_path):
    """The run that had the folder notices, and does not remove the lock of the other."""
    second = FolderLock(tmp_path)
    second.acquire(take_over=True)
    assert second.is_held()
    assert not lock.is_held()
    lock.release()
    assert second.is_held()
    second.release()


def test_why_a_run_must_not_write_any_more(lock, tmp_path, monkeypatch):
    assert lock.problem() is None
    lock.path.unlink()
    assert lock.problem() == f'{lock.path} is gone: removed, or its disk is not mounted'
    monkeypatch.setattr(lock, '_read', lambda: os.stat(tmp_path / 'none'))
    assert lock.problem().startswith(f'cannot read {lock.path}: [Errno 2]')


def try_to_lock(folder, together, answers):
    """What each of several processes does at once."""
    lock = FolderLock(folder)
    together.wait()
    try:
        lock.acquire()
        answers.put('got')
    except WorkDirError as error:
        answers.put(str(error))
    together.wait()


def test_one_of_many_takes_a_dead_lock(tmp_path):
    """Processes that start at once, as a requeued array of jobs does."""
    context = multiprocessing.get_context('fork')
    for _ in range(5):
        (tmp_path / LOCK).write_text(lock_of(2**22 + 1, start='1'))
        together, answers = context.Barrier(4), context.Queue()
        arguments = (tmp_path, together, answers)
        processes = [context.Process(target=try_to_lock, args=arguments) for _ in range(4)]
        for process in processes:
            process.start()
        said = [answers.get(timeout=60) for _ in processes]
        for process in processes:
            process.join()
        assert sorted(text == 'got' for text in said) == [False, False, False, True], said


def test_a_lock_is_removed_by_one_process_at_a_time(lock, tmp_path, monkeypatch):
    """One that read a dead lock leaves its successor; one that died there is no obstacle."""
    monkeypatch.setattr(os, 'rename', None)
    FolderLock(tmp_path)._remove('of a dead run')
    assert lock.is_held()
    monkeypatch.setattr(work_dir, 'PATIENCE', 0.1)
    guard = tmp_path / f'{LOCK}.removing'
    guard.touch()
    lock._remove(lock.text)
    assert not lock.path.exists()
    assert not guard.exists()


def test_all_processes_are_told(process, tmp_path, monkeypatch):
    """Only the main process looks at the file."""
    (tmp_path / LOCK).write_text(lock_of(process.pid))
    monkeypatch.setattr(work_dir, 'is_main_process', lambda: False)
    assert lock_folder(tmp_path) is None

    def broadcast_object_list(values):
        values[0] = 'in use'

    monkeypatch.setattr(work_dir, 'broadcast_object_list', broadcast_object_list)
    with pytest.raises(WorkDirError, match='in use'):
        lock_folder(tmp_path)


def test_a_folder_that_cannot_be_written_to(tmp_path):
    (tmp_path / 'file').touch()
    with pytest.raises(WorkDirError, match='File exists'):
        lock_folder(tmp_path / 'file')
