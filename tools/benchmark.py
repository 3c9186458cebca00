"""Measures backbones beside each other in one run: time, memory, arithmetic, memory traffic.

    python tools/benchmark.py                           # ours against the published code
    python tools/benchmark.py --device cuda             # the same ratios there, not judged
    python tools/benchmark.py --device cuda --report DIR   # everything, in 4 minutes on a GPU
    python tools/benchmark.py conv2former_t convnext_tiny swin_tiny --size 800 1280
    python tools/benchmark.py conv2former_t:recompute=elementwise plain_t --dtype bfloat16
    python tools/benchmark.py conv2former_t convnext_tiny:cuda_graphs=True --only inference
    python tools/benchmark.py conv2former_t --profile
    python tools/benchmark.py --count                # operators launched and bytes moved, counted
    python tools/benchmark.py conv2former_t deit3_small --sweep resolution --plot sweep.png
    python tools/benchmark.py conv2former_t --sweep kernel --plot kernels.png
    make bench                                       # the first, three runs, kept in the docs

A model is a name, with options after a colon:

    conv2former_{n,t,s,b,l}    any argument of Conv2Former, or deploy=True (inference only)
    plain_{n,t,s,b,l}          the published equations in stock operators and NCHW, as in the
                               published code; channels_last=True for the other memory layout
    convnext_tiny  swin_tiny  hornet_tiny  ...     any of docs/baselines.md, with four outputs
    birder_t                   birder's Conv2Former, if that package is installed

and of any of them, for inference only, how it is run:

    cuda_graphs=True           as a CUDA graph (--device cuda)
    compile=True               by torch.compile
    aoti=True                  compiled ahead of time, by torch.export and AOTInductor
    half=True                  weights and images in --dtype, without autocast

--report measures the depthwise convolution, models, and whole recipes, and writes what it has after
each part. MODEL, --size and --dtype are then those of the models; recipes and the convolution have
their own sizes.

--size, --batch, --device and --dtype hold for whatever is measured or counted. The project's goals
are of the default setting only: of another one the same ratios are printed without them.

Models run in turn, once a round; figures are medians over rounds with the quartiles beside them.
Ratios between models of one run mean something on a noisy machine, times of two runs do not.
"""

from __future__ import annotations

import argparse
import copy
import json
import platform
import statistics
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import asdict, dataclass, field, replace
from importlib.util import find_spec
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any
from unittest.mock import patch

import torch
import torch.nn.functional as F
from common import plain_conv2former
from common.measuring import timed
from common.tables import with_table
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten
from torch.utils.flop_counter import FlopCounterMode

from mmconv2former import Baseline, Conv2Former, use_cuda_graphs
from mmconv2former.models.baselines import BASELINES
from mmconv2former.ops import block, depthwise, triton_support

DTYPES = {'float32': torch.float32, 'bfloat16': torch.bfloat16, 'float16': torch.float16}


# ----------------------------------------------------------------------------------------- models
class PlainConv2Former(nn.Module):
    """The published equations in stock operators, with the parameters of a `Conv2Former`."""

    def __init__(self, network: Conv2Former, channels_last: bool = False) -> None:
        super().__init__()
        self.network = network
        self.memory_format = torch.channels_last if channels_last else torch.contiguous_format

    def forward(self, x: Tensor) -> list[Tensor]:
        state = dict(self.network.named_parameters()) | dict(self.network.named_buffers())
        # The published code uses torch's GELU and BatchNorm, and its own LayerNorm.
        plain_conv2former.gelu = F.gelu  # type: ignore[assignment]
        plain_conv2former.batch_norm = stock_batch_norm  # type: ignore[assignment]
        x = x.contiguous(memory_format=self.memory_format)
        return plain_conv2former.plain_conv2former(x, state, self.network.depths, self.training)


def stock_batch_norm(x: Tensor, p: dict[str, Tensor], name: str, training: bool) -> Tensor:
    mean, var = p[f'{name}.running_mean'], p[f'{name}.running_var']
    return F.batch_norm(x, mean, var, p[f'{name}.weight'], p[f'{name}.bias'], training)


def build_conv2former(arch: str, deploy: bool = False, **options: Any) -> nn.Module:
    model = Conv2Former(arch, layer_scale_init_value=1.0, **options)
    return model.switch_to_deploy() if deploy else model


