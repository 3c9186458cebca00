"""The two views of one memory, and what the choice of an operator depends on."""

from __future__ import annotations

import torch
from torch import Tensor

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


def is_cpu_float32(x: Tensor) -> bool:
    """Whether operators on `x` run in float32 on a CPU, for which alternatives were measured."""
    return x.device.type == 'cpu' and x.dtype == torch.float32 and not is_cpu_autocast()


def is_cpu_autocast() -> bool:
    """Whether mixed precision is on for a CPU."""
    if hasattr(torch, 'get_autocast_dtype'):  # torch >= 2.4
        return torch.is_autocast_enabled('cpu')
    return torch.is_autocast_cpu_enabled()
