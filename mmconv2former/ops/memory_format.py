"""Two views of one memory: (N, H, W, C) for layers on the last axis, (N, C, H, W) for torch."""

from __future__ import annotations

from torch import Tensor


def to_channels_first(x: Tensor) -> Tensor:
    """(N, H, W, C) -> (N, C, H, W), a view; of a contiguous tensor it is `torch.channels_last`."""
    return x.permute(0, 3, 1, 2)


def to_channels_last(x: Tensor) -> Tensor:
    """(N, C, H, W) -> contiguous (N, H, W, C), a view if x is `torch.channels_last`."""
    return x.permute(0, 2, 3, 1).contiguous()
