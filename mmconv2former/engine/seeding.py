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
from mmengine.dist import get_dist_info
from torch.utils.data import DataLoader, Sampler

# First number of the key of a seed; it keeps the seeds of different uses apart.
SAMPLES, ITERATIONS, ORDER = 0, 1, 2


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
    """Index of a sample, with the key of the seed for its augmentation."""

    key: tuple[int, ...]

    def __new__(cls, index: int, key: tuple[int, ...]) -> SampleIndex:
        self = super().__new__(cls, index)
        self.key = key
        return self

    @property
    def seed(self) -> int:
        """Derived where the sample is loaded, so that skipping samples is fast."""
        return derived_seed(*self.key)

    def __reduce__(self) -> tuple:
        return type(self), (int(self), self.key)


class PositionedSampler(Sampler):
    """Wraps a sampler: gives each index a seed derived from its position in the run.

    Other attributes (`dataset`, ...) come from the sampler.

    Args:
        sampler: A sampler of this process.
        seed: Seed of the run, the same in all processes.
    """

    sampler: Any  # `Sampler` of torch has no length, `seed` or `epoch`; those of the libraries do

    def __init__(self, sampler: Sampler, seed: int) -> None:
        self.sampler = sampler
        self.run_seed = seed
        self.epochs = 0
        if hasattr(sampler, 'seed'):
            sampler.seed = seed

    def set_epoch(self, epoch: int) -> None:
        """Sets the epoch, also of a sampler that does not count epochs itself, as torch's."""
        self.epochs = epoch
        if hasattr(self.sampler, 'set_epoch'):
            self.sampler.set_epoch(epoch)

    def __iter__(self) -> Iterator[SampleIndex]:
        rank, world_size = get_dist_info()
        epoch = getattr(self.sampler, 'epoch', self.epochs)
        if not hasattr(self.sampler, 'seed'):  # it may draw the order from the global generators
            seed_all(derived_seed(self.run_seed, ORDER, epoch))
        for position, index in enumerate(self.sampler):
            yield SampleIndex(index, (self.run_seed, SAMPLES, epoch, position * world_size + rank))

    def __len__(self) -> int:
        return len(self.sampler)

    def __getattr__(self, name: str) -> Any:
        if name == 'sampler':  # not set yet while this object is being copied
            raise AttributeError(name)
        return getattr(self.sampler, name)


def give_positions(dataloader: DataLoader, seed: int) -> None:
    """Wraps the sampler of a data loader in a `PositionedSampler`, unless it is iterable-style."""
    batch_sampler: Any = dataloader.batch_sampler
    sampler = getattr(batch_sampler, 'sampler', None)
    if isinstance(sampler, Sampler):
        batch_sampler.sampler = PositionedSampler(sampler, seed)
        if dataloader.sampler is sampler:  # mmengine sets its epoch; torch refuses a new sampler
            vars(dataloader)['sampler'] = batch_sampler.sampler


class LaterBatches:
    """Wraps a batch sampler whose next iteration yields given batches instead of its own.

    Args:
        batch_sampler: Of any type; batches need not be consecutive samples.
        rest: Batches of indices.
    """

    def __init__(self, batch_sampler: Any, rest: Iterator[Any]) -> None:
        self.batch_sampler = batch_sampler
        self.rest: Iterator[Any] | None = rest

    def __iter__(self) -> Iterator[Any]:
        # Not before the first batch is wanted: with workers, torch makes an iterator twice.
        rest, self.rest = self.rest, None
        yield from self.batch_sampler if rest is None else rest

    def __len__(self) -> int:
        return len(self.batch_sampler)

    def __getattr__(self, name: str) -> Any:
        if name == 'batch_sampler':  # not set yet while this object is being copied
            raise AttributeError(name)
        return getattr(self.batch_sampler, name)


def begin_with(dataloader: DataLoader, rest: Iterator[Any]) -> None:
    """Makes the next iteration over a data loader load these batches of indices."""
    # The data loader refuses a new batch sampler.
    vars(dataloader)['batch_sampler'] = LaterBatches(dataloader.batch_sampler, rest)


def skip_batches(dataloader: DataLoader, skip: int) -> None:
    """Makes the next iteration over a data loader leave out its first batches, without loading."""

    def later(batch_sampler: Any) -> Iterator[Any]:  # begins when the epoch is set
        yield from islice(iter(batch_sampler), skip, None)

    if skip:
        begin_with(dataloader, later(dataloader.batch_sampler))


class ResumedBatches:
    """Endless batches of a data loader from a position on, without loading earlier batches.

    Replaces the iterator of mmengine's `IterBasedTrainLoop`, which loads all batches before the
    position and discards them, unless the sampler has a method for that. Here the samplers run up
    to the position without loading, so that any of them is resumed exactly.

    Args:
        dataloader: A loader after `give_positions` that was not iterated yet.
        position: Number of batches of this process that the run has used.
        ignored_calls: Number of batches that the loop will request and discard.
    """

    def __init__(self, dataloader: DataLoader, position: int, ignored_calls: int) -> None:
        self.dataloader = dataloader
        self.ignored_calls = ignored_calls
        self.epoch = 0
        batch_sampler: Any = dataloader.batch_sampler
        rest = iter(batch_sampler)
        while position:
            taken = sum(1 for _ in islice(rest, position))
            position -= taken
            if not taken:  # no batch in a whole epoch: the loop will find out
                break
            if position:
                self.begin_epoch()
                rest = iter(batch_sampler)
        begin_with(dataloader, rest)
        self.iterator = iter(dataloader)

    def begin_epoch(self) -> None:
        self.epoch += 1
        batch_sampler: Any = self.dataloader.batch_sampler
        batch_sampler.sampler.set_epoch(self.epoch)

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
            self.begin_epoch()
            self.iterator = iter(self.dataloader)
            return next(self.iterator)
