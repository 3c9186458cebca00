"""How the benchmarks measure: setting, wall time, activity of the device, memory, ceilings.

The same code runs on every device. A CPU has no kernels, so torch's operators, including nested
ones, count as launches there. Peak memory is measured on CUDA only.
"""

from __future__ import annotations

import argparse
import json
import math
import platform
import statistics
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from torch import Tensor, nn
from torch.profiler import ProfilerActivity

from common import at_least
from common.config_check import in_one_line
from common.counting import count_bytes_kept
from common.tables import table

Size = tuple[int, int]  # height, width
DTYPES = {'float32': torch.float32, 'bfloat16': torch.bfloat16, 'float16': torch.float16}


@dataclass(frozen=True)
class Setting:
    """Input, device and precision of a run.

    Raises:
        SystemExit: The device is cuda and torch finds none. Counting needs one too: without it
            torch turns autocast off, and float16 would be counted as float32.
    """

    size: Size
    batch: int = 1
    device: str = 'cpu'
    dtype: str = 'float32'

    def __post_init__(self) -> None:
        if self.device == 'cuda' and not torch.cuda.is_available():
            raise SystemExit('error: --device cuda: torch finds no CUDA device on this machine')

    def images(self, size: Size | None = None) -> Tensor:
        """A random batch of this or another size."""
        torch.manual_seed(0)
        return torch.randn(self.batch, 3, *(size or self.size), device=self.device)

    def autocast(self) -> AbstractContextManager:
        if self.dtype == 'float32':
            return nullcontext()
        return torch.autocast(self.device, DTYPES[self.dtype])

    def __str__(self) -> str:
        height, width = self.size
        return f'{self.batch}x3x{height}x{width}, {self.dtype}, {self.device}'


def add_setting_arguments(parser: argparse.ArgumentParser, rounds: int) -> None:
    """Adds what `asked` returns, and `--rounds` with a default."""
    parser.add_argument('--size', type=int, nargs=2, metavar=('H', 'W'), help='size of the images')
    parser.add_argument('--batch', type=at_least(1), help='images per step')
    parser.add_argument('--device', choices=['cpu', 'cuda'], help='default: cpu')
    parser.add_argument('--dtype', choices=DTYPES, help='autocast dtype')
    parser.add_argument(
        '--rounds',
        type=at_least(2),  # which quartiles need
        default=rounds,
        help=f'number of timed rounds (default: {rounds})',
    )


def asked(args: argparse.Namespace) -> dict[str, Any]:
    """The fields of a `Setting` that the command line gives."""
    found = {key: value for key in ('batch', 'device', 'dtype') if (value := getattr(args, key))}
    return found | ({'size': tuple(args.size)} if args.size else {})


def device_name(device: str) -> str:
    if device == 'cuda':
        return torch.cuda.get_device_name()
    cpuinfo = Path('/proc/cpuinfo')
    lines = cpuinfo.read_text().splitlines() if cpuinfo.exists() else []
    names = [line.split(':')[1].strip() for line in lines if 'model name' in line]
    return names[0] if names else platform.processor() or platform.machine()


def machine(device: str) -> str:
    """The device and versions that results depend on, in a line."""
    threads = '' if device == 'cuda' else f', {torch.get_num_threads()} threads'
    return f'{device_name(device)}{threads}, torch {torch.__version__}'


class Budget:
    """A time limit, in seconds from now."""

    def __init__(self, seconds: float) -> None:
        self.end = time.monotonic() + seconds

    @property
    def left(self) -> float:
        return max(0.0, self.end - time.monotonic())

    def part(self, seconds: float) -> Budget:
        return Budget(min(seconds, self.left))


UNLIMITED = Budget(math.inf)


# ------------------------------------------------------------------------------------------- time
def synchronize(device: str) -> None:
    if device == 'cuda':
        torch.cuda.synchronize()


