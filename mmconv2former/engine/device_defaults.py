"""Settings that depend on the machine, which `ReliableRunner` fills in.

A value that the config sets is kept.
"""

from __future__ import annotations

from inspect import isclass
from typing import Any

import torch
from mmengine.device import get_device
from mmengine.optim import OptimWrapperDict
from mmengine.registry import OPTIMIZERS

FUSED = ('SGD', 'Adam', 'AdamW')  # of Adagrad, some releases of torch are fused on CPUs only
FUSED_ON = ('cuda',)  # device types; torch has fused steps on CPUs too, where launches are cheap
# torch's implementations of an optimizer step. A config that names one keeps its choice.
IMPLEMENTATIONS = ('fused', 'foreach', 'differentiable', 'capturable')
WRAPPER = 'MMDistributedDataParallel'  # mmengine's default


def with_fused_step(optim_wrapper: dict, device: torch.device) -> dict:
    """Sets `optimizer.fused=True`, which is not the default of torch.

    A fused step takes a few kernels for each parameter group; other implementations take a few for
    each operation. It works with gradient clipping, accumulation and loss scaling.

    Args:
        optim_wrapper: Settings of a config.
        device: Device of the parameters.

    Returns:
        A changed copy. On devices other than CUDA, for optimizers without the argument, and if the
        config sets one of `IMPLEMENTATIONS`, `optim_wrapper` itself.
    """
    optimizer = optim_wrapper.get('optimizer')
    if device.type not in FUSED_ON or not isinstance(optimizer, dict):
        return optim_wrapper
    type_ = optimizer.get('type')
    cls = type_ if isclass(type_) else OPTIMIZERS.get(str(type_))
    is_torchs = cls is not None and cls.__module__.startswith('torch.optim.')
    has_chosen = any(key in optimizer for key in IMPLEMENTATIONS)
    if has_chosen or not is_torchs or cls.__name__ not in FUSED:
        return optim_wrapper
    return {**optim_wrapper, 'optimizer': {**optimizer, 'fused': True}}


def keep_own_step(saved: dict, optim_wrapper: Any) -> None:
    """Replaces `fused` and `foreach` in a checkpoint with those of this run.

    torch would load them from the checkpoint, which may come from another device.

    Args:
        saved: The checkpoint's `optimizer`, changed in place, with the same groups as the run (see
            `mmconv2former.checkpoint.resumption.check_optimizer`).
        optim_wrapper: The run's `OptimWrapper` or `OptimWrapperDict`.
    """
    if isinstance(optim_wrapper, OptimWrapperDict):
        for name, part in optim_wrapper.items():
            keep_own_step(saved[name], part)
        return
    for group, own in zip(saved['param_groups'], optim_wrapper.optimizer.param_groups):
        group.update({key: own[key] for key in ('fused', 'foreach') if key in own})


def distributed_wrapper(settings: dict | None, find_unused_parameters: bool) -> dict:
    """Sets `gradient_as_bucket_view=True`, which saves a copy of all gradients.

    `static_graph` is not set. It saves the search for unused parameters, which
    `find_unused_parameters=False` does too, and with gradient accumulation from the first iteration
    on it fails (an internal assertion in torch 2.12).

    Args:
        settings: `model_wrapper_cfg` of a config, or None.
        find_unused_parameters: The config's, used without `model_wrapper_cfg`.

    Returns:
        A copy of the settings; settings of other wrappers are unchanged.
    """
    if settings is None:  # mmengine's defaults
        settings = dict(broadcast_buffers=False, find_unused_parameters=find_unused_parameters)
    settings = {'type': WRAPPER, **settings}
    if settings['type'] == WRAPPER:
        settings.setdefault('gradient_as_bucket_view', True)
    return settings


def usable_loader(settings: dict) -> dict:
    """Drops settings of a data loader that this run cannot use.

    torch refuses `persistent_workers` and `prefetch_factor` with `num_workers=0`, and warns about
    `pin_memory` without a GPU.
    """
    dropped = [] if settings.get('num_workers', 0) else ['persistent_workers', 'prefetch_factor']
    if get_device() == 'cpu':
        dropped.append('pin_memory')
    return {key: value for key, value in settings.items() if key not in dropped}
