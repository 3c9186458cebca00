"""Compiles each Triton kernel once for each kind of input, and launches it quickly."""

from __future__ import annotations

import functools
import threading
from collections.abc import Callable
from typing import Any, TypeVar

import torch
import triton
import triton.language as tl
from torch import Tensor

from .triton_support import CompilationError

compiling = threading.Lock()
Function = TypeVar('Function', bound=Callable[..., Any])
Launch = tuple['Launcher', int, tuple[int, ...]]  # a launcher, and programs and sizes for it
remembering: list[Any] = []  # functions with `remembered`
AcceleratorError = getattr(torch, 'AcceleratorError', torch.cuda.OutOfMemoryError)  # torch >= 2.8


class Launcher:
    """A kernel with its constants, ready to run on one GPU.

    Triton's own launch binds and inspects all arguments each time, which takes several times as
    long as a torch operator. This class compiles the kernel once and then calls it directly.
    Pointers must be multiples of 16 bytes, except those that a kernel's decorator names.
    """

    def __init__(self, kernel: Any, constants: dict[str, Any], num_warps: int = 4) -> None:
        self.kernel = kernel
        self.constants = constants
        self.num_warps = num_warps
        self.values = tuple(constants[name] for name in kernel.arg_names if name in constants)
        self.run: Any = None
        self.takes_tuple = False  # whether `run` takes the kernel's arguments as one tuple
        self.at_once = 16  # programs that fit on the GPU, known after compilation

    def compile(self, tensors: tuple[Tensor | None, ...], sizes: tuple[int, ...]) -> None:
        """Compiles the kernel for a GPU, or loads it from Triton's cache.

        Args:
            tensors: Tensors of the dtypes with which it will be called.
            sizes: Any integers, as many as the kernel takes.

        Raises:
            CompilationError: The compilation failed.
        """
        with compiling:  # two threads must not load one kernel
            if self.run is not None:
                return
            try:
                compiled = self.kernel.warmup(
                    *tensors, *sizes, **self.constants, num_warps=self.num_warps, grid=(1,)
                )
                run = compiled.run  # loads it on the GPU
                fixed = (compiled.function, compiled.packed_metadata, None, None, None)
                run, self.fixed, self.takes_tuple = without_python(
                    run, fixed, len(tensors) + len(sizes) + len(self.values)
                )
                self.get_stream = triton.runtime.driver.active.get_current_stream
            except (torch.cuda.OutOfMemoryError, AcceleratorError):
                raise  # from what ran before
            except Exception as error:  # from the compiler, the linker, the cache or the driver
                raise CompilationError(f'{type(error).__name__}: {error}') from error
            self.device = tensors[0].get_device()  # type: ignore[union-attr]
            processors, registers = limits(self.device)
            of_thread = 8 * -(-compiled.n_regs // 8)  # allocated in eights
            of_program = 32 * self.num_warps * of_thread
            self.at_once = processors * max(1, registers // of_program)
            self.run = run

    def __call__(
        self, programs: int, tensors: tuple[Tensor | None, ...], sizes: tuple[int, ...]
    ) -> None:
        """Runs on the current stream.

        Args:
            programs: Size of the grid.
            tensors: The kernel's first arguments; None for those that it does not read.
            sizes: The arguments that follow, of 32 bits.

        Raises:
            CompilationError: The first call failed to compile it.
        """
        if self.run is None:
            first: Any = tensors[0]
            if first.device.type == 'cpu':  # Triton's interpreter
                self.kernel[(programs,)](*tensors, *sizes, **self.constants)
                return
            self.compile(tensors, sizes)
        pointers = [None if tensor is None else tensor.data_ptr() for tensor in tensors]
        stream = self.get_stream(self.device)
        if self.takes_tuple:
            arguments = (*pointers, *sizes, *self.values)
            self.run(programs, 1, 1, stream, *self.fixed, arguments)
        else:
            self.run(programs, 1, 1, stream, *self.fixed, *pointers, *sizes, *self.values)


def launchers_of(kernel: Any) -> Callable[..., Launcher]:
    """A function that returns the launcher of a kernel, the same one for the same arguments.

    Its arguments are the device (-1 for the interpreter), the dtypes of all tensors that may have
    different ones (None for one that is missing), `num_warps`, and the kernel's constants by name.
    The constant ACC, the dtype of sums, follows from the first dtype.
    """

    @functools.cache
    def launcher(
        device: int, dtypes: tuple[torch.dtype | None, ...], num_warps: int = 4, **constants: Any
    ) -> Launcher:
        return Launcher(kernel, dict(constants, ACC=sums_dtype(dtypes[0])), num_warps)

    return launcher


def remembered(function: Function) -> Function:
    """Caches a function that prepares launches; a step has hundreds, the same for each input size.

    Its results may only depend on its arguments and on what never changes in a process.
    """
    kept: Any = functools.lru_cache(maxsize=2**12)(function)
    remembering.append(kept)
    return kept


def forget_launches() -> None:
    """Empties these caches, for tests and measurements that replace what launches depend on."""
    for function in remembering:
        function.cache_clear()


def without_python(
    run: Callable[..., Any], fixed: tuple, number: int
) -> tuple[Callable[..., Any], tuple, bool]:
    """The C function at the end of Triton's launch path, to be called directly.

    Triton's own `run` is Python. It passes its arguments on to `run.launch`, with others that are
    the same each time and depend on the release. One call with a stand-in for `run.launch` shows
    which these are. If it shows anything else, such as memory that each launch allocates, `run`
    is used as it is.

    Args:
        run: Takes the grid, the stream, `fixed`, and the kernel's arguments.
        fixed: The arguments in between.
        number: Number of the kernel's arguments.

    Returns:
        A function that takes the grid, the stream, the second result, and the kernel's arguments,
        as one tuple if the third result is true.
    """
    detour = run, fixed, False
    launch = getattr(run, '__dict__', {}).get('launch')
    if launch is None:
        return detour
    first, last = [object() for _ in range(4)], [object() for _ in range(number)]
    calls: list[tuple] = []
    try:
        run.launch = lambda *args: calls.append(args)  # type: ignore[attr-defined]
        run(*first, *fixed, *last)
    except Exception:  # it computes with its arguments
        return detour
    finally:
        run.launch = launch  # type: ignore[attr-defined]
    if len(calls) != 1 or [*calls[0][:4]] != first:
        return detour
    found = calls[0][4:]
    if found and found[-1] == tuple(last):
        return launch, found[:-1], True
    if number and [*found[-number:]] == last:
        return launch, found[:-number], False
    return detour


def sums_dtype(dtype: torch.dtype | None) -> tl.dtype:
    """The dtype in which products of tensors of `dtype` are summed."""
    return tl.float64 if dtype == torch.float64 else tl.float32


def is_packed(device: int, dtype: torch.dtype) -> bool:
    """Whether `widen` may use NVIDIA's instructions."""
    return device >= 0 and dtype == torch.bfloat16 and torch.version.hip is None


@functools.cache
def limits(device: int) -> tuple[int, int]:
    """Number of multiprocessors of a GPU, and registers of each."""
    properties = torch.cuda.get_device_properties(device)
    return properties.multi_processor_count, getattr(properties, 'regs_per_multiprocessor', 65536)