def timed(function: Callable[[], object], device: str) -> float:
    """Seconds of a call, until the device has finished."""
    synchronize(device)
    start = time.perf_counter()
    function()
    synchronize(device)
    return time.perf_counter() - start


def repeat(function: Callable[[], object], calls: int) -> None:
    for _ in range(calls):
        function()


def warm_up(function: Callable[[], object], device: str) -> tuple[float, int]:
    """Seconds of a call after the first, and how many fit into 20 ms, from 3 to 100."""
    function()  # compiles and plans
    once = timed(function, device)
    return once, max(3, min(100, int(0.02 / once)))


def launch_seconds(function: Callable[[], object], device: str) -> float:
    """Mean wall time of a call. For a tiny input this is the cost of a launch on the host."""
    _, calls = warm_up(function, device)
    return timed(partial(repeat, function, calls), device) / calls


def device_seconds(function: Callable[[], object], device: str) -> float:
    """Mean time of a call on the device alone, on a GPU without the time of launches."""
    if device != 'cuda':
        return launch_seconds(function, device)
    once, calls = warm_up(function, device)
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    # The device sleeps, at about 2 cycles a nanosecond, while the host fills its queue.
    torch.cuda._sleep(int(2e9 * min(calls * once, 0.02)))
    start.record()
    repeat(function, calls)
    end.record()
    end.synchronize()
    return start.elapsed_time(end) / 1e3 / calls


# -------------------------------------------------------------------------------------- ceilings
@dataclass
class Ceilings:
    """Measured limits of a device."""

    copy: float  # bytes read and written per second
    products: dict[str, float]  # operations of matrix products per second, by dtype

    def seconds(self, moved: float, operations: float) -> float:
        """The minimum time for moving these bytes and doing these float32 operations."""
        return max(moved / self.copy, operations / self.products['float32'])

    def __str__(self) -> str:
        rates = ', '.join(f'{name} {rate / 1e12:.1f}' for name, rate in self.products.items())
        return f'copy {self.copy / 1e9:,.0f} GB/s; matrix products, TFLOP/s: {rates}'


def measure_ceilings(device: str) -> Ceilings:
    """Rates of a large copy and of large matrix products, with float32 instead of TF32."""
    numbers, side = (2**28, 8192) if device == 'cuda' else (2**22, 512)
    source = torch.ones(numbers, device=device)
    target = torch.empty_like(source)
    copy = 2 * source.nbytes / device_seconds(lambda: target.copy_(source), device)
    products = {}
    for name, dtype in DTYPES.items():
        matrix = torch.randn(side, side, device=device, dtype=dtype)
        seconds = device_seconds(partial(torch.mm, matrix, matrix), device)
        products[name] = 2 * side**3 / seconds
    return Ceilings(copy, products)


# --------------------------------------------------------------------------- what the device does
@dataclass
class Activity:
    """Activity of a device in one call; times in seconds."""

    busy: float  # time in which it ran anything
    launches: int  # kernels, copies and fills
    depthwise: float  # the part of busy that is depthwise convolutions


def trace(function: Callable[[], object], device: str) -> Activity:
    """Activity of the device in a call, from torch's profiler."""
    activities = [ProfilerActivity.CPU]
    if device == 'cuda':
        activities.append(ProfilerActivity.CUDA)
    with torch.profiler.profile(activities=activities, record_shapes=True) as profiler:
        function()
        synchronize(device)
    with TemporaryDirectory() as folder:
        path = Path(folder) / 'trace.json'
        profiler.export_chrome_trace(str(path))
        return read_trace(json.loads(path.read_bytes())['traceEvents'], device)


Event = dict[str, Any]
ON_DEVICE = ('kernel', 'gpu_memcpy', 'gpu_memset')  # annotations also span idle time


