"""A network converted for inference: affine parts are folded into neighbouring convolutions.

The results differ by rounding only. Nothing can be trained afterwards, and no checkpoint of the
original network loaded.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import zip_longest
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.utils.parametrize import is_parametrized

from ..ops import block_stock
from ..ops.block import run, run_blocks, steps_for
from ..ops.depthwise import DepthwiseConv, aligned, prepare_weight
from ..ops.dispatch import autocast_dtype, is_captured, is_transformed, without_autocast
from ..ops.folding import FoldedWeights, fold_rows
from ..ops.mkldnn_fusion import FusedConv, is_fusible
from .blocks import (
    LAYER_NORM_EPS,
    PLAIN_LAYERS,
    Block,
    Downsample,
    LayerNorm,
    PointwiseConv,
    Stem,
    has_attachment,
)
from .fusion import FUSIONS


def deploy(network: nn.Module) -> None:
    """Replaces stem, blocks and downsamplings of a network with their forms for inference.

    Raises:
        RuntimeError: A layer was added or replaced, lacks a parameter, is parametrized, has hooks
            or another eps, which would be lost. The network is then unchanged.
    """
    for name, module in network.named_modules():
        check_foldable(name, module)
    for parent in list(network.modules()):
        for name, child in parent.named_children():
            for kind, deployed in DEPLOYED.items():
                if isinstance(child, kind):
                    setattr(parent, name, deployed(child))


# Settings of layers that folding relies on, by type.
FOLDED_SETTINGS: dict[type | None, dict[str, Any]] = {
    nn.LayerNorm: dict(eps=LAYER_NORM_EPS),
    nn.GELU: dict(approximate='none'),
    nn.Conv2d: dict(groups=1, padding=(0, 0)),  # a folded shift does not reach the padding
}


def check_foldable(name: str, module: nn.Module) -> None:
    """Raises RuntimeError if folding would lose something that is attached to a part."""
    for layer_name, plain in layers_to_fold(module).items():
        layer = module.get_submodule(layer_name)
        if not is_plain(layer, plain) or has_attachment(layer) or lacks_values(layer):
            raise RuntimeError(
                f'switch_to_deploy folds the layers of {name}, but {layer_name or "it"} was added '
                'or replaced, lacks a parameter, is parametrized, has hooks or other settings: '
                f'{layer}. Merge or remove what was attached first'
            )


def layers_to_fold(module: nn.Module) -> dict[str, type | None]:
    """Names and types of what folding replaces in a part of a network.

    '' is the part itself. The type of a layer that was added is None.
    """
    if isinstance(module, Block):
        added = [f'attn.att.{name}' for name in list(module.attn.att._modules)[3:]]
        layers = {'': Block, **PLAIN_LAYERS, **dict.fromkeys(added)}
        del layers['attn.att.2']  # the depthwise convolution is called unchanged
        return layers
    if isinstance(module, Stem):
        *_, norm, conv = module._modules
        return {'': Stem, norm: _BatchNorm, conv: nn.Conv2d}
    if isinstance(module, Downsample):
        names = module._modules
        return dict(zip_longest(names, (LayerNorm, nn.Conv2d))) if len(names) > 1 else {'': None}
    return {}


def is_plain(layer: nn.Module, plain: type | None) -> bool:
    """Whether a layer is of exactly this type, with the network's settings."""
    if plain is _BatchNorm:  # there are several
        return isinstance(layer, _BatchNorm) and not is_parametrized(layer)
    settings = FOLDED_SETTINGS.get(plain, {})
    return type(layer) is plain and all(getattr(layer, k) == v for k, v in settings.items())


def lacks_values(layer: nn.Module) -> bool:
    """Whether a layer has no bias or no affine part; that of a plain convolution is optional."""
    values = [getattr(layer, key, 0) for key in ('weight', 'bias', 'running_var')]
    return type(layer) is not nn.Conv2d and any(value is None for value in values)


