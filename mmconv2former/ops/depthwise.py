"""Depthwise convolution with stride 1 and 'same' zero padding, (N, H, W, C) in and out.

`depthwise_conv2d` and `DepthwiseConv` are for any network. `choose` is the one place that decides
which implementation runs:

| name | where | what |
| --- | --- | --- |
| triton | CUDA, ROCm | `mmconv2former.ops.depthwise_triton`; on a CPU in Triton's interpreter |
| native | CUDA, ROCm | torch's own kernels on (N, C, H, W), with copies from and to (N, H, W, C) |
| cudnn | CUDA, ROCm | cuDNN (MIOpen), in `torch.channels_last` |
| matmul | CPU | the stock operator, but the weight gradient with matrix products |
| stock | anywhere | the stock operator in `torch.channels_last` |

The environment variable `MMCONV2FORMER_DEPTHWISE` (auto or a name) overrides the choice if the
device has that implementation.
"""

from __future__ import annotations

import functools
import logging
import math
import os
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from mmengine.logging import print_log
from torch import Tensor, nn

from . import depthwise_matmul
from .dispatch import (
    autocast_dtype,
    is_autocast_enabled,
    is_compiling,
    is_cpu_float32,
    is_intercepted,
    is_transformed,
    without_autocast,
)
from .memory_format import to_channels_first, to_channels_last
from .triton_support import (
    MOST_CHANNELS,
    failures,
    is_interpreted,
    load,
    run_triton,
    triton_problem,
)

VARIABLE = 'MMCONV2FORMER_DEPTHWISE'
SETTINGS = ('auto', 'triton', 'cudnn', 'native', 'matmul', 'stock')
setting = os.environ.get(VARIABLE, 'auto')  # read once, as a launch must cost little
# Up to this size cuDNN has fast kernels for channels_last (measured on an H100).
LARGEST_FAST_CUDNN_KERNEL = 7
# torch 2.4 has registered operators too, but counts no FLOPs of them.
HAS_OPERATORS = torch.__version__ >= (2, 5)  # type: ignore[operator]
# Devices for which a captured graph gets the registered operator instead of the stock one.
OPERATOR_DEVICES = ('cuda',) if HAS_OPERATORS else ()


# ---------------------------------------------------------------------------------------- for users
class DepthwiseConv(nn.Conv2d):
    """`depthwise_conv2d` as a module, with the parameters of a depthwise `nn.Conv2d`.

    Args:
        channels: C.
        kernel_size: K, odd.
        bias: Whether to add a bias.

    Shapes:
        (N, H, W, C) in and out; weight (C, 1, K, K), bias (C,).

    Example, in a network of (N, C, H, W) tensors, fastest in `torch.channels_last` memory:

        conv = DepthwiseConv(channels=256, kernel_size=31).cuda().bfloat16()
        x = torch.rand(8, 256, 56, 56, device='cuda', dtype=torch.bfloat16)
        y = conv(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)

    Raises:
        ValueError: The kernel size is even.
    """

    bias: Any  # a parameter, or None

    def __init__(self, channels: int, kernel_size: int, bias: bool = True) -> None:
        if kernel_size % 2 == 0:
            raise ValueError(f'kernel_size must be odd, got {kernel_size}')
        super().__init__(
            channels, channels, kernel_size, padding=kernel_size // 2, groups=channels, bias=bias
        )

    def forward(self, x: Tensor) -> Tensor:
        return depthwise_conv2d(x, self.weight, self.bias)


