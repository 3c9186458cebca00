"""Layers and blocks of Conv2Former, in the order data flows.

Stem, modulation, feed-forward, block, downsampling. Inside the stages, tensors are contiguous
(N, H, W, C): LayerNorm and 1x1 convolutions then work on the last axis without copies, and the same
memory seen as (N, C, H, W) is `torch.channels_last`, the fastest layout for depthwise convolutions.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.module import _has_any_global_hook
from torch.utils.checkpoint import checkpoint

from ..ops.block import RECOMPUTE, compute_block, is_supported, is_worth_it
from ..ops.depthwise import DepthwiseConv
from ..ops.dispatch import autocast_dtype
from ..ops.folding import BlockParameters, FoldedWeights
from ..ops.memory_format import to_channels_first, to_channels_last
from ..ops.norm import layer_norm
from ..ops.pointwise import pointwise_conv
from ..registry import MODELS
from .arguments import LARGEST_RATIO, check_choice, check_number
from .fusion import FUSIONS

LAYER_NORM_EPS = 1e-6  # of every LayerNorm in the published code
MODELS.register_module(module=DepthwiseConv)  # for `depthwise_conv`


@dataclass(frozen=True)
class BlockOptions:
    """What all blocks of a network have in common; see the arguments of `Conv2Former`.

    Raises:
        ValueError, TypeError: A value is not allowed; the message names it.
    """

    fusion: str
    mlp_ratio: float
    layer_scale_init_value: float
    recompute: str
    depthwise_conv: str
    with_cp: bool

    def __post_init__(self) -> None:
        check_number('mlp_ratio', self.mlp_ratio, above=0, maximum=LARGEST_RATIO)
        largest = torch.finfo(torch.float32).max
        check_number(
            'layer_scale_init_value', self.layer_scale_init_value, minimum=-largest, maximum=largest
        )
        check_choice('fusion', self.fusion, FUSIONS)
        check_choice('recompute', self.recompute, RECOMPUTE)
        self.depthwise_type()

    def depthwise_type(self) -> Callable[[int, int], nn.Module]:
        """The class of `depthwise_conv`."""
        if not isinstance(self.depthwise_conv, str):
            raise TypeError(f'depthwise_conv must be a str, got {self.depthwise_conv!r}')
        try:
            found = MODELS.get(self.depthwise_conv)  # `build` would look in the default scope only
        except RuntimeError:  # OneDL's mmengine, where the original returns None
            found = None
        # mmengine finds any object by its full name, of which not all are layers.
        if not (isinstance(found, type) and issubclass(found, nn.Module)):
            raise ValueError(
                f'depthwise_conv must be a registered model, got {self.depthwise_conv!r}'
            )
        return found


class Stem(nn.Sequential):
    """Three convolutions, of total stride 4: (N, in_channels, H, W) -> (N, out_channels, H/4, W/4).

    In the published network the activation comes before the BatchNorm.
    """

    def __init__(self, in_channels: int, out_channels: int) -> None:
        hidden_channels = out_channels // 2
        super().__init__(
            nn.Conv2d(in_channels, hidden_channels, 3, stride=2, padding=1, bias=False),
            nn.GELU(),
            nn.BatchNorm2d(hidden_channels),
            nn.Conv2d(hidden_channels, hidden_channels, 3, padding=1, bias=False),
            nn.GELU(),
            nn.BatchNorm2d(hidden_channels),
            nn.Conv2d(hidden_channels, out_channels, 2, stride=2, bias=False),
        )


class LayerNorm(nn.LayerNorm):
    """LayerNorm over the channels of (N, H, W, C), for what is no part of a block.

    Args:
        channels: C.
        before_convolution: Whether the result is wanted in the dtype of products.
        channels_first: Whether the result is wanted as contiguous (N, C, H, W) in memory.
    """

    before_convolution = False
    channels_first = False

    def __init__(
        self, channels: int, before_convolution: bool = False, channels_first: bool = False
    ) -> None:
        super().__init__(channels, eps=LAYER_NORM_EPS)
        self.before_convolution = before_convolution
        self.channels_first = channels_first

    def forward(self, x: Tensor) -> Tensor:
        dtype = autocast_dtype(x) if self.before_convolution else x.dtype
        return layer_norm(x, self.weight, self.bias, self.eps, dtype, self.channels_first)


def matrix(layer: PointwiseConv) -> tuple[Tensor, Tensor]:
    """Weight (C_out, C_in) and bias of a 1x1 convolution."""
    return layer.weight.flatten(1), layer.bias


class PointwiseConv(nn.Conv2d):
    """1x1 convolution on the last axis: (N, H, W, C_in) -> (N, H, W, C_out)."""

    bias: Tensor

    def __init__(self, in_channels: int, out_channels: int) -> None:
        super().__init__(in_channels, out_channels, kernel_size=1)

    def forward(self, x: Tensor) -> Tensor:
        return pointwise_conv(x, *matrix(self))


class Modulation(nn.Module):
    """Convolutional modulation, equation 5 of the paper, (N, H, W, C) in and out.

    With x' = LayerNorm(x): A = DW_kxk(GELU(W1 x')), V = W2 x', result W3 (A * V); in the ablations
    another fusion of A and V (`mmconv2former.models.fusion`).
    """

    att: Any  # nn.Sequential, which to type checkers holds any modules

    def __init__(self, channels: int, kernel_size: int, options: BlockOptions) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(channels, eps=LAYER_NORM_EPS)
        self.att = nn.Sequential(
            PointwiseConv(channels, channels),
            nn.GELU(),
            options.depthwise_type()(channels, kernel_size),
        )
        self.v = PointwiseConv(channels, channels)
        self.proj = PointwiseConv(channels, channels)
        self.fusion = options.fusion

    def forward(self, x: Tensor) -> Tensor:
        x = self.norm(x)
        return self.proj(FUSIONS[self.fusion](self.att(x), self.v(x)))


class FeedForward(nn.Module):
    """Feed-forward with a residual 3x3 depthwise convolution, (N, H, W, C) in and out.

    With h = GELU(W1 LayerNorm(x)): result W2 (h + GELU(DW_3x3(h))). The paper's text does not
    mention the depthwise convolution; the published code and weights have it.
    """

    def __init__(self, channels: int, mlp_ratio: float) -> None:
        super().__init__()
        hidden_channels = int(channels * mlp_ratio)
        self.norm = nn.LayerNorm(channels, eps=LAYER_NORM_EPS)
        self.fc1 = PointwiseConv(channels, hidden_channels)
        self.pos = DepthwiseConv(hidden_channels, 3)
        self.fc2 = PointwiseConv(hidden_channels, channels)
        self.act = nn.GELU()

    def forward(self, x: Tensor) -> Tensor:
        h = self.act(self.fc1(self.norm(x)))  # (N, H, W, mlp_ratio * C)
        return self.fc2(h + self.act(self.pos(h)))


class DropPath(nn.Module):
    """Stochastic depth (arXiv 1603.09382): zeroes a residual branch per image while training."""

    def __init__(self, rate: float) -> None:
        super().__init__()
        self.rate = rate

    def forward(self, x: Tensor) -> Tensor:
        factors = self.factors(1, x)
        return x if factors is None else x * factors.view(-1, *(1,) * (x.dim() - 1))

    def factors(self, branches: int, x: Tensor) -> Tensor | None:
        """What (branches, N) branches of a batch are multiplied by, None for 1."""
        if not self.training or self.rate == 0.0:
            return None
        keep = 1.0 - self.rate
        return x.new_empty(branches, x.shape[0]).bernoulli_(keep).div_(keep)

    def extra_repr(self) -> str:
        return f'rate={self.rate:.3f}'


class Block(nn.Module):
    """Modulation and feed-forward, each with layer scale and drop path, around two residuals.

    If all its layers are the plain ones, `mmconv2former.ops.block` computes the same faster and
    with less memory. What has a hook, is replaced or parametrized runs layer by layer.
    """

    # The thread in which a network runs, and its weights as they are and folded, while it runs.
    prefolded: tuple[int, BlockParameters, FoldedWeights] | None = None

    def __init__(
        self, channels: int, kernel_size: int, drop_path_rate: float, options: BlockOptions
    ) -> None:
        super().__init__()
        self.attn = Modulation(channels, kernel_size, options)
        self.mlp = FeedForward(channels, options.mlp_ratio)
        scale = float(options.layer_scale_init_value)
        self.layer_scale_1 = nn.Parameter(torch.full((channels,), scale))
        self.layer_scale_2 = nn.Parameter(torch.full((channels,), scale))
        self.drop_path = DropPath(drop_path_rate)
        self.recompute = options.recompute
        self.with_cp = options.with_cp

    def forward(self, x: Tensor) -> Tensor:  # (N, H, W, C)
        if self.with_cp and self.training and torch.is_grad_enabled():
            return checkpoint(self._compute, x, use_reentrant=False)
        return self._compute(x)

    def _compute(self, x: Tensor) -> Tensor:
        # Under autocast the branches are of half precision, their sum is not.
        x = x.to(self.layer_scale_1.dtype)
        parameters = folded = None
        if self.prefolded is not None and self.prefolded[0] == threading.get_ident():
            _, parameters, folded = self.prefolded
        if parameters is None and is_worth_it(x, self.recompute):
            parameters = self.plain_parameters()
        if parameters is not None and (folded is not None or is_supported(parameters)):
            factors = self.drop_path.factors(2, x)
            return compute_block(x, factors, parameters, folded, LAYER_NORM_EPS, self.recompute)
        x = x + self.drop_path(self.layer_scale_1 * self.attn(x))
        return x + self.drop_path(self.layer_scale_2 * self.mlp(x))

    def __getstate__(self) -> dict:
        return {name: value for name, value in vars(self).items() if name != 'prefolded'}

    def check_foldable(self, name: str) -> None:
        """Raises RuntimeError unless the form for inference does what the layers do.

        Args:
            name: Of the block, for the message.
        """
        for of_layer, plain in PLAIN_LAYERS.items():
            layer = self.get_submodule(of_layer)
            is_free = of_layer == 'attn.att.2'  # the depthwise convolution is called as it is
            activation = getattr(layer, 'approximate', 'none')
            if (
                (type(layer) is not plain and not is_free)
                or (is_watched(layer) and not is_free)
                or activation != 'none'
            ):
                raise RuntimeError(
                    f'switch_to_deploy folds the layers of {name}, but {of_layer} was replaced, is '
                    f'parametrized or has hooks: {layer}. Merge or remove what was attached first'
                )

    def plain_parameters(self) -> BlockParameters | None:
        """The parameters, if nothing else of the layers matters, so that one function does."""
        # By name: attributes cost more, and this runs every time.
        children: Any = self._modules
        attn, mlp = children['attn'], children['mlp']
        if type(attn) is not Modulation or type(mlp) is not FeedForward or _has_any_global_hook():
            return None
        a: Any = attn._modules
        m: Any = mlp._modules
        norm_1, att, v, proj = a['norm'], a['att'], a['v'], a['proj']
        norm_2, fc1, act, pos, fc2 = m['norm'], m['fc1'], m['act'], m['pos'], m['fc2']
        layers: Any = (attn, mlp, children['drop_path'], norm_1, att, *att._modules.values(), v,
                       proj, norm_2, fc1, act, pos, fc2)  # fmt: skip
        if tuple([type(layer) for layer in layers]) != PLAIN_TYPES or any(map(is_watched, layers)):
            return None
        gate, gate_act, depthwise = layers[5:8]
        is_plain = (
            attn.fusion == 'hadamard'
            and norm_1.eps == norm_2.eps == LAYER_NORM_EPS
            and gate_act.approximate == act.approximate == 'none'
        )
        if not is_plain:
            return None
        own = self._parameters
        parameters: list[Any] = []
        for layer in (norm_1, gate, v, depthwise, proj, norm_2, fc1, pos, fc2):
            of_layer = layer._parameters
            parameters += (of_layer.get('weight'), of_layer.get('bias'))
            if layer is proj:
                parameters.append(own.get('layer_scale_1'))
        parameters.append(own.get('layer_scale_2'))
        # Some are missing where they are parametrized, and in replicas of nn.DataParallel.
        has_all = all(parameter is not None for parameter in parameters)
        return BlockParameters._make(parameters) if has_all else None


# Of the layers of a block in which nothing was replaced or parametrized.
PLAIN_LAYERS = {
    'attn': Modulation, 'mlp': FeedForward, 'drop_path': DropPath, 'attn.norm': nn.LayerNorm,
    'attn.att': nn.Sequential, 'attn.att.0': PointwiseConv, 'attn.att.1': nn.GELU,
    'attn.att.2': DepthwiseConv, 'attn.v': PointwiseConv, 'attn.proj': PointwiseConv,
    'mlp.norm': nn.LayerNorm, 'mlp.fc1': PointwiseConv, 'mlp.act': nn.GELU,
    'mlp.pos': DepthwiseConv, 'mlp.fc2': PointwiseConv,
}  # fmt: skip
PLAIN_TYPES = tuple(PLAIN_LAYERS.values())


def is_watched(layer: nn.Module) -> bool:
    """Whether something happens when a layer is called that its class does not say."""
    return bool(
        layer._forward_hooks
        or layer._forward_pre_hooks
        or layer._backward_hooks
        or layer._backward_pre_hooks
        or 'forward' in vars(layer)
    )


class Downsample(nn.Sequential):
    """LayerNorm and 2x2 convolution of stride 2: (N, H, W, C_in) -> (N, H/2, W/2, C_out).

    An odd last row or column is left out, as in the published code.
    """

    def __init__(self, in_channels: int, out_channels: int) -> None:
        super().__init__(
            LayerNorm(in_channels, before_convolution=True),
            nn.Conv2d(in_channels, out_channels, 2, stride=2),
        )

    def forward(self, x: Tensor) -> Tensor:
        norm, conv = self[0], self[1]  # torch 2.1 cannot compile the unpacking of a module
        return to_channels_last(conv(to_channels_first(norm(x))))


def embed(stem: nn.Module, x: Tensor) -> Tensor:
    """(N, in_channels, H, W) -> (N, H / stride, W / stride, C)."""
    return to_channels_last(stem(x.contiguous(memory_format=torch.channels_last)))


def drop_path_rates(last: float, depth: int) -> list[float]:
    """Rates of `depth` blocks, growing linearly from 0 at the first to `last` at the last."""
    return [last * j / max(1, depth - 1) for j in range(depth)]


def init_layer(module: nn.Module) -> None:
    """Truncated normal weights of deviation 0.02 and zero biases, as published."""
    if isinstance(module, (nn.Conv2d, nn.Linear)):
        nn.init.trunc_normal_(module.weight, std=0.02)
        if module.bias is not None:
            nn.init.zeros_(module.bias)
