"""Loads checkpoints strictly: a file that does not fit is refused, with the reasons.

Everything is checked before anything is loaded, so a module that refuses a file is unchanged.
"""

from __future__ import annotations

import copy
import logging
import re
from collections import OrderedDict
from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import Any

import torch
from mmengine.logging import print_log
from torch import Tensor, nn

from ..registry import WEIGHT_INITIALIZERS
from ..text import first, listed, printable
from .architecture import differences, pad_kernels
from .reading import CheckpointError, CheckpointNotFound, check_kinds, read_state_dict

BACKBONE = 'backbone.'
# Prefixes of our modules in a whole model; '' is a published file or a backbone alone.
PREFIXES = ('', BACKBONE, 'head.')
# Added for dense prediction, so no ImageNet checkpoint has them.
NEW_FOR_DENSE_PREDICTION = re.compile(r'norm\d+\.(weight|bias)')
SIZE_MISMATCH = re.compile(
    r'size mismatch for (\S+): copying a param with shape torch\.Size\(\[(.*?)\]\) from '
    r'checkpoint, the shape in current model is torch\.Size\(\[(.*?)\]\)'
)
HOW_TO_GET_WEIGHTS = (
    'The published weights are ImageNet checkpoints linked from the README of '
    'github.com/HVision-NKU/Conv2Former; download one and put it there, or give its path as '
    'model.backbone.init_cfg.checkpoint. To train from random weights instead, set '
    'model.backbone.init_cfg=None, and for a classifier model.head.init_cfg=None (on the command '
    'line: --cfg-options model.backbone.init_cfg=None).'
)


# ---------------------------------------------------------------------------- a backbone or a head
def load_pretrained(
    module: nn.Module,
    checkpoint: str,
    prefix: str | None = None,
    adapt_kernel: bool = False,
    new_layers: Sequence[str] = (),
    may_miss: re.Pattern | None = NEW_FOR_DENSE_PREDICTION,
    how_to_get: str = HOW_TO_GET_WEIGHTS,
) -> None:
    """Loads a checkpoint into a backbone or a head; it must have every tensor, in its shape.

    By default output norms (`norm{i}`) may be missing, as ImageNet networks have none. Tensors
    that the module does not use, such as a classification head, are ignored and logged.

    `StrictPretrainedInit` calls this for a module's `init_cfg`.

    Args:
        module: A backbone or a head.
        checkpoint: See `read_checkpoint`.
        prefix: Prefix of the module's names in the file, such as 'encoder'. By default the best
            of `PREFIXES`, for a published file or one of mmpretrain, mmdet or mmseg.
        adapt_kernel: Whether to pad smaller modulation kernels with zeros to the module's size,
            which does not change the output.
        new_layers: Layers of the module that keep their initial values, such as `['pred']` of a
            `Conv2FormerClsHead` for other classes.
        may_miss: Matches names that may be missing in the file; None if none may be.
        how_to_get: Advice that the error gives if there is no such file.

    Raises:
        CheckpointNotFound: There is no such file.
        CheckpointError: It cannot be read, or does not fit; the module is then unchanged.
    """
    try:
        state_dict = read_state_dict(checkpoint)
    except CheckpointNotFound as error:
        raise CheckpointNotFound(f'{error}. {how_to_get}') from None
    new = tuple(f'{layer}.' for layer in new_layers)
    expected = {n: value for n, value in module.state_dict().items() if not n.startswith(new)}
    if prefix is None:
        prefix = find_prefix(state_dict, expected)
    elif prefix and not prefix.endswith('.'):
        prefix += '.'
    names = {n[len(prefix) :]: value for n, value in state_dict.items() if n.startswith(prefix)}
    found = {name: value for name, value in names.items() if not name.startswith(new)}
    if not found:
        raise CheckpointError(
            f'checkpoint {checkpoint!r} has no names with prefix={prefix!r}; '
            f'its names begin with {first_parts(state_dict)}'
        )
    if adapt_kernel:
        found = pad_kernels(found, expected)
    needed = {name for name in expected if not (may_miss and may_miss.fullmatch(name))}
    tensors, summary = check_fit(module, found, needed, checkpoint)
    module.load_state_dict(tensors, strict=False)
    print_log(summary, logger='current', level=logging.INFO)


