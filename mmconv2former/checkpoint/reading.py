"""Reads a checkpoint file as data only: nothing in it is executed.

Published Conv2Former checkpoints are timm training dictionaries (a `state_dict` beside optimizer
and `argparse.Namespace`). Others come from mmpretrain, mmdet or mmseg (each key starts with
`backbone.`), are plain state dicts or safetensors. Pickles are read with
`torch.load(weights_only=True)` and a short list of safe types (for torch < 2.5: `data_pickle.py`).
"""

from __future__ import annotations

import argparse
import hashlib
import logging
import os
import re
import shutil
import struct
import tarfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pickle import UnpicklingError
from typing import Any
from urllib.parse import urlsplit
from urllib.request import urlopen
from zipfile import is_zipfile

import numpy as np
import torch
from filelock import FileLock
from mmengine.fileio import get_local_path
from mmengine.logging import HistoryBuffer, print_log
from mmengine.runner import CheckpointLoader
from torch import Tensor

from .data_pickle import DataPickle

TRUST_VARIABLE = 'MMCONV2FORMER_TRUST_CHECKPOINTS'
SECONDS_WITHOUT_ANSWER = 20  # of a host that a checkpoint is loaded from
FORCE_VARIABLE = 'TORCH_FORCE_WEIGHTS_ONLY_LOAD'  # torch's own
HOW_TO_GET_WEIGHTS = (
    'The published weights are ImageNet checkpoints linked from the README of '
    'github.com/HVision-NKU/Conv2Former; download one and put it there, or give its path as '
    'model.backbone.init_cfg.checkpoint. To train from random weights instead, set '
    'model.backbone.init_cfg=None, and of a classifier model.head.init_cfg=None (on the command '
    'line: --cfg-options model.backbone.init_cfg=None).'
)
HOW_TO_TRUST = (
    'If you trust whoever made it, --trust-checkpoints of the tools or '
    f'{TRUST_VARIABLE}=1 reads it all the same and runs what it holds.'
)
# A damaged or forged pickle can fail in any operation of the unpickler.
UNREADABLE = (
    UnpicklingError,
    RuntimeError,
    OSError,
    EOFError,
    ImportError,
    ValueError,
    TypeError,
    AttributeError,
    LookupError,
    AssertionError,
    ArithmeticError,
    MemoryError,
    struct.error,
)
FIRST_KERNEL = 'stages.0.0.attn.att.2.weight'  # in every published network
CLASSIFICATION_HEAD = re.compile(r'(head\.[02]|pred)\.(weight|bias)')


class CheckpointError(ValueError):
    """A file that is no checkpoint, cannot be read safely, or is of another network."""


class CheckpointNotFound(CheckpointError, FileNotFoundError):
    """There is no such file."""


def history_buffer_statistic(owner: object, name: str) -> Callable:
    """What mmengine's HistoryBuffer needs of `getattr`, which would lead a pickle to `eval`."""
    if owner is not HistoryBuffer or name not in ('min', 'max', 'current', 'mean'):
        raise UnpicklingError('GLOBAL builtins.getattr is for the statistics of HistoryBuffer only')
    return getattr(owner, name)


def empty_array(owner: object, shape: object, kind: object) -> np.ndarray:
    """numpy's `_reconstruct`, which would fill memory of any shape; the state comes afterwards."""
    return np.empty(0, 'b')


def scalar(dtype: np.dtype, data: object) -> Any:
    """numpy's own, which without data would fill memory of any size."""
    return MULTIARRAY.scalar(dtype, data)


def named(path: str, function: Callable) -> Callable:
    """A function that torch admits where a pickle asks for `path`."""

    def call(*args: Any) -> Any:
        return function(*args)

    call.__module__, _, call.__qualname__ = path.rpartition('.')
    call.__name__ = call.__qualname__
    return call


