"""`torch.load` restricted to data: no code in a file runs, and no file changes a class.

A pickle can call any function that it names. Here it may name what torch admits under
`weights_only=True` and `SAFE_GLOBALS`, a few classes that checkpoints of timm and mmengine contain.
torch >= 2.5 accepts such a list; for older releases, `DataPickle` applies the same rules.
"""

from __future__ import annotations

import argparse
import codecs
import io
import os
import pickle
import pickletools
import tarfile
from collections import Counter
from collections.abc import Callable
from contextlib import suppress
from functools import cache
from pickle import UnpicklingError
from typing import Any, BinaryIO, ClassVar, cast
from zipfile import is_zipfile

import numpy as np
import torch
from mmengine.logging import HistoryBuffer
from torch import _weights_only_unpickler

FORCE_VARIABLE = 'TORCH_FORCE_WEIGHTS_ONLY_LOAD'  # torch's own
DEEPEST = 100  # levels of nested objects; checkpoints have about ten
MULTIARRAY = getattr(np, 'core' if np.__version__ < '2' else '_core').multiarray


def statistic(owner: object, name: str) -> Callable:
    """`getattr` for the pickles of HistoryBuffer only; free use of it would lead to `eval`."""
    if owner is not HistoryBuffer or name not in ('min', 'max', 'current', 'mean'):
        raise UnpicklingError(
            'GLOBAL builtins.getattr is allowed for HistoryBuffer statistics only'
        )
    return getattr(owner, name)


def empty_array(owner: object, shape: object, kind: object) -> np.ndarray:
    """numpy's `_reconstruct`, ignoring its shape, which could fill memory; the state follows."""
    return np.empty(0, 'b')


def scalar(dtype: np.dtype, data: object) -> Any:
    """numpy's function, but its data are required: without data it could fill memory."""
    return MULTIARRAY.scalar(dtype, data)


def named(path: str, function: Callable) -> Callable:
    """`function` under the name by which a pickle asks for it, such as `builtins.getattr`."""

    def call(*args: Any) -> Any:
        return function(*args)

    call.__module__, _, call.__qualname__ = path.rpartition('.')
    call.__name__ = call.__qualname__
    return call


DTYPES: list[Any] = [*{type(np.dtype(code)) for code in '?bBhHiIlLqQefd'}]
# mmengine admits three of them. With all, it reads our checkpoints as data in the libraries'
# inferencers too, instead of warning and running any code in a file.
if hasattr(torch.serialization, 'add_safe_globals'):  # torch >= 2.4
    torch.serialization.add_safe_globals(DTYPES)
SAFE_GLOBALS = [
    argparse.Namespace,
    HistoryBuffer,
    named('builtins.getattr', statistic),
    np.ndarray,
    np.dtype,
    *DTYPES,
    *(
        named(f'numpy.{package}.multiarray.{name}', function)
        for package in ('core', '_core')  # of NumPy 1 and of NumPy 2
        for name, function in (('_reconstruct', empty_array), ('scalar', scalar))
    ),
]


def load_data(path: str, map_location: Any) -> Any:
    """Loads what `torch.save` wrote, as data only.

    Raises:
        UnpicklingError: The file contains something else.
        Exception: Many other types, as a forged pickle can fail in any operation.
    """
    refuse_other_formats(path)
    refuse_deep_nesting(path)
    if hasattr(torch.serialization, 'safe_globals'):  # torch >= 2.5
        # torch would also take away what was admitted before.
        known = set(torch.serialization.get_safe_globals())
        with torch.serialization.safe_globals([g for g in SAFE_GLOBALS if g not in known]):
            return torch.load(path, map_location, weights_only=True)
    forced = os.environ.pop(FORCE_VARIABLE, None)  # with it, torch refuses any `pickle_module`
    try:
        return torch.load(path, map_location, pickle_module=DataPickle, weights_only=False)
    finally:
        if forced is not None:
            os.environ[FORCE_VARIABLE] = forced


def refuse_other_formats(path: str) -> None:
    """Refuses formats that torch before 2.6 reads without the restricted unpickler.

    Raises:
        UnpicklingError: The file is TorchScript, whose program would run, or a tar archive as
            written by the first releases of torch, whose members would be unpacked.
    """
    if is_zipfile(path) and 'constants.pkl' in torch._C.PyTorchFileReader(path).get_all_records():
        raise UnpicklingError('file is TorchScript, a program; save its state_dict() instead')
    with suppress(tarfile.TarError), tarfile.open(path, 'r:'):
        raise UnpicklingError('file is a tar archive')


# ------------------------------------------------------------------------------------- nesting
def refuse_deep_nesting(path: str) -> None:
    """Refuses objects within objects within objects, without building any.

    The hash of nested tuples recurses in C without a limit: as the key of a dict, they crash the
    process. A compressed file of 600 bytes is enough.

    Raises:
        UnpicklingError: The nesting is deeper than `DEEPEST`, or the file is not a pickle.
    """
    if is_zipfile(path):
        check_nesting(io.BytesIO(torch._C.PyTorchFileReader(path).get_record('data.pkl')))
        return
    with open(path, 'rb') as file:
        for _ in range(5):  # magic number, protocol, system, content, keys of the storages
            check_nesting(file)