def read_trace(events: list[Event], device: str) -> Activity:
    """Reads a trace of torch's profiler.

    A kernel belongs to a depthwise convolution if one of the operators that launched it is one
    (`is_depthwise`), or if its name begins with `depthwise_`, as in this project.

    Raises:
        RuntimeError: The trace contains nothing of the device.
    """
    operators = [event for event in events if event.get('cat') == 'cpu_op']
    depthwise: set[int] = set()
    callers: list[Event] = []
    for operator in sorted(operators, key=lambda event: (event['tid'], event['ts'], -event['dur'])):
        while callers and not (
            callers[-1]['tid'] == operator['tid'] and operator['ts'] < end_of(callers[-1])
        ):
            callers.pop()
        if is_depthwise(operator) or (callers and identity(callers[-1]) in depthwise):
            depthwise.add(identity(operator))
        callers.append(operator)
    if device == 'cuda':
        ran = [event for event in events if event.get('cat') in ON_DEVICE]
    else:
        ran = [operator for operator in operators if operator['name'].startswith('aten::')]
    if not ran:
        raise RuntimeError("torch's profiler saw nothing run on the device")
    convolutions = [
        event
        for event in ran
        if identity(event) in depthwise or event['name'].startswith('depthwise_')
    ]
    return Activity(covered(ran), len(ran), covered(convolutions))


def identity(event: Event) -> int:
    """The number of an operator, or of the innermost one that launched a kernel."""
    return event['args'].get('External id', -1)


def end_of(event: Event) -> float:
    return event['ts'] + event['dur']


def is_depthwise(operator: Event) -> bool:
    """Checks its name, or the shapes of a convolution: input (N, C, ...), kernel (C, 1, ...)."""
    name = operator['name']
    if 'convolution' not in name:
        return 'depthwise' in name
    shapes = operator['args'].get('Input Dims', [])
    x, weight = (shapes[1:3] if name.endswith('backward') else shapes[:2]) or ([], [])
    return len(x) == len(weight) == 4 and weight[1] == 1 < weight[0] == x[1]


def covered(events: Iterable[Event]) -> float:
    """Seconds in which at least one event runs."""
    total, reached = 0.0, -math.inf
    for start, end in sorted((event['ts'], end_of(event)) for event in events):
        total += max(0.0, end - max(start, reached))
        reached = max(reached, end)
    return 1e-6 * total


# ------------------------------------------------------------------------------------------ steps
@dataclass
class Case:
    """A model and the calls that are measured, on a batch."""

    model: nn.Module
    step: Callable[[Any], object]
    forward: Callable[[Any], object] | None = None  # keeps memory for the backward pass


@dataclass
class Cost:
    """The cost of a step, or why it is unknown."""

    wall: list[float] = field(default_factory=list)  # seconds of each round
    activity: Activity | None = None
    peak_bytes: int | None = None  # beyond what was allocated before the step; CUDA only
    bytes_kept: int | None = None  # between forward and backward
    # seconds of the first and the second call at each new size
    new_sizes: list[tuple[float, float]] = field(default_factory=list)
    error: str = ''

    @property
    def median(self) -> float | None:
        return statistics.median(self.wall) if self.wall else None


LEAST_ROUNDS = 3  # even if the time limit is reached


