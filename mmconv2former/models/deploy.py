"""The form of the network for inference: what is affine is folded into the products beside it.

`Conv2Former.switch_to_deploy` exchanges blocks, downsamplings and stem for those of this file. The
results differ by rounding only; there is nothing to train or to load afterwards.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..ops import block_stock
from ..ops.block import run, run_block, steps_for
from ..ops.depthwise import DepthwiseConv, prepare_weight
from ..ops.dispatch import autocast_dtype, is_captured, is_transformed, without_autocast
from ..ops.folding import FoldedWeights
from ..ops.mkldnn_fusion import FusedConv, is_fusible
from .blocks import Block, Downsample, PointwiseConv, Stem, matrix
from .fusion import FUSIONS


def fold_norm(norm: nn.LayerNorm, weight: Tensor, bias: Tensor) -> tuple[Tensor, Tensor]:
    """Weight (C_out, C_in, ...) and bias of a product whose input is not yet scaled and shifted."""
    scale = norm.weight.view(1, -1, *(1,) * (weight.dim() - 2))
    shift = norm.bias.view_as(scale) * weight
    return weight * scale, bias + shift.flatten(1).sum(1)


class DeployedBlock(nn.Module):
    """A `Block` for inference, (N, H, W, C) in and out.

    The LayerNorms' scale and shift are in the products behind them, the layer scales in those
    before the residuals. On a CPU in float32, GELU, Hadamard product and residuals are in the
    operators before them (`mmconv2former.ops.mkldnn_fusion`); elsewhere `mmconv2former.ops.block`
    computes it.
    """

    def __init__(self, block: Block) -> None:
        super().__init__()
        attn, mlp = block.attn, block.mlp
        self.normalized_shape, self.eps = attn.norm.normalized_shape, attn.norm.eps
        with torch.no_grad():
            self.gate = FusedConv(*fold_norm(attn.norm, *matrix(attn.att[0])))
            self.value = FusedConv(*fold_norm(attn.norm, *matrix(attn.v)))
            self.proj = FusedConv(*scaled(attn.proj, block.layer_scale_1))
            self.fc1 = FusedConv(*fold_norm(mlp.norm, *matrix(mlp.fc1)))
            self.fc2 = FusedConv(*scaled(mlp.fc2, block.layer_scale_2))
            self.pos = FusedConv(mlp.pos.weight.detach(), mlp.pos.bias.detach())
        self.depthwise = attn.att[2]
        self.fusion = attn.fusion
        self.is_plain = self.fusion == 'hadamard' and type(self.depthwise) is DepthwiseConv
        self.folded: FoldedWeights | None = None  # the weights in the dtype of products
        self.is_laid_out = False  # those of convolutions as Triton's kernels take them

    def forward(self, x: Tensor) -> Tensor:
        is_differentiated = torch.is_grad_enabled() and x.requires_grad
        is_stock = is_differentiated or is_captured() or is_transformed()
        if self.is_plain and not is_fusible(x) and not is_stock:
            return self._by_function(x)
        y = F.layer_norm(x, self.normalized_shape, eps=self.eps)
        mixed = self.depthwise(self.gate.gelu(y))
        if self.fusion == 'hadamard':
            y = self.value.times(y, mixed)
        else:
            y = FUSIONS[self.fusion](mixed, self.value(y))
        x = self.proj.plus(y, x)
        y = F.layer_norm(x, self.normalized_shape, eps=self.eps)
        y = self.fc1.gelu(y)
        y = add(self.pos.gelu(y), y)
        return self.fc2.plus(y, x)

    def _by_function(self, x: Tensor) -> Tensor:
        weight = self.gate.weight
        if x.dtype != weight.dtype:  # the residuals have that of the weights, as of a `Block`
            x = x.to(weight.dtype)
        dtype = autocast_dtype(x)
        steps = steps_for(x, (self.depthwise.weight, self.pos.weight))
        by_triton = steps is not block_stock
        is_ready = self.folded is not None and self.folded.gate_value_weight.dtype == dtype
        if not is_ready or (by_triton and not self.is_laid_out):
            with torch.inference_mode(False), torch.no_grad():  # for any mode that comes later
                self.folded = self._cast(dtype, 'triton' if by_triton else 'stock')
            self.is_laid_out = by_triton
        with without_autocast(x):
            return run(run_block, steps, x, None, self.folded, self.eps, None)[0]

    def _cast(self, dtype: torch.dtype, implementation: str) -> FoldedWeights:
        """The weights in a dtype; they do not change, so this is done once."""
        pair = [torch.cat(parts) for parts in zip(self.gate.pair(), self.value.pair())]
        pair, proj, fc1, fc2 = (
            [tensor.to(dtype) for tensor in tensors]
            for tensors in (pair, self.proj.pair(), self.fc1.pair(), self.fc2.pair())
        )
        depthwise, pos = (
            (prepare_weight(layer.weight.detach(), dtype, implementation), layer.bias.detach())
            for layer in (self.depthwise, self.pos)
        )
        return FoldedWeights._make((*pair, *depthwise, *proj, *fc1, *pos, *fc2, None, None))

    def _apply(self, function: Callable, recurse: bool = True) -> nn.Module:
        self.folded = None  # of other values, another dtype or device from here on
        return super()._apply(function, recurse)

    def __getstate__(self) -> dict:
        return self.__dict__ | {'folded': None}  # neither copied nor saved


def add(x: Tensor, y: Tensor) -> Tensor:
    """Sum, in the place of `x` where that may be: new memory costs as much as the arithmetic."""
    return x.add_(y) if is_fusible(x) else x + y


def scaled(layer: PointwiseConv, scale: Tensor) -> tuple[Tensor, Tensor]:
    """Weight (C_out, C_in) and bias of a 1x1 convolution with the layer scale in them."""
    weight, bias = matrix(layer)
    return scale[:, None] * weight, scale * bias


def deployed_downsample(downsample: Downsample) -> nn.Sequential:
    """A `Downsample` whose LayerNorm only normalises; shift and scale are in the convolution."""
    layers: list[Any] = list(downsample)
    norm, conv = layers
    with torch.no_grad():
        weight, bias = fold_norm(norm, conv.weight, conv.bias)
        conv.weight.copy_(weight)
        conv.bias.copy_(bias)
    norm.register_parameter('weight', None)
    norm.register_parameter('bias', None)
    return downsample


def deployed_stem(stem: Stem) -> nn.Sequential:
    """A `Stem` with its second BatchNorm in the convolution behind.

    The first one stays: the convolution behind it pads with zeros, which stand for shifted values
    at the border, so that its shift cannot be folded exactly.
    """
    layers: list[Any] = list(stem)
    *first, norm, conv = layers
    with torch.no_grad():
        scale = norm.weight / torch.sqrt(norm.running_var + norm.eps)
        shift = norm.bias - norm.running_mean * scale
        folded = nn.Conv2d(conv.in_channels, conv.out_channels, conv.kernel_size, conv.stride)
        folded.weight = nn.Parameter(conv.weight * scale.view(1, -1, 1, 1))
        folded.bias = nn.Parameter((conv.weight * shift.view(1, -1, 1, 1)).sum((1, 2, 3)))
    return nn.Sequential(*first, folded)
