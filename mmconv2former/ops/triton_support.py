"""Whether Triton's kernels run on this machine, and what happens if one fails to compile."""

from __future__ import annotations

import functools
import importlib
import logging
from collections.abc import Callable
from typing import Any

import torch
from mmengine.logging import print_log
from torch import Tensor

DTYPES = (torch.float32, torch.float16, torch.bfloat16, torch.float64)
MOST_CHANNELS = 8192  # limit for kernels whose programs hold all channels of a position
LOWEST_CAPABILITY = (8, 0)  # of NVIDIA GPUs that Triton supports
LOWEST_VERSION = (3, 3)  # comes with torch 2.7

failures: list[str] = []  # the first failure to compile, after which Triton is not used


class CompilationError(RuntimeError):
    """Triton could not compile a kernel on this machine."""


def triton_problem(device: torch.device, dtype: torch.dtype, kernel_size: int) -> str | None:
    """Why the kernels cannot run on a CPU or GPU, or None."""
    if failures:
        return failures[0]
    problem = installation_problem()
    if problem is not None:
        return problem
    if device.type == 'cpu' and not is_interpreted():
        return (
            "a CPU needs Triton's interpreter; set TRITON_INTERPRET=1 before Python starts, or use "
            'a GPU'
        )
    if device.type == 'cuda' and torch.version.hip is None:
        capability = torch.cuda.get_device_capability(device)
        if capability < LOWEST_CAPABILITY:
            name = torch.cuda.get_device_name(device)
            return f'{name} has compute capability {capability[0]}.{capability[1]}, below 8.0'
    if dtype not in DTYPES or kernel_size < 3:
        return f'no kernels for {dtype} and kernel size {kernel_size}'
    return None


def installation_problem() -> str | None:
    """Why the kernels cannot run on any device, or None."""
    version = triton_version()
    if version is None:
        return 'Triton is not installed'
    if tuple(map(int, version.split('.')[:2])) < LOWEST_VERSION:
        return f'Triton {version} is older than 3.3, which comes with torch 2.7'
    return None


def triton_version() -> str | None:
    """The version of Triton, whose distribution has another name for other GPUs, or None."""
    try:
        return importlib.import_module('triton').__version__
    except ImportError:
        return None


def is_interpreted() -> bool:
    """Whether the kernels run on a CPU, in the interpreter, which is set before the import."""
    if installation_problem() is not None:
        return False
    language, runtime = (importlib.import_module(f'triton.{n}') for n in ('language', 'runtime'))
    return not isinstance(language.cdiv, runtime.JITFunction)


@functools.cache
def load(name: str) -> Any:
    """A module of this package that needs Triton, which may be missing."""
    return importlib.import_module(f'.{name}', __package__)


def run_triton(
    function: Callable[..., Any], fallback: Callable[..., Any], x: Tensor, *args: Any
) -> Any:
    """Calls function(x, *args), which launches kernels, on the device of x.

    Calls the fallback instead if a kernel fails to compile, and from then on.
    """
    if not failures:
        try:
            if x.is_cuda and x.get_device() != torch.cuda.current_device():
                with torch.cuda.device(x.device):
                    return function(x, *args)
            return function(x, *args)
        except CompilationError as error:
            failures.append(f'Triton failed to compile a kernel: {error}')
            print_log(
                f'{failures[0]}. Continuing without Triton, which is slower. It needs a C compiler '
                'and a writable cache folder (TRITON_CACHE_DIR).',
                logger='current',
                level=logging.WARNING,
            )
    return fallback(x, *args)
