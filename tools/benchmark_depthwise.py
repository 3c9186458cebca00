"""Times every implementation of the depthwise convolution.

    python tools/benchmark_depthwise.py                  # the backward pass on the CPU
    python tools/benchmark_depthwise.py --device cuda    # each pass on a GPU, about a minute
    python tools/benchmark_depthwise.py --device cuda --tune   # block sizes of the Triton kernels

On the CPU: medians of the backward pass, stock and with matrix products, over maps of Conv2Former's
stages. The last column says whether the matrix products are chosen. Needs an idle machine.

On a GPU: time of the GPU alone, TFLOP/s, and the share of the measured ceiling. The ceiling is the
time that the bytes need at the bandwidth of a large copy, or the operations at the rate of a large
float32 product, whichever is longer. Small maps stay in the cache and may exceed it. The chosen
implementation is bold. A second table shows what a launch costs the host.

With `--tune` instead: GPU time of the Triton kernels as they divide their work, and below it that
of other divisions, fastest first.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import astuple, dataclass, replace
from functools import partial
from typing import Any

import torch
from benchmark import DTYPES, Setting, machine, measure_product_rate, show, table
from common.config_check import in_one_line
from common.measuring import Budget, Ceilings, device_seconds, launch_seconds, measure_ceilings
from torch import Tensor, nn

from mmconv2former.ops import depthwise

Shape = tuple[int, int, int, int]  # batch, channels, height, width


def stages(batch: int, height: int, width: int) -> list[Shape]:
    """The maps of size T's four stages; the first one has this size."""
    return [(batch, 72 * 2**i, height // 2**i, width // 2**i) for i in range(4)]


# At 512x512, 800x1280 and 224x224, and of small crops.
CPU_SHAPES = [
    *stages(1, 128, 128), *stages(2, 200, 320), *stages(8, 56, 56), *stages(4, 32, 32)
]  # fmt: skip
# Of a step of detection at 800x1280, segmentation at 512x512 and classification at 224x224.
GPU_SHAPES = [*stages(2, 200, 320), *stages(2, 128, 128), *stages(64, 56, 56)]
GPU_KERNELS = (11, 3, 7, 21, 5, 31)  # the network's own first, in case time runs out
FEED_FORWARD = 3  # the kernel in the feed-forward part, which has 4 times the channels


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument('--device', choices=['cpu', 'cuda'], default='cpu')
    parser.add_argument(
        '--kernel-sizes',
        type=int,
        nargs='+',
        help='default: 5 7 9 11 15 21 on the CPU, 3 5 7 11 21 31 on a GPU',
    )
    parser.add_argument('--repeats', type=int, default=9, help='on the CPU')
    parser.add_argument('--dtype', choices=DTYPES, default='bfloat16', help='on a GPU')
    parser.add_argument(
        '--tune', action='store_true', help='time divisions of the work of the Triton kernels'
    )
    parser.add_argument('--budget', type=float, default=120, help='seconds on a GPU')
    parser.add_argument(
        '--page', action='store_true', help="keep the CPU's table in docs/performance.md"
    )
    args = parser.parse_args()
    if args.device == 'cpu':
        kernels = args.kernel_sizes or [5, 7, 9, 11, 15, 21]
        show('depthwise', compare_backward(kernels, CPU_SHAPES, args.repeats), args.page)
        return
    if args.page:
        parser.error('--page: the table of the page is of the CPU')
    Setting((1, 1), device=args.device)  # refuses a device that is not there
    print(machine(measure_product_rate(args.device), args.device))
    ceilings = measure_ceilings(args.device)
    print(f'{ceilings}\n')
    if args.tune:
        for kernel in args.kernel_sizes or (11, 3):
            print(tuning_table(kernel, GPU_SHAPES[2:3], args.device, args.dtype, args.budget / 2))
        return
    timings = measure_passes(
        args.kernel_sizes or GPU_KERNELS, GPU_SHAPES, args.device, args.dtype, ceilings,
        Budget(args.budget),
    )  # fmt: skip
    print(f'{passes_table(timings)}\n')
    print(launches_table(measure_launches(args.device, args.dtype)))


# ---------------------------------------------------------------------------- the CPU's backward
def compare_backward(kernels: Sequence[int], shapes: Sequence[Shape], repeats: int) -> str:
    """A table of all three gradients together, by both implementations of a CPU."""
    rows = []
    for kernel in kernels:
        for shape in shapes:
            x, grad, weight, _ = tensors(shape, kernel, 'cpu', torch.float32)
            stock, products = medians(
                repeats,
                *(
                    partial(depthwise.depthwise_conv_backward, grad, x, weight, implementation=name)
                    for name in ('stock', 'matmul')
                ),
            )
            is_chosen = depthwise.choose(x, weight) == 'matmul'
            rows.append(
                [str(kernel), ', '.join(map(str, shape)), f'{stock:.2f}', f'{products:.2f}',
                 f'{products / stock:.2f}', 'yes' if is_chosen else 'no']
            )  # fmt: skip
    header = ['kernel', 'N, C, H, W', 'stock, ms', 'matrix products, ms', 'ratio', 'chosen']
    return table(header, rows)


def tensors(
    shape: Shape, kernel: int, device: str, dtype: torch.dtype
) -> tuple[Tensor, Tensor, nn.Parameter, Tensor]:
    """Input and gradient of the output (N, H, W, C), kernel (C, 1, K, K), bias."""
    batch, channels, height, width = shape
    make = partial(torch.randn, device=device, dtype=dtype)
    x, grad = (make(batch, height, width, channels) for _ in range(2))
    return x, grad, nn.Parameter(make(channels, 1, kernel, kernel)), make(channels)


def medians(repeats: int, *functions: Callable[[], object]) -> list[float]:
    """Median milliseconds of each function, called in turn."""
    times: list[list[float]] = [[] for _ in functions]
    for number in range(repeats + 2):  # two to warm up
        for function, own in zip(functions, times):
            start = time.perf_counter()
            function()
            if number >= 2:
                own.append(1e3 * (time.perf_counter() - start))
    return [statistics.median(own) for own in times]


# ------------------------------------------------------------------------------------- each pass
NEEDS = {
    'forward': None,
    'input gradient': (True, False, False),
    'weight gradient': (False, True, True),  # with that of the bias
}


@dataclass
class Timing:
    """One pass of one implementation, or why it failed."""

    kernel: int
    shape: Shape
    kind: str  # of pass
    implementation: str
    is_chosen: bool  # for this input, where nothing else is asked for
    milliseconds: float = 0.0
    tflops: float = 0.0
    share: float = 0.0  # of the measured ceiling
    error: str = ''


def measure_passes(
    kernels: Sequence[int],
    shapes: Sequence[Shape],
    device: str,
    dtype: str,
    ceilings: Ceilings,
    budget: Budget,
) -> list[Timing]:
    """Times each pass of each implementation that can run on the device.

    Args:
        kernels: Kernel sizes; `FEED_FORWARD` gets 4 times the channels.
        shapes: Shapes of the input.
        device: Where it runs.
        dtype: The dtype of input, weight and bias.
        ceilings: What the times are compared with.
        budget: When it is used up, the remaining kernels and shapes are left out.
    """
    timings: list[Timing] = []
    for kernel in kernels:
        for batch, channels, height, width in shapes:
            if not budget.left:
                return timings
            shape = (batch, channels * (4 if kernel == FEED_FORWARD else 1), height, width)
            x, grad, weight, bias = tensors(shape, kernel, device, DTYPES[dtype])
            operations = 2 * kernel**2 * x.numel()
            moved = x.element_size() * (2 * x.numel() + weight.numel())
            chosen = depthwise.choose(x, weight)
            for name in depthwise.implementations(x, weight):
                for kind in NEEDS:
                    timing = Timing(kernel, shape, kind, name, name == chosen)
                    timings.append(timing)
                    try:
                        seconds = device_seconds(
                            one_pass(kind, grad, x, weight, bias, name), device
                        )
                    except Exception as error:  # the others may still work
                        timing.error = in_one_line(error)
                        continue
                    timing.milliseconds = 1e3 * seconds
                    timing.tflops = operations / seconds / 1e12
                    timing.share = ceilings.seconds(moved, operations) / seconds
    return timings


def one_pass(
    kind: str, grad: Tensor, x: Tensor, weight: Tensor, bias: Tensor, implementation: str
) -> Callable[[], object]:
    """A call of a pass. The weight is prepared beforehand, as networks do once a step."""
    needs = NEEDS[kind]
    weight = depthwise.prepare_weight(weight.detach(), x.dtype, implementation)

    @torch.no_grad()
    def call() -> object:
        if needs is None:
            return depthwise.depthwise_conv(x, weight, bias, implementation=implementation)
        return depthwise.depthwise_conv_backward(
            grad, x, weight, needs, implementation=implementation
        )

    return call


def passes_table(timings: Sequence[Timing]) -> str:
    """A row for each kernel, shape and pass, a column for each implementation."""
    names = list(dict.fromkeys(timing.implementation for timing in timings))
    cells: dict[tuple[int, Shape, str], dict[str, str]] = {}
    for timing in sorted(timings, key=lambda timing: timing.kernel):  # else as measured
        text = f'{timing.milliseconds:.3f} ({timing.tflops:.3g}, {timing.share:.0%})'
        if timing.error:
            text = timing.error
        elif timing.is_chosen:
            text = f'**{text}**'
        row = cells.setdefault((timing.kernel, timing.shape, timing.kind), {})
        row[timing.implementation] = text
    rows = [
        [str(kernel), ', '.join(map(str, shape)), kind, *(row.get(name, '') for name in names)]
        for (kernel, shape, kind), row in cells.items()
    ]
    header = [f'{name}, ms (TFLOP/s, of the ceiling)' for name in names]
    return table(['kernel', 'N, C, H, W', 'pass', *header], rows)


# ----------------------------------------------------------------------------------------- tuning
def divisions(kernel: int) -> list[Any]:
    """The `Blocks` of `blocks_for`, and others near it."""
    blocks = depthwise.triton_kernels().blocks_for(kernel)
    forward = [
        replace(blocks, rows=rows, block=block, num_warps=warps)
        for rows in (4, 6, 8, 10, 12, 16)
        for block, warps in ((256, 2), (256, 4), (512, 4), (512, 8), (1024, 8))
    ]
    gradient = [
        replace(blocks, columns=columns, gradient_block=block, num_warps=warps)
        for columns in {1, 2, 3, blocks.columns}
        for block, warps in ((128, 2), (256, 4), (512, 4), (512, 8))
        if columns * blocks.taps <= 3 * kernel
    ]
    return list(dict.fromkeys([blocks, *forward, *gradient]))


def tuning_table(
    kernel: int, shapes: Sequence[Shape], device: str, dtype: str, seconds: float
) -> str:
    """GPU time of forward pass and weight gradient, all shapes together, for each division.

    Args:
        kernel: Kernel size; `FEED_FORWARD` gets 4 times the channels.
        shapes: Shapes of the input.
        device: Where it runs.
        dtype: The dtype of input, weight and bias.
        seconds: When these have passed, the remaining divisions are left out.
    """
    kernels, budget = depthwise.triton_kernels(), Budget(seconds)
    rows: list[tuple[float, list[str]]] = []
    for blocks in divisions(kernel):
        if not budget.left:
            break
        times = [0.0, 0.0]
        for batch, channels, height, width in shapes:
            shape = (batch, channels * (4 if kernel == FEED_FORWARD else 1), height, width)
            x, grad, weight, bias = tensors(shape, kernel, device, DTYPES[dtype])
            laid_out = kernels.lay_out(weight.detach(), x.dtype)
            calls = (
                partial(kernels.depthwise_forward, x, laid_out, bias, blocks=blocks),
                partial(kernels.depthwise_weight_gradient, x, grad, kernel, torch.float32, True,
                        blocks=blocks),
            )  # fmt: skip
            for index, call in enumerate(calls):
                times[index] += 1e3 * device_seconds(call, device)
        numbers = astuple(blocks)
        rows.append((sum(times), [*map(str, numbers), *(f'{time:.3f}' for time in times)]))
    header = [f'kernel {kernel}: taps', 'rows', 'block', 'columns', 'gradient block', 'warps',
              'forward, ms', 'weight gradient, ms']  # fmt: skip
    first, *others = rows
    return table(header, [first[1], *(row for _, row in sorted(others))])


# --------------------------------------------------------------------------------------- launches
TINY: Shape = (1, 8, 8, 8)


def measure_launches(device: str, dtype: str, kernel: int = 11) -> dict[str, float]:
    """Microseconds of a call with a tiny input: `torch.add`, then each pass."""
    x, grad, weight, bias = tensors(TINY, kernel, device, DTYPES[dtype])
    calls: dict[str, Callable[[], object]] = {'torch.add': partial(torch.add, x, grad)}
    for name in depthwise.implementations(x, weight):
        for kind in NEEDS:
            calls[f'{name}, {kind}'] = one_pass(kind, grad, x, weight, bias, name)
    return {name: 1e6 * launch_seconds(call, device) for name, call in calls.items()}


def launches_table(launches: dict[str, float]) -> str:
    first = next(iter(launches.values()))
    rows = [[name, f'{us:.1f}', f'{us / first:.1f}'] for name, us in launches.items()]
    return table(['call of a tiny map', 'us', 'times of torch.add'], rows)


if __name__ == '__main__':
    main()
