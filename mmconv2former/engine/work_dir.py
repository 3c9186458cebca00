"""The files of a run that others must not write: checkpoints, `last_checkpoint`, a lock.

One run writes in a folder at a time. Network disks do not share the locks of the operating system,
so the lock is a file that names its run. A run on this machine is looked up by its process; one on
another machine counts as alive as long as it touches the file.
"""

from __future__ import annotations

import atexit
import contextlib
import json
import os
import socket
import threading
import time
import uuid
from collections.abc import Callable
from pathlib import Path
from typing import Any

from mmengine.dist import broadcast_object_list, is_main_process

from ..text import PrintableError, printable

LAST_CHECKPOINT = 'last_checkpoint'  # mmengine's file with the path of the newest checkpoint
LOCK = '.training.lock'
TOKEN = uuid.uuid4().hex  # of this process, or of the one that it was forked from
PARTIALS = '.checkpoint.*partial'  # half-written files
BEAT = 10.0  # seconds between two touches of a lock
PATIENCE = 120.0  # seconds without a touch after which a run of another machine is dead
LONGEST_PATH = 4096


class WorkDirError(PrintableError, RuntimeError):
    """The folder is in use by another run, or cannot be written to."""


# -------------------------------------------------------------------------------------------- files
def replace(partial: Path, path: Path) -> None:
    """Replaces a file with a new one, so that a crash leaves one or the other."""
    with partial.open('rb') as file:
        os.fsync(file.fileno())
    os.replace(partial, path)
    folder = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)


def created(path: Path, text: str = '') -> bool:
    """Writes a file if there is none; network disks do this for one process only."""
    try:
        file = os.open(path, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o644)
    except FileExistsError:
        return False
    try:
        with os.fdopen(file, 'w') as opened:
            opened.write(text)
    except OSError:
        path.unlink()
        raise
    return True


def partial_name() -> str:
    """The name for a file that is being written, which no other process has."""
    return f'.checkpoint.{TOKEN[:12]}-{os.getpid()}.partial'


def checkpoints_of(work_dir: Path) -> list[Path]:
    """The checkpoints from which a run can be resumed, newest first.

    The first is the one that `last_checkpoint` names; this folder is searched first, in case it was
    moved. All others follow by number.
    """
    named: list[Path] = []
    marker = work_dir / LAST_CHECKPOINT
    if marker.is_file():
        with marker.open(errors='replace') as file:
            text = file.read(LONGEST_PATH).strip()
        # Unlike `Path.is_file`, this takes any text.
        named = [p for p in (work_dir / Path(text).name, Path(text)) if os.path.isfile(p)][:1]
    numbered = [
        (int(digits), path)
        for pattern in ('epoch_*.pth', 'iter_*.pth')
        for path in work_dir.glob(pattern)
        if (digits := path.stem.rpartition('_')[2]).isdecimal()
    ]
    others = [path for _, path in sorted(numbered, reverse=True)]
    return named + [path for path in others if path not in named]


# --------------------------------------------------------------------------------------- processes
def machine() -> str:
    """This machine since its start, as its processes see it: containers have numbers of their own.

    Without Linux's /proc, the name of the host.
    """
    try:
        boot = Path('/proc/sys/kernel/random/boot_id').read_text().strip()
        return f'{boot} {os.readlink("/proc/self/ns/pid")}'
    except OSError:
        return socket.gethostname()


def start_of(pid: int) -> str | None:
    """When a process of this machine started, in the system's own count; None if it is dead.

    Without /proc it is '' for a living process.
    """
    if not os.path.isdir('/proc/self'):
        try:
            os.kill(pid, 0)
        except ProcessLookupError:
            return None
        except PermissionError:
            pass
        return ''
    try:
        fields = Path(f'/proc/{pid}/stat').read_text().rpartition(')')[2].split()
    except OSError:
        return None
    return None if fields[0] in 'ZX' else fields[19]  # dead, but not waited for


