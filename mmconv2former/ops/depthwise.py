"""Depthwise convolution with stride 1 and 'same' zero padding, (N, H, W, C) in and out.

`depthwise_conv2d` and `DepthwiseConv` are for any network. `choose` is the one place that decides
which implementation runs:

| name | where | what |
| --- | --- | --- |
| triton | CUDA, ROCm | `mmconv2former.ops.depthwise_triton`; on a CPU in Triton's interpreter |
| native | CUDA, ROCm | torch's own kernels on (N, C, H, W), with copies from and to (N, H, W, C) |
| cudnn | CUDA, ROCm | cuDNN (MIOpen), in `torch.channels_last` |
| products | CPU | the stock operator, the weight gradient as matrix products |
| stock | anywhere | the stock operator in `torch.channels_last` |

The environment variable `MMCONV2FORMER_DEPTHWISE` (auto or a name) overrides the choice where the
device has that implementation.
"""

from __future__ import annotations

import functools
import importlib
import logging
import math
import os
from collections.abc import Sequence
from types import ModuleType
from typing import Any, overload

import torch
import torch.nn.functional as F
from mmengine.logging import print_log
from torch import Tensor, nn

from ..ops import depthwise_products
from .memory_format import (
    autocast_dtype,
    is_autocast_enabled,
    is_compiling,
    is_cpu_float32,
    is_intercepted,
    is_transformed,
    to_channels_first,
    to_channels_last,
    without_autocast,
)

VARIABLE = 'MMCONV2FORMER_DEPTHWISE'
setting = os.environ.get(VARIABLE, 'auto')  # read once, as a launch must cost little
SETTINGS = ('auto', 'triton', 'cudnn', 'native', 'products', 'stock')
# Up to this size cuDNN has fast kernels for channels_last (measured on an H100).
LARGEST_FAST_CUDNN_KERNEL = 7
TRITON_DTYPES = (torch.float32, torch.float16, torch.bfloat16, torch.float64)
LOWEST_TRITON_CAPABILITY = (8, 0)  # what Triton supports of NVIDIA's GPUs
LOWEST_TRITON_VERSION = (3, 3)  # that of torch 2.7
# Devices for which a captured graph gets the registered operator, not the stock one.
OPERATOR_DEVICES = ('cuda',)


# ---------------------------------------------------------------------------------------- for users
class DepthwiseConv(nn.Conv2d):
    """`depthwise_conv2d` as a module, with the parameters of a depthwise `nn.Conv2d`.

    Args:
        channels: C.
        kernel_size: K, odd.
        bias: Whether there is a bias.

    Shapes:
        (N, H, W, C) in and out; weight (C, 1, K, K), bias (C,).

    Example, in a network of (N, C, H, W) tensors, best of `torch.channels_last` memory:

        conv = DepthwiseConv(channels=256, kernel_size=31).cuda().bfloat16()
        x = torch.rand(8, 256, 56, 56, device='cuda', dtype=torch.bfloat16)
        y = conv(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)

    Raises:
        ValueError: The kernel size is not odd.
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

    Differentiable once; under autocast it computes in autocast's dtype. Products are summed in
    float32 on GPUs, and the weight gradient is the same in every run.

    Args:
        x: Input (N, H, W, C), fastest if contiguous and C a multiple of 8.
        weight: (C, 1, K, K), K odd, as `nn.Conv2d(C, C, K, groups=C)` has it.
        bias: (C,) or None.

    Returns:
        (N, H, W, C), contiguous, of the dtype of x or of autocast's.

    Raises:
        ValueError: A shape is not as above, or the dtypes differ outside of autocast.
    """
    check(x, weight, bias)
    implementation = choose(x, weight)
    has_own_gradients = implementation in ('triton', 'native', 'products')
    if has_own_gradients and torch.is_grad_enabled():
        return DepthwiseConvFunction.apply(x, weight, bias, implementation)
    dtype = autocast_dtype(x)  # autocast does not reach the next two
    if implementation == 'operator':
        x, weight, bias = x.to(dtype), weight.to(dtype), None if bias is None else bias.to(dtype)
    elif implementation == 'triton':
        x, weight = x.to(dtype), prepare_weight(weight, dtype, implementation)
    return depthwise_conv(x, weight, bias, implementation)


