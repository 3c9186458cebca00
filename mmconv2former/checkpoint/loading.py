"""Loads checkpoints strictly: a file that does not fit is refused with the reasons."""

from __future__ import annotations

import copy
import logging
import re
from collections import Counter, OrderedDict
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from mmengine.logging import print_log
from mmengine.optim import OptimWrapperDict
from torch import Tensor, nn

from ..registry import WEIGHT_INITIALIZERS
from .architecture import differences, pad_kernels
from .reading import (
    CheckpointError,
    named_tensors,
    read_state_dict,
    without_module,
)

# Where a whole model keeps our modules; '' is an official file or a backbone alone.
PREFIXES = ('', 'backbone.', 'head.')
BACKBONE = 'backbone.'
# Made for dense prediction, hence in no ImageNet checkpoint.
NEW_FOR_DENSE_PREDICTION = re.compile(r'norm\d+\.(weight|bias)')
SIZE_MISMATCH = re.compile(
    r'size mismatch for (\S+): copying a param with shape torch\.Size\(\[(.*?)\]\) from '
    r'checkpoint, the shape in current model is torch\.Size\(\[(.*?)\]\)'
)
OPTIMIZER_KINDS = ('betas', 'momentum', 'eps', 'alpha', 'rho')  # settings that tell them apart


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

    `StrictPretrainedInit` calls this for a module's `init_cfg`.

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


def load_model(model: nn.Module, content: Mapping[str, Any], checkpoint: str, strict: bool) -> None:
    """Loads a checkpoint into a whole model, or refuses it, where mmengine only warns.

    Args:
        model: A detector, segmentor or classifier; its backbone is `backbone`.
        content: What the file holds, see `load_from_checked_file`.
        checkpoint: Its name, for messages.
        strict: Whether every tensor of the model must be in the file in its shape, as to evaluate
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
    if strict or all(name.endswith('.num_batches_tracked') for name in loaded):
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


@WEIGHT_INITIALIZERS.register_module(name='Pretrained')
class StrictPretrainedInit:
    """`init_cfg=dict(type='mmconv2former.Pretrained', ...)`: `load_pretrained` as an initializer.

    Args:
        checkpoint: See `load_pretrained`.
        map_location: Has no effect, as tensors are read on the CPU; mmengine's initializer has it.
        **options: Other arguments of `load_pretrained`.
    """

    def __init__(self, checkpoint: str, map_location: Any = None, **options: Any) -> None:
        self.checkpoint = checkpoint
        self.options = options

    def __call__(self, module: nn.Module) -> None:
        load_pretrained(module, self.checkpoint, **self.options)
