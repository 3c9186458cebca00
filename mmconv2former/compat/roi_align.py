"""mmcv's RoIAlign for features of any memory format.

The compiled operator assumes contiguous (N, C, H, W) input and does not check: it misreads
`torch.channels_last` memory without an error, and a detector trains on scrambled features.
"""

from __future__ import annotations

from functools import wraps
from importlib import import_module
from importlib.util import find_spec
from typing import Any

from torch import Tensor


def guard_roi_align() -> bool:
    """Makes mmcv's RoIAlign copy its input to contiguous memory, in this process.

    Call it before a detector gets `torch.channels_last` features. Contiguous features are not
    copied. The backward pass needs no guard. Calling it again has no effect.

    Returns:
        Whether mmcv is installed with its compiled operators.
    """
    if find_spec('mmcv') is None:
        return False
    try:
        function: Any = import_module('mmcv.ops.roi_align').RoIAlignFunction
    except ImportError:  # mmcv-lite
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