MULTIARRAY = getattr(np, 'core' if np.__version__ < '2' else '_core').multiarray
# What checkpoints of timm and mmengine hold beside tensors and plain containers: objects that only
# keep values, and functions that only build such. torch calls nothing that is not in this list or
# its own. NumPy 2 renamed its module; files of both are about.
SAFE_GLOBALS = [
    argparse.Namespace,
    HistoryBuffer,
    named('builtins.getattr', history_buffer_statistic),
    np.ndarray,
    np.dtype,
    *{type(np.dtype(code)) for code in '?bBhHiIlLqQefd'},
    *(
        named(f'numpy.{package}.multiarray.{name}', function)
        for package in ('core', '_core')
        for name, function in (('_reconstruct', empty_array), ('scalar', scalar))
    ),
]


def trusts_checkpoints() -> bool:
    """Whether the user said that checkpoints may execute what they hold."""
    return os.environ.get(TRUST_VARIABLE) == '1'


def read_checkpoint(checkpoint: str, map_location: Any = 'cpu') -> Any:
    """What a checkpoint file holds, read without executing any of it.

    Args:
        checkpoint: Path or address, of any kind that `mmengine.fileio` reads; safetensors if it
            ends with `.safetensors`, else what `torch.save` writes.
        map_location: Device of the tensors, as `torch.load` takes it.

    Raises:
        CheckpointNotFound: There is no such file.
        CheckpointError: The file is not a checkpoint, or holds more than data and the environment
            variable `MMCONV2FORMER_TRUST_CHECKPOINTS` is not 1.
    """
    checkpoint = os.path.expanduser(checkpoint)
    if '://' not in checkpoint and not os.path.isfile(checkpoint):
        problem = 'is a folder' if os.path.isdir(checkpoint) else 'does not exist'
        raise CheckpointNotFound(f'checkpoint {checkpoint!r} {problem}. {HOW_TO_GET_WEIGHTS}')
    try:
        with local_file(checkpoint) as path:
            if checkpoint.endswith('.safetensors'):
                return read_safetensors(path, map_location)
            check_download(path)
            if trusts_checkpoints():
                print_log(
                    f'{TRUST_VARIABLE}=1: {checkpoint} may run any code while it is read',
                    logger='current',
                    level=logging.WARNING,
                )
                return torch.load(path, map_location, weights_only=False)
            return load_data(path, map_location)
    except UNREADABLE as error:
        raise CheckpointError(
            f'checkpoint {checkpoint!r} cannot be read: {reason_of(error)}'
        ) from error


@contextmanager
def local_file(checkpoint: str) -> Iterator[str]:
    """The path of a file; of one at an address, that of its copy among torch's downloads.

    The copy stays for the next time, and is loaded by one process of the machine while others wait
    for it. One that cannot be read is deleted.
    """
    if not checkpoint.startswith(('http://', 'https://')):
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
    """Writes what is at an address to a file, wholly or not at all.

    mmengine would wait without end for a host that does not answer.

    Raises:
        OSError: There is no answer for `SECONDS_WITHOUT_ANSWER`, or no room for it.
        CheckpointError: It is less than the answer promised.
    """
    partial = f'{path}.partial'
    with urlopen(address, timeout=SECONDS_WITHOUT_ANSWER) as answer, open(partial, 'wb') as file:
        shutil.copyfileobj(answer, file)
        written, promised = file.tell(), answer.headers['Content-Length']
    if promised is not None and written != int(promised):
        raise CheckpointError('its end is missing, as after a download that broke off')
    os.replace(partial, path)
    print_log(f'{address} is kept as {path}', logger='current', level=logging.INFO)


def load_data(path: str, map_location: Any) -> Any:
    """`torch.load` of data alone: plain containers, tensors and `SAFE_GLOBALS`."""
    check_is_pickle(path)
    if hasattr(torch.serialization, 'safe_globals'):  # torch >= 2.5
        with torch.serialization.safe_globals(SAFE_GLOBALS):
            return torch.load(path, map_location, weights_only=True)
    forced = os.environ.pop(FORCE_VARIABLE, None)  # torch would refuse another module than its own
    try:
        return torch.load(
            path, map_location, pickle_module=DataPickle(SAFE_GLOBALS), weights_only=False
        )
    finally:
        if forced is not None:
            os.environ[FORCE_VARIABLE] = forced