def find_prefix(state_dict: Collection[str], expected: Collection[str]) -> str:
    """The prefix in `PREFIXES` with which a state dict has most of the expected names."""
    return max(PREFIXES, key=lambda prefix: sum(prefix + name in state_dict for name in expected))


# ---------------------------------------------------------------------------------- a whole model
def load_model(model: nn.Module, content: Mapping[str, Any], checkpoint: str, strict: bool) -> None:
    """Loads a checkpoint into a whole model, and refuses it where mmengine would only warn.

    Arguments are those of `check_model`.

    Raises:
        CheckpointError: The file does not fit; the model is then unchanged.
    """
    model.load_state_dict(check_model(model, content, checkpoint, strict), strict=False)


def check_model(
    model: nn.Module, content: Mapping[str, Any], checkpoint: str, strict: bool
) -> OrderedDict[str, Tensor]:
    """Checks that a checkpoint fits a whole model.

    Args:
        model: A detector, segmentor or classifier; its backbone is `backbone`.
        content: See `load_from_checked_file`.
        checkpoint: Name of the file, for messages.
        strict: Whether the file must have every tensor of the model in its shape, as needed to
            evaluate and to resume. Otherwise, for fine-tuning, it must have the whole backbone
            or none of it; other tensors, such as a head for other classes, keep their initial
            values.

    Returns:
        The tensors to load: those of the file, except those of another shape.

    Raises:
        CheckpointError: The file does not fit; the message says what differs.
    """
    found = content['state_dict']
    needed = set(model.state_dict())
    if not strict:
        has_backbone = any(name.startswith(BACKBONE) for name in found)
        needed = {
            name
            for name in needed
            if has_backbone
            and name.startswith(BACKBONE)
            and not NEW_FOR_DENSE_PREDICTION.fullmatch(name[len(BACKBONE) :])
        }
    tensors, summary = check_fit(model, found, needed, checkpoint)
    print_log(summary, logger='current', level=logging.INFO)
    return tensors


# ------------------------------------------------------------------------------------------- both
def check_fit(
    module: nn.Module, found: Mapping[str, Tensor], needed: Collection[str], checkpoint: str
) -> tuple[OrderedDict[str, Tensor], str]:
    """Checks that a file has all needed tensors of a module, in their shapes.

    Returns:
        The tensors of the file, except those of another shape, and a line for the log. It says
        which tensors of the module keep their initial values and which of the file are unused.

    Raises:
        CheckpointError: A tensor is missing, not finite or not of numbers like the module's, the
            file is of a network of other depths or widths, or a module cannot read its part of the
            file.
    """
    expected = module.state_dict()
    check_kinds(found, checkpoint)
    try:
        tensors, missing, misshaped, unused, damage = try_loading(module, found)
    except CheckpointError as error:
        raise CheckpointError(f'checkpoint {checkpoint!r} does not fit: {error}') from error
    loaded = set(expected).difference(missing, misshaped)
    if all(name.endswith('.num_batches_tracked') for name in loaded):  # torch fills these in itself
        needed = expected
    # A deeper network has all the names of a shallower one.
    reasons = [*differences(found, expected)]
    if names := [name for name in missing if name in needed]:
        reasons += [f'{len(names)} of {len(needed)} names missing, such as {first(names, 3)}']
    if texts := [text for name, text in misshaped.items() if name in needed]:
        reasons += [f'{len(texts)} shapes differ, such as {"; ".join(texts[:3])}']
    if reasons:
        raise CheckpointError(
            f'checkpoint {checkpoint!r} does not fit this {type(module).__name__}: '
            f'{"; ".join(reasons)}; its names begin with {first_parts(found)}'
        )
    if damage:
        raise CheckpointError(f'checkpoint {checkpoint!r} is damaged: {damage}')
    summary = (
        f'{printable(checkpoint)} has {len(loaded)} of {len(expected)} tensors of '
        f'{type(module).__name__}; '
        f'initial values kept: {listed([*missing, *misshaped.values()])}; unused: {listed(unused)}'
    )
    return tensors, summary


