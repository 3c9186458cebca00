"""Reads a checkpoint file as data only: nothing in it is executed.

Published Conv2Former checkpoints are timm training dictionaries (a `state_dict` next to optimizer
state and an `argparse.Namespace`). Others come from mmpretrain, mmdet or mmseg (each name starts
with `backbone.`), or are plain state dicts or safetensors. `read_checkpoint` reads the file,
`state_dict_of` finds the tensors in it.
"""

from __future__ import annotations

import hashlib
import logging
import os
import re
import shutil
import struct
from collections import OrderedDict
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pickle import UnpicklingError
from typing import Any
from urllib.parse import urlsplit
from urllib.request import urlopen
from zipfile import BadZipFile, ZipFile, is_zipfile
from zlib import error as ZlibError

import torch
from filelock import FileLock
from mmengine.fileio import get_file_backend, get_local_path
from mmengine.logging import print_log
from mmengine.runner import CheckpointLoader
from torch import Tensor, nn

from ..text import PrintableError, first
from .safe_pickle import FORCE_VARIABLE, load_data

TRUST_VARIABLE = 'MMCONV2FORMER_TRUST_CHECKPOINTS'
HOW_TO_TRUST = (
    f'If you trust its author, --trust-checkpoints of the tools or {TRUST_VARIABLE}=1 reads it '
    'anyway and runs the code in it.'
)
DOWNLOAD_TIMEOUT = 20  # seconds without an answer
# A damaged or forged file can fail in any operation of the unpickler.
UNREADABLE = (
    UnpicklingError, RuntimeError, OSError, EOFError, ImportError, ValueError, TypeError,
    AttributeError, LookupError, AssertionError, ArithmeticError, MemoryError, struct.error,
    BadZipFile, ZlibError,
)  # fmt: skip
FOLDER = 0x10  # attribute of a record for which torch returns memory as it finds it
FIRST_KERNEL = 'stages.0.0.attn.att.2.weight'  # in every published network
CLASSIFICATION_HEAD = re.compile(r'(head\.[02]|pred)\.(weight|bias)')


class CheckpointError(PrintableError, ValueError):
    """A file that is not a checkpoint, cannot be read safely, or is of another network."""


class CheckpointNotFound(CheckpointError, FileNotFoundError):
    """There is no such file."""


def trusts_checkpoints() -> bool:
    """Whether the user allows checkpoints to execute code."""
    return os.environ.get(TRUST_VARIABLE) == '1'


# ----------------------------------------------------------------------------------------- files
def read_checkpoint(checkpoint: str, map_location: Any = 'cpu') -> Any:
    """Reads a checkpoint file without executing anything in it.

    Args:
        checkpoint: Path or URL, of any kind that `mmengine.fileio` reads. It is read as safetensors
            if it ends with `.safetensors`, otherwise as written by `torch.save`.
        map_location: Device of the tensors, as `torch.load` takes it.

    Raises:
        CheckpointNotFound: There is no such file.
        CheckpointError: The file is not a checkpoint, or contains more than data and the
            environment variable `MMCONV2FORMER_TRUST_CHECKPOINTS` is not 1.
    """
    checkpoint = os.path.expanduser(checkpoint)
    if '://' not in checkpoint and not os.path.isfile(checkpoint):
        problem = 'is a folder' if os.path.isdir(checkpoint) else 'does not exist'
        raise CheckpointNotFound(f'checkpoint {checkpoint!r} {problem}')
    try:
        with local_copy(checkpoint) as path:
            if checkpoint.endswith('.safetensors'):
                return read_safetensors(path, map_location)
            check_file(path)
            if not trusts_checkpoints():
                return load_data(path, map_location)
            print_log(
                f'{TRUST_VARIABLE}=1: {checkpoint} may run any code while it is read',
                logger='current',
                level=logging.WARNING,
            )
            return torch.load(path, map_location, weights_only=False)
    except UNREADABLE as error:
        raise CheckpointError(
            f'checkpoint {checkpoint!r} cannot be read: {reason_of(error)}'
        ) from error


@contextmanager
def local_copy(checkpoint: str) -> Iterator[str]:
    """The path of a file, or of the copy of a remote one.

    Downloads are kept in torch's folder; one process of a machine downloads while others wait. A
    download that cannot be read is deleted.
    """
    if not checkpoint.startswith(('http://', 'https://')):
        try:
            get_file_backend(checkpoint)
        except KeyError as error:
            raise CheckpointError(
                f'unknown scheme {error}, names of model zoos included; give the file or its '
                'http(s) address'
            ) from None
        with get_local_path(checkpoint) as path:
            yield path
        return
    folder = os.path.join(torch.hub.get_dir(), 'checkpoints')
    os.makedirs(folder, exist_ok=True)
    name = os.path.basename(urlsplit(checkpoint).path)
    digest = hashlib.sha256(checkpoint.encode()).hexdigest()[:8]
    path = os.path.join(folder, f'{digest}-{name}')
    with FileLock(f'{path}.lock'):
        if not os.path.isfile(path):
            download(checkpoint, path)
    try:
        yield path
    except UNREADABLE:
        with suppress(FileNotFoundError):
            os.unlink(path)
        raise


