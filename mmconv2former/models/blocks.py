"""Layers and blocks of Conv2Former in the order data flows.

Stem, modulation, feed-forward, block, downsampling. Inside the stages, tensors are contiguous
(N, H, W, C): LayerNorm and 1x1 convolutions then work on the last axis without copies, and the same
memory seen as (N, C, H, W) is `torch.channels_last`, the fastest layout for depthwise convolutions.

Paper: arXiv 2211.11943, section 3.
"""

from __future__ import annotations

import threading
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from itertools import takewhile
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.modules import module as torch_module
from torch.utils.checkpoint import checkpoint

from ..ops.block import (
    Factors,
    compute_blocks,
    fold_together,
    is_by_kernels,
    is_supported,
    is_worth_it,
)
from ..ops.depthwise import DepthwiseConv
from ..ops.dispatch import autocast_dtype, is_captured, is_transformed
from ..ops.folding import BlockParameters, FoldedWeights
from ..ops.memory_format import to_channels_first, to_channels_last
from ..ops.norm import layer_norm
from ..ops.pointwise import pointwise_conv
from ..registry import MODELS
from .fusion import FUSIONS

LAYER_NORM_EPS = 1e-6  # of every LayerNorm in the published code
MODELS.register_module(module=DepthwiseConv)  # the default of `depthwise_conv`


class Stem(nn.Sequential):
    """Three convolutions: (N, in_channels, H, W) -> (N, out_channels, H / s, W / s).

    The total stride s is 4 by default. GELU comes before BatchNorm in the published network.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        hidden_channels: int,
        strides: tuple[int, int, int] = (2, 1, 2),
        bias: bool = False,
    ) -> None:
        super().__init__(
            nn.Conv2d(in_channels, hidden_channels, 3, strides[0], padding=1, bias=False),
            nn.GELU(),
            nn.BatchNorm2d(hidden_channels),
            nn.Conv2d(hidden_channels, hidden_channels, 3, strides[1], padding=1, bias=False),
            nn.GELU(),
            nn.BatchNorm2d(hidden_channels),
            nn.Conv2d(hidden_channels, out_channels, strides[2], strides[2], bias=bias),
        )


def embed(stem: nn.Module, x: Tensor) -> Tensor:
    """Runs a stem and changes the layout: (N, in_channels, H, W) -> (N, H / s, W / s, C)."""
    if is_captured() or not is_transformed():  # vmap cannot change the layout
        x = x.contiguous(memory_format=torch.channels_last)
    return to_channels_last(stem(x))


class LayerNorm(nn.LayerNorm):
    """LayerNorm over the channels of (N, H, W, C), outside of blocks.

    Args:
        channels: C.
        before_convolution: Whether a convolution of the backbone follows: the result has
            autocast's dtype. Otherwise it is returned by the network: it keeps the dtype of x and
            can be contiguous as (N, C, H, W).
    """

    def __init__(self, channels: int, before_convolution: bool = False) -> None:
        super().__init__(channels, eps=LAYER_NORM_EPS)
        self.before_convolution = before_convolution

    def forward(self, x: Tensor) -> Tensor:
        dtype = autocast_dtype(x) if self.before_convolution else x.dtype
        channels_first = not self.before_convolution
        return layer_norm(x, self.weight, self.bias, self.eps, dtype, channels_first)


class PointwiseConv(nn.Conv2d):
    """1x1 convolution on the last axis: (N, H, W, C_in) -> (N, H, W, C_out)."""

    bias: Tensor

    def __init__(self, in_channels: int, out_channels: int) -> None:
        super().__init__(in_channels, out_channels, kernel_size=1)

    def forward(self, x: Tensor) -> Tensor:
        return pointwise_conv(x, self.weight.flatten(1), self.bias)


class Modulation(nn.Module):
    """Convolutional modulation, equation 5 of the paper, (N, H, W, C) -> (N, H, W, C).

    With x' = LayerNorm(x), A = DW_kxk(GELU(W1 x')) and V = W2 x', the result is W3 (A * V). The
    ablations fuse A and V in other ways (`mmconv2former.models.fusion`).
    """

    att: Any  # nn.Sequential; type checkers cannot tell the layers of one

    def __init__(
        self, channels: int, kernel_size: int, fusion: str, depthwise_conv: type[nn.Module]
    ) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(channels, eps=LAYER_NORM_EPS)
        self.att = nn.Sequential(
            PointwiseConv(channels, channels), nn.GELU(), depthwise_conv(channels, kernel_size)
        )
        self.v = PointwiseConv(channels, channels)
        self.proj = PointwiseConv(channels, channels)
        self.fusion = fusion

    def forward(self, x: Tensor) -> Tensor:
        x = self.norm(x)
        return self.proj(FUSIONS[self.fusion](self.att(x), self.v(x)))


class FeedForward(nn.Module):
    """Feed-forward with a residual 3x3 depthwise convolution, (N, H, W, C) -> (N, H, W, C).

    With h = GELU(W1 LayerNorm(x)), the result is W2 (h + GELU(DW_3x3(h))). The paper does not
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
    """Stochastic depth (arXiv 1603.09382): in training, drops a residual branch of some images."""

    def __init__(self, rate: float) -> None:
        super().__init__()
        self.rate = rate

    def forward(self, x: Tensor) -> Tensor:
        (factor,) = self.factors(1, x)
        return x if factor is None else x * factor.view(-1, *(1,) * (x.dim() - 1))

    def factors(self, branches: int, x: Tensor) -> tuple[Tensor | None, ...]:
        """Factors (N,) of branches for each image; None means 1."""
        if not self.training or self.rate == 0.0:
            return (None,) * branches
        keep = 1.0 - self.rate
        return x.new_empty(branches, x.shape[0]).bernoulli_(keep).div_(keep).unbind()

    def extra_repr(self) -> str:
        return f'rate={self.rate:.3f}'


