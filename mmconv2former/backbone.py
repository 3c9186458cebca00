"""Conv2Former, a ConvNet in transformer style, as a multi-scale backbone.

Paper: "Conv2Former: A Simple Transformer-Style ConvNet for Visual Recognition", arXiv 2211.11943,
section 3. Parameter names and numerics are those of the published ImageNet checkpoints, which
differ from the paper's text in one place: the feed-forward has a residual 3x3 depthwise
convolution.

The file reads in the order data flows: variants, stem, modulation, feed-forward, block,
downsampling, network. Inside the stages, tensors are contiguous (N, H, W, C): then LayerNorm and
1x1 convolutions work on the last axis without copies, and the same memory seen as (N, C, H, W) is
`torch.channels_last`, the layout in which depthwise convolutions and their neighbours are fastest.
"""

from __future__ import annotations

import math
import threading
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain
from numbers import Integral, Real
from typing import Any, NoReturn, TypeGuard

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.module import _has_any_global_hook
from torch.utils.checkpoint import checkpoint

from .compat.roi_align import guard_roi_align
from .deploy import DeployedBlock, deployed_downsample, deployed_stem, matrix
from .fusion import FUSIONS
from .ops.block import (
    RECOMPUTE,
    BlockParameters,
    FoldedWeights,
    compute_block,
    folded_together,
    is_supported,
    is_worth_it,
)
from .ops.depthwise import DepthwiseConv
from .ops.memory_format import autocast_dtype, is_captured, to_channels_first, to_channels_last
from .ops.norm import layer_norm
from .ops.pointwise import product
from .registry import MODELS, register
from .weights import LoadsPretrained


@dataclass(frozen=True)
class Arch:
    """One row of the table of variants."""

    channels: tuple[int, ...]
    depths: tuple[int, ...]
    kernel_size: int | tuple[int, ...] = 11


# Table 1 of arXiv 2211.11943; `nano` is from the official repository, whose code uses kernel 7.
ARCHS = {
    'nano': Arch(channels=(64, 128, 256, 512), depths=(2, 2, 8, 2), kernel_size=7),
    'tiny': Arch(channels=(72, 144, 288, 576), depths=(3, 3, 12, 3)),
    'small': Arch(channels=(72, 144, 288, 576), depths=(4, 4, 32, 4)),
    'base': Arch(channels=(96, 192, 384, 768), depths=(4, 4, 34, 4)),
    'large': Arch(channels=(128, 256, 512, 1024), depths=(4, 4, 48, 4)),
}
ARCH_LETTERS = {name[0]: name for name in ARCHS}

MODELS.register_module(module=DepthwiseConv)  # for `depthwise_conv`

LAYER_NORM_EPS = 1e-6  # of every LayerNorm in the published code
STEM_STRIDE = 4
# Far above what anybody builds (our choice): beyond, a slip would take all memory or hours.
MOST_CHANNELS = 2**16
MOST_BLOCKS = 1000  # of a stage
MOST_STAGES = 12
LARGEST_KERNEL = 999
LARGEST_RATIO = 64


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


class PointwiseConv(nn.Conv2d):
    """1x1 convolution on the last axis: (N, H, W, C_in) -> (N, H, W, C_out)."""

    bias: Tensor

    def __init__(self, in_channels: int, out_channels: int) -> None:
        super().__init__(in_channels, out_channels, kernel_size=1)

    def forward(self, x: Tensor) -> Tensor:
        return product(x, *matrix(self))


