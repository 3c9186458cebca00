"""Times, activity and costs, with a clock and events whose truth is known."""

import random
import time
from functools import partial
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from common import measuring
from common.measuring import (
    DTYPES,
    Activity,
    Budget,
    Case,
    Ceilings,
    Cost,
    Setting,
    costs_table,
    covered,
    device_seconds,
    launch_seconds,
    machine,
    measure_ceilings,
    measure_costs,
    read_trace,
    trace,
)
from helpers.half_precision import needs_float16

TINY = Setting((1, 1))


@pytest.fixture
def clock(monkeypatch):
    """A clock that only `clock.now` moves."""
    clock = SimpleNamespace(now=0.0)
    monkeypatch.setattr(measuring.time, 'perf_counter', lambda: clock.now)
    monkeypatch.setattr(measuring.time, 'monotonic', lambda: clock.now)
    return clock


def test_cuda_needs_a_gpu(monkeypatch):
    """Counting too: torch would switch autocast off and count float16 as float32."""
    monkeypatch.setattr(torch.cuda, 'is_available', lambda: False)
    with pytest.raises(SystemExit, match='error: --device cuda: torch finds no CUDA device'):
        Setting((1, 1), device='cuda')


def test_machine_is_the_device_measured(monkeypatch):
    monkeypatch.setattr(torch.cuda, 'get_device_name', lambda: 'Some GPU')
    assert machine('cuda').startswith('Some GPU, ')
    assert 'Some GPU' not in machine('cpu')


# ------------------------------------------------------------------------------------------ trace
def event(cat, name, start, end, tid=1, **args):
    args = {key.replace('_', ' '): value for key, value in args.items()}
    return dict(ph='X', cat=cat, name=name, ts=start, dur=end - start, tid=tid, args=args)


def operator(number, name, start, end, *shapes, tid=1):
    return event('cpu_op', name, start, end, tid, External_id=number, Input_Dims=shapes)


def kernel(name, start, end, number=None, cat='kernel'):
    args = {} if number is None else dict(External_id=number)
    return event(cat, name, start, end, 7, **args)


def test_overlapping_events_count_once():
    rng = random.Random(0)
    for _ in range(50):
        starts = [rng.randrange(30) for _ in range(rng.randrange(12))]
        events = [kernel('', start, start + rng.randrange(8)) for start in starts]
        seconds = {s for e in events for s in range(e['ts'], e['ts'] + e['dur'])}
        assert covered(events) == pytest.approx(1e-6 * len(seconds))


def test_trace_of_a_gpu():
    """Two streams, annotations, and depthwise convolutions told from others."""
    x, thin, wide = [2, 8, 9, 9], [8, 1, 3, 3], [8, 8, 3, 3]
    events = [
        operator(1, 'aten::convolution', 0, 10, x, thin, [8]),
        operator(2, 'aten::cudnn_convolution', 2, 8, x, thin),
        operator(9, 'aten::copy_', 3, 4, x),  # called by both
        operator(3, 'aten::convolution', 10, 20, x, wide, [8]),
        operator(4, 'aten::convolution', 21, 22, [2, 1, 9, 9], thin, [8]),  # of one channel
        operator(10, 'aten::convolution', 30, 40, x, thin, [8]),
        operator(5, 'aten::convolution_backward', 0, 9, x, x, thin, tid=2),
        operator(6, 'aten::sum', 9, 10, x, tid=2),
        operator(7, 'ours::depthwise_conv', 11, 12, tid=2),
        event('user_annotation', 'step', 0, 100, External_id=8),
        event('gpu_user_annotation', 'step', 0, 1000, External_id=8),
        kernel('a', 100, 120, 2),
        kernel('b', 110, 130, 5),  # in another stream
        kernel('copy', 130, 132, 9),
        kernel('c', 200, 240, 3),
        kernel('d', 240, 245, 4),
        kernel('e', 250, 251, 6),
        kernel('f', 260, 263, 7),
        kernel('depthwise_forward_kernel', 300, 304),  # launched outside of any operator
        kernel('Memcpy DtoD', 400, 410, cat='gpu_memcpy'),
        kernel('Memset', 420, 421, cat='gpu_memset'),
        {'ph': 'f', 'cat': 'ac2g', 'name': 'flow', 'ts': 1},
    ]
    with pytest.raises(RuntimeError, match='saw nothing run on the device'):
        read_trace([event for event in events if event['ts'] < 100], 'cuda')
    activity = read_trace(events, 'cuda')
    assert activity.launches == 10
    assert activity.busy == pytest.approx(1e-6 * (32 + 45 + 1 + 3 + 4 + 10 + 1))
    assert activity.depthwise == pytest.approx(1e-6 * (32 + 3 + 4))


