"""mmcv's RoIAlign with features of any memory format.

The compiled operator takes its input to be contiguous (N, C, H, W) and does not check: it reads
`torch.channels_last` memory as if it were that, without an error. A detector then trains on
scrambled features.
"""

from __future__ import annotations

from functools import wraps
from importlib import import_module
from importlib.util import find_spec
from typing import Any

from torch import Tensor


def guard_roi_align() -> bool:
    """Has mmcv's RoIAlign make its input contiguous, in this process from now on.

    Whoever hands `torch.channels_last` features to detectors calls this first. Calling it again
    has no effect. Contiguous features are passed on without a copy, others are copied at each call
    of the operator. Its backward pass makes its gradient contiguous by itself.

    Returns:
        Whether there is an mmcv with the operator.
    """
    if find_spec('mmcv') is None:
        return False
    try:
        function: Any = import_module('mmcv.ops.roi_align').RoIAlignFunction
    except ImportError:  # an mmcv without compiled operators
        return False
    stock = function.forward
    if getattr(stock, 'makes_contiguous', False):
        return True

    @wraps(stock)
    def forward(ctx: Any, input: Tensor, *args: Any) -> Tensor:
        return stock(ctx, input.contiguous(), *args)

    forward.makes_contiguous = True  # type: ignore[attr-defined]
    function.forward = staticmethod(forward)
    return True
