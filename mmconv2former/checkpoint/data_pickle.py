"""Stands for the module `pickle` in `torch.load`, and finds nothing in a file but data.

For torch < 2.5, whose `weights_only=True` cannot be told what else to admit: neither published
training checkpoints nor mmengine's can be read with it. What it admits is the base here too.
"""

from __future__ import annotations

import codecs
import pickle
from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any, BinaryIO, ClassVar

import torch
from torch import _weights_only_unpickler

BUILD = pickle.BUILD[0]  # opcode that gives an object its state
BYTEARRAY8 = pickle.BYTEARRAY8[0]  # one that fills memory of any size before it reads as much
# What later releases of torch admit by themselves.
ADMITTED_LATER = [
    torch.bfloat16, torch.uint8, torch.bool, torch.device, codecs.encode, set, Counter,
]  # fmt: skip


class DataPickle:
    """What `torch.load` takes as `pickle_module`.

    Args:
        safe_globals: Classes and functions that a file may name, beside those of torch.
    """

    __name__ = 'data_pickle'  # torch asks for it

    def __init__(self, safe_globals: Sequence[Callable]) -> None:
        self.admitted = admitted = {
            **_weights_only_unpickler._get_allowed_globals(),
            **{path_of(value): value for value in [*ADMITTED_LATER, *safe_globals]},
        }

        kept = {value for value in admitted.values() if isinstance(value, type)}
        # Called with a number, both fill memory of any size; `_reconstruct` is told of the array.
        admitted.pop('builtins.bytearray', None)
        admitted['numpy.ndarray'] = None

        class Unpickler(pickle._Unpickler):  # typed as the one in C, which hides more
            def find_class(self, module: str, name: str) -> Any:
                if module == '__builtin__':  # Python 2's name, which old protocols keep
                    module = 'builtins'
                path = f'{module}.{name}'
                if path not in admitted:
                    raise pickle.UnpicklingError(f'GLOBAL {path} is not admitted')
                return admitted[path]

            def load_build(self) -> None:
                """Gives an object its state; a class or function would be changed for all."""
                changed = type(self.stack[-2])  # type: ignore[attr-defined]
                if changed not in kept:
                    raise pickle.UnpicklingError(f'state of {path_of(changed)} is not admitted')
                pickle._Unpickler.dispatch[BUILD](self)  # type: ignore[arg-type]

            def load_bytearray8(self) -> None:
                raise pickle.UnpicklingError('a bytearray is not admitted')

            dispatch: ClassVar[dict] = {
                **pickle._Unpickler.dispatch,
                BUILD: load_build,
                BYTEARRAY8: load_bytearray8,
            }

        self.Unpickler = Unpickler

    def load(self, file: BinaryIO, **options: Any) -> Any:
        """As `pickle.load`.

        Raises:
            pickle.UnpicklingError: The file names or changes what is not admitted.
        """
        return self.Unpickler(file, **options).load()


def path_of(value: Any) -> str:
    """How a pickle names a class or a function; dtypes are named by their own text."""
    if isinstance(value, torch.dtype):
        return str(value)
    return f'{value.__module__}.{value.__qualname__}'
