"""Samplers of any kind are resumed at their position, with the seeds of their samples."""

import pytest
import torch
from mmdet.datasets.samplers import AspectRatioBatchSampler, ClassAwareSampler, MultiSourceSampler
from mmengine.dataset import DefaultSampler, InfiniteSampler
from mmengine.runner.loops import _InfiniteDataloaderIterator
from torch.utils.data import DataLoader, Dataset, RandomSampler, SequentialSampler

from mmconv2former.engine.seeding import (
    LaterBatches,
    PositionedSampler,
    ResumedBatches,
    give_positions,
    seed_all,
    skip_batches,
)


class Sizes(Dataset):
    """Wide and narrow images of two classes, from two sources; a sample is its index and seed."""

    def __init__(self, length):
        self.metainfo = dict(classes=('a', 'b'))
        self.datasets = [range(length - 3), range(3)]
        self.cumulative_sizes = [length - 3, length]

    def __len__(self):
        return self.cumulative_sizes[-1]

    def __getitem__(self, index):
        return int(index), index.seed

    def get_data_info(self, index):
        return dict(width=1 + index % 3, height=2)

    def get_cat_ids(self, index):
        return [index % 2]

    def full_init(self):
        pass


TORCHS = {'random': lambda data: RandomSampler(data), 'in order': lambda d: SequentialSampler(d)}


class Silent(SequentialSampler):
    """Takes the epoch, but does not say it."""

    def __init__(self, dataset):
        super().__init__(dataset)
        self.dataset = dataset

    def set_epoch(self, epoch):
        pass


SAMPLERS = {
    'that does not say its epoch': Silent,
    'finite': DefaultSampler,
    'endless': InfiniteSampler,
    'by class': ClassAwareSampler,
    'of two sources': lambda dataset: MultiSourceSampler(dataset, 2, [1, 1]),
}


def build(sampler, batch_sampler, workers=0):
    dataset = Sizes(11)
    sampler = {**TORCHS, **SAMPLERS}[sampler](dataset)
    batches = dict(sampler=sampler, batch_size=2)
    if batch_sampler is not None:
        batches = dict(batch_sampler=batch_sampler(sampler, 2, False))
    loader = DataLoader(dataset, **batches, collate_fn=list, num_workers=workers,
                        persistent_workers=workers > 0)  # fmt: skip
    give_positions(loader, seed=5)
    return loader


KINDS = [(sampler, None) for sampler in (*TORCHS, *SAMPLERS)]
KINDS += [(sampler, AspectRatioBatchSampler) for sampler in SAMPLERS]  # they have `dataset`


@pytest.mark.parametrize(
    ('kind', 'workers'), [*((kind, 0) for kind in KINDS), (KINDS[0], 1), (KINDS[-1], 1)]
)
def test_a_run_of_iterations_is_resumed_with_any_sampler(kind, workers):
    whole = _InfiniteDataloaderIterator(build(*kind))
    expected = []
    for iteration in range(20):
        seed_all(iteration)  # as each iteration of a run
        expected.append(next(whole))
    seed_all(99)
    resumed = ResumedBatches(build(*kind, workers), 9, ignored_calls=0)
    assert [next(resumed) for _ in range(11)] == expected[9:]
    seeds = [seed for batch in expected for _, seed in batch]
    assert len(set(seeds)) == len(seeds)  # another augmentation in each epoch


def test_samples_differ_between_epochs_of_samplers_that_count_none():
    sampler = PositionedSampler(SequentialSampler(range(3)), seed=0)
    first = [index.seed for index in sampler]
    assert [index.seed for index in sampler] == first
    sampler.set_epoch(1)
    assert not set(first) & {index.seed for index in sampler}


@pytest.mark.parametrize('workers', [0, 1])
def test_batches_of_an_epoch_are_left_out_once(workers):
    def build():
        loader = DataLoader(Sizes(6), batch_size=2, collate_fn=list, num_workers=workers,
                            persistent_workers=workers > 0)  # fmt: skip
        give_positions(loader, seed=0)
        return loader

    whole, loader = list(build()), build()
    skip_batches(loader, 2)
    assert len(loader) == 3
    assert list(loader) == whole[2:]
    assert list(loader) == whole


def test_batches_of_another_kind_are_left_out():
    batches = LaterBatches([[0], [1]], iter([[1]]))
    assert len(batches) == 2
    assert list(batches) == [[1]]
    assert list(batches) == [[0], [1]]


def test_a_loader_that_never_has_a_batch_ends():
    loader = DataLoader(torch.arange(3), batch_size=4, drop_last=True)
    give_positions(loader, seed=0)
    with pytest.raises(StopIteration):
        next(ResumedBatches(loader, 5, ignored_calls=0))
