"""What the hierarchical and the isotropic Conv2Former share.

Pretrained weights, arguments, outputs, freezing, modes and checks of the input.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NoReturn

import torch
from mmengine.model import BaseModule, PretrainedInit
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from ..ops.block import RECOMPUTE
from ..ops.dispatch import is_captured
from ..ops.memory_format import to_channels_first
from ..registry import MODELS, WEIGHT_INITIALIZERS
from .arguments import (
    check_choice,
    check_init_cfg,
    check_int,
    check_number,
    parse_out_indices,
    refuse_foreign,
)
from .blocks import Block, LayerNorm, init_layer, prepare
from .deploy import deploy
from .fusion import FUSIONS


class PretrainedModule(BaseModule):
    """mmengine's BaseModule, but weights of `init_cfg=dict(type='Pretrained', ...)` must fit.

    mmengine loads with `strict=False`, so a file of another model changes nothing and raises no
    error. Here `mmconv2former.Pretrained` loads it, with the arguments in the dict. With several
    base classes this one must come first.
    """

    init_cfg: dict | list[dict] | None

    def init_weights(self) -> None:
        """Applies `init_cfg`, pretrained weights last.

        Raises:
            FileNotFoundError, CheckpointError: See `load_pretrained_weights`.
        """
        if self.is_init:
            return
        init_cfg = self.init_cfg
        self.init_cfg = [cfg for cfg in self._init_cfgs() if not is_pretrained(cfg)]
        super().init_weights()
        self.init_cfg = init_cfg
        try:
            self.load_pretrained_weights()
        except Exception:
            self._is_init = False  # so that the next call does not return early
            raise

    def load_pretrained_weights(self) -> None:
        """Loads the checkpoints that `init_cfg` names, and ignores the rest of it.

        Raises:
            FileNotFoundError: There is no such file.
            CheckpointError: It cannot be read or does not fit.
        """
        for cfg in filter(is_pretrained, self._init_cfgs()):
            WEIGHT_INITIALIZERS.build({**cfg, 'type': 'mmconv2former.Pretrained'})(self)

    def _init_cfgs(self) -> list[dict]:
        return [self.init_cfg] if isinstance(self.init_cfg, dict) else list(self.init_cfg or ())


def is_pretrained(init_cfg: Mapping) -> bool:
    """Whether an `init_cfg` loads a checkpoint."""
    return init_cfg['type'] in ('Pretrained', PretrainedInit)


class Conv2FormerBase(PretrainedModule):
    """A network of blocks between a stem and norms `norm{i}` of the outputs.

    A subclass calls `_set_outputs`, builds its stem and its stages with `_block`, and then calls
    `_finish`. `Conv2Former` describes the arguments.
    """

    smallest_input: int  # pixels of a side

    def __init__(
        self,
        *,
        in_channels: int = 3,
        fusion: str = 'hadamard',
        mlp_ratio: float = 4,
        drop_path_rate: float = 0.0,
        layer_scale_init_value: float = 1e-6,
        out_norm: bool = True,
        frozen_stages: int = -1,
        norm_eval: bool = False,
        with_cp: bool = False,
        recompute: str = 'elementwise',
        depthwise_conv: str = 'DepthwiseConv',
        init_cfg: dict | list[dict] | None = None,
        **foreign: NoReturn,
    ) -> None:
        refuse_foreign(type(self).__name__, foreign)
        check_init_cfg(init_cfg)
        check_int('in_channels', in_channels, minimum=1)
        check_number('mlp_ratio', mlp_ratio, minimum=0, below=math.inf)
        check_number('layer_scale_init_value', layer_scale_init_value, -math.inf, math.inf)
        check_number('drop_path_rate', drop_path_rate, minimum=0, below=1)
        check_choice('fusion', fusion, FUSIONS)
        check_choice('recompute', recompute, RECOMPUTE)
        super().__init__(init_cfg)
        self.in_channels = in_channels
        self.drop_path_rate = drop_path_rate
        self.out_norm = out_norm
        self.frozen_stages = frozen_stages
        self.norm_eval = norm_eval
        self.with_cp = with_cp
        self.is_deployed = False
        self._block_options: dict[str, Any] = dict(
            fusion=fusion,
            mlp_ratio=mlp_ratio,
            layer_scale_init_value=layer_scale_init_value,
            recompute=recompute,
            depthwise_conv=find_layer('depthwise_conv', depthwise_conv),
            with_cp=with_cp,
        )

    # ------------------------------------------------------------------------------------ to build
    def _set_outputs(
        self, out_indices: int | Sequence[int], channels: Sequence[int], strides: Sequence[int]
    ) -> None:
        """Chooses the outputs of stages (or blocks) with these channels and strides."""
        check_int('frozen_stages', self.frozen_stages, minimum=-1, maximum=len(channels))
        self.out_indices = parse_out_indices(out_indices, len(channels))
        self.channels = tuple(channels[i] for i in self.out_indices)
        self.strides = tuple(strides[i] for i in self.out_indices)

    def _block(self, channels: int, kernel_size: int, drop_path_rate: float) -> Block:
        mlp_ratio = self._block_options['mlp_ratio']
        if int(channels * mlp_ratio) < 1:
            raise ValueError(f'mlp_ratio {mlp_ratio} leaves no hidden channels of {channels}')
        return Block(channels, kernel_size, drop_path_rate, **self._block_options)

    def _finish(self) -> None:
        """Adds output norms and sets initial values and modes, after all stages are built."""
        for i, channels in zip(self.out_indices, self.channels):
            if self.out_norm:
                self.add_module(f'norm{i}', LayerNorm(channels))
        self.apply(init_layer)
        for module in self._frozen_modules():
            module.requires_grad_(False)
        self.train()  # applies `frozen_stages` and `norm_eval`

    # ----------------------------------------------------------------------- for subclasses to say
    def _stages_to_freeze(self, number: int) -> list[nn.Module]:
        """The stem and the first stages (or blocks)."""
        raise NotImplementedError(f'{type(self).__name__} must say which modules are frozen')

    def _blocks(self) -> Iterable[nn.Module]:
        """The blocks, or the modules that replaced them."""
        raise NotImplementedError(f'{type(self).__name__} must say which blocks it has')

    def _forward(self, x: Tensor) -> tuple[Tensor, ...]:
        """The feature maps of a checked input."""
        raise NotImplementedError(f'{type(self).__name__} must say how it computes')

    # --------------------------------------------------------------------------------------- modes
    def _frozen_modules(self) -> list[nn.Module]:
        if self.frozen_stages < 0:
            return []
        indices = [i for i in self.out_indices if self.out_norm and i < self.frozen_stages]
        norms = [getattr(self, f'norm{i}') for i in indices]
        return [*self._stages_to_freeze(self.frozen_stages), *norms]

    def train(self, mode: bool = True) -> Conv2FormerBase:
        """Sets the mode, except for frozen parts and, with `norm_eval`, the stem's BatchNorms."""
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
        """Converts the network for inference, in place: see `mmconv2former.models.deploy`.

        Load weights first; afterwards nothing can be trained or loaded. Calling it again has no
        effect.

        Returns:
            The module, in eval mode, without parameters that need a gradient.

        Raises:
            RuntimeError: A layer of a block was replaced, is parametrized or has hooks, which would
                be lost.
        """
        if not self.is_deployed:
            deploy(self)
            self.is_deployed = True
        return self.eval().requires_grad_(False)

    # ------------------------------------------------------------------------------------- forward
    def forward(self, x: Tensor) -> tuple[Tensor, ...]:  # (N, in_channels, H, W)
        self._check_input(x)
        if is_captured():
            return self._forward(x)
        # Blocks in wrappers are left out, because they may not have their weights yet.
        with prepare([b for b in self._blocks() if isinstance(b, Block)], x):
            return self._forward(x)

    def _check_input(self, x: Tensor) -> None:
        if torch.jit.is_tracing():  # sizes are tensors there, and a comparison would be frozen
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
        return to_channels_first(x).contiguous()  # mmcv's RoIAlign misreads other layouts


def find_layer(argument: str, name: str) -> type[nn.Module]:
    """The registered class of a layer; `build` would look in the default scope only."""
    layer = MODELS.get(name) if isinstance(name, str) and name else None
    if not isinstance(layer, type):  # mmengine finds any object by its full name
        raise ValueError(f'{argument} must be a registered model, got {name!r}')
    return layer