def depthwise_conv2d(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """Depthwise convolution with stride 1 and 'same' zero padding.

    Under autocast it computes in autocast's dtype. GPUs sum in float32, and the weight gradient is
    the same in every run.

    Args:
        x: Input (N, H, W, C), fastest if contiguous and C a multiple of 8.
        weight: (C, 1, K, K), K odd, as in `nn.Conv2d(C, C, K, groups=C)`.
        bias: (C,) or None.

    Returns:
        (N, H, W, C), contiguous, of the dtype of x or of autocast.

    Raises:
        ValueError: A shape is not as above, or the dtypes differ without autocast.
    """
    check(x, weight, bias)
    implementation = choose(x, weight)
    if implementation in ('triton', 'native', 'matmul') and torch.is_grad_enabled():
        return DepthwiseConvFunction.apply(x, weight, bias, implementation)
    if implementation in ('operator', 'triton'):  # which autocast does not reach
        x = x.to(autocast_dtype(x))
    if implementation == 'operator':
        weight, bias = weight.to(x.dtype), None if bias is None else bias.to(x.dtype)
    elif weight.requires_grad and not (is_compiling() or torch.jit.is_tracing()):
        # A view, so that the gradient has the weight's strides: else DDP would copy it.
        weight = weight.flatten(1).view_as(weight)
    return depthwise_conv(x, weight, bias, implementation)


def check(x: Tensor, weight: Tensor, bias: Tensor | None) -> None:
    """Raises ValueError unless `depthwise_conv2d` takes these shapes and dtypes."""
    if torch.jit.is_tracing():  # sizes are tensors there
        return
    channels = weight.shape[0]
    if weight.dim() != 4 or weight.shape[1] != 1 or weight.shape[2] != weight.shape[3]:
        raise ValueError(f'weight must have shape (C, 1, K, K), got {tuple(weight.shape)}')
    if weight.shape[2] % 2 == 0:
        raise ValueError(f'weight must have an odd kernel size, got {weight.shape[2]}')
    if x.dim() != 4 or x.shape[3] != channels:
        raise ValueError(f'x must have shape (N, H, W, C={channels}), got {tuple(x.shape)}')
    if bias is not None and bias.shape != (channels,):
        raise ValueError(f'bias must have shape (C={channels},), got {tuple(bias.shape)}')
    if weight.dtype != x.dtype and not is_autocast_enabled(x.device.type):
        raise ValueError(f'x and weight must have one dtype, got {x.dtype} and {weight.dtype}')


# ------------------------------------------------------------------------------------------- choice
def choose(x: Tensor, weight: Tensor, is_trained: bool | None = None) -> str:
    """The implementation for an input and a weight: see the table at the top of this file.

    Args:
        x: Input (N, H, W, C); its values do not matter.
        weight: (C, 1, K, K).
        is_trained: Whether its gradient is needed; None for `weight.requires_grad`.

    Returns:
        A name in that table, or 'operator': the registered operator, which chooses when a graph
        runs.

    Raises:
        ValueError: `MMCONV2FORMER_DEPTHWISE` has an unknown value.
        RuntimeError: It asks for Triton, which cannot run here.
    """
    has_operator = x.device.type in OPERATOR_DEVICES
    if is_compiling():
        return 'operator' if has_operator and not torch.onnx.is_in_onnx_export() else 'stock'
    # Transforms of `torch.func` know neither autograd functions nor registered derivatives.
    if torch.jit.is_tracing() or is_transformed():
        return 'stock'
    if has_operator and is_intercepted(x):
        return 'operator'
    return choose_kernel(x, weight, is_trained)


def choose_kernel(x: Tensor, weight: Tensor, is_trained: bool | None = None) -> str:
    """Like `choose`, for operators that go straight to the device."""
    implementation = device_choice(weight, autocast_dtype(x))
    if implementation == 'auto':  # a CPU, where the size of the input matters
        is_trained = weight.requires_grad if is_trained is None else is_trained
        is_fast = is_trained and is_cpu_float32(x) and depthwise_matmul.is_faster(x, weight)
        return 'matmul' if is_fast else 'stock'
    if implementation == 'triton' and not is_in_reach(*x.shape[:3], *weight.shape[::3]):
        return 'native'
    return implementation


def is_in_reach(batch: int, height: int, width: int, channels: int, kernel_size: int) -> bool:
    """Whether the Triton kernels can address an input: offsets within a program have 32 bits.

    ROCm's compiler uses 32-bit offsets throughout if the first tensor it sees is below 2 GiB.
    """
    elements = batch * height * width * channels
    most = 2**28 if torch.version.hip is not None else 2**62
    return 0 < elements < most and width * channels * (kernel_size + 8) < 2**31


def runs_triton(x: Tensor) -> bool:
    """Whether the kernels of norms run on x, by the same rules."""
    if (x.device.type != 'cuda' and setting != 'triton') or x.dim() != 4:
        return False
    batch, height, width, channels = x.shape
    reach = is_in_reach(batch, height, width, channels, kernel_size=3)
    reach = reach and height * width * channels < 2**31  # offsets within an image have 32 bits
    if not reach or channels > MOST_CHANNELS or is_intercepted(x):
        return False
    return choice_for(setting, x.device, x.dtype, 3, bool(failures)) == 'triton'


def implementations(x: Tensor, weight: Tensor) -> list[str]:
    """All implementations that can run on an input and a weight."""
    if x.device.type == 'cuda':
        has_triton = triton_problem(x.device, x.dtype, weight.shape[-1]) is None
        return [*(['triton'] if has_triton else []), 'native', 'cudnn']
    return ['stock', 'matmul', *(['triton'] if is_interpreted() else [])]


def device_choice(weight: Tensor, dtype: torch.dtype) -> str:
    """The implementation for inputs of any size; 'auto' if the size decides."""
    return choice_for(setting, weight.device, dtype, weight.shape[-1], bool(failures))


@functools.cache
def choice_for(
    setting: str, device: torch.device, dtype: torch.dtype, kernel_size: int, has_failed: bool
) -> str:
    """`device_choice`, cached by what it depends on; `has_failed` if a kernel did not compile."""
    if setting not in SETTINGS:
        raise ValueError(f'{VARIABLE} must be one of {", ".join(SETTINGS)}, got {setting!r}')
    if device.type == 'cpu' and setting != 'triton':
        return setting if setting in ('matmul', 'stock') else 'auto'
    if device.type not in ('cpu', 'cuda'):  # 'cuda' is ROCm's name, too
        return 'stock'
    problem = triton_problem(device, dtype, kernel_size)
    if setting == 'triton' and problem is not None and not has_failed:
        raise RuntimeError(f'{VARIABLE}=triton: {problem}')
    if device.type == 'cpu':
        return 'auto' if has_failed else 'triton'
    if setting in ('native', 'cudnn'):
        choice, reason = setting, f' ({VARIABLE}={setting})'
    elif problem is None:
        choice, reason = 'triton', ''
    else:
        choice = 'cudnn' if kernel_size <= LARGEST_FAST_CUDNN_KERNEL else 'native'
        reason = f' ({problem})'
    log_once(f'Depthwise convolutions, kernel {kernel_size}, {dtype}: {choice}{reason}.')
    return choice


@functools.cache
def log_once(text: str) -> None:
    """Logs a line at its first occurrence."""
    print_log(text, logger='current', level=logging.INFO)


# --------------------------------------------------------------------------------- implementations
def prepare_weight(weight: Tensor, dtype: torch.dtype, implementation: str) -> Tensor:
    """A weight (C, 1, K, K) in `dtype` and the memory layout of the implementation."""
    if implementation == 'triton':
        return load('depthwise_triton').lay_out(weight, dtype)
    return weight.to(dtype)


def aligned(x: Tensor) -> Tensor:
    """x, contiguous and aligned to 16 bytes, as compiled kernels expect it."""
    x = x.contiguous()
    return x if x.data_ptr() % 16 == 0 else x.clone()


def depthwise_conv(
    x: Tensor, weight: Tensor, bias: Tensor | None, implementation: str | None = None
) -> Tensor:
    """Depthwise convolution, (N, H, W, C) in and out; only stock operators are differentiable.

    Args:
        x: Input (N, H, W, C).
        weight: (C, 1, K, K), K odd, of the dtype of x, best as `prepare_weight` returns it.
        bias: (C,) or None.
        implementation: One of `implementations`; None for that of `choose`.
    """
    implementation = implementation or choose(x, weight)
    if implementation == 'operator':
        return torch.ops.mmconv2former.depthwise_conv2d(x, weight, bias)
    if implementation == 'triton':
        return run_triton(conv_by_triton, depthwise_conv, x, weight, bias)
    if bias is not None and bias.dtype != weight.dtype:
        bias = bias.to(weight.dtype)
    x = to_channels_first(x)
    if implementation == 'native':
        x, weight = x.contiguous(), weight.contiguous()
    # int: torch < 2.4 traces sizes as tensors, which padding does not take
    padding, channels = int(weight.shape[-1]) // 2, int(weight.shape[0])
    return to_channels_last(F.conv2d(x, weight, bias, padding=padding, groups=channels))


def conv_by_triton(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """The convolution with Triton kernels."""
    weight = prepare_weight(weight, x.dtype, 'triton')
    bias = None if bias is None else bias.contiguous()
    return load('depthwise_triton').depthwise_forward(aligned(x), weight, bias)


def depthwise_conv_backward(
    grad: Tensor,
    x: Tensor,
    weight: Tensor,
    needs: Sequence[bool] = (True, True, True),
    implementation: str | None = None,
) -> tuple[Any, Any, Any]:
    """Gradients of `depthwise_conv` for input, kernel and bias.

    Args:
        grad: Gradient of the output (N, H, W, C).
        x: Input (N, H, W, C).
        weight: (C, 1, K, K), of the dtype of x, best as `prepare_weight` returned it.
        needs: Which of the three gradients are needed; the others are None.
        implementation: One of `implementations`; None for that of `choose`.

    Returns:
        (N, H, W, C) of the dtype of x, and (C, 1, K, K) and (C,) of that or a wider dtype.
    """
    implementation = implementation or choose(x, weight)
    if implementation == 'operator':
        grads = torch.ops.mmconv2former.depthwise_conv2d_backward(grad, x, weight, [*needs])
        grad_x, grad_weight, grad_bias = (g if need else None for g, need in zip(grads, needs))
        return grad_x, grad_weight, grad_bias
    if implementation == 'triton':
        return run_triton(backward_by_triton, depthwise_conv_backward, grad, x, weight, needs)
    needs_x, needs_weight, needs_bias = needs
    x, grad = to_channels_first(x), to_channels_first(grad)
    if implementation == 'native':
        x, grad, weight = x.contiguous(), grad.contiguous(), weight.contiguous()
    by_matmul = implementation == 'matmul' and needs_weight
    padding, channels = weight.shape[-1] // 2, weight.shape[0]
    grad_x, grad_weight, grad_bias = torch.ops.aten.convolution_backward(
        grad, x, weight, [channels], [1, 1], [padding, padding], [1, 1], False, [0, 0], channels,
        (needs_x, needs_weight and not by_matmul, needs_bias and not by_matmul),
    )  # fmt: skip
    if by_matmul:
        grad_weight = depthwise_matmul.weight_gradient(x, grad, weight.shape[-1])
        # For the gradient of the bias, oneDNN would also compute that of the weight.
        grad_bias = grad.sum((0, 2, 3)) if needs_bias else None
    elif needs_weight:  # strides of sizes of 1 as parameters have them, for DDP's buckets
        grad_weight = grad_weight.flatten(1).view(weight.shape)
    return to_channels_last(grad_x) if needs_x else None, grad_weight, grad_bias


def backward_by_triton(
    grad: Tensor, x: Tensor, weight: Tensor, needs: Sequence[bool]
) -> tuple[Any, Any, Any]:
    """The gradients with Triton kernels; see `depthwise_conv_backward`."""
    needs_x, needs_weight, needs_bias = needs
    kernels, grad = load('depthwise_triton'), aligned(grad)
    dtype = torch.promote_types(x.dtype, torch.float32)
    grad_x = grad_weight = grad_bias = None
    if needs_x:
        weight = prepare_weight(weight, x.dtype, 'triton')
        grad_x = kernels.depthwise_forward(grad, weight, None, flip=True)
    if needs_weight:
        grad_weight, grad_bias = kernels.depthwise_weight_gradient(
            aligned(x), grad, weight.shape[-1], dtype, needs_bias
        )
    elif needs_bias:
        grad_bias = grad.sum((0, 1, 2), dtype=dtype)
    return grad_x, grad_weight, grad_bias


class DepthwiseConvFunction(torch.autograd.Function):
    """`depthwise_conv` with the gradients of `depthwise_conv_backward`, also under autocast."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, implementation: str
    ) -> Tensor:
        dtype = autocast_dtype(x)
        ctx.implementation = implementation
        with without_autocast(x):
            prepared = prepare_weight(weight, dtype, implementation)
            # Gradients of gradients need the inputs themselves.
            cast = x.to(dtype)
            ctx.save_for_backward(x, weight, bias, cast, prepared)
            out = depthwise_conv(cast, prepared, bias, implementation)
        return out.data  # not a view, so that it may be modified in place

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, bias, cast, prepared = ctx.saved_tensors
        implementation = ctx.implementation
        with without_autocast(x):
            if torch.is_grad_enabled():  # gradients of gradients: with operators that have them
                implementation, cast, prepared = 'stock', x.to(cast.dtype), weight.to(cast.dtype)
            grads = depthwise_conv_backward(
                grad.to(cast.dtype), cast, prepared, ctx.needs_input_grad[:3], implementation
            )
        dtypes = [None if value is None else value.dtype for value in (x, weight, bias)]
        results = (None if g is None else g.to(dtype) for g, dtype in zip(grads, dtypes))
        return *results, None


# ----------------------------------------------------------------------------- registered operators
# Each is one node of a captured graph. They compute what the functions above compute.
if HAS_OPERATORS:
    from torch.utils.flop_counter import register_flop_formula

    @torch.library.custom_op(
        'mmconv2former::depthwise_conv2d',
        mutates_args=(),
        schema='(Tensor x, Tensor weight, Tensor? bias) -> Tensor',
    )
    def operator(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        """The convolution as one operator for graphs."""
        with without_autocast(x):  # which would change the dtype that the fake version promises
            return depthwise_conv(x, weight, bias, choose_kernel(x, weight))

    @operator.register_fake
    def _(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        return x.new_empty(x.shape)

    @torch.library.custom_op(
        'mmconv2former::depthwise_conv2d_backward',
        mutates_args=(),
        schema='(Tensor grad, Tensor x, Tensor weight, bool[] needs) -> (Tensor, Tensor, Tensor)',
    )
    def operator_backward(
        grad: Tensor, x: Tensor, weight: Tensor, needs: Sequence[bool]
    ) -> tuple[Tensor, ...]:
        """The gradients of the convolution as one operator; gradients not needed are empty."""
        grads = depthwise_conv_backward(grad, x, weight, needs, choose_kernel(x, weight))
        # Operators cannot return None, and must return the dtypes of their fake versions.
        return tuple(x.new_empty(0) if value is None else value.to(x.dtype) for value in grads)

    @operator_backward.register_fake
    def _(grad: Tensor, x: Tensor, weight: Tensor, needs: Sequence[bool]) -> tuple[Tensor, ...]:
        shapes = (x.shape, weight.shape, weight.shape[:1])
        return tuple(x.new_empty(shape if need else 0) for shape, need in zip(shapes, needs))

    def setup_context(ctx: Any, inputs: tuple, output: Tensor) -> None:
        """Saves the tensors that the gradients need."""
        x, weight, bias = inputs
        ctx.save_for_backward(x, weight)
        ctx.needs = [*ctx.needs_input_grad[:2], bias is not None and ctx.needs_input_grad[2]]

    def differentiate(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        """Calls the operator of the gradients."""
        x, weight = ctx.saved_tensors
        grads = torch.ops.mmconv2former.depthwise_conv2d_backward(grad, x, weight, ctx.needs)
        return tuple(value if need else None for value, need in zip(grads, ctx.needs))

    operator.register_autograd(differentiate, setup_context=setup_context)

    @register_flop_formula(torch.ops.mmconv2former.depthwise_conv2d)
    def count_flops(x_shape: Sequence[int], weight_shape: Sequence[int], *_: Any, **__: Any) -> int:
        """Twice the multiply-adds, as torch counts its own convolutions."""
        return 2 * math.prod(x_shape) * weight_shape[-1] ** 2

    @register_flop_formula(torch.ops.mmconv2former.depthwise_conv2d_backward)
    def count_backward_flops(
        grad_shape: Sequence[int],
        x_shape: Sequence[int],
        weight_shape: Sequence[int],
        needs: Sequence[bool],
        *_: Any,
        **__: Any,
    ) -> int:
        """FLOPs of the gradients."""
        return count_flops(x_shape, weight_shape) * sum(needs[:2])