def check_download(path: str) -> None:
    """Tells what usually goes wrong with downloads, which torch reports in its own terms.

    Raises:
        CheckpointError: The file is empty or a web page, or its end is missing.
    """
    with open(path, 'rb') as file:
        start = file.read(64).lstrip()
    if not start:
        raise CheckpointError('it is empty')
    if start.startswith(b'<'):
        raise CheckpointError('it is a web page')
    if start.startswith(b'PK') and not is_zipfile(path):
        raise CheckpointError('its end is missing, as after a download that broke off')


def check_is_pickle(path: str) -> None:
    """Refuses what torch before 2.6 reads without the unpickler, whatever it was told to admit.

    Raises:
        CheckpointError: The file is a TorchScript archive, whose program would run, or a tar as of
            the first torch, whose members would be unpacked.
    """
    if is_zipfile(path) and 'constants.pkl' in torch._C.PyTorchFileReader(path).get_all_records():
        raise CheckpointError('it is TorchScript, a program; save its state_dict() instead')
    with suppress(tarfile.TarError), tarfile.open(path, 'r:'):
        raise CheckpointError('it is a tar archive')


def read_safetensors(path: str, map_location: Any) -> dict[str, Tensor]:
    """The tensors of a safetensors file.

    Raises:
        CheckpointError: The package is missing, or the file is not of this kind.
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
    """The part of an error of `torch.load` that tells a user something, in one line."""
    text = str(error)
    forbidden = re.search(r'GLOBAL (\S+)', text)
    if forbidden:
        return f'it holds {forbidden[1]}, which is not data. {HOW_TO_TRUST}'
    text = text.rpartition('WeightsUnpickler error:')[2].strip()
    return text.splitlines()[0] if text else type(error).__name__


def admit_only_data() -> None:
    """Makes mmengine read `load_from`, `resume` and others' `init_cfg` with `read_checkpoint` too.

    Its own loaders unpickle whatever is in a file: OneDL's after a warning, and admit `getattr`
    before that; the original's at once where torch < 2.6. On `resume`, mmengine also runs a
    checkpoint's `meta['config']` as Python, only to count GPUs: that entry is left out.

    In force for this process; any other `torch.load`, here and in its children, is held to
    tensors and plain containers.
    """
    if not trusts_checkpoints():
        os.environ.pop('TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD', None)  # torch refuses to have both
        os.environ[FORCE_VARIABLE] = '1'
    files = ['', 'http://', 'https://', r'(\S+\:)?s3://', r'(\S+\:)?petrel://']
    zoos = ['modelzoo://', 'torchvision://', 'open-mmlab://', 'openmmlab://', 'mmcls://', 'pavi://']
    CheckpointLoader.register_scheme(files, load_from_checked_file, force=True)
    if not trusts_checkpoints():
        CheckpointLoader.register_scheme(zoos, load_from_refused_zoo, force=True)


def load_from_checked_file(checkpoint: str, map_location: Any = None) -> dict:
    """A loader for mmengine (it prints the name from the eleventh character on).

    Published names get those of the whole model that mmengine loads into, so that a classifier
    takes an official file as it is.

    Raises:
        FileNotFoundError, CheckpointError: See `read_checkpoint`.
    """
    content = with_state_dict(read_checkpoint(checkpoint, map_location), checkpoint)
    if trusts_checkpoints() or 'meta' not in content:
        return content
    if not isinstance(content['meta'], dict):
        raise CheckpointError(
            f'checkpoint {checkpoint!r}: meta must be a dict, got {type(content["meta"]).__name__}'
        )
    content['meta'] = dict(content['meta'])
    content['meta'].pop('config', None)
    return content


def with_state_dict(content: Any, checkpoint: str) -> dict:
    """What a file holds, with the weights under `state_dict` and the names of a whole model.

    Args:
        content: A state dict, or a dict with one under `state_dict` or `model`.
        checkpoint: The file's name, for messages.

    Raises:
        CheckpointError: It is no dict.
    """
    if not isinstance(content, dict):
        raise CheckpointError(
            f'checkpoint {checkpoint!r} must hold a dict, got {type(content).__name__}'
        )
    content = dict(content)  # plain ones: an OrderedDict in a pickle may come with its own `get`
    weights = content.get('state_dict', content.get('model', content))
    named = named_tensors(weights) if isinstance(weights, Mapping) else {}
    if FIRST_KERNEL in (plain := without_module(named)):
        content['state_dict'] = in_whole_model(plain)
    elif 'state_dict' not in content:
        content = dict(content, state_dict=weights)  # some hooks of mmengine look nowhere else
    return content


def load_from_refused_zoo(checkpoint: str, map_location: Any = None) -> dict:
    """For names that mmengine looks up and loads by itself.

    Raises:
        CheckpointError: Always.
    """
    raise CheckpointError(
        f'checkpoint {checkpoint!r} is a name in a model zoo, which mmengine does not read safely: '
        f'give the file or its address. {HOW_TO_TRUST}'
    )


def read_state_dict(checkpoint: str, averaged: bool = False) -> dict[str, Tensor]:
    """The state dict in a checkpoint file, whatever is around it.

    Args:
        checkpoint: See `read_checkpoint`. The file holds a state dict, or a dict with one under
            `state_dict` or `model`.
        averaged: Whether to take the moving average of the weights: `state_dict_ema` or
            `model_ema`; `state_dict` in a checkpoint of mmengine's EMAHook, which puts the average
            there and the others into `ema_state_dict`.

    Returns:
        Names and tensors (on the CPU), without the `module.` that data-parallel training puts in
        front of all of them.

    Raises:
        FileNotFoundError: There is no such file.
        CheckpointError: The file is not a checkpoint, holds more than data, or no average where
            that is asked for.
    """
    content = read_checkpoint(checkpoint)
    keys: tuple[str, ...] = ('state_dict', 'model')
    if averaged:
        is_of_ema_hook = isinstance(content, Mapping) and 'ema_state_dict' in content
        keys = ('state_dict',) if is_of_ema_hook else ('state_dict_ema', 'model_ema')
    for key in keys:
        if isinstance(content, Mapping) and isinstance(content.get(key), Mapping):
            content = content[key]
            break
    else:
        if averaged:
            found = list(content)[:8] if isinstance(content, Mapping) else type(content).__name__
            raise CheckpointError(
                f'checkpoint {checkpoint!r} has no averaged weights (state_dict_ema, model_ema or '
                f'ema_state_dict), got {found}'
            )
    if not isinstance(content, Mapping):
        raise CheckpointError(
            f'checkpoint {checkpoint!r} must hold a state dict, got {type(content).__name__}'
        )
    tensors = named_tensors(content)
    if not tensors:
        raise CheckpointError(
            f'checkpoint {checkpoint!r} holds no tensors, only {list(content)[:5]}'
        )
    return without_module(tensors)


def named_tensors(content: Mapping) -> dict[str, Tensor]:
    """What of a state dict can belong to a module; any file may hold any other keys."""
    return {
        name: value
        for name, value in content.items()
        if isinstance(name, str) and isinstance(value, Tensor)
    }


def without_module(state_dict: dict[str, Tensor]) -> dict[str, Tensor]:
    """The same without the `module.` that data-parallel training puts in front of all names."""
    if not all(isinstance(name, str) and name.startswith('module.') for name in state_dict):
        return state_dict
    return {name[len('module.') :]: value for name, value in state_dict.items()}


def in_whole_model(state_dict: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Published names under those of a model: `backbone.` and, of a classifier, `head.`."""
    return {
        f'head.{name}' if CLASSIFICATION_HEAD.fullmatch(name) else f'backbone.{name}': value
        for name, value in state_dict.items()
    }
