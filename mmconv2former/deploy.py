"""The form of the network for inference: what is affine is folded into the products beside it.

`Conv2Former.switch_to_deploy` exchanges blocks, downsamplings and stem for those of this file. The
results differ by rounding only; there is nothing to train or to load afterwards.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .fused import conv, conv_gelu, conv_plus, conv_times, is_fusible
from .fusion import FUSIONS


def fold_norm(norm: nn.LayerNorm, weight: Tensor, bias: Tensor) -> tuple[Tensor, Tensor]:
    """Weight (C_out, C_in, ...) and bias of a product whose input is not yet scaled and shifted."""
    scale = norm.weight.view(1, -1, *(1,) * (weight.dim() - 2))
    shift = norm.bias.view_as(scale) * weight
    return weight * scale, bias + shift.flatten(1).sum(1)


class DeployedBlock(nn.Module):
    """A `Block` for inference, (N, H, W, C) in and out.

    The LayerNorms' scale and shift are in the products behind them, the layer scales in those
    before the residuals; on a CPU, GELU, Hadamard product and residuals are in the operators
    before them (`mmconv2former.fused`).
    """

    def __init__(self, block: nn.Module) -> None:
        super().__init__()
        attn, mlp = block.attn, block.mlp
        self.eps = attn.norm.eps
        with torch.no_grad():
            self._keep('gate', *fold_norm(attn.norm, *matrix(attn.att[0])))
            self._keep('value', *fold_norm(attn.norm, *matrix(attn.v)))
            self._keep('proj', *scaled(attn.proj, block.layer_scale_1))
            self._keep('fc1', *fold_norm(mlp.norm, *matrix(mlp.fc1)))
            self._keep('fc2', *scaled(mlp.fc2, block.layer_scale_2))
        self.depthwise = attn.att[2]
        self.pos = mlp.pos
        self.fusion = attn.fusion

    def _keep(self, name: str, weight: Tensor, bias: Tensor) -> None:
        self.register_buffer(f'{name}_weight', weight.contiguous())
        self.register_buffer(f'{name}_bias', bias)

    def forward(self, x: Tensor) -> Tensor:
        y = F.layer_norm(x, (x.shape[-1],), eps=self.eps)
        mixed = self.depthwise(conv_gelu(y, self.gate_weight, self.gate_bias))
        if self.fusion == 'hadamard':
            y = conv_times(y, self.value_weight, self.value_bias, mixed)
        else:
            y = FUSIONS[self.fusion](mixed, conv(y, self.value_weight, self.value_bias))
        x = conv_plus(y, self.proj_weight, self.proj_bias, x)
        y = F.layer_norm(x, (x.shape[-1],), eps=self.eps)
        y = conv_gelu(y, self.fc1_weight, self.fc1_bias)
        y = add(conv_gelu(y, self.pos.weight, self.pos.bias), y)
        return conv_plus(y, self.fc2_weight, self.fc2_bias, x)


def add(x: Tensor, y: Tensor) -> Tensor:
    """Sum, in the place of `x` where that may be: new memory costs as much as the arithmetic."""
    return x.add_(y) if is_fusible(x) else x + y


def matrix(layer: nn.Module) -> tuple[Tensor, Tensor]:
    """Weight (C_out, C_in) and bias of a 1x1 convolution."""
    return layer.weight.flatten(1), layer.bias


def scaled(layer: nn.Module, scale: Tensor) -> tuple[Tensor, Tensor]:
    """Weight (C_out, C_in) and bias of a 1x1 convolution with the layer scale in them."""
    weight, bias = matrix(layer)
    return scale[:, None] * weight, scale * bias


def deployed_downsample(downsample: nn.Sequential) -> nn.Sequential:
    """A `Downsample` whose LayerNorm only normalises; shift and scale are in the convolution."""
    norm, conv = downsample
    with torch.no_grad():
        weight, bias = fold_norm(norm, conv.weight, conv.bias)
        conv.weight.copy_(weight)
        conv.bias.copy_(bias)
    downsample[0] = nn.LayerNorm(norm.normalized_shape, eps=norm.eps, elementwise_affine=False)
    return downsample


def deployed_stem(stem: nn.Sequential) -> nn.Sequential:
    """A `Stem` with its second BatchNorm in the convolution behind.

    The first one stays: the convolution behind it pads with zeros, which stand for shifted values
    at the border, so that its shift cannot be folded exactly.
    """
    *first, norm, conv = stem
    with torch.no_grad():
        scale = norm.weight / torch.sqrt(norm.running_var + norm.eps)
        shift = norm.bias - norm.running_mean * scale
        folded = nn.Conv2d(
            conv.in_channels, conv.out_channels, conv.kernel_size, conv.stride, device=scale.device,
            dtype=scale.dtype,
        )  # fmt: skip
        folded.weight.copy_(conv.weight * scale.view(1, -1, 1, 1))
        folded.bias.copy_((conv.weight * shift.view(1, -1, 1, 1)).sum((1, 2, 3)))
    return nn.Sequential(*first, folded)
