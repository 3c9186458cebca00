"""How the modulation joins its two branches: the Hadamard product, and the paper's ablations.

Source: arXiv 2211.11943, section 4.1 ("fusion strategy"). A is the output of the large depthwise
convolution, V the linear projection, both (..., C). The paper names the alternatives without
formulas; axis and constants are our choice. Both normalisations run over the channels of one
position, so that the result does not depend on the image's size and padding.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

EPS = 1e-6  # our choice: keeps quotients and their gradients finite where A is zero or constant


def hadamard(a: Tensor, v: Tensor) -> Tensor:
    """A * V, as published."""
    return a * v


def elementwise_sum(a: Tensor, v: Tensor) -> Tensor:
    """A + V."""
    return a + v


def sigmoid(a: Tensor, v: Tensor) -> Tensor:
    """sigmoid(A) * V."""
    return torch.sigmoid(a) * v


def l1(a: Tensor, v: Tensor) -> Tensor:
    """A / (||A||_1 + eps) * V, with the L1 norm over the channels; zero A gives zero."""
    wide = at_least_float32(a)
    return (wide / (wide.abs().sum(-1, keepdim=True) + EPS)).to(a.dtype) * v


def linear(a: Tensor, v: Tensor) -> Tensor:
    """(A - min A + eps) / (max A - min A + eps) * V, with minimum and maximum over the channels.

    Maps A linearly to (0, 1]; constant A gives V.
    """
    wide = at_least_float32(a)
    low, high = wide.amin(-1, keepdim=True), wide.amax(-1, keepdim=True)
    return ((wide - low + EPS) / (high - low + EPS)).to(a.dtype) * v


def at_least_float32(x: Tensor) -> Tensor:
    """Widens half precision, in which `EPS` would vanish or its reciprocal overflow."""
    return x if x.dtype == torch.float64 else x.float()


FUSIONS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    'hadamard': hadamard,
    'sum': elementwise_sum,
    'sigmoid': sigmoid,
    'l1': l1,
    'linear': linear,
}
