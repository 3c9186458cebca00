"""Reading checkpoints: safely, and never in part without saying so.

Published Conv2Former checkpoints are timm training dictionaries (a `state_dict` beside optimizer
and `argparse.Namespace`); others come from mmpretrain, mmdet or mmseg (`backbone.` in front of
each key), are plain state dicts or safetensors. Pickles are read with
`torch.load(weights_only=True)` and a short list of what may be rebuilt, so that nothing in a file
is executed (with torch < 2.5: `data_pickle.py`). The order here: reading, recognising a network by
its shapes, loading into a module.
"""

from __future__ import annotations

import argparse
import copy
import hashlib
import logging
import os
import re
import shutil
import struct
import tarfile
from collections import Counter, OrderedDict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, fields
from pickle import UnpicklingError
from typing import Any
from urllib.parse import urlsplit
from urllib.request import urlopen
from zipfile import is_zipfile

import numpy as np
import torch
import torch.nn.functional as F
from filelock import FileLock
from mmengine.fileio import get_local_path
from mmengine.logging import HistoryBuffer, print_log
from mmengine.model import BaseModule, PretrainedInit
from mmengine.optim import OptimWrapperDict
from mmengine.runner import CheckpointLoader
from torch import Tensor, nn

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

# Where a whole model keeps our modules; '' is an official file or a backbone alone.
PREFIXES = ('', 'backbone.', 'head.')
BACKBONE = 'backbone.'
# Made for dense prediction, hence in no ImageNet checkpoint.
NEW_FOR_DENSE_PREDICTION = re.compile(r'norm\d+\.(weight|bias)')
# Of the hierarchical network, with its stage, or of the isotropic one.
MODULATION_KERNEL = re.compile(r'(?:stages\.(\d+)|blocks)\.\d+\.attn\.att\.2\.weight')
FIRST_KERNEL = 'stages.0.0.attn.att.2.weight'  # in every published network
SIZE_MISMATCH = re.compile(
    r'size mismatch for (\S+): copying a param with shape torch\.Size\(\[(.*?)\]\) from '
    r'checkpoint, the shape in current model is torch\.Size\(\[(.*?)\]\)'
)
OPTIMIZER_KINDS = ('betas', 'momentum', 'eps', 'alpha', 'rho')  # settings that tell them apart
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


@dataclass(frozen=True)
class Architecture:
    """What the shapes of a state dict tell of its network; empty or None is what they do not."""

    channels: tuple[int, ...]
    depths: tuple[int, ...]
    kernel_size: tuple[int, ...]
    mlp_ratio: float | None
    in_channels: int | None
    num_classes: int | None


def recognise_arch(state_dict: Mapping[str, Tensor]) -> Architecture:
    """The network of a state dict with the published names: one value a stage, from shapes alone.

    Nothing is checked for completeness. Without stages of modulations, as in the state dict of a
    head or of another network, `depths` is empty.
    """
    blocks: dict[int, list[Tensor]] = {}
    for name, value in state_dict.items():
        match = MODULATION_KERNEL.fullmatch(name)
        if match and match[1] and value.dim() == 4:  # (C, 1, k, k)
            blocks.setdefault(int(match[1]), []).append(value)
    stages = [blocks[stage] for stage in sorted(blocks)]

    def size(name: str, axis: int) -> int | None:
        value = state_dict.get(name)
        return value.shape[axis] if value is not None and value.dim() > axis else None

    hidden_channels, in_channels = (size('stages.0.0.mlp.fc1.weight', axis) for axis in (0, 1))
    return Architecture(
        channels=tuple(stage[0].shape[0] for stage in stages),
        depths=tuple(len(stage) for stage in stages),
        kernel_size=tuple(stage[0].shape[-1] for stage in stages),
        mlp_ratio=hidden_channels / in_channels if hidden_channels and in_channels else None,
        in_channels=size('downsample_layers.0.0.weight', 1),
        num_classes=size('pred.weight', 0),
    )