class BirderBackbone(nn.Module):
    """The four feature maps of a network of birder."""

    network: Any

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network

    def forward(self, x: Tensor) -> list[Tensor]:
        return list(self.network.detection_features(x).values())


def build_birder() -> nn.Module:
    if find_spec('birder') is None:
        raise SystemExit('error: birder_t: pip install birder (it is no part of this project)')
    import birder.net  # noqa: F401  (fills the registry)
    from birder.model_registry import registry

    return BirderBackbone(registry.net_factory('conv2former_t', num_classes=0))


BUILDERS: dict[str, Callable[..., nn.Module]] = {
    **{
        f'conv2former_{size}': lambda size=size, **options: build_conv2former(size, **options)
        for size in 'ntsbl'
    },
    **{
        f'plain_{size}': lambda size=size, **options: PlainConv2Former(
            Conv2Former(size), **options
        )
        for size in 'ntsbl'
    },
    **{
        name: lambda name=name, **options: Baseline(name, options=options)
        for name, variant in BASELINES.items()
        if variant.family.dense is not None
    },
    'birder_t': build_birder,
}  # fmt: skip


def build(spec: str) -> nn.Module:
    """The model of a specification such as `conv2former_t:with_cp=True,kernel_size=7`.

    Raises:
        SystemExit: There is no such model, or it says how it is run: see `split`.
    """
    if split(spec)[1]:
        raise SystemExit(f'error: {spec}: {", ".join(WAYS)} are for the times of inference only')
    name, options = parse(spec)
    return BUILDERS[name](**options)


def parse(spec: str) -> tuple[str, dict[str, Any]]:
    """Name and options of a model; raises SystemExit if there is none of this name."""
    name, _, text = spec.partition(':')
    if name not in BUILDERS:
        raise SystemExit(f'error: unknown model {name}; there are {", ".join(BUILDERS)}')
    options = dict(option.split('=') for option in text.split(',') if option)
    values = {'True': True, 'False': False}
    return name, {key: values.get(v, int(v) if v.isdigit() else v) for key, v in options.items()}


WAYS = ('cuda_graphs', 'compile', 'aoti', 'half')  # to run a model in inference


def split(spec: str) -> tuple[str, set[str]]:
    """The specification without ways to run the model, and these ways."""
    name, _, text = spec.partition(':')
    options = [option.partition('=') for option in text.split(',') if option]
    ways = {key for key, _, value in options if key in WAYS and value == 'True'}
    rest = ','.join(''.join(option) for option in options if option[0] not in WAYS)
    return f'{name}:{rest}' if rest else name, ways


# -------------------------------------------------------------------------------------- measuring
@dataclass
class Setting:
    """Input, device and precision of a run.

    Raises:
        SystemExit: The device is cuda and torch finds none. Counting needs it too: without one,
            torch switches autocast to it off, and float16 would be counted as float32.
    """

    size: tuple[int, int]  # height, width
    batch: int = 1
    device: str = 'cpu'
    dtype: str = 'float32'

    def __post_init__(self) -> None:
        if self.device == 'cuda' and not torch.cuda.is_available():
            raise SystemExit('error: --device cuda: torch finds no CUDA device on this machine')

    @property
    def shape(self) -> str:
        return f'{self.batch}x3x{self.size[0]}x{self.size[1]}'

    def images(self) -> Tensor:
        torch.manual_seed(0)
        return torch.randn(self.batch, 3, *self.size, device=self.device)

    def precision(self) -> AbstractContextManager:
        if self.dtype == 'float32':
            return nullcontext()
        return torch.autocast(self.device, DTYPES[self.dtype])

    def __str__(self) -> str:
        return f'{self.shape}, {self.dtype}, {self.device}'


@dataclass
class Result:
    """What was measured of one model; times in seconds, one for each round."""

    model: str
    parameters: int = 0
    gmacs: float = 0.0  # multiply-adds of convolutions and products, in 10^9
    inference: list[float] = field(default_factory=list)
    training: list[float] = field(default_factory=list)  # forward and backward
    bytes_kept: int | None = None  # between forward and backward
    peak_bytes: int | None = None  # CUDA only: on a CPU all models share one process


def train_step(model: nn.Module, images: Tensor, setting: Setting) -> None:
    model.zero_grad(set_to_none=True)
    with setting.precision():
        outputs = model(images)
        loss = sum(output.float().mean() for output in outputs)
    loss.backward()


