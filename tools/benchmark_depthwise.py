"""Times the backward pass of depthwise convolutions with both weight gradients, on the CPU.

    python tools/benchmark_depthwise.py

Prints a Markdown table of medians over maps of Conv2Former's stages; the last column says whether
`has_fast_weight_gradient` chooses the matrix products. Needs an otherwise idle machine.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from functools import partial

import torch
from benchmark import show, table
from torch import Tensor, nn

from mmconv2former import depthwise
from mmconv2former.layout import to_channels_first

# batch, channels, height, width: of size T at 512x512 and 800x1280, and of small crops
SHAPES = [
    *((1, 72 * 2**i, 128 // 2**i, 128 // 2**i) for i in range(4)),
    *((2, 72 * 2**i, 200 // 2**i, 320 // 2**i) for i in range(4)),
    *((8, 72 * 2**i, 56 // 2**i, 56 // 2**i) for i in range(4)),
    *((4, 72 * 2**i, 32 // 2**i, 32 // 2**i) for i in range(4)),
]


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument('--kernel-sizes', type=int, nargs='+', default=[5, 7, 9, 11, 15, 21])
    parser.add_argument('--repeats', type=int, default=9)
    parser.add_argument(
        '--page', action='store_true', help='keep what is printed in docs/performance.md'
    )
    args = parser.parse_args()
    rows = []
    for kernel_size in args.kernel_sizes:
        for shape in SHAPES:
            batch, channels, height, width = shape
            x, grad = (torch.randn(batch, height, width, channels) for _ in range(2))
            weight = nn.Parameter(torch.randn(channels, 1, kernel_size, kernel_size))
            stock, products = medians(
                args.repeats,
                partial(backward, grad, x, weight, 'stock'),
                partial(backward, grad, x, weight, 'products'),
            )
            is_chosen = depthwise.has_fast_weight_gradient(to_channels_first(x), weight)
            rows.append(
                [str(kernel_size), ', '.join(map(str, shape)), f'{stock:.2f}', f'{products:.2f}',
                 f'{products / stock:.2f}', 'yes' if is_chosen else 'no']
            )  # fmt: skip
    header = ['kernel', 'N, C, H, W', 'stock, ms', 'matrix products, ms', 'ratio', 'chosen']
    show('depthwise', table(header, rows), args.page)


def backward(grad: Tensor, x: Tensor, weight: Tensor, method: str) -> None:
    """All three gradients, the kernel's by the method named."""
    depthwise.weight_gradient_method = method
    depthwise.depthwise_conv_backward(grad, x, weight)
    depthwise.weight_gradient_method = 'auto'


def medians(repeats: int, *functions: Callable[[], None]) -> list[float]:
    """Median milliseconds of each function, called in turn."""
    times: list[list[float]] = [[] for _ in functions]
    for repeat in range(repeats + 2):  # two to warm up
        for function, own in zip(functions, times):
            start = time.perf_counter()
            function()
            if repeat >= 2:
                own.append(1e3 * (time.perf_counter() - start))
    return [statistics.median(own) for own in times]


if __name__ == '__main__':
    main()