class Prepared(NamedTuple):
    """What `mmconv2former.ops.block` needs to compute a block."""

    parameters: BlockParameters
    weights: FoldedWeights | None = None  # None to fold them from the parameters


class CurrentPass(threading.local):
    """What the network that runs in this thread has prepared for its blocks."""

    prepared: Mapping[nn.Module, Prepared] = {}


current_pass = CurrentPass()


class Block(nn.Module):
    """Modulation and feed-forward, each with layer scale and drop path around a residual.

    As long as all layers are plain, `mmconv2former.ops.block` computes the same faster and in less
    memory. A block with a hooked, replaced or parametrized layer runs layer by layer.
    """

    def __init__(
        self,
        channels: int,
        kernel_size: int,
        drop_path_rate: float,
        *,
        fusion: str,
        mlp_ratio: float,
        layer_scale_init_value: float,
        recompute: str,
        depthwise_conv: type[nn.Module],
        with_cp: bool,
    ) -> None:
        super().__init__()
        self.attn = Modulation(channels, kernel_size, fusion, depthwise_conv)
        self.mlp = FeedForward(channels, mlp_ratio)
        self.layer_scale_1 = nn.Parameter(torch.full((channels,), float(layer_scale_init_value)))
        self.layer_scale_2 = nn.Parameter(torch.full((channels,), float(layer_scale_init_value)))
        self.drop_path = DropPath(drop_path_rate)
        self.recompute = recompute
        self.with_cp = with_cp

    def forward(self, x: Tensor) -> Tensor:  # (N, H, W, C)
        if self.with_cp and self.training and torch.is_grad_enabled():
            return checkpoint(self._compute, x, use_reentrant=False)
        return self._compute(x)

    def _compute(self, x: Tensor) -> Tensor:
        x = x.to(self.layer_scale_1.dtype)  # autocast halves the precision of branches, not of x
        if self._prepared(x) is not None:
            return self.run_together([self], x)
        x = x + self.drop_path(self.layer_scale_1 * self.attn(x))
        x = x + self.drop_path(self.layer_scale_2 * self.mlp(x))
        return x

    def _prepared(self, x: Tensor) -> Prepared | None:
        """None if the layers must run one by one, or are faster that way."""
        if is_captured():
            return None
        if self in current_pass.prepared:
            return current_pass.prepared[self]
        parameters = self.plain_parameters() if is_worth_it(x, self.recompute) else None
        if parameters is None or not is_supported(parameters):
            return None
        return Prepared(parameters)

    def key_to_join(self, x: Tensor) -> Any:
        """See `run_in_turn`. The same with and without what the network has prepared.

        Activation checkpointing calls parts of a network again, after its pass.
        """
        prepared = self._prepared(x)
        is_recomputed = self.with_cp and self.training
        if prepared is None or is_recomputed or type(self) is not Block:
            return None
        parameters, weights = prepared
        if not is_by_kernels(x, parameters, weights):
            return None
        is_trained = any(p.requires_grad for p in parameters)
        return Block, parameters.scale_1.dtype, self.recompute, is_trained

    @staticmethod
    def run_together(blocks: Sequence[Block], x: Tensor) -> Tensor:
        """Consecutive blocks as one function, (N, H, W, C) -> (N, H, W, C)."""
        x = x.to(blocks[0].layer_scale_1.dtype)
        prepared: Any = [block._prepared(x) for block in blocks]
        parameters, weights = zip(*prepared)
        folded = None if any(w is None for w in weights) else weights
        factors = draw_factors(blocks, x)
        recompute = blocks[0].recompute
        return compute_blocks(x, factors, parameters, folded, LAYER_NORM_EPS, recompute)

    def plain_parameters(self) -> BlockParameters | None:
        """The parameters if all layers are plain, so that nothing else matters, otherwise None."""
        # Reads `_modules` and `_parameters`: attributes take longer, and this runs for each block
        # of each forward pass.
        children: Any = self._modules
        attn, mlp = children['attn'], children['mlp']
        if type(attn) is not Modulation or type(mlp) is not FeedForward or any(GLOBAL_HOOKS):
            return None
        a: Any = attn._modules
        m: Any = mlp._modules
        norm_1, att, v, proj = a['norm'], a['att'], a['v'], a['proj']
        norm_2, fc1, act, pos, fc2 = m['norm'], m['fc1'], m['act'], m['pos'], m['fc2']
        layers: Any = (attn, mlp, children['drop_path'], norm_1, att, *att._modules.values(), v,
                       proj, norm_2, fc1, act, pos, fc2)  # fmt: skip
        if tuple(map(type, layers)) != PLAIN_TYPES or any(map(has_attachment, layers)):
            return None
        gate, gate_act, depthwise = layers[5:8]
        has_other_settings = (
            attn.fusion != 'hadamard'
            or not norm_1.eps == norm_2.eps == LAYER_NORM_EPS
            or not gate_act.approximate == act.approximate == 'none'
        )
        if has_other_settings:
            return None
        parameters: list[Any] = []
        for layer in (norm_1, gate, v, depthwise, proj, norm_2, fc1, pos, fc2):
            own = layer._parameters
            parameters += own.get('weight'), own.get('bias')
        parameters.insert(10, self._parameters.get('layer_scale_1'))  # behind proj
        parameters.append(self._parameters.get('layer_scale_2'))
        if type(None) in tuple(
            map(type, parameters)
        ):  # no bias, parametrized, or of nn.DataParallel
            return None
        return BlockParameters._make(parameters)