def infer(model: nn.Module, images: Tensor, setting: Setting) -> None:
    with torch.inference_mode(), setting.precision():
        model(images)


class AheadOfTime(nn.Module):
    """A model for inference as AOTInductor compiles it, for the size of the images.

    Args:
        model: In eval mode.
        images: Its input.
        setting: Its precision.
    """

    def __init__(self, model: nn.Module, images: Tensor, setting: Setting) -> None:
        super().__init__()
        with torch.no_grad(), setting.precision():
            program = torch.export.export(model, (images,))
        self.folder = TemporaryDirectory()
        path = f'{self.folder.name}/model.pt2'
        inductor: Any = torch._inductor
        self.package = inductor.aoti_load_package(
            inductor.aoti_compile_and_package(program, package_path=path)
        )

    def forward(self, x: Tensor) -> Any:
        return self.package(x)


def ready_to_infer(
    spec: str, model: nn.Module, images: Tensor, setting: Setting
) -> tuple[nn.Module, Tensor, Setting]:
    """The arguments of `infer` for a model that is run as its specification says.

    Raises:
        SystemExit: The setting does not allow it, or two ways exclude each other.
    """
    ways = split(spec)[1]
    if 'cuda_graphs' in ways and setting.device != 'cuda':
        raise SystemExit(f'error: {spec}: cuda_graphs needs --device cuda')
    if 'half' in ways and setting.dtype == 'float32':
        raise SystemExit(f'error: {spec}: half needs --dtype bfloat16 or float16')
    if len(ways - {'half'}) > 1:
        raise SystemExit(f'error: {spec}: choose one of cuda_graphs, compile and aoti')
    model.eval()
    if 'half' in ways:
        dtype = DTYPES[setting.dtype]
        model, images, setting = (
            model.to(dtype),
            images.to(dtype),
            replace(setting, dtype='float32'),
        )
    if 'cuda_graphs' in ways:
        use_cuda_graphs(model)
    if 'compile' in ways:
        model.compile()
    if 'aoti' in ways:
        model = AheadOfTime(model, images, setting)
    return model, images, setting


def measure(specs: list[str], setting: Setting, rounds: int, kinds: list[str]) -> list[Result]:
    """Times of all models, in turn in each round, after one round to warm up."""
    results = [Result(spec) for spec in specs]
    cases: list[tuple[nn.Module, Tensor, Setting]] = []
    images = setting.images()
    for spec, result in zip(specs, results):
        network, ways = split(spec)
        model = build(network).to(setting.device)
        result.parameters = sum(parameter.numel() for parameter in model.parameters())
        result.gmacs = count_macs(network, setting) / 1e9
        trains = not ways and any(p.requires_grad for p in model.parameters())
        if 'training' in kinds and trains:
            result.bytes_kept = count_bytes_kept(network, setting)
        is_needed = 'inference' in kinds
        case = (model, images, setting)
        cases.append(ready_to_infer(spec, *case) if is_needed else case)
    for kind, function in (('training', train_step), ('inference', infer)):
        if kind not in kinds:
            continue
        for number in range(rounds + 1):
            for (model, *inputs), result in zip(cases, results):
                if kind == 'training' and result.bytes_kept is None:
                    continue
                model.train(kind == 'training')
                if setting.device == 'cuda':
                    torch.cuda.reset_peak_memory_stats()
                seconds = timed(function, model, *inputs, device=setting.device)
                model.zero_grad(set_to_none=True)
                if number > 0:
                    getattr(result, kind).append(seconds)
                if setting.device == 'cuda':
                    result.peak_bytes = max(
                        result.peak_bytes or 0, torch.cuda.max_memory_allocated()
                    )
    return results


def measure_product_rate(device: str) -> float:
    """A device's own floor: multiply-adds a second of a large product in float32, in 10^9."""
    side = 2048
    matrix = torch.randn(side, side, device=device)
    times = [timed(torch.mm, matrix, matrix, device=device) for _ in range(9)]
    return side**3 / statistics.median(times[2:]) / 1e9


# --------------------------------------------------------------------------------------- counting
# With fake tensors, which have shapes and no values: any size in seconds, and the same on every
# machine. They are of the setting's device, for which autocast and operators are chosen.
def build_fake(spec: str, mode: FakeTensorMode, device: str) -> nn.Module:
    """The model with tensors without values."""
    model = build(spec)
    fakes: dict[int, Tensor] = {}
    for tensor in (*model.parameters(), *model.buffers()):
        fake: Tensor = torch.empty_like(mode.from_tensor(tensor.detach()), device=device)
        if isinstance(tensor, nn.Parameter):
            fake = nn.Parameter(fake, requires_grad=tensor.requires_grad)
        fakes[id(tensor)] = fake
    return copy.deepcopy(model, fakes)


