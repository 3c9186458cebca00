"""How the benchmarks measure: wall time, what the device does meanwhile, memory, ceilings.

The same code runs on every device. A CPU has no kernels, so torch's operators, nested ones
included, count as launches there. Peak memory is for CUDA only.
"""

from __future__ import annotations

import json
import math
import statistics
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from torch import Tensor, nn
from torch.profiler import ProfilerActivity
from torch.utils._pytree import tree_flatten

from common.config_check import in_one_line

Size = tuple[int, int]  # height, width


class Budget:
    """A limit of time, in seconds from now."""

    def __init__(self, seconds: float) -> None:
        self.end = time.monotonic() + seconds

    @property
    def left(self) -> float:
        return max(0.0, self.end - time.monotonic())

    def part(self, seconds: float) -> Budget:
        return Budget(min(seconds, self.left))


# ------------------------------------------------------------------------------------------- time
def synchronize(device: str) -> None:
    if device == 'cuda':
        torch.cuda.synchronize()


def timed(function: Callable, *args: object, device: str) -> float:
    """Seconds."""
    synchronize(device)
    start = time.perf_counter()
    function(*args)
    synchronize(device)
    return time.perf_counter() - start


def repeat(function: Callable[[], object], calls: int) -> None:
    for _ in range(calls):
        function()


def warm_up(function: Callable[[], object], device: str, at_most: float) -> tuple[float, int]:
    """Seconds of a call, and how many fit into `at_most` seconds: from 3 to 100."""
    function()  # compiles and plans
    once = timed(function, device=device)
    return once, max(3, min(100, int(at_most / once)))


def launch_seconds(function: Callable[[], object], device: str, at_most: float = 0.02) -> float:
    """Mean wall time of a call. For a tiny input it is what a launch costs the host."""
    _, calls = warm_up(function, device, at_most)
    return timed(repeat, function, calls, device=device) / calls


def device_seconds(function: Callable[[], object], device: str, at_most: float = 0.02) -> float:
    """Mean time of a call on the device alone: on a GPU without the time that launches take.

    Args:
        function: What is called.
        device: Where it runs.
        at_most: Seconds for all calls together; there are at least 3.
    """
    if device != 'cuda':
        return launch_seconds(function, device, at_most)
    once, calls = warm_up(function, device, at_most)
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    # While the device sleeps (about 2 cycles a nanosecond) the host fills its queue.
    torch.cuda._sleep(int(2e9 * min(calls * once, at_most)))
    start.record()
    repeat(function, calls)
    end.record()
    end.synchronize()
    return start.elapsed_time(end) / 1e3 / calls


# -------------------------------------------------------------------------------------- ceilings
@dataclass
class Ceilings:
    """Measured limits of a device."""

    copy: float  # bytes a second, read and written
    products: dict[str, float]  # operations a second of matrix products, by dtype

    def seconds(self, moved: float, operations: float) -> float:
        """The least time in which so many bytes can be moved and float32 operations done."""
        return max(moved / self.copy, operations / self.products['float32'])

    def __str__(self) -> str:
        rates = ', '.join(f'{name} {rate / 1e12:.1f}' for name, rate in self.products.items())
        return f'copy {self.copy / 1e9:,.0f} GB/s; matrix products, TFLOP/s: {rates}'


def measure_ceilings(device: str) -> Ceilings:
    """Of a large copy and of large matrix products; float32 is without TF32, torch's default."""
    numbers, side = (2**28, 8192) if device == 'cuda' else (2**22, 512)
    source = torch.ones(numbers, device=device)
    target = torch.empty_like(source)
    copy = 2 * 4 * numbers / device_seconds(lambda: target.copy_(source), device)
    products = {}
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        matrix = torch.randn(side, side, device=device, dtype=dtype)
        seconds = device_seconds(partial(torch.mm, matrix, matrix), device)
        products[str(dtype).removeprefix('torch.')] = 2 * side**3 / seconds
    return Ceilings(copy, products)


# --------------------------------------------------------------------------- what the device does
@dataclass
class Activity:
    """What a device did in one call; times in seconds."""

    busy: float  # while it ran anything
    launches: int  # kernels, copies and fills
    depthwise: float  # of busy, while it ran a depthwise convolution


def trace(function: Callable[[], object], device: str) -> Activity:
    """What the device does in a call, by torch's profiler."""
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


ON_DEVICE = ('kernel', 'gpu_memcpy', 'gpu_memset')  # annotations span the idle time between them


def read_trace(events: list[dict[str, Any]], device: str) -> Activity:
    """What a trace of torch's profiler says of the device.

    A kernel belongs to a depthwise convolution if one of the operators that it was launched in is
    one (`is_depthwise`), or if its own name begins with `depthwise_`, as those of this project do.

    Raises:
        RuntimeError: There is nothing of the device in it.
    """
    operators = [event for event in events if event.get('cat') == 'cpu_op']
    depthwise: set[int] = set()
    stack: list[dict[str, Any]] = []
    for operator in sorted(operators, key=lambda event: (event['tid'], event['ts'], -event['dur'])):
        while stack and not (
            stack[-1]['tid'] == operator['tid'] and operator['ts'] < end_of(stack[-1])
        ):
            stack.pop()
        if is_depthwise(operator) or (stack and identity(stack[-1]) in depthwise):
            depthwise.add(identity(operator))
        stack.append(operator)
    if device == 'cuda':
        ran = [event for event in events if event.get('cat') in ON_DEVICE]
    else:
        ran = [operator for operator in operators if operator['name'].startswith('aten::')]
    if not ran:
        raise RuntimeError("torch's profiler saw nothing run on the device")
    of_depthwise = [
        event
        for event in ran
        if identity(event) in depthwise or event['name'].startswith('depthwise_')
    ]
    return Activity(covered(ran), len(ran), covered(of_depthwise))


