"""Times the two weight gradients of large depthwise convolutions, in turn, on the CPU.

    python tools/benchmark_depthwise.py

Prints a Markdown table of medians over maps of Conv2Former's stages; the last column says whether
`has_fast_weight_gradient` chooses the matrix products. Needs an otherwise idle machine.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable

import torch
from torch import Tensor, nn

from mmconv2former.depthwise import has_fast_weight_gradient, weight_gradient

# batch, channels, side: size T at 128x128 (batch 4), 512x512 (batch 1), 800x800 (batch 2)
SHAPES = [
    *((4, 72 * 2**i, 32 // 2**i) for i in range(4)),
    *((1, 72 * 2**i, 128 // 2**i) for i in range(4)),
    *((2, 72 * 2**i, 200 // 2**i) for i in range(4)),
]


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument('--kernel-sizes', type=int, nargs='+', default=[7, 11])
    parser.add_argument('--repeats', type=int, default=9)
    args = parser.parse_args()
    print(f'torch {torch.__version__}, {torch.get_num_threads()} threads, float32\n')
    print('| kernel | N, C, H, W | stock, ms | matrix products, ms | ratio | chosen |')
    print('|---|---|---|---|---|---|')
    for kernel_size in args.kernel_sizes:
        for batch, channels, side in SHAPES:
            shape = (batch, channels, side, side)
            x = torch.randn(shape).contiguous(memory_format=torch.channels_last)
            grad = torch.randn(shape).contiguous(memory_format=torch.channels_last)
            weight = nn.Parameter(torch.randn(channels, 1, kernel_size, kernel_size))
            stock, products = medians(
                args.repeats,
                lambda x=x, grad=grad, weight=weight: stock_gradient(x, grad, weight),
                lambda x=x, grad=grad, k=kernel_size: weight_gradient(x, grad, k),
            )
            chosen = 'yes' if has_fast_weight_gradient(x, weight) else 'no'
            print(
                f'| {kernel_size} | {", ".join(map(str, shape))} | {stock:.2f} | {products:.2f} '
                f'| {products / stock:.2f} | {chosen} |',
                flush=True,
            )


def stock_gradient(x: Tensor, grad: Tensor, weight: Tensor) -> Tensor:
    """The weight gradient alone, as autograd computes it."""
    pad = weight.shape[-1] // 2
    return torch.nn.grad.conv2d_weight(x, weight.shape, grad, padding=pad, groups=x.shape[1])


def medians(repeats: int, *functions: Callable[[], Tensor]) -> list[float]:
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