def count_macs(spec: str, setting: Setting) -> int:
    """Multiply-adds of convolutions and matrix products in a forward pass."""
    mode = FakeTensorMode()
    model = build_fake(spec, mode, setting.device)
    model.eval()
    with mode:
        counter = FlopCounterMode(display=False)
        with counter, torch.no_grad():
            model(torch.empty(setting.batch, 3, *setting.size, device=setting.device))
    return counter.get_total_flops() // 2


def count_bytes_kept(spec: str, setting: Setting) -> int:
    """Bytes that autograd keeps between forward and backward: each storage once, no parameters."""
    kept = {}  # with the storage itself, so that its place is not used again

    def pack(tensor: Tensor) -> Tensor:
        kept[tensor.untyped_storage()._cdata] = tensor.untyped_storage()
        return tensor

    mode = FakeTensorMode()
    model = build_fake(spec, mode, setting.device)
    model.train()
    with mode:
        images = torch.empty(setting.batch, 3, *setting.size, device=setting.device)
        with (
            torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor),
            setting.precision(),
        ):
            outputs = model(images)
        for tensor in (images, *model.parameters()):
            kept.pop(tensor.untyped_storage()._cdata, None)
        del outputs
        return sum(storage.nbytes() for storage in kept.values())


# Operators that only describe a tensor anew, or reserve memory.
FREE = {
    'aten::detach', 'aten::_unsafe_view', 'aten::empty', 'aten::empty_like', 'aten::new_empty',
    'aten::empty_strided', 'aten::new_empty_strided', 'aten::lift_fresh', 'aten::promote_types',
}  # fmt: skip


class TrafficCounter(TorchDispatchMode):
    """Counts operators launched, and the bytes that they read and write; views are free."""

    def __init__(self) -> None:
        super().__init__()
        self.launches = 0
        self.bytes = 0

    def __torch_dispatch__(
        self, function: Any, types: Any, args: tuple = (), kwargs: dict | None = None
    ) -> Any:
        result = function(*args, **(kwargs or {}))
        returns = function._schema.returns
        is_view = any(r.alias_info is not None and not r.alias_info.is_write for r in returns)
        is_ours = function.namespace in ('aten', 'mmconv2former')
        is_free = is_view or function._schema.name in FREE or not is_ours
        if not is_free:
            leaves, _ = tree_flatten((args, kwargs, result))
            self.note([leaf for leaf in leaves if isinstance(leaf, Tensor)])
        return result

    def note(self, tensors: Iterable[Tensor | None]) -> None:
        """A launch that reads or writes each tensor once."""
        self.launches += 1
        self.bytes += sum(t.numel() * t.element_size() for t in tensors if t is not None)


@contextmanager
def counted_kernels(counter: TrafficCounter) -> Iterator[None]:
    """While it lasts, tensors without values take the way through Triton's kernels of a GPU."""
    if triton_support.installation_problem() is not None:
        yield
        return
    from mmconv2former.ops.launch import Launcher  # which needs Triton

    with (
        patch.object(depthwise, 'setting', 'triton'),
        patch.object(depthwise, 'choice_for', lambda *_: 'triton'),
        patch.object(depthwise, 'is_intercepted', lambda _: False),
        patch.object(block, 'is_intercepted', lambda _: False),
        patch.object(Launcher, '__call__', lambda _self, _n, tensors, _: counter.note(tensors)),
    ):
        yield


def count_traffic(spec: str, setting: Setting, training: bool) -> tuple[int, int]:
    """Operators and kernels launched on a GPU, and bytes read and written.

    Of a training step, or of an inference.
    """
    mode = FakeTensorMode()
    model = build_fake(spec, mode, setting.device)
    model.train(training)
    with mode:
        images = torch.empty(setting.batch, 3, *setting.size, device=setting.device)
        run = train_step if training else infer
        counter = TrafficCounter()
        with counted_kernels(counter):
            run(model, images, setting)  # what is done once, as casting weights, does not count
            counter = TrafficCounter()
            with counted_kernels(counter), counter:
                run(model, images, setting)
    return counter.launches, counter.bytes


