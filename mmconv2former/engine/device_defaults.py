"""Settings that depend on the machine, which a config cannot know: `ReliableRunner` fills them in.

What a config says itself stays as it is.
"""

from __future__ import annotations

import copy
from inspect import isclass, signature
from typing import Any

import torch
from mmengine.device import get_device
from mmengine.optim import OptimWrapperDict
from mmengine.registry import OPTIMIZERS

# Where a step is fused; torch can on a CPU too, where launches are cheap.
FUSED_ON = ('cuda',)
# How torch's optimizers compute a step; none changes what they compute. A config that names one
# has chosen.
IMPLEMENTATIONS = ('fused', 'foreach', 'differentiable', 'capturable')
# What torch's DataLoader refuses where there are no worker processes.
OF_WORKERS = ('persistent_workers', 'prefetch_factor')
PLAIN_WRAPPER = 'MMDistributedDataParallel'  # what mmengine takes where no type is named


def with_fused_step(optim_wrapper: dict, device: torch.device) -> dict:
    """Settings of an optim wrapper with `optimizer.fused=True` where torch has that.

    A fused step is a few kernels for each parameter group, where the others launch some for each
    operation. It works with gradient clipping, accumulation and loss scaling.

    Args:
        optim_wrapper: Settings of a config, unchanged.
        device: Of the parameters.

    Returns:
        A changed copy, or `optim_wrapper` itself where nothing is to change: on other devices than
        CUDA, for optimizers without the argument, and if one of `IMPLEMENTATIONS` is set.
    """
    optimizer = optim_wrapper.get('optimizer')
    if device.type not in FUSED_ON or not isinstance(optimizer, dict):
        return optim_wrapper
    type_ = optimizer.get('type')
    cls = type_ if isclass(type_) else OPTIMIZERS.get(str(type_))
    is_torchs = cls is not None and cls.__module__.startswith('torch.optim.')
    has_chosen = any(key in optimizer for key in IMPLEMENTATIONS)
    if has_chosen or not is_torchs or 'fused' not in signature(cls).parameters:
        return optim_wrapper
    optim_wrapper = copy.deepcopy(optim_wrapper)
    optim_wrapper['optimizer']['fused'] = True
    return optim_wrapper


def keep_own_step(saved: dict, optim_wrapper: Any) -> None:
    """Makes the state of an optimizer go on with the implementation of this run.

    A checkpoint holds `fused` and `foreach` of the run that wrote it, perhaps on another device,
    and torch loads them.

    Args:
        saved: What a checkpoint holds under `optimizer`, changed in place; it has the groups of
            the run (see `mmconv2former.checkpoint.loading.check_optimizer`).
        optim_wrapper: The run's, an `OptimWrapper` or an `OptimWrapperDict` of mmengine.
    """
    if isinstance(optim_wrapper, OptimWrapperDict):
        for name, part in optim_wrapper.items():
            keep_own_step(saved[name], part)
        return
    for group, own in zip(saved['param_groups'], optim_wrapper.optimizer.param_groups):
        group.update({key: own[key] for key in ('fused', 'foreach') if key in own})


def distributed_wrapper(settings: dict | None, find_unused_parameters: bool) -> dict:
    """Settings of the wrapper for several processes: gradients live in the buckets they travel in.

    That saves a copy of all gradients and the memory of one. `static_graph` is not set: with
    `find_unused_parameters=False`, which the recipes have as they use every parameter, there is no
    search for unused ones that it could save, and with gradients accumulated from the first
    iteration on it fails (an internal assertion in torch 2.12).

    Args:
        settings: `model_wrapper_cfg` of a config, unchanged.
        find_unused_parameters: Of the config, where there is no `model_wrapper_cfg`.

    Returns:
        A copy with defaults; settings of other wrappers as they are.
    """
    if settings is None:
        # As mmengine does where nothing is said.
        settings = dict(broadcast_buffers=False, find_unused_parameters=find_unused_parameters)
    settings = copy.copy(settings)
    if settings.setdefault('type', PLAIN_WRAPPER) == PLAIN_WRAPPER:
        settings.setdefault('gradient_as_bucket_view', True)
    return settings


def usable_loader(settings: dict) -> dict:
    """Settings of a data loader without what cannot be had here.

    `persistent_workers` and `prefetch_factor` go where `num_workers` is 0, so that
    `train_dataloader.num_workers=0` is enough to load in the process itself; `pin_memory` goes on a
    CPU, where torch would warn.
    """
    settings = dict(settings)
    if settings.get('num_workers', 0) == 0:
        for key in OF_WORKERS:
            settings.pop(key, None)
    if get_device() == 'cpu':
        settings.pop('pin_memory', None)
    return settings
