"""Mixed precision without a GPU, so that a recipe with `--amp` can be tried on any machine.

mmengine's `AmpOptimWrapper` refuses to start without CUDA. `CpuAmpOptimWrapper` has its arguments,
its loss scaler and its checkpoints, hence a run can go on with either. The formats differ: float16
is usual on GPUs, processors compute in bfloat16.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from mmengine.device import get_device
from mmengine.model import is_model_wrapper
from mmengine.optim import AmpOptimWrapper, OptimWrapper
from torch import Tensor, nn

from .registry import OPTIM_WRAPPERS, register

DTYPES = {'bfloat16': torch.bfloat16, 'float16': torch.float16}


@register(OPTIM_WRAPPERS)
class CpuAmpOptimWrapper(AmpOptimWrapper):
    """mmengine's `AmpOptimWrapper` on the CPU.

    Of a detector, backbone and neck compute in the lower precision, the heads in float32: mmcv's
    RoIAlign and non-maximum suppression know no other on a CPU. Of other models, everything.

    Args:
        loss_scale: 'dynamic', a factor that stays, or the arguments of `torch.amp.GradScaler`.
        dtype: 'bfloat16' or 'float16', in which matrix products and convolutions compute.
        **kwargs: Arguments of mmengine's `OptimWrapper`.

    Raises:
        RuntimeError: The models of this machine run on a GPU, where mmengine's own is right, or
            torch is older than 2.3, whose loss scaler needs a GPU.
        ValueError, TypeError: An argument is not as described above.
    """

    def __init__(
        self,
        loss_scale: str | float | dict = 'dynamic',
        dtype: str = 'bfloat16',
        **kwargs: Any,
    ) -> None:
        OptimWrapper.__init__(self, **kwargs)  # AmpOptimWrapper's asks for CUDA
        if get_device() != 'cpu':
            raise RuntimeError(
                f'CpuAmpOptimWrapper is for a CPU, the device is {get_device()}: use '
                'AmpOptimWrapper'
            )
        if dtype not in DTYPES:
            raise ValueError(f'dtype must be one of {list(DTYPES)}, got {dtype!r}')
        self.cast_dtype = DTYPES[dtype]
        self._scale_update_param = loss_scale if isinstance(loss_scale, float) else None
        settings: dict[str, Any]
        if loss_scale == 'dynamic':
            settings = {}
        elif isinstance(loss_scale, float):
            settings = dict(init_scale=loss_scale)
        elif isinstance(loss_scale, dict):
            settings = loss_scale
        else:
            raise TypeError(f"loss_scale must be 'dynamic', a float or a dict, got {loss_scale!r}")
        if not hasattr(torch.amp, 'GradScaler'):
            raise RuntimeError(
                'mixed precision without a GPU needs the loss scaler of torch 2.3 or later, found '
                f'torch {torch.__version__}'
            )
        self.loss_scaler = torch.amp.GradScaler('cpu', **settings)

    @contextmanager
    def optim_context(self, model: nn.Module) -> Iterator[None]:
        """Context of the forward pass: lower precision, and what `OptimWrapper` does there.

        Args:
            model: The model, in its wrapper for several processes or without.
        """
        inner: Any = model.module if is_model_wrapper(model) else model
        with OptimWrapper.optim_context(self, model), ExitStack() as stack:
            if hasattr(inner, 'with_bbox'):  # of all detectors of mmdet
                for part in (inner.backbone, inner.neck) if inner.with_neck else (inner.backbone,):
                    stack.enter_context(forward_in(part, self.cast_dtype))
            else:
                stack.enter_context(torch.autocast('cpu', self.cast_dtype))
            yield


@contextmanager
def forward_in(module: nn.Module, dtype: torch.dtype) -> Iterator[None]:
    """Lets a module compute in another format while the context lasts; float32 comes out.

    Args:
        module: Returns a tensor or several.
        dtype: For matrix products and convolutions on the CPU.
    """
    forward: Callable = module.forward

    def forward_in_dtype(*args: Any, **kwargs: Any) -> Any:
        with torch.autocast('cpu', dtype):
            outputs = forward(*args, **kwargs)
        if isinstance(outputs, Tensor):
            return outputs.float()
        return tuple(output.float() for output in outputs)

    module.forward = forward_in_dtype
    try:
        yield
    finally:
        del module.forward