# ----------------------------------------------------------------------------------------- tables
def spread(times: list[float], digits: int = 0) -> str:
    """Median and quartiles in milliseconds."""
    if not times:
        return ''
    first, _, third = statistics.quantiles(times, n=4)
    median, *quartiles = (
        f'{1e3 * seconds:.{digits}f}' for seconds in (statistics.median(times), first, third)
    )
    return f'{median} ({" to ".join(quartiles)})'


def table(header: list[str], rows: list[list[str]]) -> str:
    lines = [header, ['---'] * len(header), *rows]
    return '\n'.join(f'| {" | ".join(cells)} |' for cells in lines)


def describe(results: list[Result], rate: float) -> str:
    """All that was measured, a row a model, and how far each is from the machine's floor."""
    rows = []
    for result in results:
        floors = []
        for times, passes in ((result.training, 3), (result.inference, 1)):
            if times:  # a training step multiplies three times as often as an inference
                floors.append(f'{statistics.median(times) / (passes * result.gmacs / rate):.1f}')
        rows.append(
            [
                f'`{result.model}`',
                f'{result.parameters / 1e6:.1f} M',
                f'{result.gmacs:.1f} G',
                spread(result.training),
                spread(result.inference),
                '' if result.bytes_kept is None else f'{result.bytes_kept / 2**20:,.0f}',
                '' if result.peak_bytes is None else f'{result.peak_bytes / 2**20:,.0f}',
                ', '.join(floors),
            ]
        )
    header = ['model', 'parameters', 'multiply-adds', 'training step, ms', 'inference, ms',
              'kept for backward, MiB', 'peak, MiB', 'times of floor']  # fmt: skip
    return table(header, rows)


def device_name(device: str) -> str:
    if device == 'cuda':
        return torch.cuda.get_device_name()
    cpuinfo = Path('/proc/cpuinfo')
    if cpuinfo.exists():
        names = [line for line in cpuinfo.read_text().splitlines() if 'model name' in line]
        if names:
            return names[0].split(':')[1].strip()
    return platform.processor() or platform.machine()


def machine(rate: float, device: str) -> str:
    """What was measured on: the device's name, and its rate from `measure_product_rate`."""
    return (
        f'{device_name(device)}, {torch.get_num_threads()} threads, torch {torch.__version__}; '
        f'matrix products at {rate:.0f} G multiply-adds a second'
    )


# ------------------------------------------------------------------------------- goals, --count
SPEED = Setting((512, 512))
MEMORY = Setting((800, 1280))
COUNT = Setting((800, 1280), dtype='bfloat16')
SWEEP = Setting((224, 224))
PLAIN = ('plain_t', 'plain_t:channels_last=True')  # the better of both stands for the published
DEFAULT, FASTEST, LEAST, CHECKPOINTED, DEPLOYED = (
    'conv2former_t', 'conv2former_t:recompute=nothing', 'conv2former_t:recompute=expansion',
    'conv2former_t:with_cp=True', 'conv2former_t:deploy=True',
)  # fmt: skip
RIVAL = 'convnext_tiny'
# what is measured, of which model, and the ratios to the published code that must and should be
GOALS = [
    ('bytes kept, {memory}, default', DEFAULT, 'bytes', 0.50, 0.33),
    ('training step, {speed}, default', DEFAULT, 'training', 0.80, 0.65),
    ("training step, for speed (`recompute='nothing'`)", FASTEST, 'training', 0.75, 0.60),
    ("training step, for memory (`recompute='expansion'`)", LEAST, 'training', None, None),
    ("bytes kept, for memory (`recompute='expansion'`)", LEAST, 'bytes', 0.50, 0.33),
    ('training step, `with_cp`', CHECKPOINTED, 'training', 1.20, None),
    ('bytes kept, `with_cp`', CHECKPOINTED, 'bytes', 0.15, 0.10),
    ('inference, {speed}, deployed', DEPLOYED, 'inference', 0.90, 0.65),
]