class Modulation(nn.Module):
    """Convolutional modulation, equation 5 of the paper, (N, H, W, C) in and out.

    With x' = LayerNorm(x): A = DW_kxk(GELU(W1 x')), V = W2 x', result W3 (A * V); in the ablations
    another fusion of A and V (`mmconv2former.fusion`).
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
    ready: tuple[int, BlockParameters, FoldedWeights] | None = None

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
        if self.ready is not None and self.ready[0] == threading.get_ident():
            _, parameters, folded = self.ready
        if parameters is None and is_worth_it(x, self.recompute):
            parameters = self.plain_parameters()
        if parameters is not None and (folded is not None or is_supported(x, parameters)):
            factors = self.drop_path.factors(2, x)
            return compute_block(x, factors, parameters, folded, LAYER_NORM_EPS, self.recompute)
        x = x + self.drop_path(self.layer_scale_1 * self.attn(x))
        return x + self.drop_path(self.layer_scale_2 * self.mlp(x))

    def __getstate__(self) -> dict:
        return {name: value for name, value in vars(self).items() if name != 'ready'}

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


class Conv2FormerBase(LoadsPretrained):
    """What the hierarchical and the isotropic network share: weights, modes, form for inference.

    Subclasses have `channels`, `strides`, `smallest_input` (pixels of a side), `out_indices`, norms
    `norm{i}` of these if `out_norm`, and the methods below that raise NotImplementedError here.
    Arguments are those of `Conv2Former`.
    """

    channels: tuple[int, ...]
    strides: tuple[int, ...]
    smallest_input: int
    out_indices: tuple[int, ...]

    def __init__(
        self,
        in_channels: int,
        drop_path_rate: float,
        out_norm: bool,
        norm_eval: bool,
        with_cp: bool,
        out_channels_last: bool,
        init_cfg: dict | list[dict] | None,
    ) -> None:
        check_int('in_channels', in_channels, minimum=1, maximum=MOST_CHANNELS)
        switches = dict(
            out_norm=out_norm, norm_eval=norm_eval, with_cp=with_cp,
            out_channels_last=out_channels_last,
        )  # fmt: skip
        for name, value in switches.items():
            check_bool(name, value)
        check_init_cfg(init_cfg)
        check_number('drop_path_rate', drop_path_rate, minimum=0, below=1)
        super().__init__(init_cfg)
        self.in_channels = in_channels
        self.out_norm = out_norm
        self.norm_eval = norm_eval
        self.with_cp = with_cp
        self.out_channels_last = out_channels_last
        if out_channels_last:
            guard_roi_align()
        self.is_deployed = False

    def _frozen_modules(self) -> list[nn.Module]:
        """The modules that `frozen_stages` freezes."""
        raise NotImplementedError(f'{type(self).__name__} must say which modules are frozen')

    def _frozen_norms(self, last: int) -> list[nn.Module]:
        """The output norms of indices below `last`."""
        return [getattr(self, f'norm{i}') for i in self.out_indices if self.out_norm and i < last]

    def _forward(self, x: Tensor) -> tuple[Tensor, ...]:
        """The feature maps of an input that was checked."""
        raise NotImplementedError(f'{type(self).__name__} must say how it computes')

    def _own_blocks(self) -> Iterable[nn.Module]:
        """The blocks, or what was put in their place."""
        raise NotImplementedError(f'{type(self).__name__} must say which blocks it has')

    def _deploy(self) -> None:
        """Exchanges modules for those of `mmconv2former.deploy`."""
        raise NotImplementedError(f'{type(self).__name__} has no form for inference')

    def _start(self) -> None:
        """Initial values and modes, when all modules are there."""
        self.apply(init_layer)
        for module in self._frozen_modules():
            module.requires_grad_(False)
        self.train()  # applies `frozen_stages` and `norm_eval`

    def train(self, mode: bool = True) -> Conv2FormerBase:
        """Sets the mode, except of frozen norms and, with `norm_eval`, of the stem's BatchNorms."""
        super().train(mode)
        if mode:
            for module in self._frozen_modules():
                module.eval()
            if self.norm_eval:
                for module in self.modules():
                    if isinstance(module, _BatchNorm):
                        module.eval()
        return self

    def switch_to_deploy(self) -> Conv2FormerBase:
        """Takes the form for inference, in place: see `mmconv2former.deploy`.

        Load weights before; afterwards nothing can be trained or loaded. Twice is as once.

        Returns:
            The module, in eval mode, without parameters that need a gradient.

        Raises:
            RuntimeError: A layer of a block was replaced, is parametrized or has hooks, which would
                be lost.
        """
        if not self.is_deployed:
            for name, module in self.named_modules():
                if isinstance(module, Block):
                    module.check_foldable(name)
            self.is_deployed = True
            self._deploy()
        return self.eval().requires_grad_(False)

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:  # (N, in_channels, H, W)
        self._check_input(x)
        if is_captured():
            return self._forward(x)
        blocks = self._own_blocks()  # not those in wrappers, which may hand out their weights later
        with folded_together([b for b in blocks if isinstance(b, Block)], x, self):
            return self._forward(x)

    def _check_input(self, x: Tensor) -> None:
        if torch.jit.is_tracing():  # sizes are tensors there, a comparison would be frozen
            return
        if x.dim() != 4 or x.shape[1] != self.in_channels:
            raise ValueError(
                f'input must have shape (N, in_channels={self.in_channels}, H, W), '
                f'got {tuple(x.shape)}'
            )
        if x.shape[2] < self.smallest_input or x.shape[3] < self.smallest_input:
            raise ValueError(
                f'input must be at least {self.smallest_input}x{self.smallest_input} pixels, '
                f'got H={x.shape[2]}, W={x.shape[3]}'
            )

    def _output(self, x: Tensor, index: int) -> Tensor:
        """The returned feature map of index `index`, (N, H, W, C) -> (N, C, H, W)."""
        x = getattr(self, f'norm{index}')(x) if self.out_norm else x
        x = to_channels_first(x)
        return x if self.out_channels_last and x.is_cuda else x.contiguous()