MARK = -1  # instead of a depth
PUTS = {'PUT', 'BINPUT', 'LONG_BINPUT', 'MEMOIZE'}
GETS = {'GET', 'BINGET', 'LONG_BINGET'}
FILLS = {'APPEND', 'APPENDS', 'SETITEM', 'SETITEMS', 'ADDITEMS', 'BUILD'}


def effect(opcode: pickletools.OpcodeInfo) -> tuple[int, bool, int]:
    """How many objects an opcode takes, whether also all above the mark, and how many it pushes."""
    before = opcode.stack_before
    takes_slice = pickletools.markobject in before
    taken = before.index(pickletools.markobject) if takes_slice else len(before)
    return taken, takes_slice, len(opcode.stack_after)


EFFECTS = {opcode.name: effect(opcode) for opcode in pickletools.opcodes}


def check_nesting(file: BinaryIO) -> None:
    """Follows the depth of each object on the stack of a pickle, in a time linear in its length.

    The depth of a list or a dict that is filled after it was stored in the memo is not followed
    there: no hash goes through them.

    Raises:
        UnpicklingError: See `refuse_deep_nesting`.
    """
    stack: list[int] = []  # depths; MARK is a mark
    memo: dict[int, int] = {}
    try:
        for opcode, number, _ in pickletools.genops(file):
            name, argument = opcode.name, cast('int | None', number)
            if name in PUTS:
                memo[len(memo) if argument is None else argument] = stack[-1]
            elif name in GETS:
                stack.append(memo[argument or 0])
            elif name == 'MARK':
                stack.append(MARK)
            elif name == 'POP':
                stack.pop()
            elif name == 'DUP':
                stack.append(stack[-1])
            else:
                taken, takes_slice, pushed = EFFECTS[name]
                inside = MARK
                while takes_slice and (popped := stack.pop()) != MARK:
                    inside = max(inside, popped)
                fills = name in FILLS  # a container below what it takes
                for _ in range(taken - fills):
                    inside = max(inside, stack.pop())
                depth = max(stack.pop(), inside + 1) if fills else inside + 1
                if depth > DEEPEST:
                    raise UnpicklingError(f'objects are nested in more than {DEEPEST} levels')
                stack.extend([depth] * pushed)
    except (ValueError, LookupError) as error:
        raise UnpicklingError(f'not a file of torch.save: {error}') from error


# ---------------------------------------------------------------------------------- torch < 2.5
BUILD = pickle.BUILD[0]  # opcode that sets an object's state
BYTEARRAY8 = pickle.BYTEARRAY8[0]  # opcode that allocates any size before it reads as much
# What later releases of torch admit by default.
ADMITTED_LATER = [
    torch.bfloat16, torch.uint8, torch.bool, torch.device, codecs.encode, set, Counter,
]  # fmt: skip


@cache
def admitted_globals() -> dict[str, Any]:
    """What a pickle may name, by name: torch's own list and `SAFE_GLOBALS`."""
    admitted = dict(_weights_only_unpickler._get_allowed_globals())
    admitted |= {path_of(value): value for value in [*ADMITTED_LATER, *SAFE_GLOBALS]}
    # Called with a number, both fill memory; `_reconstruct` receives the array class.
    admitted.pop('builtins.bytearray', None)
    return admitted | {'numpy.ndarray': None}


def path_of(value: Any) -> str:
    """How a pickle names a class or a function; dtypes are named by their own text."""
    if isinstance(value, torch.dtype):
        return str(value)
    return f'{value.__module__}.{value.__qualname__}'


class DataUnpickler(pickle._Unpickler):  # the one in C cannot be overridden as far
    """Builds only what `admitted_globals` names."""

    def find_class(self, module: str, name: str) -> Any:
        """The object of a name.

        Raises:
            UnpicklingError: It is not admitted.
        """
        if module == '__builtin__':  # Python 2's name, which old protocols keep
            module = 'builtins'
        path = f'{module}.{name}'
        if path not in admitted_globals():
            raise UnpicklingError(f'GLOBAL {path} is not admitted')
        return admitted_globals()[path]

    def load_build(self) -> None:
        """Sets the state of an object; a changed class or function would stay changed.

        Raises:
            UnpicklingError: The object is not of an admitted class.
        """
        changed = type(self.stack[-2])  # type: ignore[attr-defined]
        classes = {np.ndarray, *admitted_globals().values()}
        if changed not in {value for value in classes if isinstance(value, type)}:
            raise UnpicklingError(f'state of {path_of(changed)} is not admitted')
        pickle._Unpickler.dispatch[BUILD](self)  # type: ignore[arg-type]

    def load_bytearray8(self) -> None:
        """Raises UnpicklingError: no checkpoint needs this opcode."""
        raise UnpicklingError('a bytearray is not admitted')

    dispatch: ClassVar[dict] = {
        **pickle._Unpickler.dispatch,
        BUILD: load_build,
        BYTEARRAY8: load_bytearray8,
    }


class DataPickle:
    """A `pickle_module` for `torch.load`."""

    Unpickler = DataUnpickler

    @staticmethod
    def load(file: BinaryIO, **options: Any) -> Any:
        """As `pickle.load`.

        Raises:
            UnpicklingError: The file names or changes something that is not admitted.
        """
        return DataUnpickler(file, **options).load()