def download(address: str, path: str) -> None:
    """Downloads a file completely or not at all; unlike mmengine, it does not wait forever.

    Raises:
        OSError: No answer for `DOWNLOAD_TIMEOUT` seconds, or the disk is full.
        CheckpointError: Fewer bytes arrived than were announced.
    """
    partial = f'{path}.partial'
    with urlopen(address, timeout=DOWNLOAD_TIMEOUT) as answer, open(partial, 'wb') as file:
        shutil.copyfileobj(answer, file)
        written, announced = file.tell(), answer.headers['Content-Length']
    if announced is not None and written != int(announced):
        raise CheckpointError('file is truncated (incomplete download?)')
    os.replace(partial, path)
    print_log(f'Saved {address} as {path}', logger='current', level=logging.INFO)


def check_file(path: str) -> None:
    """Recognises failed downloads, for which torch has obscure messages, and changed bytes.

    Raises:
        CheckpointError: The file is empty, a web page, truncated or damaged.
    """
    with open(path, 'rb') as file:
        start = file.read(64).lstrip()
    if not start:
        raise CheckpointError('file is empty')
    if start.startswith(b'<'):
        raise CheckpointError('file is a web page')
    if start.startswith(b'PK'):
        if not is_zipfile(path):
            raise CheckpointError('file is truncated (incomplete download?)')
        check_sums(path)


def check_sums(path: str) -> None:
    """Checks the CRC-32 of every record of a zip file, which torch does not.

    It takes 0.2 s for 300 MB. Files of `torch.serialization.set_crc32_options(False)` have no
    sums: all are 0.

    Raises:
        CheckpointError: A record is not what was written.
        Exception: Of `UNREADABLE`, if the structure of the file is damaged.
    """
    with ZipFile(path) as archive:
        records = archive.infolist()
        has_sums = any(record.CRC for record in records)
        for record in records:
            if record.external_attr & FOLDER:
                raise CheckpointError(f'file is damaged: record {record.filename!r} is a folder')
            try:
                with archive.open(record) as file:
                    while has_sums and file.read(2**20):
                        pass
            except (BadZipFile, ZlibError, EOFError) as error:
                raise CheckpointError(
                    f'file is damaged: record {record.filename!r} is not what was written '
                    '(CRC-32); use another copy'
                ) from error


def read_safetensors(path: str, map_location: Any) -> dict[str, Tensor]:
    """Reads the tensors of a safetensors file.

    Raises:
        CheckpointError: The package is missing, or the file is of another kind.
    """
    try:  # optional: few files are of this kind
        from safetensors import SafetensorError
        from safetensors.torch import load_file
    except ImportError as error:
        raise CheckpointError('this needs a package: pip install safetensors') from error
    try:
        return load_file(path, 'cpu' if map_location is None else map_location)
    except SafetensorError as error:
        raise CheckpointError(f'not safetensors: {error}') from error


def reason_of(error: Exception) -> str:
    """The informative part of an error of `torch.load`, in one line."""
    text = str(error)
    if forbidden := re.search(r'GLOBAL (\S+)', text):
        return f'file contains {forbidden[1]}, which is not plain data. {HOW_TO_TRUST}'
    text = text.rpartition('WeightsUnpickler error:')[2].strip()
    return text.splitlines()[0] if text else type(error).__name__