def embed(stem: nn.Module, x: Tensor) -> Tensor:
    """(N, in_channels, H, W) -> (N, H / stride, W / stride, C)."""
    return to_channels_last(stem(x.contiguous(memory_format=torch.channels_last)))


@register(MODELS)
class Conv2Former(Conv2FormerBase):
    """Conv2Former backbone with multi-scale outputs.

    Stages after the last one asked for by `out_indices` are not built, so that no parameter is
    unused in training.

    Args:
        arch: A name of `ARCHS`, its first letter, or a dict of `channels` and `depths` (one value
            a stage, as many stages as wished, even channels in the first) and optionally
            `kernel_size`.
        in_channels: Channels of the input image.
        kernel_size: Odd size of the depthwise convolutions of the modulation: None for the arch's
            own, an int, or one int a stage.
        fusion: How the modulation joins its branches, a key of `mmconv2former.fusion.FUSIONS`:
            'hadamard', or of the paper's ablations 'sum', 'sigmoid', 'l1', 'linear'.
        mlp_ratio: Width of the feed-forward's hidden layer, as a multiple of the block's.
        drop_path_rate: Drop path of the last block, in [0, 1); it grows linearly from 0 at the
            first block.
        layer_scale_init_value: Initial value of both layer scales of each block.
        out_indices: Stages whose features are returned, in this order: an int or a sequence;
            negatives count from the last stage.
        out_norm: Whether a LayerNorm `norm{i}` is applied to each returned feature map. The paper
            does not say; on by our choice, as in ConvNeXt's and Swin's dense prediction.
        frozen_stages: -1 freezes nothing, 0 the stem, k the stem and the first k stages with their
            output norms. Frozen parameters get no gradient and frozen norms stay in eval mode.
        norm_eval: Whether the stem's BatchNorms stay in eval mode while training.
        with_cp: Whether each block is recomputed in the backward pass (activation checkpointing),
            for less memory at the price of time.
        recompute: What the backward pass computes again instead of keeping it from the forward
            pass: 'nothing' (most memory, fastest), 'elementwise' (GELU, Hadamard product, sums) or
            'expansion' (these and the feed-forward's first product: least memory). A block with
            another `fusion` or `depthwise_conv` than the defaults, or with hooks or replaced
            layers, is computed layer by layer, where autograd keeps all.
        depthwise_conv: Type name of the modulation's depthwise convolution in the registry; see
            `mmconv2former.ops.DepthwiseConv`. Another than that is called as it is.
        out_channels_last: Whether feature maps on a GPU are in `torch.channels_last` memory, which
            half-precision convolutions behind them would otherwise be copied to. mmcv's RoIAlign,
            which misreads it, is guarded then (`mmconv2former.compat`).
        init_cfg: mmengine's initialisation config. `dict(type='Pretrained', checkpoint=FILE)`
            takes published files as they are; a file that does not fit is an error (see
            `mmconv2former.weights.load_pretrained`, whose `prefix` and `adapt_kernel` it takes).

    Attributes:
        channels: Channels of each returned feature map.
        strides: Stride of each returned feature map with respect to the input.

    Shapes:
        Input (N, in_channels, H, W), H and W at least the largest stride built (32 for four
        stages). Returns a tuple of contiguous (N, channels[i], h_i, w_i).
        Sizes are H / strides[i] for multiples of the stride and are rounded as the published
        convolutions do otherwise.

    Raises:
        ValueError, TypeError: An argument, or the shape of an input, is not as described above, or
            there are others (`foreign`, which stands for none); the message says what to do.

    Source: arXiv 2211.11943; parameter names as in the published ImageNet checkpoints.
    """

    # Both nn.ModuleList, which to type checkers holds any modules.
    downsample_layers: Any  # of Stem and Downsample
    stages: Any  # of nn.Sequential of Block

    def __init__(
        self,
        arch: str | Mapping = 'tiny',
        in_channels: int = 3,
        kernel_size: int | Sequence[int] | None = None,
        fusion: str = 'hadamard',
        mlp_ratio: float = 4,
        drop_path_rate: float = 0.0,
        layer_scale_init_value: float = 1e-6,
        out_indices: int | Sequence[int] = (0, 1, 2, 3),
        out_norm: bool = True,
        frozen_stages: int = -1,
        norm_eval: bool = False,
        with_cp: bool = False,
        recompute: str = 'elementwise',
        depthwise_conv: str = 'DepthwiseConv',
        out_channels_last: bool = False,
        init_cfg: dict | list[dict] | None = None,
        **foreign: NoReturn,
    ) -> None:
        refuse_foreign(type(self).__name__, foreign)
        super().__init__(
            in_channels, drop_path_rate, out_norm, norm_eval, with_cp, out_channels_last, init_cfg
        )
        variant = parse_arch(arch)
        channels, num_stages = variant.channels, len(variant.depths)
        kernel_sizes = parse_kernel_size(
            variant.kernel_size if kernel_size is None else kernel_size, num_stages
        )
        check_int('frozen_stages', frozen_stages, minimum=-1, maximum=num_stages)
        options = BlockOptions(
            fusion, mlp_ratio, layer_scale_init_value, recompute, depthwise_conv, with_cp
        )
        self.out_indices = parse_out_indices(out_indices, num_stages)
        self.frozen_stages = frozen_stages
        self.depths = variant.depths[: max(self.out_indices) + 1]
        self.channels = tuple(channels[i] for i in self.out_indices)
        self.strides = tuple(STEM_STRIDE * 2**i for i in self.out_indices)
        self.smallest_input = STEM_STRIDE * 2 ** (len(self.depths) - 1)

        self.downsample_layers = nn.ModuleList([Stem(in_channels, channels[0])])
        for i in range(1, len(self.depths)):
            self.downsample_layers.append(Downsample(channels[i - 1], channels[i]))

        # Over the arch's full depth, so that a network cut by `out_indices` is part of the whole.
        rates = iter(drop_path_rates(drop_path_rate, sum(variant.depths)))
        self.stages = nn.ModuleList()
        for i, depth in enumerate(self.depths):
            blocks = [
                Block(channels[i], kernel_sizes[i], next(rates), options) for _ in range(depth)
            ]
            self.stages.append(nn.Sequential(*blocks))

        if out_norm:
            for i in self.out_indices:
                norm = LayerNorm(channels[i], channels_first=not out_channels_last)
                self.add_module(f'norm{i}', norm)
        self._start()

    def _forward(self, x: Tensor) -> tuple[Tensor, ...]:
        outputs: list[Any] = []  # a list by stage: torch 2.4 cannot compile a dict by integers
        for i, (downsample, stage) in enumerate(zip(self.downsample_layers, self.stages)):
            x = embed(downsample, x) if i == 0 else downsample(x)
            x = stage(x)
            outputs.append(self._output(x, i) if i in self.out_indices else None)
        return tuple(outputs[i] for i in self.out_indices)

    def _own_blocks(self) -> Iterable[nn.Module]:
        return chain.from_iterable(self.stages)

    def _deploy(self) -> None:
        stem, *downsamples = self.downsample_layers
        self.downsample_layers = nn.ModuleList(
            [deployed_stem(stem), *map(deployed_downsample, downsamples)]
        )
        self.stages = nn.ModuleList(
            nn.Sequential(*map(DeployedBlock, stage)) for stage in self.stages
        )

    def get_layer_depth(self, param_name: str, prefix: str = '') -> tuple[int, int]:
        """Depth of a parameter for layer-wise learning-rate decay, as mmpretrain's backbones do.

        The stem is layer 0. Each stage forms `num_groups(depth)` layers of consecutive blocks, a
        downsampling counts with the first blocks behind it. What is not of the published
        backbone, that is the output norms and any name without `prefix`, is the last layer, with
        the heads.

        Args:
            param_name: Name of a parameter, in the backbone or in the model around it.
            prefix: Prefix of the backbone's parameters in that name, such as `'backbone.'`.

        Returns:
            The layer, from 0, and the number of layers.
        """
        groups = [num_groups(depth) for depth in self.depths]
        num_layers = 1 + sum(groups) + 1
        stage, block = self._locate(param_name, prefix)
        if stage is None:
            return num_layers - 1, num_layers
        if stage < 0:
            return 0, num_layers
        group = block * groups[stage] // self.depths[stage]
        return 1 + sum(groups[:stage]) + group, num_layers

    def get_stage_depth(self, param_name: str, prefix: str = '') -> tuple[int, int]:
        """As `get_layer_depth`, for stage-wise decay: stem, stages one by one, all the rest."""
        num_layers = 1 + len(self.depths) + 1
        stage, _ = self._locate(param_name, prefix)
        return (num_layers - 1 if stage is None else stage + 1), num_layers

    def _locate(self, param_name: str, prefix: str) -> tuple[int | None, int]:
        """Stage (-1 for the stem, None for no part of the stages) and block of a parameter."""
        if param_name.startswith(prefix):
            part, _, rest = param_name[len(prefix) :].partition('.')
            if part == 'downsample_layers':
                index = int(rest.split('.')[0])
                return (index if index > 0 else -1), 0
            if part == 'stages':
                stage, block = rest.split('.')[:2]
                return int(stage), int(block)
        return None, 0

    def _frozen_modules(self) -> list[nn.Module]:
        if self.frozen_stages < 0:
            return []
        last = self.frozen_stages
        return [
            *self.downsample_layers[: max(last, 1)],
            *self.stages[:last],
            *self._frozen_norms(last),
        ]


