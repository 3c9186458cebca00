"""Mixed precision on GPUs and CPUs, for `tools/train.py --amp`.

A run can resume in another format and on another device: both wrappers load the state of the other,
of mmengine's `AmpOptimWrapper` and of `OptimWrapper`, with and without loss scaling.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from mmengine.device import get_device
from mmengine.logging import print_log
from mmengine.model import is_model_wrapper
from mmengine.optim import AmpOptimWrapper, OptimWrapper
from torch import Tensor, nn
from torch.utils._pytree import tree_map

from ..registry import OPTIM_WRAPPERS, register

DTYPES = {'bfloat16': torch.bfloat16, 'float16': torch.float16}


@register(OPTIM_WRAPPERS)
class ReliableAmpOptimWrapper(AmpOptimWrapper):
    """mmengine's `AmpOptimWrapper`, which also resumes after loss scaling was switched on or off.

    float16 needs loss scaling, bfloat16 does not (`loss_scale=dict(enabled=False)`). A disabled
    scaler saves an empty state, which torch refuses to load into an enabled one.
    """

    def load_state_dict(self, state_dict: dict) -> None:
        """Loads the optimizer, and the loss scale if it was saved and is used."""
        has_scale, scales = bool(state_dict.get('loss_scaler')), self.loss_scaler.is_enabled()
        if scales and not has_scale:
            state_dict.pop('loss_scaler', None)
            scale = self.loss_scaler.get_scale()
            print_log(f'No loss scale in the checkpoint; starting with {scale:g}.', 'current')
        elif has_scale and not scales:
            print_log('Loss scaling is off; ignoring the loss scale of the checkpoint.', 'current')
        super().load_state_dict(state_dict)


@register(OPTIM_WRAPPERS)
class CpuAmpOptimWrapper(ReliableAmpOptimWrapper):
    """`AmpOptimWrapper` for CPUs, where mmengine's refuses to start.

    Detectors run backbone and neck in low precision and their heads in float32, because mmcv's
    RoIAlign and NMS support only float32 on CPUs. Other models run in low precision as a whole.

    Args:
        loss_scale: 'dynamic', a constant factor, or arguments of `torch.amp.GradScaler`, which
            needs torch 2.3 or later on a CPU.
        dtype: 'bfloat16' or 'float16', for matrix products and convolutions.
        **kwargs: Arguments of `OptimWrapper`.

    Raises:
        RuntimeError: Models run on a GPU on this machine.
        ValueError: `dtype` or `loss_scale` is not as described above.
    """

    def __init__(
        self, loss_scale: str | float | dict = 'dynamic', dtype: str = 'bfloat16', **kwargs: Any
    ) -> None:
        OptimWrapper.__init__(self, **kwargs)  # AmpOptimWrapper's asks for CUDA
        if get_device() != 'cpu':
            raise RuntimeError(
                f'CpuAmpOptimWrapper needs device cpu, got {get_device()}: use AmpOptimWrapper'
            )
        if dtype not in DTYPES:
            raise ValueError(f'dtype must be one of {list(DTYPES)}, got {dtype!r}')
        self.cast_dtype = DTYPES[dtype]
        self._scale_update_param = None
        settings: dict[str, Any] = {}
        if isinstance(loss_scale, dict):
            settings = loss_scale
        elif loss_scale != 'dynamic':
            self._scale_update_param = settings['init_scale'] = float(loss_scale)
        self.loss_scaler = torch.amp.GradScaler('cpu', **settings)

    @contextmanager
    def optim_context(self, model: nn.Module) -> Iterator[None]:
        """Context of the forward pass.

        Args:
            model: The model, with or without its wrapper for several processes.
        """
        inner: Any = model.module if is_model_wrapper(model) else model
        with OptimWrapper.optim_context(self, model), ExitStack() as stack:
            if hasattr(inner, 'with_bbox'):  # a detector of mmdet
                for part in (inner.backbone, inner.neck) if inner.with_neck else (inner.backbone,):
                    stack.enter_context(forward_in(part, self.cast_dtype))
            else:
                stack.enter_context(torch.autocast('cpu', self.cast_dtype))
            yield


@contextmanager
def forward_in(module: nn.Module, dtype: torch.dtype) -> Iterator[None]:
    """Lets a module compute in another dtype; its outputs are float32."""
    forward: Callable = module.forward

    def forward_in_dtype(*args: Any, **kwargs: Any) -> Any:
        with torch.autocast('cpu', dtype):
            return tree_map(Tensor.float, forward(*args, **kwargs))

    module.forward = forward_in_dtype
    try:
        yield
    finally:
        del module.forward