def measure_costs(
    builders: Mapping[str, Callable[[], Case]],
    make_batch: Callable[[Size], Any],
    setting: Setting,
    rounds: int,
    budget: Budget,
    new_sizes: Sequence[Size] = (),
) -> dict[str, Cost]:
    """Costs of cases that run in turn, after a warm-up.

    Args:
        builders: Functions that make the cases. A case that cannot be built or run gets an `error`.
        make_batch: Function that makes a batch of a given size, for all cases.
        setting: The size of the timed batches, and the device.
        rounds: How often each case is timed; fewer when the budget is used up, but at least
            `LEAST_ROUNDS`.
        budget: Time limit. Cases that exceed it get an `error`; new sizes are left out.
        new_sizes: Sizes at which the first and the second call are timed.
    """
    costs = {name: Cost() for name in builders}
    cases: dict[str, Case] = {}
    device, batch = setting.device, make_batch(setting.size)
    for name, build in builders.items():
        with noting_errors(costs[name]):
            if not budget.left:
                raise TimeoutError('skipped, the time limit is reached')
            case = build()
            case.step(batch)
            cases[name] = case
            costs[name].activity = trace(partial(case.step, batch), device)
            if case.forward is not None:
                costs[name].bytes_kept = count_bytes_kept(case.model, batch, case.forward)
    for number in range(rounds):
        if number >= LEAST_ROUNDS and not budget.left:
            break
        for name, case in cases.items():
            time_and_peak(costs[name], partial(case.step, batch), device)
    for new_size in new_sizes:
        new_batch = make_batch(new_size)
        for name, case in cases.items():
            with noting_errors(costs[name]):
                if budget.left:
                    first, second = (timed(partial(case.step, new_batch), device) for _ in range(2))
                    costs[name].new_sizes.append((first, second))
    return costs


@contextmanager
def noting_errors(cost: Cost) -> Iterator[None]:
    """Records an error in one case, so that the others continue."""
    try:
        yield
    except Exception as error:
        cost.error = in_one_line(error)


def time_and_peak(cost: Cost, step: Callable[[], object], device: str) -> None:
    before = 0
    if device == 'cuda':
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
    cost.wall.append(timed(step, device))
    if device == 'cuda':
        cost.peak_bytes = max(cost.peak_bytes or 0, torch.cuda.max_memory_allocated() - before)


# ----------------------------------------------------------------------------------------- tables
def costs_table(costs: Mapping[str, Cost], more: Mapping[str, Mapping[str, str]] = {}) -> str:
    """A row for each case, with medians; `more` columns by header and case follow the names.

    Ratios are those of the first case to each. Columns without any value are left out; below the
    table is a line for each case that was not measured.
    """
    first = next(iter(costs.values()))
    rows: list[dict[str, str]] = []
    for name, cost in costs.items():
        row = {'': f'`{name}`'} | {header: cells.get(name, '') for header, cells in more.items()}
        row |= {
            'wall, ms': spread(cost.wall),
            'first to it': ratio(first.median, cost.median),
            'kept for backward, MiB': mebibytes(cost.bytes_kept),
            'kept, first to it': ratio(first.bytes_kept, cost.bytes_kept),
        }
        if cost.activity is not None:
            row |= {
                'busy, ms': f'{1e3 * cost.activity.busy:.1f}',
                'depthwise, ms': f'{1e3 * cost.activity.depthwise:.1f}',
                'launches': f'{cost.activity.launches:,}',
            }
        row['peak, MiB'] = mebibytes(cost.peak_bytes)
        if cost.new_sizes:
            seconds, ratios = zip(*((new, new / known) for new, known in cost.new_sizes))
            row['new size, ms'] = f'{1e3 * statistics.median(seconds):.0f}'
            row['times of a known size'] = f'{statistics.median(ratios):.1f}'
        rows.append(row)
    headers = dict.fromkeys(header for row in rows for header, cell in row.items() if cell)
    errors = [f'\n`{name}`: {cost.error}\n' for name, cost in costs.items() if cost.error]
    cells = [[row.get(header, '') for header in headers] for row in rows]
    return table(list(headers), cells) + ''.join(errors)


def spread(seconds: Sequence[float]) -> str:
    """Median and quartiles in milliseconds."""
    if not seconds:
        return ''
    first, median, third = (f'{1e3 * value:.1f}' for value in statistics.quantiles(seconds, n=4))
    return f'{median} ({first} to {third})'


def ratio(first: float | None, other: float | None) -> str:
    return f'{first / other:.2f}' if first and other else ''


def mebibytes(count: int | None) -> str:
    return '' if count is None else f'{count / 2**20:,.0f}'
