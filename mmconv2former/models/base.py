"""What the hierarchical and the isotropic Conv2Former share: modes, freezing, input checks."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from ..checkpoint.loading import LoadsPretrained
from ..compat.roi_align import guard_roi_align
from ..ops.block import folded_together
from ..ops.dispatch import is_captured
from ..ops.memory_format import to_channels_first
from .arguments import MOST_CHANNELS, check_bool, check_init_cfg, check_int, check_number
from .blocks import Block, init_layer


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
        """Exchanges modules for those of `mmconv2former.models.deploy`."""
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
        """Takes the form for inference, in place: see `mmconv2former.models.deploy`.

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
        with folded_together([b for b in blocks if isinstance(b, Block)], x):
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