# ------------------------------------------------------------------------------------------- choice
def choose(x: Tensor, weight: Tensor, is_trained: bool | None = None) -> str:
    """The implementation for an input and a weight: see the table at the top of this file.

    Args:
        x: Input (N, H, W, C). Its values do not matter.
        weight: (C, 1, K, K).
        is_trained: Whether its gradient is wanted; None for what it says itself.

    Returns:
        A name of that table, or 'operator': the registered operator, which makes the choice when a
        graph runs.

    Raises:
        ValueError: `MMCONV2FORMER_DEPTHWISE` has a value that there is not.
        RuntimeError: It demands Triton where that cannot run.
    """
    has_operator = x.device.type in OPERATOR_DEVICES
    if is_compiling():
        return 'operator' if has_operator and not torch.onnx.is_in_onnx_export() else 'stock'
    # Transforms of `torch.func` know neither autograd functions nor registered derivatives.
    if torch.jit.is_tracing() or is_transformed():
        return 'stock'
    return (
        'operator' if has_operator and is_intercepted(x) else choose_kernel(x, weight, is_trained)
    )


def choose_kernel(x: Tensor, weight: Tensor, is_trained: bool | None = None) -> str:
    """As `choose`, where nothing stands between the operators and the device."""
    implementation = device_choice(weight, autocast_dtype(x))
    if implementation == 'auto':  # on a CPU, where the size of the input counts
        is_trained = weight.requires_grad if is_trained is None else is_trained
        is_fast = is_trained and is_cpu_float32(x)
        is_fast = is_fast and depthwise_products.is_faster(x, weight)
        return 'products' if is_fast else 'stock'
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
    """Whether Triton's kernels other than convolutions run on x, by the same rules."""
    if x.device.type != 'cuda' and setting != 'triton':
        return False
    if x.dim() != 4:
        return False
    batch, height, width, channels = x.shape
    reach = is_in_reach(batch, height, width, channels, kernel_size=3)
    reach = reach and height * width * channels < 2**31  # offsets within an image have 32 bits
    return reach and not is_intercepted(x) and choice_for(setting, x.device, x.dtype, 3) == 'triton'


def implementations(x: Tensor, weight: Tensor) -> list[str]:
    """All that can run on an input and a weight."""
    if x.device.type == 'cuda':
        has_triton = triton_problem(x.device, x.dtype, weight.shape[-1]) is None
        return [*(['triton'] if has_triton else []), 'native', 'cudnn']
    return ['stock', 'products', *(['triton'] if is_interpreted() else [])]


def device_choice(weight: Tensor, dtype: torch.dtype) -> str:
    """As `choose`, for any input; 'auto' where its size decides."""
    return choice_for(setting, weight.device, dtype, weight.shape[-1])


@functools.cache
def choice_for(setting: str, device: torch.device, dtype: torch.dtype, kernel_size: int) -> str:
    """`device_choice` by what it depends on."""
    if setting not in SETTINGS:
        raise ValueError(f'{VARIABLE} must be one of {", ".join(SETTINGS)}, got {setting!r}')
    if device.type == 'cpu':
        if setting == 'triton' and failures:
            return 'auto'
        if setting == 'triton' and not is_interpreted():
            raise RuntimeError(
                f"{VARIABLE}=triton: on a CPU there is only Triton's interpreter; set "
                'TRITON_INTERPRET=1 before Python starts, or use a GPU'
            )
        return setting if setting in ('triton', 'products', 'stock') else 'auto'
    if device.type != 'cuda':  # also ROCm's name
        return 'stock'
    problem = triton_problem(device, dtype, kernel_size)
    if setting == 'triton' and problem is not None and not failures:
        raise RuntimeError(f'{VARIABLE}=triton: {problem}')
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
    print_log(text, logger='current', level=logging.INFO)


failures: list[str] = []  # of Triton on this machine: at most one, after which it is not used


def triton_problem(device: torch.device, dtype: torch.dtype, kernel_size: int) -> str | None:
    """Why Triton's kernels cannot run on a GPU, or None."""
    if failures:
        return failures[0]
    problem = installation_problem()
    if problem is not None:
        return problem
    if torch.version.hip is None:
        capability = torch.cuda.get_device_capability(device)
        if capability < LOWEST_TRITON_CAPABILITY:
            name = torch.cuda.get_device_name(device)
            return f'{name} has compute capability {capability[0]}.{capability[1]}, below 8.0'
    if dtype not in TRITON_DTYPES or kernel_size < 3:
        return f'no kernels for {dtype} and kernel size {kernel_size}'
    return None


@functools.cache
def triton_kernels() -> ModuleType:
    """`mmconv2former.ops.depthwise_triton`, imported when it is needed: Triton may be missing."""
    return importlib.import_module('.depthwise_triton', __package__)


def installation_problem() -> str | None:
    """Why Triton's kernels can run nowhere, or None."""
    version = triton_version()
    if version is None:
        return 'Triton is not installed'
    if tuple(map(int, version.split('.')[:2])) < LOWEST_TRITON_VERSION:
        lowest = '.'.join(map(str, LOWEST_TRITON_VERSION))
        return f'Triton {version} is older than {lowest}, which comes with torch 2.7'
    return None