def bench(speed: Setting, memory: Setting, rounds: int, runs: int) -> tuple[str, list[Result]]:
    """Ratios to the better layout of the published code, and all that was measured in the last run.

    Args:
        speed: Of what is timed.
        memory: Of the bytes kept. With `SPEED` and `MEMORY` the table judges by the goals too.
        rounds: Of each run.
        runs: Ratios are listed run by run.
    """
    ratios: dict[str, list[float]] = {what: [] for what, *_ in GOALS}
    rival: dict[str, list[float]] = {what: [] for what, *_ in GOALS}
    specs = [*PLAIN, DEFAULT, FASTEST, LEAST, CHECKPOINTED, RIVAL]
    kept = {spec: count_bytes_kept(spec, memory) for spec in specs}
    for _ in range(runs):
        training = measure(specs, speed, rounds, ['training'])
        inference = measure([*PLAIN, DEFAULT, DEPLOYED, RIVAL], speed, rounds, ['inference'])
        values: dict[str, Mapping[str, float]] = {
            'training': {result.model: statistics.median(result.training) for result in training},
            'inference': {
                result.model: statistics.median(result.inference) for result in inference
            },
            'bytes': kept,
        }
        for what, model, kind, *_ in GOALS:
            published = min(values[kind][name] for name in PLAIN)
            ratios[what].append(values[kind][model] / published)
            rival[what].append(values[kind][model] / values[kind][RIVAL])
    is_judged = has_goals(speed, memory)
    rows = []
    for what, _, _, must, aim in GOALS:
        goals = ['' if wanted is None else f'{wanted:.2f}' for wanted in (must, aim)]
        rows.append(
            [
                what.format(speed=speed.shape, memory=memory.shape),
                ', '.join(
                    f'{ratio:.2f}' for ratio in sorted(set(ratios[what]), key=ratios[what].index)
                ),
                *([*goals, verdict(ratios[what], must, aim)] if is_judged else []),
                f'{statistics.median(rival[what]):.2f}',
            ]
        )
    header = ['measure', f'of the published code, {runs} runs']
    if is_judged:
        header += ['must', 'aim', 'reached']
    return table([*header, 'of ConvNeXt-T'], rows), training + inference


def has_goals(speed: Setting, memory: Setting) -> bool:
    return (speed, memory) == (SPEED, MEMORY)


def verdict(ratios: list[float], must: float | None, aim: float | None) -> str:
    """What all runs reached, to the precision of the table."""
    worst = round(max(ratios), 2)
    if aim is not None and worst <= aim:
        return 'aim'
    if must is None:
        return ''
    return 'must' if worst <= must else 'NO'


def count_table(specs: list[str], setting: Setting) -> str:
    """Operators launched and bytes moved, and their ratios to the first model."""
    rows = []
    first: dict[bool, tuple[int, int]] = {}
    for spec in specs:
        cells = [f'`{spec}`']
        for training in (True, False):
            if training and 'deploy=True' in spec:
                cells += ['', '']
                continue
            launches, moved = count_traffic(spec, setting, training)
            base = first.setdefault(training, (launches, moved))
            cells += [
                f'{launches:,} ({launches / base[0]:.2f})',
                f'{moved / 2**30:.1f} ({moved / base[1]:.2f})',
            ]
        rows.append(cells)
    header = ['model', 'training: operators', 'GiB moved', 'inference: operators', 'GiB moved']
    return table(header, rows)


OPERATORS = 12  # rows of a profile


def profile_table(spec: str, setting: Setting) -> str:
    """Where the setting's device spends the time of a training step, by operator."""
    model = build(spec).to(setting.device)
    model.train()
    images = setting.images()
    for _ in range(2):
        train_step(model, images, setting)
    activities = [ProfilerActivity.CPU]
    if setting.device == 'cuda':
        activities.append(ProfilerActivity.CUDA)
    with torch.profiler.profile(activities=activities) as profiler:
        train_step(model, images, setting)
    # Kernels of a GPU are events too, whose time their operators have already.
    operators = [e for e in profiler.key_averages() if e.device_type == DeviceType.CPU]
    times = [(self_time(event, setting.device), event) for event in operators]
    times.sort(key=lambda item: -item[0])
    total = sum(microseconds for microseconds, _ in times)
    rows = [
        [f'`{event.key}`', str(event.count), f'{microseconds / 1e3:.0f}',
         f'{microseconds / total:.0%}']
        for microseconds, event in times[:OPERATORS]
    ]  # fmt: skip
    return table(['operator', 'calls', 'ms', 'share'], rows)


def self_time(event: Any, device: str) -> float:
    """Microseconds of an operator on the device, without those of the operators it calls."""
    if device != 'cuda':
        return event.self_cpu_time_total
    # The first is the name of torch's later releases.
    names = ('self_device_time_total', 'self_cuda_time_total')
    return getattr(event, names[0] if hasattr(event, names[0]) else names[1])


