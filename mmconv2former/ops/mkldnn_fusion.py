"""Convolutions fused with the operation that follows, for inference on a CPU in float32.

oneDNN applies GELU, a product or a sum before it writes the result of a convolution; stock
operators write the result and read it again. oneDNN also takes weights that are laid out
beforehand. These are the operators that `torch.compile` uses on CPUs. On other devices, and if
gradients or a graph are needed, stock operators compute the same.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .depthwise import depthwise_conv2d
from .dispatch import is_captured, is_cpu_float32, is_intercepted, is_transformed
from .memory_format import to_channels_first, to_channels_last
from .pointwise import pointwise_conv

HAS_FUSED_OPERATORS = torch.backends.mkldnn.is_available() and all(
    hasattr(torch.ops.mkldnn, name)
    for name in ('_convolution_pointwise', '_reorder_convolution_weight')
)


def is_fusible(x: Tensor) -> bool:
    """Whether oneDNN's fused operators run on x; the one place that decides."""
    if torch.is_grad_enabled() or is_captured() or is_transformed() or is_intercepted(x):
        return False
    return is_cpu_float32(x) and HAS_FUSED_OPERATORS


class FusedConv(nn.Module):
    """1x1 or depthwise convolution for inference, (N, H, W, C_in) -> (N, H, W, C_out).

    Args:
        weight: (C_out, C_in), or a depthwise kernel (C_in, 1, K, K) with 'same' padding.
        bias: (C_out,).
    """

    weight: Tensor
    bias: Tensor

    def __init__(self, weight: Tensor, bias: Tensor) -> None:
        super().__init__()
        self.register_buffer('weight', weight.contiguous())
        self.register_buffer('bias', bias)
        self.is_depthwise = weight.dim() == 4
        self.packed_weight: Tensor | None = None

    def forward(self, x: Tensor) -> Tensor:
        conv = depthwise_conv2d if self.is_depthwise else pointwise_conv
        return conv(x, self.weight, self.bias)

    def pair(self) -> tuple[Tensor, Tensor]:
        """Weight and bias."""
        return self.weight, self.bias

    def gelu(self, x: Tensor) -> Tensor:
        """GELU of the convolution."""
        if not is_fusible(x):
            return F.gelu(self(x))
        operator = torch.ops.mkldnn._convolution_pointwise.default
        x = to_channels_first(x)
        return to_channels_last(operator(x, *self._pack(x), 'gelu', [], 'none'))

    def times(self, x: Tensor, other: Tensor) -> Tensor:
        """The convolution times a tensor (N, H, W, C_out)."""
        return self._binary(x, other, 'mul') if is_fusible(x) else self(x) * other

    def plus(self, x: Tensor, other: Tensor) -> Tensor:
        """The convolution plus a tensor (N, H, W, C_out)."""
        return self._binary(x, other, 'add') if is_fusible(x) else self(x) + other

    def _binary(self, x: Tensor, other: Tensor, operation: str) -> Tensor:
        operator = torch.ops.mkldnn._convolution_pointwise.binary
        x, other = to_channels_first(x), to_channels_first(other)
        return to_channels_last(operator(x, other, *self._pack(x), operation, 1.0, None, [], None))

    def _pack(self, x: Tensor) -> tuple:
        """Weight, bias, padding, stride, dilation and groups, as oneDNN takes them.

        The weight is laid out for the first size of x (N, C_in, H, W), but works for any.
        """
        groups = self.weight.shape[0] if self.is_depthwise else 1
        padding = [self.weight.shape[-1] // 2] * 2 if self.is_depthwise else [0, 0]
        geometry = (padding, [1, 1], [1, 1], groups)
        if self.packed_weight is None:
            weight = self.weight if self.is_depthwise else self.weight[..., None, None]
            self.packed_weight = torch.ops.mkldnn._reorder_convolution_weight(
                weight, *geometry, list(x.shape)
            )
        return self.packed_weight, self.bias, *geometry

    def _load_from_state_dict(self, *args: Any) -> None:
        self.packed_weight = None
        super()._load_from_state_dict(*args)

    def _apply(self, function: Callable, recurse: bool = True) -> nn.Module:
        self.packed_weight = None  # values, dtype or device are about to change
        return super()._apply(function, recurse)

    def __getstate__(self) -> dict:
        return self.__dict__ | {'packed_weight': None}  # neither copied nor saved
