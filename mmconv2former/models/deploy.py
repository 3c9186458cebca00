"""A network converted for inference: affine parts are folded into neighbouring convolutions.

The results differ by rounding only. Nothing can be trained afterwards, and no checkpoint of the
original network loaded.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.utils.parametrize import is_parametrized

from ..ops import block_stock
from ..ops.block import run, run_block, steps_for
from ..ops.depthwise import DepthwiseConv, prepare_weight
from ..ops.dispatch import autocast_dtype, is_captured, is_transformed, without_autocast
from ..ops.folding import FoldedWeights
from ..ops.mkldnn_fusion import FusedConv, is_fusible
from .blocks import (
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


def check_foldable(name: str, module: nn.Module) -> None:
    """Raises RuntimeError if folding would lose something that is attached to a part."""
    for layer_name, plain in layers_to_fold(module).items():
        layer = module.get_submodule(layer_name)
        is_tanh = getattr(layer, 'approximate', 'none') != 'none'
        if not is_plain(layer, plain) or has_attachment(layer) or is_tanh or lacks_values(layer):
            raise RuntimeError(
                f'switch_to_deploy folds the layers of {name}, but {layer_name or "it"} was '
                f'replaced, lacks a parameter, is parametrized or has hooks: {layer}. Merge or '
                'remove what was attached first'
            )
    if isinstance(module, Block) and len(module.attn.att) != 3:
        raise RuntimeError(
            f'switch_to_deploy folds the layers of {name}, but attn.att must have 3 layers, got '
            f'{len(module.attn.att)}. Remove what was added first'
        )
    if isinstance(module, Downsample) and len(module) != 2:
        raise RuntimeError(
            f'switch_to_deploy folds the layers of {name}, which must be 2, got {len(module)}. '
            'Remove what was added first'
        )
    if isinstance(module, Block) and module.attn.norm.eps != module.mlp.norm.eps:
        raise RuntimeError(
            f'switch_to_deploy folds the layers of {name}, but mlp.norm must have the eps of '
            f'attn.norm, {module.attn.norm.eps}, got {module.mlp.norm.eps}'
        )


def layers_to_fold(module: nn.Module) -> dict[str, type]:
    """Names and types of what folding replaces in a part of a network; '' is the part itself."""
    if isinstance(module, Block):
        layers = {'': Block, **PLAIN_LAYERS}
        del layers['attn.att.2']  # the depthwise convolution is called unchanged
        return layers
    if isinstance(module, Stem):
        *_, norm, conv = module._modules
        return {'': Stem, norm: _BatchNorm, conv: nn.Conv2d}
    if isinstance(module, Downsample):
        return dict(zip(module._modules, (LayerNorm, nn.Conv2d)))
    return {}


def is_plain(layer: nn.Module, plain: type) -> bool:
    """Whether a layer is of exactly this type; of BatchNorm there are several."""
    is_batch_norm = plain is _BatchNorm and isinstance(layer, _BatchNorm)
    return type(layer) is plain or (is_batch_norm and not is_parametrized(layer))


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
        self.normalized_shape, self.eps = attn.norm.normalized_shape, attn.norm.eps
        with torch.no_grad():
            self.gate = FusedConv(*with_norm(attn.norm, *matrix(attn.att[0])))
            self.value = FusedConv(*with_norm(attn.norm, *matrix(attn.v)))
            self.proj = FusedConv(*with_scale(block.layer_scale_1, *matrix(attn.proj)))
            self.fc1 = FusedConv(*with_norm(mlp.norm, *matrix(mlp.fc1)))
            self.fc2 = FusedConv(*with_scale(block.layer_scale_2, *matrix(mlp.fc2)))
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
        is_differentiated = torch.is_grad_enabled() and x.requires_grad
        is_stock = is_differentiated or is_captured() or is_transformed()
        is_by_function = self.is_plain and not is_stock and not is_fusible(x)
        if is_by_function and not has_attachment(self.depthwise):
            return self._by_function(x)
        y = F.layer_norm(x, self.normalized_shape, eps=self.eps)
        a = self.depthwise(self.gate.gelu(y))
        if self.fusion == 'hadamard':
            y = self.value.times(y, a)
        else:
            y = FUSIONS[self.fusion](a, self.value(y))
        x = self.proj.plus(y, x)
        y = F.layer_norm(x, self.normalized_shape, eps=self.eps)
        h = self.fc1.gelu(y)  # (N, H, W, mlp_ratio * C)
        return self.fc2.plus(add(self.pos.gelu(h), h), x)

    def _by_function(self, x: Tensor) -> Tensor:
        x = x.to(self.gate.weight.dtype)  # dtype of the residuals, as in a `Block`
        dtype = autocast_dtype(x)
        steps = steps_for(x, (self.depthwise.weight, self.pos.weight))
        form = dtype, x.device, 'stock' if steps is block_stock else 'triton'
        if form not in self.folded:
            with torch.inference_mode(False), torch.no_grad():  # usable in any mode
                self.folded[form] = self._cast(*form)
        with without_autocast(x):
            return run(run_block, steps, x, None, self.folded[form], self.eps, None)[0]

    def _cast(self, dtype: torch.dtype, device: torch.device, implementation: str) -> FoldedWeights:
        """The weights in a dtype, with depthwise weights in the layout of their kernels."""
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
    with torch.no_grad():
        weight, bias = with_norm(norm, conv.weight, 0 if conv.bias is None else conv.bias)
        conv.weight, conv.bias = nn.Parameter(weight), nn.Parameter(bias)
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
    with torch.no_grad():
        scale = norm.weight / torch.sqrt(norm.running_var + norm.eps)
        shift = norm.bias - norm.running_mean * scale
        bias = (conv.weight * shift.view(1, -1, 1, 1)).sum((1, 2, 3))
        folded = nn.Conv2d(conv.in_channels, conv.out_channels, conv.kernel_size, conv.stride)
        folded.weight = nn.Parameter(conv.weight * scale.view(1, -1, 1, 1))
        folded.bias = nn.Parameter(bias if conv.bias is None else conv.bias + bias)
    return nn.Sequential(*first, folded)


DEPLOYED: dict[type, Callable[[Any], nn.Module]] = {
    Block: DeployedBlock,
    Downsample: deployed_downsample,
    Stem: deployed_stem,
}


def matrix(layer: PointwiseConv) -> tuple[Tensor, Tensor]:
    """Weight (C_out, C_in) and bias of a 1x1 convolution."""
    return layer.weight.flatten(1), layer.bias


def with_norm(norm: nn.LayerNorm, weight: Tensor, bias: Tensor | float) -> tuple[Tensor, Tensor]:
    """Weight (C_out, C_in, ...) and bias of a convolution with the norm's scale and shift."""
    scale = norm.weight.view(1, -1, *(1,) * (weight.dim() - 2))
    shift = norm.bias.view_as(scale) * weight
    return weight * scale, bias + shift.flatten(1).sum(1)


def with_scale(scale: Tensor, weight: Tensor, bias: Tensor) -> tuple[Tensor, Tensor]:
    """Weight (C_out, C_in) and bias of a 1x1 convolution with the layer scale after it."""
    return scale[:, None] * weight, scale * bias


def add(x: Tensor, y: Tensor) -> Tensor:
    """x + y, in place where possible: allocating costs as much as the arithmetic."""
    return x.add_(y) if is_fusible(x) else x + y
