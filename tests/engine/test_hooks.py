"""Hooks of the runner, without a run."""

import errno
import os
from types import SimpleNamespace

from mmengine.hooks import LoggerHook

from mmconv2former.engine.hooks import ReliableLoggerHook


def test_scalars_on_a_full_disk_are_reported_once(monkeypatch):
    def full(*args, **kwargs):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    for method in ('after_train_iter', 'after_val_epoch'):
        monkeypatch.setattr(LoggerHook, method, full)
    said = []
    runner = SimpleNamespace(work_dir='work', logger=SimpleNamespace(warning=said.append))
    hook = ReliableLoggerHook()
    for batch in range(3):
        hook.after_train_iter(runner, batch)
    hook.after_val_epoch(runner, {})
    (line,) = said
    assert line.startswith('Scalars cannot be logged in work: [Errno 28] No space left on device.')