# --------------------------------------------------------------------------------------- content
def state_dict_of(
    content: Any, checkpoint: str, averaged: bool = False
) -> OrderedDict[str, Tensor]:
    """Finds the state dict in the content of a checkpoint file.

    Args:
        content: A state dict, or a dict with one under `state_dict` or `model`.
        checkpoint: Name of the file, for messages.
        averaged: Whether to take the moving average of the weights: `state_dict_ema` or
            `model_ema`. In a checkpoint of mmengine's EMAHook this is `state_dict`, because the
            hook stores the average there and the other weights as `ema_state_dict`.

    Returns:
        Names and tensors, with the versions of the modules. The prefix `module.` of data-parallel
        training is removed, and `_orig_mod.` of `torch.compile` anywhere in a name.

    Raises:
        CheckpointError: There are no tensors, or no averaged weights.
    """
    if not isinstance(content, dict):
        raise CheckpointError(
            f'checkpoint {checkpoint!r} must hold a state dict, got {type(content).__name__}'
        )
    # A pickle can give an OrderedDict its own `get` or `items`; the methods of `dict` ignore them.
    keys = ['state_dict', 'model']
    if averaged:
        keys = ['state_dict'] if 'ema_state_dict' in content else ['state_dict_ema', 'model_ema']
    found = [content[key] for key in keys if isinstance(dict.get(content, key), dict)]
    if averaged and not found:
        raise CheckpointError(
            f'checkpoint {checkpoint!r} has no averaged weights (state_dict_ema, model_ema or '
            f'ema_state_dict), got {first(content, 8)}'
        )
    weights = found[0] if found else content
    tensors = {
        name.replace('_orig_mod.', ''): value
        for name, value in dict.items(weights)
        if isinstance(name, str) and isinstance(value, Tensor)
    }
    if not tensors:
        raise CheckpointError(
            f'checkpoint {checkpoint!r} contains no tensors, only {first(weights, 5)}'
        )
    check_kinds(tensors, checkpoint)
    in_wrapper = all(name.startswith('module.') for name in tensors)
    prefix = 'module.' if in_wrapper else ''
    result = OrderedDict((name[len(prefix) :], value) for name, value in tensors.items())
    if hasattr(weights, '_metadata'):
        result._metadata = weights._metadata  # type: ignore[attr-defined]
    return result


def check_kinds(tensors: Mapping[str, Tensor], checkpoint: str) -> None:
    """Checks that tensors are plain arrays of numbers.

    Raises:
        CheckpointError: One is sparse, quantized, nested, of another class, or without values.
    """
    for name, value in tensors.items():
        if (kind := kind_of(value)) is not None:
            raise CheckpointError(
                f'checkpoint {checkpoint!r} cannot be loaded: {first([name])[0]} is {kind}; only '
                'plain dense tensors are supported'
            )


def kind_of(value: Tensor) -> str | None:
    """What a tensor is if it is not a plain array of numbers."""
    if value.is_nested:
        return 'a nested tensor'
    if value.is_quantized:
        return 'a quantized tensor'
    if value.layout is not torch.strided:
        return f'a sparse tensor ({value.layout})'
    if value.is_meta:
        return 'a tensor without values (meta)'
    return None if type(value) in (Tensor, nn.Parameter) else f'of {type(value).__name__}'


def read_state_dict(checkpoint: str, averaged: bool = False) -> OrderedDict[str, Tensor]:
    """Reads the state dict in a checkpoint file, on the CPU; see `state_dict_of`.

    Raises:
        CheckpointNotFound, CheckpointError: See `read_checkpoint` and `state_dict_of`.
    """
    return state_dict_of(read_checkpoint(checkpoint), checkpoint, averaged)


def in_whole_model(state_dict: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
    """Published names as those of a whole model: `backbone.` and, for a classifier, `head.`."""
    if FIRST_KERNEL not in state_dict:
        return state_dict
    return OrderedDict(
        (f'head.{name}' if CLASSIFICATION_HEAD.fullmatch(name) else f'backbone.{name}', value)
        for name, value in state_dict.items()
    )


# -------------------------------------------------------------------------------------- mmengine
def load_from_checked_file(checkpoint: str, map_location: Any = None) -> dict[str, Any]:
    """A loader for mmengine, which logs this function's name from its 11th character on.

    Returns:
        The content of the file. `state_dict` has the names of a whole model, so that a classifier
        can load a published file. `config` in `meta` is left out, because mmengine would run it
        as Python on `resume`, only to count GPUs.

    Raises:
        CheckpointNotFound, CheckpointError: See `read_checkpoint` and `state_dict_of`.
    """
    content = read_checkpoint(checkpoint, map_location)
    state_dict = in_whole_model(state_dict_of(content, checkpoint))
    content = dict(dict.items(content), state_dict=state_dict)
    if isinstance(content.get('meta'), dict):
        content['meta'] = {k: v for k, v in dict.items(content['meta']) if k != 'config'}
    return content


def admit_only_data() -> None:
    """Makes mmengine read `load_from`, `resume` and others' `init_cfg` with `read_checkpoint` too.

    mmengine's own loaders unpickle anything: OneDL's release does so after a warning, and allows
    `getattr` before that; the original release does so at once with torch < 2.6.

    This affects the whole process: any other `torch.load`, here and in child processes, is
    restricted to tensors and plain containers.
    """
    schemes = ['', 'http://', 'https://']
    if not trusts_checkpoints():
        os.environ.pop(
            'TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD', None
        )  # torch refuses both variables together
        os.environ[FORCE_VARIABLE] = '1'
        schemes = list(CheckpointLoader._schemes)  # model zoos too, which mmengine would unpickle
    CheckpointLoader.register_scheme(schemes, load_from_checked_file, force=True)
