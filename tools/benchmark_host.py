"""Times what a step of size T costs the host on a GPU, without a GPU: kernels are left out.

    python tools/benchmark_host.py

Everything else happens as on a GPU with bfloat16 autocast: autograd, the choice of kernels, memory
for their results, arguments. The image and the channels are so small that torch's own operators,
which run on the CPU, take little. What the driver needs to launch a kernel is missing. To compare
two versions, run them in turn on an idle machine, and look at the fastest step.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any
from unittest.mock import patch

import common  # before torch
import torch
from common.measuring import machine
from common.tables import show, table

from mmconv2former import Conv2Former
from mmconv2former.ops import depthwise
from mmconv2former.ops.triton_support import installation_problem, load

CHANNELS = 8
DEPTHS = (3, 3, 12, 3)  # of T


def main() -> None:
    parser = common.parser_of(__doc__)
    parser.add_argument(
        '--rounds',
        type=common.at_least(1),
        default=200,
        help='steps to time (default: %(default)s)',
    )
    args = parser.parse_args()
    problem = installation_problem()
    if problem is not None:
        raise SystemExit(f'error: {problem}')
    torch.set_num_threads(1)
    print(f'{machine("cpu")}; milliseconds\n')
    show('host', measure(args.rounds), [])


def measure(rounds: int) -> str:
    """A table of a training step, inference, and inference in the deployed form."""
    model = Conv2Former(dict(channels=(CHANNELS,) * 4, depths=DEPTHS))
    x = torch.randn(2, 3, 64, 64)
    with kernels_left_out() as launches:
        rows = [['training step', *times(partial(train, model, x), launches, rounds)]]
        model.eval()
        rows.append(['inference', *times(partial(infer, model, x), launches, rounds)])
        model.switch_to_deploy()
        rows.append(['deployed', *times(partial(infer, model, x), launches, rounds)])
    return table(['', 'kernels', 'median', 'fastest'], rows)


@contextmanager
def kernels_left_out() -> Iterator[list[int]]:
    """Chooses kernels as on a GPU, and counts instead of running them; results are arbitrary.

    For a process that does nothing else: launchers are kept.
    """
    launch = load('launch')
    launches = [0]

    def run(*args: object) -> None:
        launches[0] += 1

    class Compiled(launch.Launcher):  # type: ignore[name-defined]
        def __init__(self, *args: Any, **options: Any) -> None:
            super().__init__(*args, **options)
            self.run, self.fixed, self.takes_tuple = run, (None,) * 5, True
            self.device, self.get_stream = 0, int

    with (
        patch.object(launch, 'Launcher', Compiled),
        patch.object(load('folding_triton'), 'Launcher', Compiled),
        patch.object(depthwise, 'setting', 'triton'),
        patch.object(depthwise, 'choice_for', lambda *_: 'triton'),
    ):
        yield launches


def train(model: torch.nn.Module, x: torch.Tensor) -> None:
    """A training step without an optimizer."""
    model.zero_grad()
    with torch.autocast('cpu', torch.bfloat16):
        outputs = model(x)
    sum(output.float().mean() for output in outputs).backward()


@torch.no_grad()
def infer(model: torch.nn.Module, x: torch.Tensor) -> None:
    with torch.autocast('cpu', torch.bfloat16):
        model(x)


def times(step: Callable[[], None], launches: list[int], rounds: int) -> tuple[str, str, str]:
    """Kernels of a step, and its median and shortest time."""
    for _ in range(5):  # prepares launches
        step()
    launches[0] = 0
    step()
    kernels, seconds = launches[0], []
    for _ in range(rounds):
        start = time.perf_counter()
        step()
        seconds.append(time.perf_counter() - start)
    return str(kernels), f'{1e3 * statistics.median(seconds):.2f}', f'{1e3 * min(seconds):.2f}'


if __name__ == '__main__':
    main()