def test_trace_of_this_machine():
    x = torch.zeros(1, 8, 64, 64)

    def step(weight, groups):
        time.sleep(0.2)  # is no work
        F.conv2d(x, weight, groups=groups)

    start = time.perf_counter()
    wide = trace(partial(step, torch.zeros(8, 8, 9, 9), 1), 'cpu')
    assert 0 < wide.busy < time.perf_counter() - start - 0.2
    assert wide.depthwise == 0
    thin = trace(partial(step, torch.zeros(8, 1, 9, 9), 8), 'cpu')
    assert 0.5 * thin.busy < thin.depthwise <= thin.busy
    assert trace(lambda: x.add_(x).mul_(x), 'cpu').launches == 2


# ------------------------------------------------------------------------------------------- time
@pytest.mark.parametrize(('seconds', 'calls'), [(0.00099, 20), (0.1, 3), (1e-6, 100)])
@pytest.mark.parametrize('device', ['cpu', 'cuda'])
def test_calls_fill_the_time(device, seconds, calls, clock, monkeypatch):
    """On a GPU between two events, and behind a sleep that outlasts the launches."""
    happened = []

    class Event:
        def __init__(self, enable_timing):
            assert enable_timing

        def record(self):
            happened.append('record')
            self.now = clock.now

        def elapsed_time(self, end):
            return 1e3 * (end.now - self.now)

        def synchronize(self):
            happened.append('synchronize')

    def call():
        happened.append('call')
        clock.now += seconds

    monkeypatch.setattr(torch.cuda, 'Event', Event)
    monkeypatch.setattr(torch.cuda, '_sleep', lambda cycles: happened.append(cycles), raising=False)
    monkeypatch.setattr(torch.cuda, 'synchronize', lambda: None)
    assert device_seconds(call, device) == pytest.approx(seconds)
    if device == 'cpu':
        assert happened == ['call'] * (2 + calls)
        assert launch_seconds(call, device) == pytest.approx(seconds)
    else:
        cycles = happened.pop(2)
        assert cycles == pytest.approx(2e9 * min(calls * seconds, 0.02), rel=1e-4)
        assert happened == ['call'] * 2 + ['record'] + ['call'] * calls + ['record', 'synchronize']


@needs_float16
def test_ceilings(monkeypatch):
    """Rates of results that are seen to be computed, for calls of 0.1 s."""
    results = []
    monkeypatch.setattr(
        measuring, 'device_seconds', lambda call, device: results.append(call()) or 0.1
    )
    ceilings = measure_ceilings('cpu')
    copied, *products = results
    assert ceilings.copy == pytest.approx(10 * 2 * copied.nbytes)
    assert copied.min() == copied.max() == 1
    for (name, dtype), product in zip(DTYPES.items(), products, strict=True):
        assert product.dtype == dtype
        rate = 10 * 2 * product.numel() * product.shape[0]
        assert ceilings.products[name] == pytest.approx(rate)
    known = Ceilings(copy=100.0, products={'float32': 1000.0})
    assert known.seconds(moved=50, operations=10) == 0.5
    assert known.seconds(moved=50, operations=2000) == 2


