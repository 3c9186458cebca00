"""Numbers that are not finite: found at once, named, and never written to a checkpoint.

mmengine trains on with a loss that is NaN, and mmdet's `CheckInvalidLossHook` looks at every 50th
sum of losses only and says that it is not finite. What is said here is what one needs to find the
cause: which terms, in which iteration, on which images, and where to go on from.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from mmengine.hooks import Hook
from mmengine.runner import Runner, find_latest_checkpoint
from torch import nn

from ..registry import HOOKS, register


class NonFiniteError(RuntimeError):
    """A run has lost its numbers; to go on, change something and resume from the checkpoint."""


class NonFiniteLossError(NonFiniteError):
    """A term of the loss is NaN or infinite."""


class NonFiniteWeightsError(NonFiniteError):
    """Weights are NaN or infinite, although no loss was."""


@register(HOOKS)
class BatchImagesHook(Hook):
    """Remembers which images are in work, for whoever has to report what went wrong with them.

    Attributes:
        images: Paths of the images that the model has at the moment, none between iterations.
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
    """Stops training at the first loss that is not finite.

    Costs no waiting for a GPU: the values are those that mmengine's `RuntimeInfoHook`, one of the
    default hooks, has just fetched for the log. Runs behind that and before weights are averaged
    (`EMAHook`) or saved (`CheckpointHook`). In a run of several processes each looks at its own
    batch.
    """

    priority = 'HIGH'

    def after_train_iter(
        self,
        runner: Runner,
        batch_idx: int,
        data_batch: Any = None,
        outputs: Mapping[str, Any] | None = None,
    ) -> None:
        """Looks at every value that the model reports, the sum of the losses and its terms.

        Raises:
            NonFiniteLossError: One is NaN or infinite.
        """
        values = {
            name: runner.message_hub.get_scalar(f'train/{name}').current() for name in outputs or ()
        }
        wrong = {name: value for name, value in values.items() if not math.isfinite(value)}
        if wrong:
            raise NonFiniteLossError(
                f'iteration {runner.iter + 1}: '
                + ', '.join(f'{name} is {value}' for name, value in wrong.items())
                + f'; images: {", ".join(image_paths(data_batch)) or "unknown"}; '
                + last_good_checkpoint(runner)
            )


def check_weights(runner: Runner) -> None:
    """Checks the weights that are about to be saved.

    Raises:
        NonFiniteWeightsError: One is NaN or infinite, as after an update with such a gradient.
    """
    names = non_finite_parameters(runner.model)
    if names:
        raise NonFiniteWeightsError(
            f'iteration {runner.iter}: {len(names)} tensors of the model are not finite and are '
            f'not saved, such as {names[:3]}; ' + last_good_checkpoint(runner)
        )


def last_good_checkpoint(runner: Runner) -> str:
    """Which checkpoint a run can go on from, for a message."""
    checkpoint = find_latest_checkpoint(runner.work_dir)
    return f'last good checkpoint: {checkpoint}' if checkpoint else 'no checkpoint was saved yet'


@contextmanager
def images_on_error(runner: Runner) -> Iterator[None]:
    """Logs which images the model had when anything goes wrong inside the context."""
    try:
        yield
    except Exception:  # of any library, and raised again
        for hook in runner.hooks:
            if isinstance(hook, BatchImagesHook) and hook.images:
                runner.logger.error(f'It went wrong with {", ".join(hook.images)}')
        raise


def image_paths(data_batch: Any) -> list[str]:
    """The image files of a batch as a data loader of mmdet, mmseg or mmpretrain gives it.

    Without augmentation at test time `data_samples` is a list of samples, with it one of lists.
    """
    samples = data_batch.get('data_samples') if isinstance(data_batch, Mapping) else None
    paths = (path_of(sample) for sample in flat(samples or ()))
    return list(dict.fromkeys(path for path in paths if path is not None))


def path_of(sample: Any) -> str | None:
    """The file of the image of a sample, if the sample names it."""
    path = getattr(sample, 'img_path', None)
    return None if path is None else str(path)


def flat(items: Iterable) -> Iterable:
    """Items of lists and tuples within lists and tuples, one after another."""
    for item in items:
        if isinstance(item, (list, tuple)):
            yield from flat(item)
        else:
            yield item


def non_finite_parameters(model: nn.Module) -> list[str]:
    """Names of the parameters and buffers of a model that are not finite in all their elements.

    Waits for the device once, not once a tensor.
    """
    tensors = {
        name: value
        for name, value in model.state_dict().items()
        if isinstance(value, torch.Tensor) and value.is_floating_point()
    }
    if not tensors:
        return []
    finite = torch.stack([torch.isfinite(value).all() for value in tensors.values()]).tolist()
    return [name for name, is_finite in zip(tensors, finite) if not is_finite]
