"""The form of the network for inference: what is affine is folded into the products beside it.

`Conv2Former.switch_to_deploy` exchanges blocks, downsamplings and stem for those of this file. The
results differ by rounding only; there is nothing to train or to load afterwards.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .fusion import FUSIONS
from .product import product


def fold_norm(norm: nn.LayerNorm, weight: Tensor, bias: Tensor) -> tuple[Tensor, Tensor]:
    """Weight (C_out, C_in, ...) and bias of a product whose input is not yet scaled and shifted."""
    scale = norm.weight.view(1, -1, *(1,) * (weight.dim() - 2))
    shift = norm.bias.view_as(scale) * weight
    return weight * scale, bias + shift.flatten(1).sum(1)


class DeployedBlock(nn.Module):
    """A `Block` for inference, (N, H, W, C) in and out.

    The LayerNorms' scale and shift are in the products behind them, the layer scales in those
    before the residuals; the two products of the modulation's input are one of twice the width.
    """

    def __init__(self, block: nn.Module) -> None:
        super().__init__()
        attn, mlp = block.attn, block.mlp
        self.eps = attn.norm.eps
        with torch.no_grad():
            weight = torch.cat([attn.att[0].weight, attn.v.weight]).flatten(1)
            bias = torch.cat([attn.att[0].bias, attn.v.bias])
            self._keep('gate_and_value', *fold_norm(attn.norm, weight, bias))
            self._keep('proj', *scaled(attn.proj, block.layer_scale_1))
            self._keep('fc1', *fold_norm(mlp.norm, mlp.fc1.weight.flatten(1), mlp.fc1.bias))
            self._keep('fc2', *scaled(mlp.fc2, block.layer_scale_2))
        self.depthwise = attn.att[2]
        self.fusion = attn.fusion
        self.pos = mlp.pos

    def _keep(self, name: str, weight: Tensor, bias: Tensor) -> None:
        self.register_buffer(f'{name}_weight', weight.contiguous())
        self.register_buffer(f'{name}_bias', bias)

    def forward(self, x: Tensor) -> Tensor:
        y = F.layer_norm(x, (x.shape[-1],), eps=self.eps)
        gate, value = product(y, self.gate_and_value_weight, self.gate_and_value_bias).chunk(2, -1)
        # GELU makes of the half a tensor of its own.
        y = FUSIONS[self.fusion](self.depthwise(F.gelu(gate)), value)
        x = x + product(y, self.proj_weight, self.proj_bias)
        y = F.layer_norm(x, (x.shape[-1],), eps=self.eps)
        y = F.gelu(product(y, self.fc1_weight, self.fc1_bias))
        y = y + F.gelu(self.pos(y))
        return x + product(y, self.fc2_weight, self.fc2_bias)


def scaled(layer: nn.Module, scale: Tensor) -> tuple[Tensor, Tensor]:
    """Weight (C_out, C_in) and bias of a product with the layer scale in them."""
    return scale[:, None] * layer.weight.flatten(1), scale * layer.bias


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