class DeployedBlock(nn.Module):
    """A `Block` for inference, (N, H, W, C) -> (N, H, W, C).

    The LayerNorms' scale and shift are folded into the convolutions after them, the layer scales
    into those before the residuals. On a CPU in float32, GELU, Hadamard product and residuals are
    fused into the operators before them (`mmconv2former.ops.mkldnn_fusion`); elsewhere
    `mmconv2former.ops.block` computes the block.
    """

    def __init__(self, block: Block) -> None:
        super().__init__()
        attn, mlp = block.attn, block.mlp
        self.normalized_shape = attn.norm.normalized_shape
        norm_1, norm_2 = ((norm.weight, norm.bias) for norm in (attn.norm, mlp.norm))
        dtype = block.layer_scale_1.dtype
        with torch.no_grad():
            self.gate = FusedConv(*with_affine(*norm_1, *matrix(attn.att[0])))
            self.value = FusedConv(*with_affine(*norm_1, *matrix(attn.v)))
            self.proj = FusedConv(*fold_rows(*matrix(attn.proj), block.layer_scale_1, dtype))
            self.fc1 = FusedConv(*with_affine(*norm_2, *matrix(mlp.fc1)))
            self.fc2 = FusedConv(*fold_rows(*matrix(mlp.fc2), block.layer_scale_2, dtype))
            self.pos = FusedConv(mlp.pos.weight.detach(), mlp.pos.bias.detach())
        self.depthwise = attn.att[2]
        self.fusion = attn.fusion
        is_depthwise_plain = (
            type(self.depthwise) is DepthwiseConv and self.depthwise.bias is not None
        )
        self.is_plain = self.fusion == 'hadamard' and is_depthwise_plain
        # Made as needed, and shared by the replicas of nn.DataParallel.
        self.folded: dict[tuple[torch.dtype, torch.device, str], FoldedWeights] = {}

    def forward(self, x: Tensor) -> Tensor:
        if self._is_by_function(x):
            return self.run_together([self], x)
        y = F.layer_norm(x, self.normalized_shape, eps=LAYER_NORM_EPS)
        a = self.depthwise(self.gate.gelu(y))
        if self.fusion == 'hadamard':
            y = self.value.times(y, a)
        else:
            y = FUSIONS[self.fusion](a, self.value(y))
        x = self.proj.plus(y, x)
        y = F.layer_norm(x, self.normalized_shape, eps=LAYER_NORM_EPS)
        h = self.fc1.gelu(y)  # (N, H, W, mlp_ratio * C)
        return self.fc2.plus(add(self.pos.gelu(h), h), x)

    def _is_by_function(self, x: Tensor) -> bool:
        is_differentiated = torch.is_grad_enabled() and x.requires_grad
        is_stock = is_differentiated or is_captured() or is_transformed()
        is_by_function = self.is_plain and not is_stock and not is_fusible(x)
        return is_by_function and not has_attachment(self.depthwise)

    def key_to_join(self, x: Tensor) -> Any:
        """See `run_in_turn`."""
        is_joined = type(self) is DeployedBlock and self._is_by_function(x)
        return (DeployedBlock, self.gate.weight.dtype) if is_joined else None

    @staticmethod
    def run_together(blocks: Sequence[DeployedBlock], x: Tensor) -> Tensor:
        """Consecutive blocks as one function, (N, H, W, C) -> (N, H, W, C)."""
        x = x.to(blocks[0].gate.weight.dtype)  # dtype of the residuals, as in a `Block`
        weights = [weight for b in blocks for weight in (b.depthwise.weight, b.pos.weight)]
        steps = steps_for(x, weights)
        form = autocast_dtype(x), x.device, 'stock' if steps is block_stock else 'triton'
        folded = [block._folded_in(*form) for block in blocks]
        factors = [(None, None)] * len(blocks)
        with without_autocast(x):
            return run(run_blocks, steps, x, factors, folded, LAYER_NORM_EPS, None)[0]

    def _folded_in(self, *form: Any) -> FoldedWeights:
        if form not in self.folded:
            with torch.inference_mode(False), torch.no_grad():  # usable in any mode
                self.folded[form] = self._cast(*form)
        return self.folded[form]

    def _cast(self, dtype: torch.dtype, device: torch.device, implementation: str) -> FoldedWeights:
        """The weights in a dtype, with depthwise weights in the layout of their kernels."""
        pair = [torch.cat(parts) for parts in zip(self.gate.pair(), self.value.pair())]
        pair, proj, fc1, fc2 = (
            [aligned(tensor.to(dtype)) for tensor in tensors]
            for tensors in (pair, self.proj.pair(), self.fc1.pair(), self.fc2.pair())
        )
        depthwise, pos = (
            (prepare_weight(layer.weight.detach(), dtype, implementation), layer.bias.detach())
            for layer in (self.depthwise, self.pos)
        )
        return FoldedWeights._make((*pair, *depthwise, *proj, *fc1, *pos, *fc2, None, None))

    def _load_from_state_dict(self, *args: Any) -> None:
        self.folded = {}
        super()._load_from_state_dict(*args)

    def _apply(self, function: Callable, recurse: bool = True) -> nn.Module:
        self.folded = {}  # values, dtype or device may change
        return super()._apply(function, recurse)

    def __getstate__(self) -> dict:
        return self.__dict__ | {'folded': {}}  # neither copied nor saved