# ----------------------------------------------------------------------------------------- sweeps
RESOLUTIONS = (224, 320, 448, 640, 896)
KERNELS = (5, 7, 11, 15, 21, 31)


def sweep(specs: list[str], kind: str, base: Setting, rounds: int, plot: Path | None) -> str:
    """Inference times over input sizes, or over kernel sizes at the size of `base`."""
    curves: dict[str, list[tuple[int, float, float]]] = {spec: [] for spec in specs}
    pixels: dict[int, int] = {}
    for value in RESOLUTIONS if kind == 'resolution' else KERNELS:
        setting = replace(base, size=(value, value)) if kind == 'resolution' else base
        suffix = {spec: ',' if ':' in spec else ':' for spec in specs}
        names = {
            spec: spec if kind == 'resolution' else f'{spec}{suffix[spec]}kernel_size={value}'
            for spec in specs
        }
        results = measure(list(names.values()), setting, rounds, ['inference'])
        for spec, result in zip(specs, results):
            seconds = statistics.median(result.inference)
            curves[spec].append((value, seconds, result.gmacs))
            pixels[value] = setting.batch * setting.size[0] * setting.size[1]
    if plot is not None:
        draw(curves, kind, plot)
    rows = [
        [f'`{spec}`', str(value), f'{gmacs:.1f} G', f'{1e3 * seconds:.0f}',
         f'{1e9 * seconds / pixels[value]:.0f}']
        for spec, points in curves.items() for value, seconds, gmacs in points
    ]  # fmt: skip
    return table(['model', kind, 'multiply-adds', 'inference, ms', 'ns a pixel'], rows)


def draw(curves: dict[str, list[tuple[int, float, float]]], kind: str, plot: Path) -> None:
    import matplotlib  # only a plot needs it

    matplotlib.use('Agg')
    from matplotlib import pyplot as plt

    figure, axis = plt.subplots(figsize=(6, 4))
    for spec, points in curves.items():
        xs = [v**2 / 1e6 if kind == 'resolution' else v for v, _, _ in points]
        axis.plot(xs, [1e3 * seconds for _, seconds, _ in points], marker='o', ms=4, label=spec)
    axis.set(xlabel='megapixels' if kind == 'resolution' else 'kernel size', ylabel='inference, ms')
    axis.grid(alpha=0.3)
    axis.legend()
    figure.tight_layout()
    figure.savefig(plot, dpi=110)


PAGE = Path(__file__).resolve().parents[1] / 'docs/performance.md'


def show(name: str, text: str, keep: bool) -> None:
    """Prints a table and, if asked, puts it at its mark in docs/performance.md."""
    print(text)
    if keep:
        PAGE.write_text(with_table(PAGE.read_text(), name, text + '\n'))


