"""Lets mmpretrain, and mmdet with it, be imported beside transformers 5.

mmpretrain's multimodal networks need transformers 4. With 5, importing mmpretrain raises
`TypeError: NoneType takes no arguments`. mmdet imports mmpretrain and only expects an
`ImportError`.
"""

from __future__ import annotations

from importlib.abc import Loader
from importlib.machinery import ModuleSpec
from importlib.metadata import PackageNotFoundError, version
from types import ModuleType

from .finder import find_changed

NAME = 'mmpretrain.utils.dependency'
FIRST_UNKNOWN = 5


def install() -> None:
    """Lets mmpretrain leave out its multimodal networks if transformers is too new for them.

    Calling this again has no effect.
    """
    try:
        major = int(version('transformers').split('.')[0])
    except (PackageNotFoundError, ValueError):
        return
    if major >= FIRST_UNKNOWN:
        find_changed(NAME, without_multimodal)


def without_multimodal(spec: ModuleSpec | None) -> ModuleSpec | None:
    """Changes the loader of the module in which mmpretrain decides what it has."""
    if spec is not None and spec.loader is not None:
        spec.loader = WithoutMultimodal(spec.loader)
    return spec


class WithoutMultimodal(Loader):
    """Loads the module and decides that there are none."""

    def __init__(self, stock: Loader) -> None:
        self.stock = stock

    def create_module(self, spec: ModuleSpec) -> ModuleType | None:
        return self.stock.create_module(spec)

    def exec_module(self, module: ModuleType) -> None:
        self.stock.exec_module(module)
        module.WITH_MULTIMODAL = False  # type: ignore[attr-defined]