def differences(found: Mapping[str, Tensor], expected: Mapping[str, Tensor]) -> Iterator[str]:
    """In which respects the network of a file is not the model's, in words.

    Stages of the file behind the model's last do not count: `out_indices` may leave them out.
    """
    in_file, in_model = recognise_arch(found), recognise_arch(expected)
    for field in fields(Architecture):
        ours, theirs = getattr(in_model, field.name), getattr(in_file, field.name)
        if isinstance(ours, tuple):
            theirs = theirs[: len(ours)]
        if ours and theirs and ours != theirs:
            hint = ' (adapt_kernel=True pads smaller ones)' if field.name == 'kernel_size' else ''
            yield f'{field.name} is {theirs} in the file, {ours} in the model{hint}'


def pad_kernels(found: Mapping[str, Tensor], expected: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The modulations' kernels, padded with zeros around to the size of the expected ones.

    A centred kernel in zeros is the same convolution, so the output stays as it was; smaller
    kernels would change it.

    Args:
        found: Names and tensors of a file, kernels of shape (C, 1, k, k).
        expected: Those of the model, kernels of shape (C, 1, K, K) with K >= k, odd as k is.

    Raises:
        CheckpointError: An expected kernel is smaller than the one found.
    """
    padded = dict(found)
    for name in filter(MODULATION_KERNEL.fullmatch, expected):
        if name not in found or found[name].dim() != 4:
            continue
        old, new = found[name].shape[-1], expected[name].shape[-1]
        if new < old:
            raise CheckpointError(
                f'kernel_size can only grow, as a smaller kernel has another output: {name} is '
                f'{old}x{old} in the file, {new}x{new} in the model'
            )
        padded[name] = F.pad(found[name], [(new - old) // 2] * 4)
    return padded


def find_prefix(state_dict: Mapping[str, Tensor], expected: Iterable[str]) -> str:
    """The one of `PREFIXES` behind which a state dict has the most of the expected names."""
    return max(PREFIXES, key=lambda prefix: sum(prefix + name in state_dict for name in expected))


def behind_prefix(state_dict: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    """The part of a state dict whose names begin with a prefix, without it.

    Raises:
        CheckpointError: There is no such name.
    """
    found = {
        name[len(prefix) :]: value for name, value in state_dict.items() if name.startswith(prefix)
    }
    if not found:
        raise CheckpointError(
            f'no name begins with prefix={prefix!r}; '
            f'the names begin with {sorted({name.split(".")[0] for name in state_dict})}'
        )
    return found


def check_fit(
    found: Mapping[str, Tensor],
    expected: Mapping[str, Tensor],
    may_miss: re.Pattern | None = NEW_FOR_DENSE_PREDICTION,
) -> None:
    """Checks that a file has every tensor of a model, in its shape, and is of the same depth.

    Names that `may_miss` matches need not be in the file.

    Raises:
        CheckpointError: It does not; the message says what differs and lists names.
    """
    missing = [
        name
        for name in expected
        if name not in found and not (may_miss and may_miss.fullmatch(name))
    ]
    misshaped = [
        f'{name} is {tuple(found[name].shape)} in the file, {tuple(value.shape)} in the model'
        for name, value in expected.items()
        if name in found and found[name].shape != value.shape
    ]
    differing = list(differences(found, expected))  # a deeper network has all names of a flat one
    if missing or misshaped or differing:
        raise CheckpointError(misfit(differing, missing, misshaped, len(expected)))


def misfit(
    differing: Sequence[str], missing: Sequence[str], misshaped: Sequence[str], number: int
) -> str:
    """In which respects a file does not fit `number` names of a model, in words."""
    return (
        ''.join(f'{difference}; ' for difference in differing)
        + f'{len(missing)} of {number} names missing'
        + (f', such as {list(missing[:3])}' if missing else '')
        + f'; {len(misshaped)} shapes differ'
        + (f', such as {"; ".join(misshaped[:3])}' if misshaped else '')
    )


def load_pretrained(
    module: nn.Module,
    checkpoint: str,
    prefix: str | None = None,
    adapt_kernel: bool = False,
    new_layers: Sequence[str] = (),
    may_miss: re.Pattern | None = NEW_FOR_DENSE_PREDICTION,
) -> None:
    """Loads a checkpoint into a backbone or a head; every parameter must be in it, in its shape.

    By default output norms (`norm{i}`) may be missing, as ImageNet networks have none. What the
    module has no use for, such as a classification head, is left out and logged.

    `LoadsPretrained` calls this for a module's `init_cfg`.

    Args:
        module: The module to fill, with the published names (`head.0`, `head.2` and `pred` for the
            classification head) or those of its own checkpoints.
        checkpoint: See `read_state_dict`.
        prefix: What the module's names begin with in the file; None finds '', `backbone.` or
            `head.` by itself: an official file as well as one of mmpretrain, mmdet or mmseg.
        adapt_kernel: Whether smaller kernels of the modulation are padded with zeros to the
            module's size, which does not change the output.
        new_layers: Layers that keep the values they have, such as `['pred']` of a head for other
            classes than the file's.
        may_miss: Matches the names that need not be in the file; None: all must be.

    Raises:
        FileNotFoundError: There is no such file.
        CheckpointError: The file is not a checkpoint, or one of another network; the message says
            in what it differs. The module is then unchanged.
    """
    state_dict = read_state_dict(checkpoint)
    expected = without_layers(module.state_dict(), new_layers)
    try:
        if prefix is None:
            prefix = find_prefix(state_dict, expected)
        elif prefix and not prefix.endswith('.'):
            prefix += '.'
        found = behind_prefix(state_dict, prefix)
        if adapt_kernel:
            found = pad_kernels(found, expected)
        check_fit(found, expected, may_miss)
    except CheckpointError as error:
        raise CheckpointError(
            f'checkpoint {checkpoint!r} does not fit this {type(module).__name__}: {error}'
        ) from error

    module.load_state_dict({name: found[name] for name in expected if name in found}, False)
    unused = Counter(name.split('.')[0] for name in found if name not in expected)
    left_out = ', '.join(f'{count} of {part}' for part, count in unused.items()) or 'none'
    print_log(
        f'Loaded {checkpoint}: all {len(expected)} tensors of {type(module).__name__} but '
        f'{[name for name in expected if name not in found]}; tensors left out: {left_out}',
        logger='current',
        level=logging.INFO,
    )


def load_model(model: nn.Module, content: Mapping[str, Any], checkpoint: str, whole: bool) -> None:
    """Loads a checkpoint into a whole model, or refuses it, where mmengine only warns.

    Args:
        model: A detector, segmentor or classifier; its backbone is `backbone`.
        content: What the file holds, see `load_from_checked_file`.
        checkpoint: Its name, for messages.
        whole: Whether every tensor of the model must be in the file in its shape, as to evaluate
            and to resume. Else, to fine-tune, every one of the backbone if the file has any of it;
            others, such as a head for other classes, keep their initial values. In both cases what
            the model has no use for is left out. All that is named in the log.

    Raises:
        CheckpointError: The file does not fit; part of it may be in the model then.
    """
    found = tensors_of(content['state_dict'])
    if not found:
        raise CheckpointError(f'checkpoint {checkpoint!r} holds no state dict of tensors')
    expected = model.state_dict()
    try:
        missing, misshaped, unused = load_fitting(model, found)
    except CheckpointError as error:
        raise CheckpointError(f'checkpoint {checkpoint!r} does not fit: {error}') from error
    # torch makes up the counters of BatchNorms itself.
    loaded = set(expected).difference(missing, misshaped)
    if whole or all(name.endswith('.num_batches_tracked') for name in loaded):
        part, needed = 'model', set(expected)
    else:
        part, needed = 'backbone', needed_to_tune(found, expected)
    differing = list(differences(of_backbone(found), of_backbone(expected)))
    lacking = [name for name in missing if name in needed]
    others = [text for name, text in misshaped.items() if name in needed]
    if differing or lacking or others:
        raise CheckpointError(
            f'checkpoint {checkpoint!r} does not fit the {part} of this config: '
            f'{misfit(differing, lacking, others, len(needed))}; '
            f'the names in the file begin with {beginnings(found)}'
        )
    kept = [*missing, *misshaped.values()]
    print_log(
        f'Loaded {checkpoint}: {len(loaded)} of {len(expected)} tensors of the model; '
        f'at their initial values stay {listed(kept)}; '
        f'left out of the file: {listed(unused)}',
        logger='current',
        level=logging.WARNING if kept else logging.INFO,
    )


def load_fitting(
    model: nn.Module, state_dict: OrderedDict[str, Tensor]
) -> tuple[list[str], dict[str, str], list[str]]:
    """Loads what fits, by way of all the hooks by which modules read files of former versions.

    Returns:
        Names that the file lacks, those of another shape with words for that, and names that the
        model lacks.

    Raises:
        CheckpointError: A module cannot read its part of the file.
    """
    misshaped = {}
    try:
        keys = model.load_state_dict(state_dict, strict=False)
    except RuntimeError as error:  # torch tells which shapes differ in its message only
        for name, in_file, in_model in SIZE_MISMATCH.findall(str(error)):
            misshaped[name] = f'{name} is ({in_file}) in the file, ({in_model}) in the model'
        if not misshaped:
            raise CheckpointError(str(error).splitlines()[-1].strip()) from error
        fitting = copy.copy(state_dict)  # with the versions of modules
        for name in misshaped:
            fitting.pop(name, None)
        keys = model.load_state_dict(fitting, strict=False)
    except (LookupError, AttributeError, TypeError, ValueError) as error:  # in a module's hook
        raise CheckpointError(f'{type(error).__name__}: {error}') from error
    missing = [name for name in keys.missing_keys if name not in misshaped]
    return missing, misshaped, keys.unexpected_keys


def tensors_of(state_dict: Any) -> OrderedDict[str, Tensor]:
    """The tensors of a state dict and the versions of its modules; nothing of what is none."""
    found: OrderedDict[str, Tensor] = OrderedDict()
    if isinstance(state_dict, Mapping):
        found = OrderedDict(without_module(named_tensors(state_dict)))
        if hasattr(state_dict, '_metadata'):  # by which modules read files of former versions
            found._metadata = state_dict._metadata  # type: ignore[attr-defined]
    return found


def needed_to_tune(found: Mapping[str, Tensor], expected: Mapping[str, Tensor]) -> set[str]:
    """Names of the backbone, if the file has any, that cannot do without values of the file."""
    if not of_backbone(found):
        return set()
    needed = (n for n in of_backbone(expected) if not NEW_FOR_DENSE_PREDICTION.fullmatch(n))
    return {BACKBONE + name for name in needed}


def of_backbone(state_dict: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The part of a whole model's state dict that is its backbone's, without the prefix."""
    return {n[len(BACKBONE) :]: value for n, value in state_dict.items() if n.startswith(BACKBONE)}


def beginnings(state_dict: Mapping[str, Tensor]) -> list[str]:
    """What the names of a state dict begin with, such as `backbone` and `neck`."""
    return sorted({name.split('.')[0] for name in state_dict})[:8]


def listed(names: Sequence[str]) -> str:
    """The number of names and the first of them."""
    return f'{len(names)} ({", ".join(names[:6])}{", ..." * (len(names) > 6)})' if names else 'none'


def check_resumable(content: Mapping[str, Any], checkpoint: str) -> None:
    """Checks that a checkpoint holds what mmengine resumes a run from.

    Raises:
        CheckpointError: It holds weights only, or something else in that place.
    """
    meta, hub = content.get('meta'), content.get('message_hub')
    groups = content.get('optimizer')
    counts = [meta.get(key) for key in ('epoch', 'iter')] if isinstance(meta, Mapping) else [None]
    holds = {
        'meta with epoch and iter': all(type(count) is int and count >= 0 for count in counts),
        'message_hub': isinstance(hub, Mapping)
        and all(
            isinstance(hub.get(key), Mapping)
            for key in ('log_scalars', 'runtime_info', 'resumed_keys')
        ),
        'optimizer': isinstance(groups, Mapping),
    }
    lacking = [part for part, is_there in holds.items() if not is_there]
    if lacking:
        raise CheckpointError(
            f'checkpoint {checkpoint!r} cannot be resumed from: it holds no '
            f'{", no ".join(lacking)}. To begin a new run from its weights, give it as load_from '
            '(--cfg-options load_from=FILE).'
        )


def check_optimizer(saved: Any, optimizer: Any, checkpoint: str) -> None:
    """Checks that the state of an optimizer, or of several by name, is of the one of the run.

    Args:
        saved: What the checkpoint holds under `optimizer`.
        optimizer: The run's, an `OptimWrapper` or an `OptimWrapperDict` of mmengine.
        checkpoint: Its name, for messages.

    Raises:
        CheckpointError: It is of a run with other parameter groups or another optimizer.
    """
    if isinstance(optimizer, OptimWrapperDict):
        for name, part in optimizer.items():
            check_optimizer(saved.get(name), part, checkpoint)
        return
    groups = saved.get('param_groups') if isinstance(saved, Mapping) else None
    if not isinstance(groups, list) or not all(
        isinstance(group, Mapping) and isinstance(group.get('params'), list) for group in groups
    ):
        raise CheckpointError(f'checkpoint {checkpoint!r} holds no param_groups of an optimizer')
    own_groups = optimizer.optimizer.param_groups  # the wrapper adds one of no parameters
    sizes = [len(group['params']) for group in groups]
    wanted = [len(group['params']) for group in own_groups]
    of_kind = [key for key in OPTIMIZER_KINDS if key in own_groups[0]]
    lacking = [key for key in of_kind if any(key not in group for group in groups)]
    if sizes != wanted or lacking:
        reason = (
            f'{len(sizes)} parameter groups of {sum(sizes)} parameters in the file, '
            f'{len(wanted)} of {sum(wanted)} in this config'
            if sizes != wanted
            else f'the optimizer in the file has no {", ".join(lacking)}'
        )
        raise CheckpointError(
            f'checkpoint {checkpoint!r} cannot be resumed from: {reason}. Resume with the '
            'optim_wrapper and frozen_stages of its run, or give it as load_from to begin anew.'
        )


def without_layers(state_dict: Mapping[str, Tensor], layers: Sequence[str]) -> dict[str, Tensor]:
    """The part of a state dict that is not of some layers."""
    prefixes = tuple(f'{layer}.' for layer in layers)
    return {name: value for name, value in state_dict.items() if not name.startswith(prefixes)}


class LoadsPretrained(BaseModule):
    """mmengine's module, whose `init_cfg=dict(type='Pretrained', ...)` goes by `load_pretrained`.

    Stands first among several bases. The other keys of the dict are the arguments of
    `load_pretrained`.
    """

    init_cfg: dict | list[dict] | None

    def init_weights(self) -> None:
        """Applies `init_cfg`; pretrained weights are read safely and must fit.

        Raises:
            FileNotFoundError, CheckpointError: See `load_pretrained`.
        """
        if self.is_init:
            return
        init_cfg = self.init_cfg
        # mmengine loads with strict=False: a file of another model would be taken in silence.
        self.init_cfg = [cfg for cfg in self._init_cfgs() if not is_pretrained(cfg)]
        super().init_weights()
        self.init_cfg = init_cfg
        self.load_own_pretrained()

    def load_own_pretrained(self) -> None:
        """Loads what `init_cfg` names; the rest of `init_weights` is not done.

        Raises:
            FileNotFoundError, CheckpointError: See `load_pretrained`.
        """
        # `map_location`, which mmengine's takes, has no use: reading is on the CPU.
        ignored = ('type', 'map_location')
        for cfg in filter(is_pretrained, self._init_cfgs()):
            load_pretrained(self, **{key: cfg[key] for key in cfg if key not in ignored})

    def _init_cfgs(self) -> list[dict]:
        return [self.init_cfg] if isinstance(self.init_cfg, dict) else list(self.init_cfg or ())


def is_pretrained(init_cfg: Mapping) -> bool:
    """Whether an `init_cfg` loads a checkpoint."""
    return init_cfg['type'] in ('Pretrained', PretrainedInit)