# The layers of a block, all plain.
PLAIN_LAYERS = {
    'attn': Modulation, 'mlp': FeedForward, 'drop_path': DropPath, 'attn.norm': nn.LayerNorm,
    'attn.att': nn.Sequential, 'attn.att.0': PointwiseConv, 'attn.att.1': nn.GELU,
    'attn.att.2': DepthwiseConv, 'attn.v': PointwiseConv, 'attn.proj': PointwiseConv,
    'mlp.norm': nn.LayerNorm, 'mlp.fc1': PointwiseConv, 'mlp.act': nn.GELU,
    'mlp.pos': DepthwiseConv, 'mlp.fc2': PointwiseConv,
}  # fmt: skip
PLAIN_TYPES = tuple(PLAIN_LAYERS.values())
# torch's dicts of hooks for all modules.
GLOBAL_HOOKS = tuple(
    getattr(torch_module, f'_global_{kind}_hooks')
    for kind in ('forward', 'forward_pre', 'backward', 'backward_pre')
)


def has_attachment(layer: nn.Module) -> bool:
    """Whether calling a layer does more than its class says: hooks, or another `forward`."""
    own = layer.__dict__
    return bool(
        own['_forward_hooks']
        or own['_forward_pre_hooks']
        or own['_backward_hooks']
        or own['_backward_pre_hooks']
        or 'forward' in own
        or own.get('_compiled_call_impl')
    )


# -------------------------------------------------------------------------------- several blocks
MOST_TOGETHER = 4  # blocks; with more, gradients would reach other GPUs later


class Stage(nn.Sequential):
    """Blocks of one resolution, (N, H, W, C) -> (N, H, W, C)."""

    def forward(self, x: Tensor) -> Tensor:
        return run_in_turn(self, x)