def identity(event: dict[str, Any]) -> int:
    """The number of an operator, or of the innermost one that launched a kernel."""
    return event['args'].get('External id', -1)


def end_of(event: dict[str, Any]) -> float:
    return event['ts'] + event['dur']


def is_depthwise(operator: dict[str, Any]) -> bool:
    """By its name, or as a convolution by its shapes: input (N, C, ...) and kernel (C, 1, ...)."""
    name = operator['name']
    if 'convolution' not in name:
        return 'depthwise' in name
    shapes = operator['args'].get('Input Dims', [])
    x, weight = (shapes[1:3] if name.endswith('backward') else shapes[:2]) or ([], [])
    return len(x) == len(weight) == 4 and weight[1] == 1 < weight[0] == x[1]


def covered(events: Iterable[dict[str, Any]]) -> float:
    """Seconds in which any of the events runs."""
    return 1e-6 * union_length((event['ts'], end_of(event)) for event in events)


def union_length(intervals: Iterable[tuple[float, float]]) -> float:
    """What the intervals cover, where they overlap once."""
    total, reached = 0.0, -math.inf
    for start, end in sorted(intervals):
        total += max(0.0, end - max(start, reached))
        reached = max(reached, end)
    return total


# ------------------------------------------------------------------------------------------ steps
@dataclass
class Case:
    """A model with what is measured of it, on a batch."""

    model: nn.Module
    step: Callable[[Any], object]
    forward: Callable[[Any], object] | None = None  # what keeps memory for the backward pass


@dataclass
class Cost:
    """What a step costs, or why that is unknown."""

    wall: list[float] = field(default_factory=list)  # seconds, one for each round
    activity: Activity | None = None
    peak_bytes: int | None = None  # beyond what was allocated before the step; CUDA only
    bytes_kept: int | None = None  # between forward and backward
    # seconds of the first and the second call at each new size
    new_sizes: list[tuple[float, float]] = field(default_factory=list)
    error: str = ''


LEAST_ROUNDS = 3  # even when the time is up


def measure_costs(
    builders: Mapping[str, Callable[[], Case]],
    make_batch: Callable[[Size], Any],
    size: Size,
    device: str,
    rounds: int,
    budget: Budget,
    new_sizes: Sequence[Size] = (),
) -> dict[str, Cost]:
    """Costs of cases that run in turn, after warming up.

    Args:
        builders: They make the cases. A case that cannot be built or run gets an `error`.
        make_batch: It makes a batch of a given size, for all cases.
        size: The size of the timed batches.
        device: Where the cases run.
        rounds: How often each case is timed; less when the budget is used up, but not less than
            `LEAST_ROUNDS`.
        budget: Cases that do not fit into it get an `error`, new sizes are left out.
        new_sizes: Sizes at which the first and the second call are timed.
    """
    costs = {name: Cost() for name in builders}
    cases: dict[str, Case] = {}
    batch = make_batch(size)
    for name, build in builders.items():
        with noting_errors(costs[name]):
            if not budget.left:
                raise TimeoutError('skipped, the time is used up')
            case = build()
            case.step(batch)
            cases[name] = case
            costs[name].activity = trace(partial(case.step, batch), device)
            if case.forward is not None:
                costs[name].bytes_kept = count_kept(case.model, case.forward, batch)
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
                    first, second = (timed(case.step, new_batch, device=device) for _ in range(2))
                    costs[name].new_sizes.append((first, second))
    return costs


@contextmanager
def noting_errors(cost: Cost) -> Iterator[None]:
    """An error in one case does not stop the others."""
    try:
        yield
    except Exception as error:
        cost.error = in_one_line(error)


def time_and_peak(cost: Cost, step: Callable[[], object], device: str) -> None:
    before = 0
    if device == 'cuda':
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
    cost.wall.append(timed(step, device=device))
    if device == 'cuda':
        cost.peak_bytes = max(cost.peak_bytes or 0, torch.cuda.max_memory_allocated() - before)


def count_kept(model: nn.Module, forward: Callable[[Any], object], batch: Any) -> int:
    """Bytes that autograd keeps between forward and backward, without parameters and batch."""
    kept: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        outputs = forward(batch)
    for tensor in (*model.parameters(), *tree_flatten(batch)[0]):
        if isinstance(tensor, Tensor):
            kept.pop(tensor.untyped_storage().data_ptr(), None)
    del outputs
    return sum(kept.values())


# ----------------------------------------------------------------------------------------- tables
COLUMNS = ['busy, ms', 'depthwise, ms', 'launches', 'peak, MiB', 'new size, ms',
           'times of a known size']  # fmt: skip


def cells(cost: Cost) -> list[str]:
    """The cells of `COLUMNS`, medians where there are several values."""
    activity = [''] * 3
    if cost.activity is not None:
        seconds = cost.activity.busy, cost.activity.depthwise
        activity = [*(f'{1e3 * value:.1f}' for value in seconds), f'{cost.activity.launches:,}']
    first = times = ''
    if cost.new_sizes:
        first = f'{1e3 * statistics.median(first for first, _ in cost.new_sizes):.0f}'
        times = f'{statistics.median(first / second for first, second in cost.new_sizes):.1f}'
    return [*activity, mebibytes(cost.peak_bytes), first, times]


def mebibytes(count: int | None) -> str:
    return '' if count is None else f'{count / 2**20:,.0f}'


def errors_below(costs: Mapping[str, Cost]) -> str:
    """A line below a table for each case that was not measured."""
    return ''.join(f'\n\n`{name}`: {cost.error}' for name, cost in costs.items() if cost.error)
