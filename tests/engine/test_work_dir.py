"""One run writes in a folder at a time, whatever became of earlier ones."""

import json
import multiprocessing
import os
import subprocess
import time

import pytest

from mmconv2former.engine import work_dir
from mmconv2former.engine.work_dir import LOCK, FolderLock, WorkDirError, lock_folder

SLEEP = ['sleep', '60']


@pytest.fixture(autouse=True)
def impatient(monkeypatch):
    monkeypatch.setattr(work_dir, 'BEAT', 0.1)
    monkeypatch.setattr(work_dir, 'PATIENCE', 1.0)


def write_lock(folder, **changes):
    """The lock of another run, by default of one on another machine."""
    owner = dict(host='node7', machine='other', pid=1, start='1', since='2026-01-02 03:04:05')
    (folder / LOCK).write_text(json.dumps({**owner, **changes}))


@pytest.fixture
def process():
    """A process of this machine."""
    with subprocess.Popen(SLEEP) as process:
        yield process
        process.kill()


def taken(folder, **options):
    """Whether the folder could be locked, and what was said meanwhile."""
    lock, said = FolderLock(folder), []
    lock.acquire(warn=said.append, **options)
    assert lock.is_held()
    lock.release()
    assert not (folder / LOCK).exists()
    return said


def of_process(process, **changes):
    start = work_dir.start_of(process.pid)
    return dict(machine=work_dir.machine(), pid=process.pid, start=start, **changes)


def test_a_dead_run_of_this_machine_does_not(process, tmp_path):
    """Also if nobody has waited for it yet, or its number is of another process now."""
    dead = of_process(process)
    process.kill()
    deadline = time.monotonic() + 10
    while work_dir.start_of(process.pid) is not None:
        assert time.monotonic() < deadline
    write_lock(tmp_path, **dead)
    assert taken(tmp_path) == []
    write_lock(tmp_path, **(dead | dict(pid=os.getppid())))
    assert taken(tmp_path) == []


def test_a_damaged_lock_is_of_nobody(tmp_path):
    (tmp_path / LOCK).write_text('{"pid": "x"}')
    assert 'unknown' in taken(tmp_path)[0]


def test_the_file_is_touched(tmp_path):
    lock = FolderLock(tmp_path)
    lock.acquire()
    os.utime(tmp_path / LOCK, (0, 0))
    deadline = time.monotonic() + 10
    while (tmp_path / LOCK).stat().st_mtime < 1:
        assert time.monotonic() < deadline
        time.sleep(0.02)
    lock.release()


def test_take_over(process, tmp_path):
    """The run that had the folder notices, and does not remove the lock of the other."""
    first = FolderLock(tmp_path)
    first.acquire()
    second = FolderLock(tmp_path)
    second.acquire(take_over=True)
    assert second.is_held()
    assert not first.is_held()
    first.release()
    assert second.is_held()
    second.release()


def test_why_a_run_must_not_write_any_more(tmp_path, monkeypatch):
    folder = tmp_path / 'work'
    folder.mkdir()
    lock = FolderLock(folder)
    lock.acquire()
    assert lock.problem() is None
    write_lock(folder)
    assert lock.problem() == (
        f'another training run took {folder} (host node7, process 1, since 2026-01-02 03:04:05)'
    )
    (folder / LOCK).unlink()
    assert lock.problem() == f'{folder / LOCK} is gone: removed, or its disk is not mounted'
    folder.rmdir()
    assert lock.problem() == f'the folder {folder} is gone: removed, or its disk is not mounted'
    monkeypatch.setattr(lock, '_read', lambda: os.stat(tmp_path / 'none'))
    assert lock.problem().startswith(f'cannot read {folder / LOCK}: [Errno 2]')
    lock.ended.set()


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
        write_lock(tmp_path, machine=work_dir.machine(), pid=2**22 + 1)
        together, answers = context.Barrier(4), context.Queue()
        arguments = (tmp_path, together, answers)
        processes = [context.Process(target=try_to_lock, args=arguments) for _ in range(4)]
        for process in processes:
            process.start()
        said = [answers.get(timeout=60) for _ in processes]
        for process in processes:
            process.join()
        assert sorted(text == 'got' for text in said) == [False, False, False, True], said


def test_all_processes_are_told(process, tmp_path, monkeypatch):
    """Only the main process looks at the file."""
    write_lock(tmp_path, **of_process(process))
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