def deployed_downsample(downsample: Downsample) -> nn.Module:
    """A `Downsample` whose LayerNorm only normalises; the convolution has its scale and shift."""
    layers: list[Any] = list(downsample)
    norm, conv = layers
    absorb(norm.weight, norm.bias, conv)
    norm.register_parameter('weight', None)
    norm.register_parameter('bias', None)
    return downsample


def deployed_stem(stem: Stem) -> nn.Module:
    """A `Stem` with its second BatchNorm folded into the convolution after it.

    The first BatchNorm stays: the convolution after it pads with zeros, while a folded shift would
    also apply to the padding.
    """
    layers: list[Any] = list(stem)
    *first, norm, conv = layers
    scale = norm.weight / torch.sqrt(norm.running_var + norm.eps)
    absorb(scale, norm.bias - norm.running_mean * scale, conv)
    return nn.Sequential(*first, conv)


@torch.no_grad()
def absorb(scale: Tensor, shift: Tensor, conv: nn.Conv2d) -> None:
    """Folds the scale and shift (C_in,) of its input into a convolution, in place."""
    bias = 0 if conv.bias is None else conv.bias
    weight, bias = with_affine(scale, shift, conv.weight, bias)
    conv.weight, conv.bias = nn.Parameter(weight), nn.Parameter(bias)


DEPLOYED: dict[type, Callable[[Any], nn.Module]] = {
    Block: DeployedBlock,
    Downsample: deployed_downsample,
    Stem: deployed_stem,
}


def matrix(layer: PointwiseConv) -> tuple[Tensor, Tensor]:
    """Weight (C_out, C_in) and bias of a 1x1 convolution."""
    return layer.weight.flatten(1), layer.bias


def with_affine(
    scale: Tensor, shift: Tensor, weight: Tensor, bias: Tensor | float
) -> tuple[Tensor, Tensor]:
    """Weight (C_out, C_in, ...) and bias of a convolution with the scale and shift before it."""
    scale = scale.view(1, -1, *(1,) * (weight.dim() - 2))
    return weight * scale, bias + (shift.view_as(scale) * weight).flatten(1).sum(1)


def add(x: Tensor, y: Tensor) -> Tensor:
    """x + y, in place where possible: allocating costs as much as the arithmetic."""
    return x.add_(y) if is_fusible(x) else x + y
