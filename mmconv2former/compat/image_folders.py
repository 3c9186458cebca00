"""mmpretrain's image folders, with labels by name.

mmpretrain numbers the folders that it finds, including hidden ones such as `.ipynb_checkpoints`,
regardless of the names of the given classes.
"""

from __future__ import annotations

from typing import Any

from .finder import change_after_import


def install() -> None:
    """Changes mmpretrain's `CustomDataset`; calling it again has no effect."""
    change_after_import('mmpretrain.datasets.custom', number_by_name)


def number_by_name(module: Any) -> None:
    """Skips hidden folders; if all folders are named in `classes`, these give the numbers."""
    stock_folders, stock_samples = module.find_folders, module.CustomDataset._find_samples

    def find_folders(root: str, backend: Any = None) -> tuple[list[str], dict[str, int]]:
        names = [name for name in stock_folders(root, backend)[0] if not name.startswith('.')]
        return names, {name: number for number, name in enumerate(names)}

    def find_samples(self: Any) -> list:
        classes = self.CLASSES
        if not self.with_label or classes is None:
            return stock_samples(self)
        if not set(find_folders(self.img_prefix)[0]) <= set(classes):
            return stock_samples(self)  # classes are other names, in the order of the folders
        self._metainfo['classes'] = None  # now it numbers what it finds
        try:
            samples = stock_samples(self)
            found = self._metainfo['classes']
        finally:
            self._metainfo['classes'] = classes
        self.folder_to_idx = {name: list(classes).index(name) for name in found}
        return [(path, self.folder_to_idx[found[label]]) for path, label in samples]

    module.find_folders = find_folders
    module.CustomDataset._find_samples = find_samples
