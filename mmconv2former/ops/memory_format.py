"""The two views of one memory, and what the choice of an operator depends on."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

if hasattr(torch.compiler, 'is_compiling'):  # torch >= 2.3
    from torch.compiler import is_compiling
else:
    from torch._utils import is_compiling


def to_channels_first(x: Tensor) -> Tensor:
    """(N, H, W, C) -> (N, C, H, W), a view; of a contiguous tensor it is `torch.channels_last`."""
    return x.permute(0, 3, 1, 2)


def to_channels_last(x: Tensor) -> Tensor:
    """(N, C, H, W) -> contiguous (N, H, W, C), a view if `x` is `torch.channels_last`."""
    return x.permute(0, 2, 3, 1).contiguous()


def is_captured() -> bool:
    """Whether a graph is being made of what runs: there only stock operators belong."""
    return torch.jit.is_tracing() or is_compiling()


def is_transformed() -> bool:
    """Whether a transform of `torch.func` is active, which knows differentiable operators only."""
    return torch._C._are_functorch_transforms_active()


def is_cpu_float32(x: Tensor) -> bool:
    """Whether operators on `x` run in float32 on a CPU, for which alternatives were measured."""
    is_plain = x.device.type == 'cpu' and x.dtype == torch.float32
    return is_plain and not is_autocast_enabled('cpu')


def is_autocast_enabled(device: str) -> bool:
    """Whether mixed precision is on for a type of device."""
    if device == 'meta':  # has no autocast
        return False
    if hasattr(torch, 'get_autocast_dtype'):  # torch >= 2.4
        return torch.is_autocast_enabled(device)
    return torch.is_autocast_cpu_enabled() if device == 'cpu' else torch.is_autocast_enabled()


def is_intercepted(x: Tensor) -> bool:
    """Whether operators on `x` do not go straight to its device.

    So it is for fake tensors and other subclasses, and under a dispatch mode such as
    `FlopCounterMode`. These know registered operators only.
    """
    is_plain = type(x) in (Tensor, nn.Parameter)
    return not is_plain or torch._C._len_torch_dispatch_stack() > 0


def autocast_dtype(x: Tensor) -> torch.dtype:
    """The dtype of products with `x`: autocast's where that is enabled, which spares float64."""
    device = x.device.type
    if x.dtype == torch.float64 or not is_autocast_enabled(device):
        return x.dtype
    if hasattr(torch, 'get_autocast_dtype'):  # torch >= 2.4
        return torch.get_autocast_dtype(device)
    return torch.get_autocast_cpu_dtype() if device == 'cpu' else torch.get_autocast_gpu_dtype()


@contextmanager
def without_autocast(x: Tensor) -> Iterator[None]:
    """While it lasts, all casts on the device of x are explicit.

    `torch.autocast(..., enabled=False)` does the same and costs the host ten times as much.
    """
    device = x.device.type
    if not is_autocast_enabled(device):
        yield
        return
    set_autocast_enabled(device, False)
    try:
        yield
    finally:
        set_autocast_enabled(device, True)


def set_autocast_enabled(device: str, enabled: bool) -> None:
    if hasattr(torch, 'get_autocast_dtype'):  # torch >= 2.4
        torch.set_autocast_enabled(device, enabled)
    elif device == 'cpu':
        torch.set_autocast_cpu_enabled(enabled)
    else:
        torch.set_autocast_enabled(enabled)
