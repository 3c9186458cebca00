"""Mixed precision on GPUs and CPUs, for `tools/train.py --amp`.

A run can be resumed in another format and on another device: both wrappers read checkpoints of each
other, of mmengine's `AmpOptimWrapper` and of float32, with and without loss scaling.
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

from ..registry import OPTIM_WRAPPERS, register

DTYPES = {'bfloat16': torch.bfloat16, 'float16': torch.float16}


@register(OPTIM_WRAPPERS)
class ReliableAmpOptimWrapper(AmpOptimWrapper):
    """mmengine's `AmpOptimWrapper` that resumes from checkpoints with and without a loss scale.

    float16 needs loss scaling, bfloat16 does not (`loss_scale=dict(enabled=False)`). The state of a
    disabled scaler is empty; torch's scaler, and so mmengine's wrapper, refuses to load that.
    Arguments are those of mmengine's wrapper.
    """

    def load_state_dict(self, state_dict: dict) -> None:
        """Loads the optimizer, and the loss scale if there is one and it is used.

        Args:
            state_dict: Of this class, mmengine's `AmpOptimWrapper` or `OptimWrapper`.
        """
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
    """mmengine's `AmpOptimWrapper` on the CPU, which refuses to start without a GPU.

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
