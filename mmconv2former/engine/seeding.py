"""Random numbers that depend on the seed and on how far a run has come, on nothing else.

mmengine seeds once, when a run starts, so that a run that was interrupted goes on with other random
numbers than one that was not, and data workers repeat the augmentations of its first epoch. Here
every sample and every iteration gets a seed of its own, made from the run's seed and from its
position: what happened before, how often the run was resumed and with how many workers, does not
matter.
"""

from __future__ import annotations

import random
from collections.abc import Iterator
from itertools import islice
from typing import Any

import numpy as np
import torch
from mmengine.dataset import InfiniteSampler
from mmengine.dist import get_dist_info
from torch.utils.data import DataLoader, Sampler

# What a seed is for, so that no two uses share one.
SAMPLES, ITERATIONS = 0, 1


def derived_seed(*key: int) -> int:
    """A seed (32 bits) made from non-negative numbers, different ones for different keys."""
    return int(np.random.SeedSequence(key).generate_state(1)[0])


def seed_all(seed: int) -> None:
    """Seeds Python, NumPy and torch, of the latter the CPU and the GPU in use."""
    random.seed(seed)
    np.random.seed(seed)
    # `torch.manual_seed` would queue a call for CUDA in every data worker, with a stack trace.
    torch.default_generator.manual_seed(seed)
    if torch.cuda.is_initialized():
        torch.cuda.manual_seed(seed)


class SampleIndex(int):
    """Index of a sample that carries the seed of its augmentation to the data worker."""

    seed: int

    def __new__(cls, index: int, seed: int) -> SampleIndex:
        self = super().__new__(cls, index)
        self.seed = seed
        return self

    def __reduce__(self) -> tuple:
        return type(self), (int(self), self.seed)


class PositionedSampler(Sampler):
    """The indices of another sampler, each with a seed made from its position in the run.

    Everything else (`set_epoch`, `dataset`, ...) is the other sampler's.

    Args:
        sampler: A sampler of indices of this process.
        seed: The run's, the same in all processes.
    """

    sampler: Any  # of any library: torch's `Sampler` has no length, `seed` or `epoch`

    def __init__(self, sampler: Sampler, seed: int) -> None:
        self.sampler = sampler
        self.begin(seed)

    def begin(self, seed: int, skip: int = 0) -> None:
        """Sets the seed of the order and of the samples, and how many indices are left out next.

        Args:
            seed: See above.
            skip: Indices of this process that a resumed run has used: since the first one of an
                infinite sampler, since the epoch's first one of another.
        """
        self.run_seed = seed
        self.skip = skip
        if self.is_infinite:  # what has begun cannot be rewound
            self.sampler = InfiniteSampler(self.sampler.dataset, self.sampler.shuffle, seed)
        elif hasattr(self.sampler, 'seed'):
            self.sampler.seed = seed

    @property
    def is_infinite(self) -> bool:
        """Whether samples come without an end, as for a run of iterations."""
        return type(self.sampler) is InfiniteSampler

    def __iter__(self) -> Iterator[SampleIndex]:
        rank, world_size = get_dist_info()
        epoch = getattr(self.sampler, 'epoch', 0)
        first, self.skip = self.skip, 0
        for position, index in enumerate(islice(iter(self.sampler), first, None), first):
            key = (self.run_seed, SAMPLES, epoch, position * world_size + rank)
            yield SampleIndex(index, derived_seed(*key))

    def __len__(self) -> int:
        return len(self.sampler)

    def __getattr__(self, name: str) -> Any:
        if name == 'sampler':  # not there yet, while this object is being copied
            raise AttributeError(name)
        return getattr(self.sampler, name)


def give_positions(dataloader: DataLoader, seed: int) -> None:
    """Puts a `PositionedSampler` around the sampler of a data loader that mmengine has built.

    Loaders without batches of indices (of iterable datasets) stay as they are.
    """
    batch_sampler: Any = dataloader.batch_sampler  # to torch any iterable of lists
    if isinstance(getattr(batch_sampler, 'sampler', None), Sampler):
        # The loader's own attributes are sealed; what it iterates is its batch sampler.
        batch_sampler.sampler = PositionedSampler(batch_sampler.sampler, seed)


class ResumedBatches:
    """Endless batches of a data loader, from a position on, without loading those before.

    Takes the place of the iterator in mmengine's `IterBasedTrainLoop`, which in the original
    releases loads all batches before the position and throws them away.

    Args:
        dataloader: One that `give_positions` has seen, with torch's own `BatchSampler`.
        seed: The run's.
        position: Batches of this process that the run has used before.
        ignored_calls: How often the loop will ask for a batch only to throw it away.
    """

    def __init__(
        self, dataloader: DataLoader, seed: int, position: int, ignored_calls: int
    ) -> None:
        batch_sampler: Any = dataloader.batch_sampler  # to torch any iterable of lists
        self.dataloader = dataloader
        self.sampler: PositionedSampler = batch_sampler.sampler
        self.ignored_calls = ignored_calls
        self.epoch = 0
        if not self.sampler.is_infinite:
            self.epoch, position = divmod(position, len(dataloader))
            self.sampler.set_epoch(self.epoch)
        self.sampler.begin(seed, position * batch_sampler.batch_size)
        self.iterator = iter(dataloader)

    def skip_iter(self, num_iters: int) -> None:
        """How later releases of mmengine ask to go to the position, where this is already."""

    def __iter__(self) -> ResumedBatches:
        return self

    def __next__(self) -> Any:
        if self.ignored_calls:
            self.ignored_calls -= 1
            return None
        try:
            return next(self.iterator)
        except StopIteration:
            self.epoch += 1
            self.sampler.set_epoch(self.epoch)
            self.iterator = iter(self.dataloader)
            return next(self.iterator)
