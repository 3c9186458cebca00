"""A second Conv2Former, written from the published equations, to check the package against.

Deliberately plain: functions of a state dict with the published names, tensors (N, C, H, W)
throughout, LayerNorm, GELU and BatchNorm in elementary operations, and all convolutions by
`conv2d`. `PublishedConv2Former` is the same network with the operators of the published code.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mmconv2former import Conv2Former

StateDict = Mapping[str, Tensor]


def layer_norm(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    mean = x.mean(1, keepdim=True)
    variance = ((x - mean) ** 2).mean(1, keepdim=True)
    x = (x - mean) / torch.sqrt(variance + 1e-6)
    return weight[:, None, None] * x + bias[:, None, None]


def gelu(x: Tensor) -> Tensor:
    return x * 0.5 * (1 + torch.erf(x / math.sqrt(2)))


def batch_norm(x: Tensor, p: StateDict, name: str, training: bool) -> Tensor:
    if training:
        mean = x.mean((0, 2, 3))
        variance = ((x - mean[:, None, None]) ** 2).mean((0, 2, 3))
    else:
        mean, variance = p[f'{name}.running_mean'], p[f'{name}.running_var']
    x = (x - mean[:, None, None]) / torch.sqrt(variance + 1e-5)[:, None, None]
    return p[f'{name}.weight'][:, None, None] * x + p[f'{name}.bias'][:, None, None]


def stock_batch_norm(x: Tensor, p: StateDict, name: str, training: bool) -> Tensor:
    mean, var = p[f'{name}.running_mean'], p[f'{name}.running_var']
    return F.batch_norm(x, mean, var, p[f'{name}.weight'], p[f'{name}.bias'], training)


class Operators(NamedTuple):
    """The operators that can be computed in more than one way."""

    gelu: Callable[[Tensor], Tensor]
    batch_norm: Callable[[Tensor, StateDict, str, bool], Tensor]


ELEMENTARY = Operators(gelu, batch_norm)
PUBLISHED = Operators(F.gelu, stock_batch_norm)  # the published LayerNorm is as above


def conv(x: Tensor, p: StateDict, name: str, **kwargs: Any) -> Tensor:
    return F.conv2d(x, p[f'{name}.weight'], p.get(f'{name}.bias'), **kwargs)


def depthwise(x: Tensor, p: StateDict, name: str) -> Tensor:
    channels, _, kernel_size, _ = p[f'{name}.weight'].shape
    return conv(x, p, name, padding=kernel_size // 2, groups=channels)


def norm(x: Tensor, p: StateDict, name: str) -> Tensor:
    return layer_norm(x, p[f'{name}.weight'], p[f'{name}.bias'])


def stem(x: Tensor, p: StateDict, training: bool, ops: Operators = ELEMENTARY) -> Tensor:
    name = 'downsample_layers.0'
    x = ops.gelu(conv(x, p, f'{name}.0', stride=2, padding=1))
    x = ops.batch_norm(x, p, f'{name}.2', training)
    x = ops.gelu(conv(x, p, f'{name}.3', padding=1))
    x = ops.batch_norm(x, p, f'{name}.5', training)
    return conv(x, p, f'{name}.6', stride=2)


def fuse(a: Tensor, v: Tensor, fusion: str) -> Tensor:
    """The paper's alternatives as formulas, with extremes and sums over the channels."""
    if fusion == 'hadamard':
        return a * v
    if fusion == 'sum':
        return a + v
    if fusion == 'sigmoid':
        return v / (1 + torch.exp(-a))
    if fusion == 'l1':
        return a * v / (torch.sqrt(a**2).sum(1, keepdim=True) + 1e-6)
    low, high = a.min(1, keepdim=True).values, a.max(1, keepdim=True).values
    return v * (a - low + 1e-6) / (high - low + 1e-6)


