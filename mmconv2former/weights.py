"""Reading checkpoints into a backbone: safely, and never in part without saying so.

Published Conv2Former checkpoints are timm training dictionaries (a `state_dict` beside optimizer
and `argparse.Namespace`); others come from mmpretrain, mmdet or mmseg (`backbone.` in front of
each key) or are plain state dicts. All are read with `torch.load(weights_only=True)`, so that
nothing in a file is executed.
"""

from __future__ import annotations

import argparse
import logging
import os
import re
from collections import Counter
from collections.abc import Mapping
from contextlib import nullcontext
from pickle import UnpicklingError

import numpy as np
import torch
from mmengine.fileio import get_local_path
from mmengine.logging import HistoryBuffer, print_log
from torch import Tensor, nn

# What checkpoints of timm and mmengine hold beside tensors and plain containers. None of these does
# anything but hold values when it is rebuilt; `getattr` finds the methods that mmengine's
# HistoryBuffer keeps, and torch calls nothing that is not in this list itself.
SAFE_GLOBALS = [
    argparse.Namespace,
    HistoryBuffer,
    getattr,
    np.ndarray,
    np.dtype,
    type(np.dtype(np.float64)),
    type(np.dtype(np.int64)),
    type(np.dtype(np.uint32)),
    np.core.multiarray._reconstruct if np.__version__ < '2' else np._core.multiarray._reconstruct,
    np.core.multiarray.scalar if np.__version__ < '2' else np._core.multiarray.scalar,
]

# Made for dense prediction, hence in no ImageNet checkpoint.
NEW_FOR_DENSE_PREDICTION = re.compile(r'norm\d+\.(weight|bias)')

HOW_TO_GET_WEIGHTS = (
    'The published weights are ImageNet checkpoints linked from the README of '
    'github.com/HVision-NKU/Conv2Former; download one and put it there, or give its path as '
    'model.backbone.init_cfg.checkpoint. To train from random weights instead, set '
    'model.backbone.init_cfg=None (on the command line: --cfg-options '
    'model.backbone.init_cfg=None).'
)


def read_state_dict(checkpoint: str) -> dict[str, Tensor]:
    """The state dict in a checkpoint file, whatever is around it.

    Args:
        checkpoint: Path or address, of any kind that `mmengine.fileio` reads. The file holds a
            state dict, or a dict with one under `state_dict` or `model`.

    Returns:
        Names and tensors (on the CPU), without the `module.` that data-parallel training puts in
        front of all of them.

    Raises:
        FileNotFoundError: There is no such file.
        ValueError: The file is not a checkpoint, or holds more than data.
    """
    if '://' not in checkpoint and not os.path.isfile(checkpoint):
        raise FileNotFoundError(f'checkpoint {checkpoint!r} does not exist. {HOW_TO_GET_WEIGHTS}')
    # torch < 2.5 cannot be told what to admit; it refuses what is not plain.
    safe_globals = getattr(torch.serialization, 'safe_globals', lambda _: nullcontext())
    try:
        with safe_globals(SAFE_GLOBALS), get_local_path(checkpoint) as path:
            content = torch.load(path, 'cpu', weights_only=True)
    except (UnpicklingError, RuntimeError, OSError, EOFError, ValueError, KeyError) as error:
        raise ValueError(
            f'checkpoint {checkpoint!r} is not a file of tensors that can be read safely: {error}'
        ) from error
    for key in ('state_dict', 'model'):
        if isinstance(content, Mapping) and isinstance(content.get(key), Mapping):
            content = content[key]
            break
    if not isinstance(content, Mapping):
        raise ValueError(
            f'checkpoint {checkpoint!r} must hold a state dict, got {type(content).__name__}'
        )
    tensors = {name: value for name, value in content.items() if isinstance(value, Tensor)}
    if not tensors:
        raise ValueError(f'checkpoint {checkpoint!r} holds no tensors, only {list(content)[:5]}')
    if all(name.startswith('module.') for name in tensors):
        tensors = {name[len('module.') :]: value for name, value in tensors.items()}
    return tensors


def load_pretrained(
    backbone: nn.Module,
    checkpoint: str,
    prefix: str | None = None,
    may_miss: re.Pattern | None = NEW_FOR_DENSE_PREDICTION,
) -> None:
    """Loads a checkpoint into a backbone; every parameter must be in it, in its shape.

    Output norms (`norm{i}`) may be missing, as ImageNet networks have none. What the backbone has
    no use for, such as a classification head, is left out and logged.

    Args:
        backbone: The module to fill.
        checkpoint: See `read_state_dict`.
        prefix: What the backbone's names begin with in the file; None finds `backbone.` itself.
        may_miss: Matches the names that need not be in the file; None: all must be.

    Raises:
        FileNotFoundError: There is no such file.
        ValueError: The file is not a checkpoint, or one of another network; the message lists
            what is missing and which shapes differ. The backbone is then unchanged.
    """
    state_dict = read_state_dict(checkpoint)
    if prefix is None:
        prefix = 'backbone.' if any(name.startswith('backbone.') for name in state_dict) else ''
    elif prefix and not prefix.endswith('.'):
        prefix += '.'
    found = {
        name[len(prefix) :]: value for name, value in state_dict.items() if name.startswith(prefix)
    }
    if not found:
        raise ValueError(
            f'checkpoint {checkpoint!r} has no name that begins with prefix={prefix!r}; '
            f'its names begin with {sorted({name.split(".")[0] for name in state_dict})}'
        )

    expected = backbone.state_dict()
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
    if missing or misshaped:
        raise ValueError(
            f'checkpoint {checkpoint!r} does not fit this {type(backbone).__name__} (another arch '
            f'or kernel_size?): {len(missing)} of {len(expected)} names missing'
            + (f', such as {missing[:3]}' if missing else '')
            + f'; {len(misshaped)} shapes differ'
            + (f', such as {"; ".join(misshaped[:3])}' if misshaped else '')
        )

    backbone.load_state_dict({name: found[name] for name in expected if name in found}, False)
    unused = Counter(name.split('.')[0] for name in found if name not in expected)
    left_out = ', '.join(f'{count} of {part}' for part, count in unused.items()) or 'none'
    print_log(
        f'Loaded {checkpoint}: all {len(expected)} tensors of {type(backbone).__name__} but '
        f'{[name for name in expected if name not in found]}; tensors left out: {left_out}',
        logger='current',
        level=logging.INFO,
    )