def run_in_turn(blocks: Iterable[nn.Module], x: Tensor) -> Tensor:
    """Runs blocks one after the other; several as one function where nothing can tell.

    That saves launches, and time of the host for each. Blocks of equal keys may run together.
    """
    if is_captured():
        for block in blocks:
            x = block(x)
        return x
    waiting: list[Any] = list(blocks)
    while waiting:  # what ran before may have changed x, or attached something to a block
        members = joined(waiting[:MOST_TOGETHER], x)
        if members:
            del waiting[: len(members)]
            x = type(members[0]).run_together(members, x)
        else:
            x = waiting.pop(0)(x)
    return x


def joined(blocks: Sequence[nn.Module], x: Tensor) -> list[Any]:
    """The first of these blocks that run as one function; none if the first must run alone."""
    key = key_to_join(blocks[0], x)
    if key is None:
        return []
    return [blocks[0], *takewhile(lambda block: key_to_join(block, x) == key, blocks[1:])]


def key_to_join(block: nn.Module, x: Tensor) -> Any:
    """The key of a block, None if it must run alone."""
    of_type = getattr(type(block), 'key_to_join', None)  # wrappers pass on attributes
    if of_type is None or any(GLOBAL_HOOKS) or has_attachment(block):
        return None
    return of_type(block, x)


@contextmanager
def prepare(blocks: Sequence[Block], x: Tensor) -> Iterator[None]:
    """Folds the weights of blocks for one pass with a few launches, if kernels compute them.

    Args:
        x: The network's input.
    """
    plain: list[tuple[Block, BlockParameters]] = []
    for block in blocks:
        parameters = block.plain_parameters()
        if parameters is not None and is_supported(parameters):
            plain.append((block, parameters))
    if plain:  # one launch is for one dtype and device
        kind = plain[0][1].scale_1.dtype, x.device
        plain = [(b, p) for b, p in plain if (p.scale_1.dtype, p.scale_1.device) == kind]
    weights = fold_together([p for _, p in plain], x) if plain else None
    before = current_pass.prepared
    current_pass.prepared = {b: Prepared(p, w) for (b, p), w in zip(plain, weights or ())}
    try:
        yield
    finally:
        current_pass.prepared = before


def draw_factors(blocks: Sequence[Block], x: Tensor) -> list[Factors]:
    """Factors of drop path of both branches of each block."""
    layers: list[Any] = [block.drop_path for block in blocks]
    active = [layer for layer in layers if layer.training and layer.rate > 0]
    if len(active) < 2:
        return [layer.factors(2, x) for layer in layers]
    rows = iter(draw_rows([1 - layer.rate for layer in active for _ in range(2)], x))
    return [(next(rows), next(rows)) if layer in active else (None, None) for layer in layers]


@torch.no_grad()
def draw_rows(keeps: list[float], x: Tensor) -> tuple[Tensor, ...]:
    """For each rate, factors (N,) that are 1 / rate with this probability and 0 otherwise.

    Four launches in all, instead of two for each layer.
    """
    dtype = torch.promote_types(x.dtype, torch.float32)
    factors = torch.rand(len(keeps), x.shape[0], dtype=dtype, device=x.device)
    rows = factors.unbind()
    # Numbers below the rate become -1, the others 0.
    torch._foreach_sub_(rows, keeps)
    factors.floor_()
    torch._foreach_div_(rows, [-keep for keep in keeps])
    return factors.to(x.dtype).unbind()


class Downsample(nn.Sequential):
    """LayerNorm and 2x2 convolution of stride 2: (N, H, W, C_in) -> (N, H / 2, W / 2, C_out).

    An odd last row or column is dropped, as in the published code.
    """

    def __init__(self, in_channels: int, out_channels: int) -> None:
        super().__init__(
            LayerNorm(in_channels, before_convolution=True),
            nn.Conv2d(in_channels, out_channels, 2, stride=2),
        )

    def forward(self, x: Tensor) -> Tensor:
        x = to_channels_first(self[0](x))
        for i in range(1, len(self)):  # torch 2.1 cannot compile the unpacking of a module
            x = self[i](x)
        return to_channels_last(x)  # (N, H / 2, W / 2, C_out)


def drop_path_rates(last: float, depth: int) -> list[float]:
    """Rates of `depth` blocks, which grow linearly from 0 at the first to `last` at the last."""
    return [last * j / max(1, depth - 1) for j in range(depth)]


def init_layer(module: nn.Module) -> None:
    """Truncated normal weights with a deviation of 0.02, and zero biases, as published."""
    if isinstance(module, (nn.Conv2d, nn.Linear)):
        nn.init.trunc_normal_(module.weight, std=0.02)
        if module.bias is not None:
            nn.init.zeros_(module.bias)
