"""Datasets whose samples are checked."""

from __future__ import annotations

from typing import Any

from mmengine.registry import DATASETS as ROOT_DATASETS

from .registry import DATASETS, register
from .reproducible import SampleIndex, seed_all


@register(DATASETS)
class CheckedDataset:
    """Any dataset; everything but the samples is the other's.

    Args:
        dataset: Config of the dataset.
    """

    def __init__(self, dataset: dict) -> None:
        self.dataset = ROOT_DATASETS.build(dataset)
        if hasattr(self.dataset, 'full_init'):
            self.dataset.full_init()

    def __getitem__(self, index: int) -> Any:
        if isinstance(index, SampleIndex):
            seed_all(index.seed)
        return self.dataset[int(index)]

    def __len__(self) -> int:
        return len(self.dataset)

    def __getattr__(self, name: str) -> Any:
        if name == 'dataset':  # not there yet, while this object is being copied
            raise AttributeError(name)
        return getattr(self.dataset, name)
