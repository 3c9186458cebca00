"""Times every implementation of the depthwise convolution.

    python tools/benchmark_depthwise.py                  # the backward pass on the CPU
    python tools/benchmark_depthwise.py --device cuda    # each pass on a GPU, about a minute

It shows time, TFLOP/s and the share of the measured ceiling. The ceiling is the time that the bytes
need at the bandwidth of a large copy, or the operations at the rate of a large float32 product,
whichever is longer. Small maps stay in the cache and may exceed it. The chosen implementation is
bold. On a GPU, times are those of the GPU alone; a second table shows the cost of a launch on the
host.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import common  # before torch
import torch
from common.config_check import in_one_line
from common.measuring import (
    DTYPES,
    Budget,
    Ceilings,
    Setting,
    device_seconds,
    launch_seconds,
    machine,
    measure_ceilings,
)
from common.tables import show, table
from torch import Tensor, nn

from mmconv2former.ops import depthwise

Shape = tuple[int, int, int, int]  # batch, channels, height, width
PAGE = Path(__file__).resolve().parents[1] / 'docs/data/benchmarks.md'


def stages(batch: int, height: int, width: int) -> list[Shape]:
    """The maps of size T's four stages; the first one has this size."""
    return [(batch, 72 * 2**i, height // 2**i, width // 2**i) for i in range(4)]


# At 512x512, 800x1280 and 224x224, and of small crops.
CPU_SHAPES = [
    *stages(1, 128, 128), *stages(2, 200, 320), *stages(8, 56, 56), *stages(4, 32, 32)
]  # fmt: skip
CPU_KERNELS = (5, 7, 9, 11, 15, 21)
# Of a step of detection at 800x1280, segmentation at 512x512 and classification at 224x224.
GPU_SHAPES = [*stages(2, 200, 320), *stages(2, 128, 128), *stages(64, 56, 56)]
GPU_KERNELS = (11, 3, 7, 21, 5, 31)  # those of the network first, in case time runs out
FEED_FORWARD = 3  # the kernel in the feed-forward part, which has 4 times the channels
GPU_PASSES = ('forward', 'input gradient', 'weight gradient')
# Which gradients the other passes compute: of input, weight and bias.
GRADIENTS = {
    'input gradient': (True, False, False),
    'weight gradient': (False, True, True),
    'backward': (True, True, True),
}


def main() -> None:
    parser = common.parser_of(__doc__)
    parser.add_argument('--device', choices=['cpu', 'cuda'], default='cpu')
    parser.add_argument('--dtype', choices=DTYPES, help='default: float32 on CPU, bfloat16 on GPU')
    parser.add_argument('--kernel-sizes', type=int, nargs='+')
    parser.add_argument(
        '--budget', type=float, default=120, help='time limit in seconds (default: 120)'
    )
    parser.add_argument(
        '--page', action='store_true', help='store the table of the CPU in docs/data'
    )
    args = parser.parse_args()
    is_gpu = args.device == 'cuda'
    if args.page and is_gpu:
        parser.error('--page stores the table of the CPU only')
    dtype = args.dtype or ('bfloat16' if is_gpu else 'float32')
    setting = Setting((1, 1), device=args.device, dtype=dtype)
    ceilings = measure_ceilings(args.device)
    timings = measure_passes(
        args.kernel_sizes or (GPU_KERNELS if is_gpu else CPU_KERNELS),
        GPU_SHAPES if is_gpu else CPU_SHAPES,
        setting,
        ceilings,
        Budget(args.budget),
        GPU_PASSES if is_gpu else ('backward',),
    )
    title = f'{machine(args.device)}; {setting.dtype}; {ceilings}'
    show('depthwise', f'{title}\n\n{passes_table(timings)}', [PAGE] if args.page else [])
    if is_gpu:
        print(f'\n{launches_table(measure_launches(setting))}')


def tensors(
    shape: Shape, kernel: int, setting: Setting
) -> tuple[Tensor, Tensor, nn.Parameter, Tensor]:
    """Input and gradient of the output (N, H, W, C), weight (C, 1, K, K), bias (C,)."""
    batch, channels, height, width = shape
    make = partial(torch.randn, device=setting.device, dtype=DTYPES[setting.dtype])
    x, grad = (make(batch, height, width, channels) for _ in range(2))
    return x, grad, nn.Parameter(make(channels, 1, kernel, kernel)), make(channels)


# ------------------------------------------------------------------------------------- each pass
@dataclass
class Timing:
    """One pass of one implementation, or why it failed."""

    kernel: int
    shape: Shape
    kind: str  # of pass
    implementation: str
    is_chosen: bool  # by default for this input
    milliseconds: float = 0.0
    tflops: float = 0.0
    share: float = 0.0  # of the measured ceiling
    error: str = ''


def measure_passes(
    kernels: Sequence[int],
    shapes: Sequence[Shape],
    setting: Setting,
    ceilings: Ceilings,
    budget: Budget,
    kinds: Sequence[str] = GPU_PASSES,
) -> list[Timing]:
    """Times passes of every implementation that can run on the device.

    Args:
        kernels: Kernel sizes; `FEED_FORWARD` gets 4 times the channels.
        shapes: Shapes of the input.
        setting: Device, and dtype of input, weight and bias.
        ceilings: Limits with which the times are compared.
        budget: When it is used up, the remaining kernels and shapes are left out.
        kinds: Passes: 'forward' or keys of `GRADIENTS`.
    """
    timings: list[Timing] = []
    for kernel in kernels:
        for batch, channels, height, width in shapes:
            if not budget.left:
                return timings
            shape = (batch, channels * (4 if kernel == FEED_FORWARD else 1), height, width)
            x, grad, weight, bias = tensors(shape, kernel, setting)
            chosen = depthwise.choose(x, weight)
            for name in depthwise.implementations(x, weight):
                for kind in kinds:
                    timing = Timing(kernel, shape, kind, name, name == chosen)
                    timings.append(timing)
                    try:
                        call = one_pass(kind, grad, x, weight, bias, name)
                        seconds = device_seconds(call, setting.device)
                    except Exception as error:  # the others may still work
                        timing.error = in_one_line(error)
                        continue
                    convolutions = 2 if kind == 'backward' else 1
                    operations = convolutions * 2 * kernel**2 * x.numel()
                    moved = convolutions * x.element_size() * (2 * x.numel() + weight.numel())
                    timing.milliseconds = 1e3 * seconds
                    timing.tflops = operations / seconds / 1e12
                    timing.share = ceilings.seconds(moved, operations) / seconds
    return timings


def one_pass(
    kind: str, grad: Tensor, x: Tensor, weight: Tensor, bias: Tensor, implementation: str
) -> Callable[[], object]:
    """A call of a pass. The weight is prepared beforehand, as networks do once a step."""
    weight = depthwise.prepare_weight(weight.detach(), x.dtype, implementation)

    @torch.no_grad()
    def call() -> object:
        if kind == 'forward':
            return depthwise.depthwise_conv(x, weight, bias, implementation)
        return depthwise.depthwise_conv_backward(grad, x, weight, GRADIENTS[kind], implementation)

    return call


def passes_table(timings: Sequence[Timing]) -> str:
    """A row for each kernel, shape and pass, a column for each implementation."""
    names = list(dict.fromkeys(timing.implementation for timing in timings))
    cells: dict[tuple[int, Shape, str], dict[str, str]] = {}
    for timing in sorted(timings, key=lambda timing: timing.kernel):  # otherwise as measured
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


# --------------------------------------------------------------------------------------- launches
TINY: Shape = (1, 8, 8, 8)


def measure_launches(setting: Setting, kernel: int = 11) -> dict[str, float]:
    """Microseconds of a call with a tiny input: `torch.add`, then each pass."""
    x, grad, weight, bias = tensors(TINY, kernel, setting)
    calls: dict[str, Callable[[], object]] = {'torch.add': partial(torch.add, x, grad)}
    for name in depthwise.implementations(x, weight):
        for kind in GPU_PASSES:
            calls[f'{name}, {kind}'] = one_pass(kind, grad, x, weight, bias, name)
    return {name: 1e6 * launch_seconds(call, setting.device) for name, call in calls.items()}


def launches_table(launches: dict[str, float]) -> str:
    first = next(iter(launches.values()))
    rows = [[name, f'{us:.1f}', f'{us / first:.1f}'] for name, us in launches.items()]
    return table(['call of a tiny map', 'us', 'times of torch.add'], rows)


if __name__ == '__main__':
    main()
