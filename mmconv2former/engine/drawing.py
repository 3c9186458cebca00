"""Drawing predictions, which must not end an evaluation."""

from __future__ import annotations

import logging
from functools import wraps
from typing import Any

from mmengine.hooks import Hook
from mmengine.logging import print_log

from .lost_files import LostFiles

MOMENTS = ('after_val_iter', 'after_test_iter')


def is_drawing(hook: Hook) -> bool:
    """Whether a hook draws predictions; the names of all libraries' hooks for it end alike."""
    return type(hook).__name__.endswith('VisualizationHook')


def spare_metrics(hook: Hook, lost: LostFiles) -> None:
    """Makes a hook report its first error and then stop drawing, instead of ending the run.

    The metrics of a whole evaluation would be lost otherwise. The methods of its class still raise.

    Args:
        hook: Draws.
        lost: Remembers an error of writing.
    """
    has_failed = False

    def spared(method: Any) -> Any:
        @wraps(method)
        def call(*args: Any, **kwargs: Any) -> None:
            nonlocal has_failed
            if has_failed:
                return
            try:
                method(*args, **kwargs)
            except Exception as error:  # of any library
                has_failed = True
                name = type(hook).__name__
                if isinstance(error, OSError):
                    lost.reasons[f'drawings of {name}'] = str(error)
                print_log(
                    f'{name} cannot draw: {type(error).__name__}: {error}. No more drawings in '
                    'this run; metrics are not affected.',
                    logger='current',
                    level=logging.ERROR,
                )

        return call

    for moment in MOMENTS:
        setattr(hook, moment, spared(getattr(hook, moment)))
