"""Keeps messages off the terminal that nobody can act on.

The libraries print them in every run. Only what `KNOWN` lists is hidden; all other messages are
shown. Log files keep everything that was logged.
"""

from __future__ import annotations

import logging
import re
import warnings
from typing import Any

import mmengine.logging.logger
import pycocotools.coco
import pycocotools.cocoeval
from mmengine.logging import MMLogger

# How a message begins, and why it is of no use to the reader.
KNOWN = {
    'Could not import OneDL': 'datasets of a service that no recipe uses',
    'faster_coco_eval is not installed': 'our recipes evaluate with pycocotools',
    '"FileClient" will be deprecated': "mmengine's hooks call it, not the user",
    '"HardDiskBackend" is the alias': "mmengine's hooks call it, not the user",
    'Failed to search registry with scope "mmdet"': 'mmengine finds the class itself',
    'The prefix is not set in metric class': "mmseg's metrics have no prefix by design",
    'This DataLoader will create': 'workers mostly wait; a few more than cores do no harm',
    'Setting OMP_NUM_THREADS environment': 'one thread a process, as it should be',
    'Setting MKL_NUM_THREADS environment': 'one thread a process, as it should be',
    'Default ``avg_non_ignore`` is False': "the loss of mmseg's own recipes",
    '``build_loss`` would be deprecated': "mmseg's heads call it, not the user",
    'The draw is False': 'drawings are off unless the user asks for them',
    'Distributed training is not used, all SyncBatchNorm': 'the same computation in one process',
    'Hooks will be executed in the following order': '80 lines that no user asked for',
    'Exp name:': 'the folder of the log has the same name',
    'Loads checkpoint by checked_file backend': 'the next line says what was loaded',
    'bbox_mAP_copypaste': 'the next line has these numbers with their names',
    'segm_mAP_copypaste': 'the next line has these numbers with their names',
    '`broadcast_buffers` is deprecated': "torch 2.14 says it of mmengine's wrapper",
    'Warning: The bbox is out of bounds': 'drawn as far as it is in the image',
    'Warning: The polygon is out of bounds': 'drawn as far as it is in the image',
    'Warning: The text is out of bounds': 'drawn as far as it is in the image',
    'invalid escape sequence': "Python 3.12 and later say it of the libraries' code",
    # Needed to reproduce a run, not to watch it.
    'Config:': 'in the log file and WORK_DIR/TIME/vis_data/config.py',
    '-' * 60 + '\nSystem environment:': 'in the log file',
    # pycocotools, for each annotation file and evaluation.
    'loading annotations into memory': 'takes only seconds',
    'Done (t=': 'belongs to the line before',
    'creating index': 'takes only seconds',
    'index created': 'belongs to the line before',
    'Loading and preparing results': 'takes only seconds',
    'DONE (t=': 'belongs to the line before',
    'Running per image evaluation': 'the table of the results follows',
    'Evaluate annotation type': 'the line before says it',
    'Accumulating evaluation results': 'the table of the results follows',
}
# Modules that call `print`.
PRINTING = (mmengine.logging.logger, pycocotools.coco, pycocotools.cocoeval)
IS_KNOWN = re.compile('|'.join(map(re.escape, KNOWN)))


def is_known(message: str) -> bool:
    return IS_KNOWN.match(message.strip()) is not None


def hide_known_messages() -> None:
    """Hides them in this process and its data workers. Calling it again has no effect."""
    warnings.filterwarnings('ignore', message=rf'\s*({IS_KNOWN.pattern})')
    setattr(MMLogger, 'callHandlers', call_handlers)  # noqa: B010  (mypy refuses an assignment)
    for module in PRINTING:
        setattr(module, 'print', print_unknown)  # noqa: B010


def call_handlers(self: MMLogger, record: logging.LogRecord) -> None:
    """As mmengine's method, but known messages go to files only."""
    is_hidden = is_known(record.getMessage())
    for handler in self.handlers:
        if is_hidden and not isinstance(handler, logging.FileHandler):
            continue
        if record.levelno >= handler.level:
            handler.handle(record)


def print_unknown(*values: Any, **options: Any) -> None:
    if not is_known(' '.join(map(str, values))):
        print(*values, **options)