def triton_version() -> str | None:
    """Triton's version, None without Triton; distributions for other GPUs have other names."""
    try:
        return importlib.import_module('triton').__version__
    except ImportError:
        return None


def is_interpreted() -> bool:
    """Whether Triton's kernels run on a CPU: its interpreter was chosen before it was imported."""
    if installation_problem() is not None:
        return False
    language, runtime = (importlib.import_module(f'triton.{n}') for n in ('language', 'runtime'))
    return not isinstance(language.cdiv, runtime.JITFunction)


def run_triton(function: str, x: Tensor, *args: Any, **kwargs: Any) -> Any:
    """Calls a function of `depthwise_triton` on the device of x.

    Returns:
        What it returns, or None if Triton failed to compile, which it then is not asked to again.
    """
    if failures:
        return None
    kernels = triton_kernels()
    try:
        if x.is_cuda and x.get_device() != torch.cuda.current_device():
            with torch.cuda.device(x.device):
                return getattr(kernels, function)(x, *args, **kwargs)
        return getattr(kernels, function)(x, *args, **kwargs)
    except kernels.CompilationError as error:
        stop_using_triton(error)
        return None


def stop_using_triton(error: Exception) -> None:
    """Makes the choice without Triton from here on, and says so."""
    failures.append(f'Triton failed to compile a kernel: {error}')
    choice_for.cache_clear()
    print_log(
        f'{failures[0]}. Continuing without Triton, which is slower. It needs a C compiler and '
        'a cache folder that it can write to (TRITON_CACHE_DIR).',
        logger='current',
        level=logging.WARNING,
    )


# --------------------------------------------------------------------------------- implementations
def prepare_weight(weight: Tensor, dtype: torch.dtype, implementation: str) -> Tensor:
    """A weight (C, 1, K, K) in `dtype`, and in the memory layout of the implementation."""
    if implementation == 'triton':
        return triton_kernels().lay_out(weight, dtype)
    return weight.to(dtype)


def depthwise_conv(
    x: Tensor, weight: Tensor, bias: Tensor | None, implementation: str | None = None
) -> Tensor:
    """Depthwise convolution, (N, H, W, C) in and out; differentiable if stock operators do it.

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
        weight = prepare_weight(weight, x.dtype, implementation)
        ready_bias = None if bias is None else bias.contiguous()
        out = run_triton('depthwise_forward', aligned(x), weight, ready_bias)
        return depthwise_conv(x, weight, bias) if out is None else out
    if bias is not None and bias.dtype != weight.dtype:
        bias = bias.to(weight.dtype)
    x = to_channels_first(x)
    if implementation == 'native':
        x, weight = x.contiguous(), weight.contiguous()
    # int: torch < 2.4 traces sizes as tensors, which are no padding
    padding, channels = int(weight.shape[-1]) // 2, int(weight.shape[0])
    return to_channels_last(F.conv2d(x, weight, bias, padding=padding, groups=channels))


@overload
def depthwise_conv_backward(
    grad: Tensor, x: Tensor, weight: Tensor, *, implementation: str | None = None
) -> tuple[Tensor, Tensor, Tensor]: ...


@overload
def depthwise_conv_backward(
    grad: Tensor,
    x: Tensor,
    weight: Tensor,
    needs: Sequence[bool],
    implementation: str | None = None,
) -> tuple[Tensor | None, Tensor | None, Tensor | None]: ...


def depthwise_conv_backward(
    grad: Tensor,
    x: Tensor,
    weight: Tensor,
    needs: Sequence[bool] = (True, True, True),
    implementation: str | None = None,
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """Gradients of `depthwise_conv` for input, kernel and bias.

    Args:
        grad: Gradient of the output (N, H, W, C).
        x: Input (N, H, W, C).
        weight: (C, 1, K, K), of the dtype of x, best as `prepare_weight` returned it.
        needs: Which of the three are wanted; the others are None.
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
        grads = triton_backward(grad, x, weight, needs)
        return depthwise_conv_backward(grad, x, weight, needs) if grads is None else grads
    needs_x, needs_weight, needs_bias = needs
    x, grad = to_channels_first(x), to_channels_first(grad)
    if implementation == 'native':
        x, grad, weight = x.contiguous(), grad.contiguous(), weight.contiguous()
    by_products = implementation == 'products' and needs_weight
    needs = (needs_x, needs_weight and not by_products, needs_bias and not by_products)
    kernel_size = weight.shape[-1]
    padding = kernel_size // 2
    grad_x, grad_weight, grad_bias = torch.ops.aten.convolution_backward(
        grad, x, weight, [weight.shape[0]], [1, 1], [padding, padding], [1, 1], False, [0, 0],
        weight.shape[0], needs,
    )  # fmt: skip
    if grad_weight is not None:  # strides of sizes of 1 as parameters have them, for DDP's buckets
        grad_weight = grad_weight.flatten(1).view(weight.shape)
    if by_products:
        grad_weight = depthwise_products.weight_gradient(x, grad, kernel_size)
        # oneDNN would compute the weight gradient to give that of the bias.
        grad_bias = grad.sum((0, 2, 3)) if needs_bias else None
    return to_channels_last(grad_x) if needs_x else None, grad_weight, grad_bias


