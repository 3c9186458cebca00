"""Folders that tools write."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory


@contextmanager
def new_folder(path: Path) -> Iterator[Path]:
    """A folder that gets its name when it is complete; after an error nothing of it is left."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with TemporaryDirectory(dir=path.parent, prefix=f'.{path.name}.') as temporary:
        folder = Path(temporary, path.name)
        folder.mkdir()
        yield folder
        folder.rename(path)
