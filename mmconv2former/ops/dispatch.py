"""What the choice of an operator depends on: captured graphs, transforms, modes, autocast."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad

if hasattr(torch.compiler, 'is_compiling'):  # torch >= 2.3
    from torch.compiler import is_compiling
else:
    from torch._utils import is_compiling

AUTOCAST_BY_DEVICE = hasattr(torch, 'get_autocast_dtype')  # torch >= 2.4


def is_captured() -> bool:
    """Whether torch is capturing a graph, which should contain stock operators only."""
    return torch.jit.is_tracing() or is_compiling()


def is_transformed() -> bool:
    """Whether a transform of `torch.func` or forward-mode differentiation is active.

    These need differentiable operators, also without gradients.
    """
    return torch._C._are_functorch_transforms_active() or forward_ad._current_level >= 0


def is_intercepted(x: Tensor) -> bool:
    """Whether operators on x do not go straight to its device.

    True for fake tensors and other subclasses, and under a dispatch mode such as
    `FlopCounterMode`. These only know registered operators.
    """
    is_plain = type(x) in (Tensor, nn.Parameter)
    return not is_plain or torch._C._len_torch_dispatch_stack() > 0


def is_cpu_float32(x: Tensor) -> bool:
    """Whether operators on x run in float32 on a CPU, where alternatives were measured."""
    is_plain = x.device.type == 'cpu' and x.dtype == torch.float32
    return is_plain and not is_autocast_enabled('cpu')


def is_autocast_enabled(device: str) -> bool:
    """Whether mixed precision is on for a type of device."""
    if device == 'meta':  # has no autocast
        return False
    if AUTOCAST_BY_DEVICE:
        return torch.is_autocast_enabled(device)
    return torch.is_autocast_cpu_enabled() if device == 'cpu' else torch.is_autocast_enabled()


def autocast_dtype(x: Tensor) -> torch.dtype:
    """The dtype in which convolutions of x compute: autocast's if it is on and x is not float64."""
    device = x.device.type
    if x.dtype == torch.float64 or not is_autocast_enabled(device):
        return x.dtype
    if AUTOCAST_BY_DEVICE:
        return torch.get_autocast_dtype(device)
    return torch.get_autocast_cpu_dtype() if device == 'cpu' else torch.get_autocast_gpu_dtype()


@contextmanager
def without_autocast(x: Tensor) -> Iterator[None]:
    """Switches autocast off for the device of x.

    `torch.autocast(..., enabled=False)` does the same but takes ten times as long.
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
    """torch's function of this name, whose arguments depend on the release."""
    if AUTOCAST_BY_DEVICE:
        torch.set_autocast_enabled(device, enabled)
    elif device == 'cpu':
        torch.set_autocast_cpu_enabled(enabled)
    else:
        torch.set_autocast_enabled(enabled)