def drop_path_rates(last: float, depth: int) -> list[float]:
    """Rates of `depth` blocks, growing linearly from 0 at the first to `last` at the last."""
    return [last * j / max(1, depth - 1) for j in range(depth)]


def num_groups(depth: int) -> int:
    """Layers that a stage of `depth` blocks counts for in layer-wise decay.

    Our choice: groups of at least three blocks, at most nine, so that the rates published for
    ConvNeXt (three blocks a group; 3 groups of its 9, 9 of its 27 blocks) keep their meaning at
    Conv2Former's depths, 8 to 48.
    """
    return min(9, max(1, depth // 3))


def init_layer(module: nn.Module) -> None:
    """Truncated normal weights of deviation 0.02 and zero biases, as published."""
    if isinstance(module, (nn.Conv2d, nn.Linear)):
        nn.init.trunc_normal_(module.weight, std=0.02)
        if module.bias is not None:
            nn.init.zeros_(module.bias)


def parse_arch(arch: str | Mapping) -> Arch:
    """The `Arch` of a name, a letter or a dict; see `Conv2Former`."""
    if isinstance(arch, str):
        name = ARCH_LETTERS.get(arch.lower(), arch.lower())
        if name not in ARCHS:
            raise ValueError(
                f'arch must be one of {", ".join(ARCHS)}, its first letter '
                f'({", ".join(ARCH_LETTERS)}) or a dict, got {arch!r}'
            )
        return ARCHS[name]
    if not isinstance(arch, Mapping):
        raise TypeError(f'arch must be a str or a dict, got {arch!r}')
    unknown = set(arch) - {'channels', 'depths', 'kernel_size'}
    if unknown or not {'channels', 'depths'} <= set(arch):
        raise ValueError(
            "arch as a dict must have 'channels' and 'depths', and may have 'kernel_size', "
            f'got {dict(arch)}'
        )
    values = {}
    for key in ('channels', 'depths'):
        if not is_sequence(arch[key]):
            raise TypeError(f"arch['{key}'] must be a sequence of ints, got {arch[key]!r}")
        if len(arch[key]) > MOST_STAGES:
            raise ValueError(f"arch['{key}'] must be of at most {MOST_STAGES} stages")
        for value in arch[key]:
            maximum = MOST_CHANNELS if key == 'channels' else MOST_BLOCKS
            check_int(f"arch['{key}']", value, minimum=1, maximum=maximum)
        values[key] = tuple(map(int, arch[key]))
    if not values['channels'] or len(values['channels']) != len(values['depths']):
        raise ValueError(
            "arch['channels'] and arch['depths'] must have one value a stage, "
            f'got channels={values["channels"]} and depths={values["depths"]}'
        )
    if values['channels'][0] % 2:
        raise ValueError(
            "arch['channels'] must begin with an even number, as the stem is half as wide, "
            f'got {values["channels"]}'
        )
    kernel_size = arch.get('kernel_size')
    return Arch(**values) if kernel_size is None else Arch(**values, kernel_size=kernel_size)


def parse_kernel_size(kernel_size: int | Sequence[int], num_stages: int) -> tuple[int, ...]:
    """One odd kernel size a stage."""
    sizes: Sequence[Any] = kernel_size if is_sequence(kernel_size) else (kernel_size,) * num_stages
    if len(sizes) != num_stages:
        raise ValueError(
            f'kernel_size must be an int or one int for each of {num_stages} stages, '
            f'got {kernel_size!r}'
        )
    for size in sizes:
        check_int('kernel_size', size, minimum=1, maximum=LARGEST_KERNEL)
        if size % 2 == 0:
            raise ValueError(f'kernel_size must be odd, got {size}')
    return tuple(map(int, sizes))


def parse_out_indices(out_indices: int | Sequence[int], num_stages: int) -> tuple[int, ...]:
    """Stages from 0, none twice, in the given order."""
    indices: Sequence[Any] = out_indices if is_sequence(out_indices) else (out_indices,)
    if not 1 <= len(indices) <= num_stages:
        raise ValueError(
            f'out_indices must name at least one stage and none of {num_stages} twice, '
            f'got {out_indices!r}'
        )
    for index in indices:
        check_int('out_indices', index, minimum=-num_stages, maximum=num_stages - 1)
    stages = tuple(int(index) % num_stages for index in indices)
    if len(set(stages)) != len(stages):
        raise ValueError(f'out_indices must not name a stage twice, got {out_indices!r}')
    return stages


def refuse_foreign(name: str, arguments: Mapping[str, object]) -> None:
    """Raises TypeError if there are arguments: those of the backbone that a config had before.

    Args:
        name: Of the class, for the message.
        arguments: What a constructor got beyond its own.
    """
    if not arguments:
        return
    advice = [f'{name} has no argument {", ".join(arguments)}']
    if set(arguments) & {'dilations', 'strides', 'dilation', 'output_stride'}:
        advice.append(
            'Its strides are fixed and nothing is dilated: let the head take them as they are '
            '(docs/use_in_your_config.md shows it for DeepLabV3+)'
        )
    if 'pretrained' in arguments:
        advice.append(
            "Weights are named by init_cfg=dict(type='Pretrained', checkpoint=FILE), and a "
            "segmentor's own pretrained must be None"
        )
    advice.append(
        'If these are the arguments of the backbone that a recipe had before, write _delete_=True '
        "in the backbone's dict"
    )
    raise TypeError('. '.join(advice))


def check_choice(name: str, value: object, choices: Collection[str]) -> None:
    """Raises ValueError unless `value` is one of `choices`."""
    if not isinstance(value, str) or value not in choices:
        raise ValueError(f'{name} must be one of {", ".join(choices)}, got {value!r}')


def is_sequence(value: object) -> TypeGuard[Sequence]:
    """Whether a value is a sequence, of which a text is none here."""
    return isinstance(value, Sequence) and not isinstance(value, (str, bytes))


def check_bool(name: str, value: object) -> None:
    """Raises TypeError unless `value` is a bool."""
    if not isinstance(value, (bool, np.bool_)):
        raise TypeError(f'{name} must be a bool, got {value!r}')


def check_init_cfg(init_cfg: object) -> None:
    """Raises TypeError or ValueError unless `init_cfg` is None, a dict with a type, or such."""
    configs = init_cfg if isinstance(init_cfg, (list, tuple)) else [init_cfg]
    for cfg in configs if init_cfg is not None else ():
        if not isinstance(cfg, dict):
            raise TypeError(f'init_cfg must be a dict, a list of dicts or None, got {init_cfg!r}')
        if 'type' not in cfg:
            raise ValueError(f"init_cfg must have a 'type', got {cfg}")


def check_int(name: str, value: object, minimum: int, maximum: int | None = None) -> None:
    """Raises TypeError or ValueError unless `value` is an int within the closed range."""
    allowed = f'at least {minimum}' if maximum is None else f'from {minimum} to {maximum}'
    if isinstance(value, bool) or not isinstance(value, Integral):
        raise TypeError(f'{name} must be an int {allowed}, got {value!r}')
    if value < minimum or not (maximum is None or value <= maximum):
        raise ValueError(f'{name} must be {allowed}, got {value}')


def check_number(
    name: str,
    value: object,
    minimum: float | None = None,
    maximum: float | None = None,
    above: float | None = None,
    below: float | None = None,
) -> None:
    """Raises TypeError or ValueError unless `value` is a finite number within the given bounds."""
    if isinstance(value, bool) or not isinstance(value, Real):
        raise TypeError(f'{name} must be a number, got {value!r}')
    # `numbers.Real` declares < and <= only.
    bounds = [
        (minimum is None or value >= minimum, f'at least {minimum}'),  # type: ignore[operator]
        (maximum is None or value <= maximum, f'at most {maximum}'),
        (above is None or value > above, f'above {above}'),  # type: ignore[operator]
        (below is None or value < below, f'below {below}'),
        (value == value and value not in (math.inf, -math.inf), 'finite'),
    ]
    broken = [text for holds, text in bounds if not holds]
    if broken:
        raise ValueError(f'{name} must be {" and ".join(broken)}, got {value}')
