"""Lets mmpretrain, and mmdet with it, be imported beside transformers 5.

mmpretrain's multimodal networks need transformers 4. With 5, importing mmpretrain raises
`TypeError: NoneType takes no arguments`. mmdet imports mmpretrain and only expects an
`ImportError`.
"""

from __future__ import annotations

from importlib.metadata import PackageNotFoundError, version
from typing import Any

from .finder import change_after_import

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
        change_after_import(NAME, without_multimodal)


def without_multimodal(module: Any) -> None:
    """Changes what mmpretrain says that it has."""
    module.WITH_MULTIMODAL = False
