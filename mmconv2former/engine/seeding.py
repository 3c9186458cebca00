"""Random numbers that depend only on the run's seed and the position in the run.

mmengine seeds once, when a run starts. A resumed run then draws different random numbers than an
uninterrupted one, and its data workers repeat the augmentations of the first epoch. Here each
sample and each iteration has its own seed, derived from the run's seed and its position. It depends
neither on what happened before nor on the number of data workers.
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

# First number of the key of a seed; it keeps the seeds of different uses apart.
SAMPLES, ITERATIONS = 0, 1


def derived_seed(*key: int) -> int:
    """A 32-bit seed derived from non-negative numbers."""
    return int(np.random.SeedSequence(key).generate_state(1)[0])


def seed_all(seed: int) -> None:
    """Seeds Python, NumPy, and torch on the CPU and the current GPU."""
    random.seed(seed)
    np.random.seed(seed)
    # `torch.manual_seed` would queue a CUDA call, with its stack trace, in every data worker.
    torch.default_generator.manual_seed(seed)
    if torch.cuda.is_initialized():
        torch.cuda.manual_seed(seed)


class SampleIndex(int):
    """Index of a sample, with the seed of its augmentation."""

    seed: int

    def __new__(cls, index: int, seed: int) -> SampleIndex:
        self = super().__new__(cls, index)
        self.seed = seed
        return self

    def __reduce__(self) -> tuple:
        return type(self), (int(self), self.seed)


class PositionedSampler(Sampler):
    """Wraps a sampler: gives each index a seed derived from its position in the run.

    Other attributes (`set_epoch`, `dataset`, ...) come from the sampler.

    Args:
        sampler: A sampler of this process.
        seed: Seed of the run, the same in all processes.
    """

    sampler: Any  # `Sampler` of torch has no length, `seed` or `epoch`; those of the libraries do

    def __init__(self, sampler: Sampler, seed: int) -> None:
        self.sampler = sampler
        self.begin(seed)

    def begin(self, seed: int, skip: int = 0) -> None:
        """Sets the seed, and how many indices to skip next.

        Args:
            seed: Seed of the run.
            skip: Indices of this process that the run has used: since the start for an infinite
                sampler, since the start of the epoch for others.
        """
        self.run_seed = seed
        self.skip = skip
        if self.is_infinite:  # it cannot be rewound
            self.sampler = InfiniteSampler(self.sampler.dataset, self.sampler.shuffle, seed)
        elif hasattr(self.sampler, 'seed'):
            self.sampler.seed = seed

    @property
    def is_infinite(self) -> bool:
        """Whether the sampler never ends, as in an iteration-based run."""
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
        if name == 'sampler':  # not set yet while this object is being copied
            raise AttributeError(name)
        return getattr(self.sampler, name)


def give_positions(dataloader: DataLoader, seed: int) -> None:
    """Wraps the sampler of a data loader in a `PositionedSampler`, unless it is iterable-style."""
    batch_sampler: Any = dataloader.batch_sampler
    if isinstance(getattr(batch_sampler, 'sampler', None), Sampler):
        # A data loader refuses a new sampler, but it only iterates over its batch sampler.
        batch_sampler.sampler = PositionedSampler(batch_sampler.sampler, seed)


def set_epoch(sampler: Any, epoch: int) -> None:
    """Sets the epoch of a sampler that counts them; others, as torch's, do not."""
    if hasattr(sampler, 'set_epoch'):
        sampler.set_epoch(epoch)


class LaterBatches:
    """Wraps a batch sampler whose next iteration leaves out its first batches, without loading.

    Args:
        batch_sampler: Of any type; batches need not be consecutive samples.
        skip: Number of batches.
    """

    def __init__(self, batch_sampler: Any, skip: int) -> None:
        self.batch_sampler = batch_sampler
        self.skip = skip

    def __iter__(self) -> Iterator[Any]:
        first, self.skip = self.skip, 0
        return islice(iter(self.batch_sampler), first, None)

    def __len__(self) -> int:
        return len(self.batch_sampler)

    def __getattr__(self, name: str) -> Any:
        if name == 'batch_sampler':  # not set yet while this object is being copied
            raise AttributeError(name)
        return getattr(self.batch_sampler, name)


def skip_batches(dataloader: DataLoader, skip: int) -> None:
    """Makes the next iteration over a data loader leave out its first batches."""
    if skip:  # the data loader refuses a new batch sampler
        vars(dataloader)['batch_sampler'] = LaterBatches(dataloader.batch_sampler, skip)


class ResumedBatches:
    """Endless batches of a data loader from a position on, without loading earlier batches.

    Replaces the iterator of mmengine's `IterBasedTrainLoop`, which in the original releases loads
    all batches before the position and discards them.

    Args:
        dataloader: A loader after `give_positions`, with torch's own `BatchSampler`.
        seed: Seed of the run.
        position: Number of batches of this process that the run has used.
        ignored_calls: Number of batches that the loop will request and discard.
    """

    def __init__(
        self, dataloader: DataLoader, seed: int, position: int, ignored_calls: int
    ) -> None:
        batch_sampler: Any = dataloader.batch_sampler
        self.dataloader = dataloader
        self.sampler: PositionedSampler = batch_sampler.sampler
        self.ignored_calls = ignored_calls
        self.epoch = 0
        if not self.sampler.is_infinite:
            self.epoch, position = divmod(position, len(dataloader))
            set_epoch(self.sampler, self.epoch)
        self.sampler.begin(seed, position * batch_sampler.batch_size)
        self.iterator = iter(dataloader)

    def skip_iter(self, num_iters: int) -> None:
        """Does nothing: newer mmengine asks to skip to the position, which is already set."""

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
            set_epoch(self.sampler, self.epoch)
            self.iterator = iter(self.dataloader)
            return next(self.iterator)