def modulation(x: Tensor, p: StateDict, name: str, fusion: str, ops: Operators) -> Tensor:
    x = norm(x, p, f'{name}.norm')
    a = depthwise(ops.gelu(conv(x, p, f'{name}.att.0')), p, f'{name}.att.2')
    return conv(fuse(a, conv(x, p, f'{name}.v'), fusion), p, f'{name}.proj')


def feed_forward(x: Tensor, p: StateDict, name: str, ops: Operators) -> Tensor:
    h = ops.gelu(conv(norm(x, p, f'{name}.norm'), p, f'{name}.fc1'))
    return conv(h + ops.gelu(depthwise(h, p, f'{name}.pos')), p, f'{name}.fc2')


def block(
    x: Tensor, p: StateDict, name: str, fusion: str = 'hadamard', ops: Operators = ELEMENTARY
) -> Tensor:
    scale_1, scale_2 = (p[f'{name}.layer_scale_{i}'][:, None, None] for i in (1, 2))
    x = x + scale_1 * modulation(x, p, f'{name}.attn', fusion, ops)
    return x + scale_2 * feed_forward(x, p, f'{name}.mlp', ops)


def plain_conv2former(
    x: Tensor,
    p: StateDict,
    depths: Sequence[int],
    training: bool = False,
    fusion: str = 'hadamard',
    ops: Operators = ELEMENTARY,
) -> list[Tensor]:
    """Outputs of all stages, with the norms `norm{i}` where the state dict `p` has them."""
    outputs = []
    for i, depth in enumerate(depths):
        if i == 0:
            x = stem(x, p, training, ops)
        else:
            name = f'downsample_layers.{i}'
            x = conv(norm(x, p, f'{name}.0'), p, f'{name}.1', stride=2)
        for j in range(depth):
            x = block(x, p, f'stages.{i}.{j}', fusion, ops)
        outputs.append(norm(x, p, f'norm{i}') if f'norm{i}.weight' in p else x)
    return outputs


def plain_isotropic(
    x: Tensor, p: StateDict, depth: int, out_indices: Sequence[int], training: bool = False
) -> list[Tensor]:
    """Outputs of the requested blocks, with a plain or a convolutional patch embedding."""
    name = 'patch_embed'
    if f'{name}.weight' in p:
        x = conv(x, p, name, stride=16)
    else:
        x = conv(x, p, f'{name}.0', stride=2, padding=1)
        x = batch_norm(gelu(x), p, f'{name}.2', training)
        x = conv(x, p, f'{name}.3', stride=2, padding=1)
        x = batch_norm(gelu(x), p, f'{name}.5', training)
        x = conv(x, p, f'{name}.6', stride=4)
    outputs = {}
    for j in range(depth):
        x = block(x, p, f'blocks.{j}')
        outputs[j] = norm(x, p, f'norm{j}') if f'norm{j}.weight' in p else x
    return [outputs[j] for j in out_indices]


def plain_head(x: Tensor, p: StateDict) -> Tensor:
    """Logits of a feature map (N, C, H, W)."""
    x = norm(gelu(conv(x, p, 'head.0')), p, 'head.2')
    return x.mean((2, 3)) @ p['pred.weight'].t() + p['pred.bias']


class PublishedConv2Former(nn.Module):
    """A `Conv2Former` computed as in the published code, which has the same parameters.

    Args:
        network: Gives parameters and depths.
        channels_last: Memory format of the published code's tensors (N, C, H, W).
    """

    def __init__(self, network: Conv2Former, channels_last: bool = False) -> None:
        super().__init__()
        self.network = network
        self.memory_format = torch.channels_last if channels_last else torch.contiguous_format

    def forward(self, x: Tensor) -> list[Tensor]:
        state = dict(self.network.named_parameters()) | dict(self.network.named_buffers())
        x = x.contiguous(memory_format=self.memory_format)
        return plain_conv2former(x, state, self.network.depths, self.training, ops=PUBLISHED)