def refuse_page(asked: Setting, of_the_page: Setting) -> None:
    """Raises SystemExit unless a table is of the setting that the page says it is of."""
    if asked != of_the_page:
        raise SystemExit(f"error: --page: the page's table is of {of_the_page}, not of {asked}")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        'models',
        nargs='*',
        metavar='MODEL',
        help='measure these; none: the ratios to the published code (with --count, --profile and '
        '--sweep a choice of models)',
    )
    parser.add_argument(
        '--size',
        type=int,
        nargs=2,
        metavar=('H', 'W'),
        help='of the images (default: 512 512; of bytes kept without MODEL, and of --count, '
        '800 1280; of --sweep kernel 224 224)',
    )
    parser.add_argument('--batch', type=int, help='images of a step (default: 1)')
    parser.add_argument(
        '--device', choices=['cpu', 'cuda'], help='measure or count on it (default: cpu)'
    )
    parser.add_argument(
        '--dtype', choices=DTYPES, help='autocast to it (default: float32; of --count bfloat16)'
    )
    parser.add_argument(
        '--rounds',
        type=int,
        default=7,
        help='rounds that count, of all that is timed but --profile',
    )
    parser.add_argument(
        '--only', choices=['training', 'inference'], help='of the MODELs named, measure only that'
    )
    parser.add_argument('--count', action='store_true', help='count operators and traffic instead')
    parser.add_argument(
        '--profile', action='store_true', help='show where the time of a training step goes'
    )
    parser.add_argument(
        '--sweep',
        choices=['resolution', 'kernel'],
        help='time inference over sizes of the images or of the kernels instead',
    )
    parser.add_argument('--plot', type=Path, help='picture of the sweep')
    parser.add_argument(
        '--runs', type=int, default=1, help='of the ratios to the published code, without MODEL'
    )
    parser.add_argument(
        '--page',
        action='store_true',
        help='keep what is printed in docs/performance.md, if it is of the setting there',
    )
    parser.add_argument(
        '--json',
        type=Path,
        help='file for all that was measured (not with --count, --profile or --sweep)',
    )
    parser.add_argument(
        '--report',
        type=Path,
        metavar='DIR',
        help='measure everything instead, and write DIR/report.json and DIR/report.md',
    )
    parser.add_argument(
        '--budget', type=float, default=240, help='seconds of --report (default: 240)'
    )
    parser.add_argument(
        '--quick', action='store_true', help='tiny sizes and models in --report, to look at it'
    )
    args = parser.parse_args()
    if args.rounds < 2:
        parser.error(f'--rounds must be at least 2, got {args.rounds}')
    if args.report is not None and args.page:
        parser.error('--report writes files of its own: leave --page out')
    if args.sweep == 'resolution' and args.size is not None:
        parser.error('--sweep resolution has its own sizes: leave --size out')
    asked: dict[str, Any] = {
        key: value
        for key in ('batch', 'device', 'dtype')
        if (value := getattr(args, key)) is not None
    }
    if args.size is not None:
        asked['size'] = tuple(args.size)
    setting = replace(SPEED, **asked)

    if args.report is not None:
        from benchmark_report import FULL, QUICK, write_report  # which imports this module

        plan = QUICK if args.quick else FULL
        plan = replace(
            plan,
            models=tuple(args.models) or plan.models,
            setting=replace(plan.setting, **asked),
            rounds=args.rounds,
        )
        write_report(args.report, plan, args.budget)
        return
    if args.count:
        counted = replace(COUNT, **asked)
        if args.page:
            refuse_page(counted, COUNT)
        specs = args.models or [PLAIN[0], DEFAULT, FASTEST, LEAST, CHECKPOINTED, DEPLOYED, RIVAL]
        show('count', f'{counted}, counted\n\n{count_table(specs, counted)}', args.page)
        return
    if args.profile:
        if args.page:
            refuse_page(setting, SPEED)
        for spec in args.models or [DEFAULT]:
            show(f'profile {spec}', f'{setting}\n\n{profile_table(spec, setting)}', args.page)
        return
    if args.sweep:
        base = replace(SWEEP, **asked)
        if args.page:
            refuse_page(base, SWEEP)
        title = machine(measure_product_rate(base.device), base.device) + '\n\n'
        if base != SWEEP:
            size = '' if args.sweep == 'resolution' else f', {base.size[0]}x{base.size[1]}'
            title += f'batch {base.batch}{size}, {base.dtype}, {base.device}\n\n'
        rows = sweep(args.models or [DEFAULT], args.sweep, base, args.rounds, args.plot)
        show(f'sweep {args.sweep}', title + rows, args.page)
        return
    memory = replace(MEMORY, **asked)
    if args.page:  # which has a table of models for each dtype
        refuse_page(setting, replace(SPEED, dtype=setting.dtype) if args.models else SPEED)
    rate = measure_product_rate(setting.device)
    title = f'{machine(rate, setting.device)}\n\n'
    if args.models:
        kinds = [args.only] if args.only else ['training', 'inference']
        results = measure(args.models, setting, args.rounds, kinds)
        medians = f'{setting}, medians of {args.rounds} rounds\n\n{describe(results, rate)}'
        show(f'models {setting.dtype}', title + medians, args.page)
    else:
        ratios, results = bench(setting, memory, args.rounds, args.runs)
        medians = f'{setting}, medians of {args.rounds} rounds\n\n'
        if not has_goals(setting, memory):
            medians += f'Not judged: the goals are of {SPEED}, and {MEMORY} for bytes kept.\n\n'
        medians += f'{ratios}\n\nThe last run:\n\n'
        show('goals', title + medians + describe(results, rate), args.page)
    if args.json is not None:
        content: dict[str, Any] = {'setting': str(setting)}
        content['machine'] = machine(rate, setting.device)
        content['results'] = [asdict(result) for result in results]
        args.json.write_text(json.dumps(content, indent=1) + '\n')


if __name__ == '__main__':
    main()