def try_loading(
    module: nn.Module, found: Mapping[str, Tensor]
) -> tuple[OrderedDict[str, Tensor], list[str], dict[str, str], list[str], str]:
    """Loads into a copy, through the hooks with which modules read files of earlier versions.

    Returns:
        The tensors that fit; names that the file lacks; descriptions of tensors of another shape,
        by name; names that the module lacks; what is wrong with the values, '' if nothing is.

    Raises:
        CheckpointError: A module cannot read its part of the file.
    """
    # Shared, because they cannot be copied: what is computed from parameters, as by weight_norm.
    values = (value for part in module.modules() for value in vars(part).values())
    computed = {id(v): v for v in values if isinstance(v, Tensor) and not v.is_leaf}
    trial, tensors, misshaped = copy.deepcopy(module, computed), OrderedDict(found), {}
    if hasattr(found, '_metadata'):  # versions of the modules
        tensors._metadata = found._metadata  # type: ignore[attr-defined]
    while True:
        try:
            keys = trial.load_state_dict(tensors, strict=False)
            break
        except RuntimeError as error:  # only the message of torch says which shapes differ
            mismatches = SIZE_MISMATCH.findall(str(error))
            if not any(name in tensors for name, *_ in mismatches):
                raise CheckpointError(str(error).splitlines()[-1].strip()) from error
            for name, in_file, in_model in mismatches:
                misshaped[name] = f'{name} is ({in_file}) in the file, ({in_model}) in the model'
                tensors.pop(name, None)
        except (LookupError, AttributeError, TypeError, ValueError) as error:  # in a module's hook
            raise CheckpointError(f'{type(error).__name__}: {error}') from error
    missing = [name for name in keys.missing_keys if name not in misshaped]
    damage = damage_of(tensors, trial, module, {*missing, *misshaped})
    return tensors, missing, misshaped, keys.unexpected_keys, damage


def damage_of(
    tensors: Mapping[str, Tensor], trial: nn.Module, module: nn.Module, kept: Collection[str]
) -> str:
    """What is wrong with loaded values; '' if nothing is.

    Args:
        tensors: What was loaded.
        trial: The module with these values.
        module: The module without them. Its buffers may be infinite, such as a mask.
        kept: Names that keep their initial values, which may be undefined.
    """
    expected = module.state_dict()
    mistyped = [
        name
        for name, value in tensors.items()
        if name in expected and expected[name].is_floating_point() and not value.is_floating_point()
    ]
    if mistyped:
        kind = str(tensors[mistyped[0]].dtype).removeprefix('torch.')
        return f'{len(mistyped)} weights are {kind} instead of floats, such as {first(mistyped, 3)}'
    wrong = set(non_finite(trial.state_dict())).difference(kept)
    if wrong:
        wrong -= {*non_finite(expected)} - {name for name, _ in module.named_parameters()}
    names = [name for name in expected if name in wrong]
    return f'{len(names)} tensors are NaN or infinite, such as {first(names, 3)}' if names else ''


def non_finite(state_dict: Mapping[str, Any]) -> list[str]:
    """Names of tensors with non-finite elements; waits for the device once."""
    tensors = {
        name: value
        for name, value in state_dict.items()
        if isinstance(value, Tensor) and value.is_floating_point() and not value.is_meta
    }
    if not tensors:
        return []
    finite = torch.stack([torch.isfinite(value).all() for value in tensors.values()]).tolist()
    return [name for name, is_finite in zip(tensors, finite) if not is_finite]


def first_parts(names: Iterable[str]) -> list[str]:
    """The first parts of names, such as `backbone` and `neck`."""
    return first(sorted({name.split('.')[0] for name in names}), 8)


@WEIGHT_INITIALIZERS.register_module(name='Pretrained')
class StrictPretrainedInit:
    """`init_cfg=dict(type='mmconv2former.Pretrained', ...)`: `load_pretrained` as an initializer.

    Args:
        checkpoint: See `load_pretrained`.
        map_location: Ignored, as tensors are read on the CPU; mmengine's initializer has it.
        **options: Other arguments of `load_pretrained`.
    """

    def __init__(self, checkpoint: str, map_location: Any = None, **options: Any) -> None:
        self.checkpoint = checkpoint
        self.options = options

    def __call__(self, module: nn.Module) -> None:
        load_pretrained(module, self.checkpoint, **self.options)
