"""Files that a run cannot write, as on a full disk or in a folder that is gone.

A log, a scalar or a drawing is no reason to lose a run: the first error of each is reported, and
the run continues. Checkpoints are different, see `ReliableRunner.save_checkpoint`. An evaluation
shows its metrics and then ends with an error, because its files are what it was started for.
"""

from __future__ import annotations

import errno
import logging
import os
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import wraps
from pathlib import Path
from typing import Any

import cv2
import numpy as np
from mmengine.dist import all_gather_object
from mmengine.evaluator import DumpResults
from mmengine.visualization import LocalVisBackend

from ..text import PrintableError

BACKEND_METHODS = ('add_config', 'add_graph', 'add_image', 'add_scalar', 'add_scalars', 'close')


class FilesNotWritten(PrintableError, OSError):
    """An evaluation is complete, but files of it could not be written."""


class LostFiles:
    """What a run could not write.

    Args:
        warn: Called with a line for each thing that is lost.

    Attributes:
        reasons: Errors by the name of what is lost.
    """

    def __init__(self, warn: Callable[[str], Any]) -> None:
        self.warn = warn
        self.reasons: dict[str, str] = {}
        self.logs: list[str] = []

    @contextmanager
    def spared(self, name: str) -> Iterator[None]:
        """Reports an OSError in this context instead of raising it."""
        try:
            yield
        except OSError as error:
            self.add(name, error)

    def add(self, name: str, error: OSError) -> None:
        """Reports the first error of a name."""
        if name not in self.reasons:
            self.reasons[name] = str(error)  # first, because the log may be what is lost
            self.warn(f'{name} cannot be written: {error}. The run continues without.')

    def check(self) -> None:
        """Ends an evaluation, in all processes alike, if something was lost.

        Raises:
            FilesNotWritten: It was in one of them.
        """
        for log in self.logs:
            if not os.path.exists(log):
                self.reasons.setdefault(f'log {log}', 'it was removed')
        reasons = dict(pair for part in all_gather_object([*self.reasons.items()]) for pair in part)
        if reasons:
            lost = '; '.join(f'{name}: {reason}' for name, reason in reasons.items())
            raise FilesNotWritten(f'the evaluation is complete, but not all was written: {lost}')

    # ---------------------------------------------------------------------------------- writers
    def spare(
        self, owner: Any, method: str, name: str, function: Any = None, lost: Any = None
    ) -> None:
        """Makes a method of an object report errors instead of raising them.

        Args:
            owner: The object.
            method: Name of the method.
            name: What it writes.
            function: Called instead of the method of the object's class.
            lost: What the method then returns.
        """
        call = function or getattr(type(owner), method).__get__(owner)

        @wraps(call)
        def spared(*args: Any, **kwargs: Any) -> Any:
            with self.spared(name):
                return call(*args, **kwargs)
            return lost

        setattr(owner, method, spared)

    def spare_log(self, handler: logging.Handler) -> None:
        """Python would print a traceback for each line that it cannot write."""
        stock = type(handler).handleError.__get__(handler)
        if isinstance(handler, logging.FileHandler):
            self.logs.append(handler.baseFilename)

        def handle(record: logging.LogRecord) -> None:
            error = sys.exc_info()[1]
            if isinstance(error, OSError):
                self.add(f'log {getattr(handler, "baseFilename", "on the terminal")}', error)
            else:
                stock(record)

        handler.handleError = handle  # type: ignore[method-assign]

    def spare_backend(self, backend: Any) -> None:
        """Spares a backend of a visualizer: scalars, drawings, the config."""
        name = f'{type(backend).__name__} in {backend._save_dir}'
        for method in BACKEND_METHODS:
            is_silent = method == 'add_image' and type(backend) is LocalVisBackend
            self.spare(backend, method, name, save_image(backend) if is_silent else None)
        if threading.excepthook is threading.__excepthook__:
            threading.excepthook = without_writers

    def spare_dump(self, metric: DumpResults) -> None:
        """Spares the predictions of an evaluation; half a file is removed."""
        path = Path(metric.out_file_path)
        stock = type(metric).compute_metrics.__get__(metric)

        def dump(results: list) -> dict:
            try:
                return stock(results)
            except OSError:
                if path.is_file():  # no device
                    path.unlink()
                raise

        self.spare(metric, 'compute_metrics', f'predictions {path}', dump, lost={})


def save_image(backend: LocalVisBackend) -> Callable[..., None]:
    """Its `add_image`, which raises an error where OpenCV's `imwrite` only returns False."""

    def add_image(name: str, image: np.ndarray, step: int = 0, **kwargs: Any) -> None:
        folder = Path(backend.experiment._img_save_dir)
        path = folder / f'{name}_{step}.png'
        path.parent.mkdir(parents=True, exist_ok=True)
        data = cv2.imencode('.png', cv2.cvtColor(image, cv2.COLOR_RGB2BGR))[1]
        path.write_bytes(data.tobytes())

    return add_image


def without_writers(args: threading.ExceptHookArgs) -> None:
    """Prints errors of threads, except TensorBoard's, which raises them again at the next call."""
    is_writer = type(args.thread).__name__ == '_AsyncWriterThread'
    if not (is_writer and isinstance(args.exc_value, OSError)):
        threading.__excepthook__(args)


def is_disk_error(error: BaseException) -> bool:
    """Whether a disk is full, read-only, or gone."""
    codes = (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.ESTALE, errno.EIO)
    return isinstance(error, OSError) and error.errno in codes
