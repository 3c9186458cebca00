"""Changes how one module of another package is imported."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec, PathFinder
from types import ModuleType


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