# -------------------------------------------------------------------------------------------- lock
class FolderLock:
    """A file that says which run writes in a folder.

    Args:
        folder: Exists.
    """

    def __init__(self, folder: str | Path) -> None:
        self.path = Path(folder, LOCK)
        self.owner: dict[str, Any] = {
            'host': socket.gethostname(),
            'machine': machine(),
            'pid': os.getpid(),
            'start': start_of(os.getpid()),
            'since': time.strftime('%Y-%m-%d %H:%M:%S %z'),
        }
        self.text = json.dumps({**self.owner, 'token': uuid.uuid4().hex})
        self.ended = threading.Event()

    def acquire(self, take_over: bool = False, warn: Callable[[str], Any] = print) -> None:
        """Takes the folder, and removes what dead runs left half-written in it.

        Args:
            take_over: Whether to take it from a living run, which stops at its next checkpoint.
            warn: Called with a line if this will take minutes.

        Raises:
            WorkDirError: Another run has it, or the folder cannot be written to.
        """
        try:
            while not created(self.path, self.text):
                text, touched = self._read()
                if text is None:
                    continue  # removed since
                if not take_over and self._lives(text, touched, warn):
                    raise WorkDirError(
                        f'{self.path.parent} is in use by another training run ({described(text)}).'
                        ' Use another --work-dir, or end that run; --take-over takes the folder '
                        'from it, and it stops at its next checkpoint'
                    )
                self._remove(text)
            for partial in self.path.parent.glob(PARTIALS):
                partial.unlink(missing_ok=True)
        except OSError as error:
            raise WorkDirError(f'cannot lock {self.path.parent}: {error}') from error
        atexit.register(self.release)  # if the run ends before it trains
        threading.Thread(target=self._beat, daemon=True).start()

    def is_held(self) -> bool:
        """Whether this run still has the folder."""
        return self._read()[0] == self.text

    def problem(self) -> str | None:
        """Why this run must not write in the folder any more; None if it may."""
        try:
            text = self._read()[0]
        except OSError as error:
            return f'cannot read {self.path}: {error}'
        if text == self.text:
            return None
        if text is not None:
            return f'another training run took {self.path.parent} ({described(text)})'
        if not self.path.parent.is_dir():
            return f'the folder {self.path.parent} is gone: removed, or its disk is not mounted'
        return f'{self.path} is gone: removed, or its disk is not mounted'

    def release(self) -> None:
        """Gives the folder back, unless another run took it."""
        self.ended.set()
        atexit.unregister(self.release)
        if os.getpid() != self.owner['pid']:
            return
        with contextlib.suppress(OSError):
            if self.is_held():
                self.path.unlink()

    def _read(self) -> tuple[str | None, float]:
        """Content and time of the last touch; opening the file makes a network disk look again."""
        try:
            with self.path.open(errors='replace') as file:
                return file.read(LONGEST_PATH), os.fstat(file.fileno()).st_mtime
        except FileNotFoundError:
            return None, 0.0

    def _lives(self, text: str, touched: float, warn: Callable[[str], Any]) -> bool:
        """Whether the run that wrote a lock lives."""
        owner = parsed(text)
        if owner.get('machine') == self.owner['machine']:
            if owner.get('pid') == os.getpid():  # an earlier run of this process
                return False
            start = start_of(owner['pid'])
            return start is not None and start == owner.get('start')
        # Clocks of machines differ, so it is watched. A file without content is being written.
        warn(
            f'{self.path} is of a run on another machine ({described(text)}); watching for up to '
            f'{PATIENCE:.0f} s whether it lives.'
        )
        deadline = time.monotonic() + PATIENCE
        while time.monotonic() < deadline:
            time.sleep(min(BEAT / 2, PATIENCE / 4))
            now = self._read()
            if now != (text, touched):
                return now[0] is not None
        return False

    def _remove(self, text: str) -> None:
        """Removes the lock with this content, and no other that came in between.

        One process at a time: others may have read the same lock, and one may have taken it since.
        """
        guard = self.path.with_name(f'{LOCK}.removing')
        deadline = time.monotonic() + PATIENCE
        while not created(guard):
            if time.monotonic() > deadline:  # its process died
                guard.unlink(missing_ok=True)
            time.sleep(0.05)
        try:
            if self._read()[0] == text:
                self.path.unlink(missing_ok=True)
        finally:
            guard.unlink(missing_ok=True)

    def _beat(self) -> None:
        while not self.ended.wait(BEAT):
            with contextlib.suppress(OSError):  # the disk may come back
                if self.is_held():
                    os.utime(self.path)


def parsed(text: str) -> dict[str, Any]:
    """The content of a lock; nothing of a damaged one."""
    try:
        owner = json.loads(text)
    except ValueError:
        return {}
    is_whole = isinstance(owner, dict) and isinstance(owner.get('pid'), int)
    return owner if is_whole else {}


def described(text: str) -> str:
    """Who wrote a lock."""
    owner = parsed(text)
    if not owner:
        return 'unknown'
    known = {key: printable(owner.get(key), 100) for key in ('host', 'pid', 'since')}
    return f'host {known["host"]}, process {known["pid"]}, since {known["since"]}'


def lock_folder(
    folder: str | Path, take_over: bool = False, warn: Callable[[str], Any] = print
) -> FolderLock | None:
    """Locks a folder for all processes of a run; see `FolderLock.acquire`.

    Returns:
        The lock in the main process, None in others.

    Raises:
        WorkDirError: In all processes: another run has it, or it cannot be written to.
    """
    lock = None
    problem: list[str | None] = [None]
    if is_main_process():
        try:
            os.makedirs(folder, exist_ok=True)
            lock = FolderLock(folder)
            lock.acquire(take_over, warn)
        except (WorkDirError, OSError) as error:
            problem = [str(error)]
    broadcast_object_list(problem)
    if problem[0] is not None:
        raise WorkDirError(problem[0])
    return lock