def triton_backward(
    grad: Tensor, x: Tensor, weight: Tensor, needs: Sequence[bool]
) -> tuple[Tensor | None, Tensor | None, Tensor | None] | None:
    """`depthwise_conv_backward` by Triton's kernels, or None if they failed to compile."""
    needs_x, needs_weight, needs_bias = needs
    dtype = torch.promote_types(x.dtype, torch.float32)
    grad = aligned(grad)
    grad_x = grad_weight = grad_bias = None
    if needs_x:
        weight = prepare_weight(weight, x.dtype, 'triton')
        grad_x = run_triton('depthwise_forward', grad, weight, None, flip=True)
        if grad_x is None:
            return None
    if needs_weight:
        grads = run_triton(
            'depthwise_weight_gradient', aligned(x), grad, weight.shape[-1], dtype, needs_bias
        )
        if grads is None:
            return None
        grad_weight, grad_bias = grads
    elif needs_bias:
        grad_bias = grad.sum((0, 1, 2), dtype=dtype)
    return grad_x, grad_weight, grad_bias


def aligned(x: Tensor) -> Tensor:
    """x, contiguous and at a multiple of 16 bytes, as the compiled kernels expect it."""
    x = x.contiguous()
    return x if x.data_ptr() % 16 == 0 else x.clone()


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
            # The inputs themselves are kept, for gradients of gradients; casts where they differ.
            cast = x.to(dtype)
            ctx.save_for_backward(x, weight, bias, cast, prepared)
            out = depthwise_conv(cast, prepared, bias, implementation)
        return out.data  # no view, so that it may be modified in place

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, bias, cast, prepared = ctx.saved_tensors
        implementation = ctx.implementation
        with without_autocast(x):
            if torch.is_grad_enabled():  # gradients of gradients: by operators that have them
                implementation, cast, prepared = 'stock', x.to(cast.dtype), weight.to(cast.dtype)
            grads = depthwise_conv_backward(
                grad.to(cast.dtype), cast, prepared, ctx.needs_input_grad[:3], implementation
            )
        dtypes = [None if value is None else value.dtype for value in (x, weight, bias)]
        results = (None if g is None else g.to(dtype) for g, dtype in zip(grads, dtypes))
        return *results, None


# ----------------------------------------------------------------------------- registered operators
# What a captured graph has as one node. They compute as the functions above, and may be called by
# these names with import of this package alone.
if hasattr(torch.library, 'custom_op'):  # torch >= 2.4
    from torch.utils.flop_counter import register_flop_formula

    @torch.library.custom_op(
        'mmconv2former::depthwise_conv2d',
        mutates_args=(),
        schema='(Tensor x, Tensor weight, Tensor? bias) -> Tensor',
    )
    def operator(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
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
        grads = depthwise_conv_backward(grad, x, weight, needs, choose_kernel(x, weight))
        # Operators cannot return None, and must return what their fake ones promise.
        return tuple(x.new_empty(0) if value is None else value.to(x.dtype) for value in grads)

    @operator_backward.register_fake
    def _(grad: Tensor, x: Tensor, weight: Tensor, needs: Sequence[bool]) -> tuple[Tensor, ...]:
        shapes = (x.shape, weight.shape, weight.shape[:1])
        return tuple(x.new_empty(shape if need else 0) for shape, need in zip(shapes, needs))

    def setup_context(ctx: Any, inputs: tuple, output: Tensor) -> None:
        x, weight, bias = inputs
        ctx.save_for_backward(x, weight)
        ctx.needs = [*ctx.needs_input_grad[:2], bias is not None and ctx.needs_input_grad[2]]

    def differentiate(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
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
        return count_flops(x_shape, weight_shape) * sum(needs[:2])


def check(x: Tensor, weight: Tensor, bias: Tensor | None) -> None:
    """Raises ValueError unless shapes and dtypes are those that `depthwise_conv2d` takes."""
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
