"""Other launches of the Triton kernels than those of the network, for measurements and tests."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from unittest.mock import patch

from mmconv2former.ops.triton_support import load


@contextmanager
def replaced(module: Any, **functions: Any) -> Iterator[None]:
    """Replaces functions of a module of `mmconv2former.ops` on which launches depend.

    Launches that were prepared with other functions are forgotten, before and after.
    """
    forget_launches = load('launch').forget_launches
    with patch.multiple(module, **functions):
        forget_launches()
        try:
            yield
        finally:
            forget_launches()
