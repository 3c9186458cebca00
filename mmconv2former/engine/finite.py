"""Non-finite losses and weights: training stops, and they are never saved.

mmengine continues to train with a NaN loss. mmdet's `CheckInvalidLossHook` checks only every 50th
loss and only says that it is not finite. The errors here name the loss terms, the iteration, the
images and the last checkpoint to resume from.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from mmengine.hooks import Hook
from mmengine.runner import Runner
from torch.utils._pytree import tree_flatten

from ..checkpoint.loading import non_finite
from ..registry import HOOKS, register
from ..text import PrintableError, first, printable
from .work_dir import checkpoints_of


class NonFiniteError(PrintableError, RuntimeError):
    """A loss or a weight is NaN or infinite."""


@register(HOOKS)
class BatchImagesHook(Hook):
    """Keeps the paths of the current batch's images, for `images_on_error`.

    Attributes:
        images: Paths of the images, empty between iterations.
    """

    priority = 'HIGHEST'

    def __init__(self) -> None:
        self.images: list[str] = []

    def _before_iter(
        self, runner: Runner, batch_idx: int, data_batch: Any = None, mode: str = 'train'
    ) -> None:
        self.images = image_paths(data_batch)

    def _after_iter(self, *args: Any, **kwargs: Any) -> None:
        self.images = []


@register(HOOKS)
class FiniteLossHook(Hook):
    """Stops training at the first non-finite loss.

    It reads the values that mmengine's `RuntimeInfoHook`, a default hook, has fetched for the log,
    so it does not wait for the GPU; without that hook it fetches them. It runs before weights are
    averaged (`EMAHook`) or saved (`CheckpointHook`). Each process checks its own batch.
    """

    priority = 'HIGH'

    def after_train_iter(
        self,
        runner: Runner,
        batch_idx: int,
        data_batch: Any = None,
        outputs: Mapping[str, Any] | None = None,
    ) -> None:
        """Checks the loss and its terms.

        Raises:
            NonFiniteError: A loss term is NaN or infinite.
        """
        log = runner.message_hub.log_scalars
        values = {
            name: log[f'train/{name}'].current()
            if f'train/{name}' in log
            else torch.as_tensor(value).item()
            for name, value in (outputs or {}).items()
        }
        wrong = [f'{name} is {value}' for name, value in values.items() if not math.isfinite(value)]
        if wrong:
            images = ', '.join(image_paths(data_batch)) or 'unknown'
            raise NonFiniteError(
                f'iteration {runner.iter + 1}: {", ".join(wrong)}; images: {images}; '
                + last_checkpoint(runner)
            )


def check_weights(runner: Runner) -> None:
    """Checks the weights that are about to be saved.

    Raises:
        NonFiniteError: A weight is NaN or infinite, e.g. after an update with a non-finite
            gradient.
    """
    names = non_finite(runner.model.state_dict())
    if names:
        raise NonFiniteError(
            f'iteration {runner.iter}: {len(names)} tensors of the model are not finite, such as '
            f'{first(names, 3)}; they are not saved; {last_checkpoint(runner)}'
        )


def last_checkpoint(runner: Runner) -> str:
    """The checkpoint from which a run can resume, for a message."""
    found = checkpoints_of(Path(runner.work_dir))
    return f'last good checkpoint: {found[0]}' if found else 'no checkpoint was saved yet'


@contextmanager
def images_on_error(runner: Runner) -> Iterator[None]:
    """Logs the images of the current batch if anything fails in this context."""
    try:
        yield
    except Exception:  # from any library; raised again
        for hook in runner.hooks:
            if isinstance(hook, BatchImagesHook) and hook.images:
                images = ', '.join(hook.images)
                runner.logger.error(printable(f'The failing batch has the images {images}'))
        raise


def image_paths(data_batch: Any) -> list[str]:
    """The image files of a batch, including test-time augmentation."""
    samples = tree_flatten(data_batch)[0]
    paths = (getattr(sample, 'img_path', None) for sample in samples)
    return list(dict.fromkeys(str(path) for path in paths if path is not None))