# ------------------------------------------------------------------------------------------ costs
def test_costs_are_measured_in_turn(clock, monkeypatch):
    """One case fails and the others are measured; a new size costs 4 s, a known one 1 s."""
    monkeypatch.setattr(measuring, 'trace', lambda step, device: step() or Activity(2, 3, 1))
    called = []

    def build(name):
        def step(batch):
            called.append((name, batch.numel()))
            clock.now += 4 if called.count(called[-1]) == 1 else 1

        if name == 'broken':
            raise RuntimeError('no such kernel\nmore')
        return Case(torch.nn.Linear(1, 1), step, lambda batch: (batch * torch.ones(5)).sigmoid())

    costs = measure_costs(
        {name: partial(build, name) for name in ('a', 'broken', 'b')},
        lambda size: torch.ones(size[0] * size[1], 1, requires_grad=True),
        Setting((3, 4)),
        rounds=4,
        budget=Budget(60),
        new_sizes=[(5, 5), (6, 6)],
    )
    assert costs['broken'] == Cost(error='RuntimeError: no such kernel')
    in_turn = [('a', 12), ('b', 12)] * 4
    new = [(name, size) for size in (25, 36) for name in 'ab' for _ in range(2)]
    assert called == [('a', 12)] * 2 + [('b', 12)] * 2 + in_turn + new
    for name in 'ab':
        kept = 4 * (12 * 5 + 5)  # the sigmoid's output and `ones`, not the batch
        assert costs[name] == Cost([1] * 4, Activity(2, 3, 1), None, kept, [(4, 1), (4, 1)])
    costs['b'].wall = [2] * 4
    rest = '2000.0 | 1000.0 | 3 | 4000 | 4.0 |'
    assert costs_table(costs, {'weights': {'a': '5', 'b': '7'}}).splitlines() == [
        '|  | weights | wall, ms | first to it | kept for backward, MiB | kept, first to it '
        '| busy, ms | depthwise, ms | launches | new size, ms | times of a known size |',
        f'|{" --- |" * 11}',
        f'| `a` | 5 | 1000.0 (1000.0 to 1000.0) | 1.00 | 0 | 1.00 | {rest}',
        f'| `broken` |{"  |" * 10}',
        f'| `b` | 7 | 2000.0 (2000.0 to 2000.0) | 0.50 | 0 | 1.00 | {rest}',
        '',
        '`broken`: RuntimeError: no such kernel',
    ]


def test_peak_is_beyond_what_was_there(monkeypatch):
    memory = iter([100, 130, 200, 290, 300, 310])
    monkeypatch.setattr(torch.cuda, 'reset_peak_memory_stats', lambda: None)
    monkeypatch.setattr(torch.cuda, 'synchronize', lambda: None)
    monkeypatch.setattr(torch.cuda, 'memory_allocated', lambda: next(memory))
    monkeypatch.setattr(torch.cuda, 'max_memory_allocated', lambda: next(memory))
    cost = Cost()
    for _ in range(3):
        measuring.time_and_peak(cost, lambda: None, 'cuda')
    assert cost.peak_bytes == 90
    assert len(cost.wall) == 3


def test_what_does_not_fit_into_the_budget_is_left_out(clock, monkeypatch):
    monkeypatch.setattr(measuring, 'trace', lambda step, device: None)
    budget = Budget(10)
    assert budget.part(4).left == 4
    clock.now = 8.0
    assert budget.part(4).left == budget.left == 2

    def step(_):
        clock.now += 1.0

    cases = dict.fromkeys('abc', lambda: Case(torch.nn.Linear(1, 1), step, lambda batch: batch))
    costs = measure_costs(cases, lambda size: torch.ones(1), TINY, 9, budget, [(2, 2)])
    assert [len(cost.wall) for cost in costs.values()] == [3, 3, 0]  # of 9 rounds
    assert costs['c'].error == 'TimeoutError: skipped, the time limit is reached'
    assert costs['c'].bytes_kept is None
    assert costs['a'].new_sizes == []
