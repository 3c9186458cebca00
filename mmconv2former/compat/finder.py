"""Changes how one module of another package is imported."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec, PathFinder
from types import ModuleType
from typing import Any


class Finder(MetaPathFinder):
    """Finds one module, with a changed specification.

    Args:
        name: The module's full name.
        change: Function that gets the specification that Python finds, or None, and returns its
            own.
    """

    def __init__(self, name: str, change: Callable[[ModuleSpec | None], ModuleSpec | None]) -> None:
        self.name, self.change = name, change

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if fullname != self.name:
            return None
        return self.change(PathFinder.find_spec(fullname, path))


def find_changed(name: str, change: Callable[[ModuleSpec | None], ModuleSpec | None]) -> None:
    """Installs a `Finder`; calling it again for this name has no effect."""
    if not any(isinstance(finder, Finder) and finder.name == name for finder in sys.meta_path):
        sys.meta_path.insert(0, Finder(name, change))


def change_after_import(name: str, change: Callable[[ModuleType], None]) -> None:
    """Changes a module once: now if it is imported, otherwise when it is.

    Args:
        name: The module's full name.
        change: Function that gets the module.
    """
    if any(isinstance(finder, Finder) and finder.name == name for finder in sys.meta_path):
        return

    def wrap(spec: ModuleSpec | None) -> ModuleSpec | None:
        if spec is not None and spec.loader is not None:
            spec.loader = ChangingLoader(spec.loader, change)
        return spec

    find_changed(name, wrap)
    if name in sys.modules:
        change(sys.modules[name])


class ChangingLoader(Loader):
    """Loads a module as another loader does, and changes it."""

    def __init__(self, stock: Loader, change: Callable[[ModuleType], None]) -> None:
        self.stock, self.change = stock, change

    def create_module(self, spec: ModuleSpec) -> ModuleType | None:
        return self.stock.create_module(spec)

    def exec_module(self, module: ModuleType) -> None:
        self.stock.exec_module(module)
        self.change(module)

    def __getattr__(self, name: str) -> Any:  # such as get_source, for tracebacks
        if name == 'stock':
            raise AttributeError(name)
        return getattr(self.stock, name)
