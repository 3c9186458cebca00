"""The benchmarks run the models they name, as asked, and write what they measure."""

import copy
import json
import re
import subprocess
import sys
from dataclasses import replace

import benchmark
import benchmark_depthwise
import benchmark_pointwise
import benchmark_report
import pytest
import torch
import torch.nn.functional as F
from benchmark_depthwise import GPU_PASSES, measure_passes, one_pass, passes_table, tensors
from benchmark_report import Plan, write_report
from common import model_specs
from common.measuring import Budget, Ceilings, Cost, Setting
from common.model_specs import build, check_ways, infer, inference_case, trains, without_values
from helpers import ROOT
from helpers.comparisons import randomized, relative_error
from helpers.half_precision import needs_float16
from helpers.in_process import write_tiny_config
from helpers.simulated_graphs import StandIn

from mmconv2former import Conv2Former
from mmconv2former.ops import depthwise, triton_support
from mmconv2former.ops.depthwise import DepthwiseConv

SMALL = Setting((64, 64))
NANO = ['plain_n', 'conv2former_n:recompute=expansion', 'conv2former_n:deploy=True']


# ----------------------------------------------------------------------------------------- models
def test_options_of_a_model():
    model = build(
        'conv2former_n:with_cp=True,kernel_size=5,recompute=nothing,drop_path_rate=0.5,compile=True'
    )
    assert isinstance(model, Conv2Former)
    assert model.with_cp is True
    assert model.stages[0][0].attn.att[2].kernel_size == (5, 5)
    assert model.stages[0][0].recompute == 'nothing'
    assert model.drop_path_rate == 0.5
    assert build('conv2former_n:deploy=True').is_deployed
    with pytest.raises(SystemExit, match='unknown model resnet; choose one of conv2former_n, '):
        build('resnet')
    with pytest.raises(SystemExit, match='with_cp must have a value, as in with_cp=True'):
        build('conv2former_n:with_cp')


def test_networks_of_timm():
    outputs = build('timm/resnet18:output_stride=16')(torch.zeros(1, 3, 64, 64))
    assert [output.shape[2] for output in outputs] == [32, 16, 8, 4, 4]
    with pytest.raises(SystemExit, match=r'timm/none: RuntimeError: Unknown model \(none\)'):
        build('timm/none')
    with pytest.raises(SystemExit, match='timm/resnet18: TypeError: '):
        build('timm/resnet18:depth=3')


def test_published_operators_compute_the_same():
    ours, plain = build('conv2former_n'), build('plain_n:channels_last=True')
    randomized(ours)
    plain.network.load_state_dict(ours.state_dict())
    x = torch.randn(1, 3, 64, 64)
    for output, reference in zip(ours.eval()(x), plain.eval()(x), strict=True):
        assert relative_error(output, reference) < 1e-5


@pytest.mark.parametrize('name', ['convnext_tiny', 'deit3_small'])
def test_baselines_have_four_outputs(name):
    with without_values(name, SMALL) as (model, images):
        outputs = model(images)
    assert [output.shape[-1] for output in outputs] == [16, 8, 4, 2]


def test_ways_to_run_inference(simulated, monkeypatch):
    model = torch.nn.Conv2d(3, 4, 3, bias=False)
    monkeypatch.setattr(model_specs, 'build', lambda spec: model)
    setting = replace(SMALL, dtype='bfloat16')
    case = inference_case('conv2former_n:half=True,cuda_graphs=True', setting)
    output = case.step(setting.images())
    assert (output.dtype, model.weight.dtype) == (torch.bfloat16, torch.bfloat16)
    assert StandIn.replays == 1
    assert [trains(spec) for spec in NANO] == [True, True, False]
    assert not trains('conv2former_n:half=True')


@pytest.mark.parametrize(
    ('options', 'message'),
    [
        ('cuda_graphs=True', 'cuda_graphs needs --device cuda'),
        ('half=True', 'half needs --dtype bfloat16 or float16'),
        ('compile=True,aoti=True', 'choose one of cuda_graphs, compile and aoti'),
    ],
)
def test_ways_that_do_not_apply(options, message):
    spec = f'conv2former_n:{options}'
    with pytest.raises(SystemExit, match=f'error: {spec}: {message}'):
        check_ways([spec], SMALL)


@pytest.mark.slow
@pytest.mark.parametrize('dtype', ['float32', 'bfloat16'])
def test_compiled_models_compute_the_same(dtype, monkeypatch):
    """With the registered operator, as on a GPU."""
    conv = DepthwiseConv(SMALL.size[1], 3)  # the last axis is that of its channels
    model = torch.nn.Sequential(torch.nn.Conv2d(3, 4, 1), conv, torch.nn.GELU()).eval()
    monkeypatch.setattr(model_specs, 'build', lambda spec: copy.deepcopy(model))
    monkeypatch.setattr(depthwise, 'OPERATOR_DEVICES', ('cpu', 'cuda'))
    setting = replace(SMALL, dtype=dtype)
    images = setting.images()
    expected = infer(model, images, setting)
    for way in ('compile', 'aoti'):
        found = inference_case(f'conv2former_n:{way}=True', setting).step(images)
        torch.testing.assert_close(found, expected)


# ------------------------------------------------------------------------------------ the commands
@pytest.fixture
def page(tmp_path, monkeypatch):
    page = tmp_path / 'page.md'
    marks = ('ratios', 'last run', 'models float32', 'count', 'sweep kernel', 'sweep resolution')
    page.write_text(''.join(f'<!-- table {mark} -->\nold\n<!-- end -->\n' for mark in marks))
    monkeypatch.setattr(benchmark, 'PAGES', [page])
    return page


@pytest.fixture
def run(monkeypatch, capsys):
    """Runs a tool in this process and returns what it printed."""

    def run(tool, *arguments):
        monkeypatch.setattr(sys, 'argv', [tool.__name__, *map(str, arguments)])
        tool.main()
        return capsys.readouterr().out

    return run


def test_command(run, page):
    output = run(benchmark, *NANO, '--size', 64, 64, '--rounds', 2, '--batch', 2)
    assert '2x3x64x64, float32, cpu; medians of 2 rounds' in output
    training, inference = output.split('\nInference:\n')
    assert re.findall(r'^\| `(.*?)` \| 1\d.\d M \| 0\.4 G \|', training, re.M) == NANO[:2]
    assert re.findall(r'^\| `(.*?)` \| 1\d.\d M \| 0\.4 G \|', inference, re.M) == NANO
    assert 'kept for backward' in training
    assert 'kept for backward' not in inference
    assert page.read_text().count('old') == 6
    with pytest.raises(SystemExit):
        run(benchmark, '--rounds', 1)


def test_ratios_to_the_published_code(run, page, monkeypatch):
    """Each ratio is to the faster one of the published code's two layouts."""
    seconds = {'plain_t': 4.0, 'plain_t:channels_last=True': 2.0, 'convnext_tiny': 5.0}
    runs = iter([1.0, 1.0, 1.5, 1.5])

    def measure(specs, training, setting, rounds):
        assert (str(setting), rounds) == ('1x3x32x32, float32, cpu', 3)
        ours = next(runs)
        return {spec: Cost([seconds.get(spec, ours)] * rounds) for spec in specs}

    monkeypatch.setattr(benchmark, 'measure_models', measure)
    monkeypatch.setattr(benchmark, 'models_table', lambda costs, setting: ', '.join(costs))
    monkeypatch.setattr(benchmark, 'bytes_kept', lambda spec, setting: 10 if ':' in spec else 20)
    output = run(benchmark, '--size', 32, 32, '--rounds', 3, '--runs', 2, '--page')
    setting = '1x3x32x32, float32, cpu'
    for row in (
        f'| kept for backward, {setting} | `conv2former_t` | 2.00 | 1.00 |',
        f'| training, {setting} | `conv2former_t:recompute=nothing` | 0.50, 0.75 | 0.20, 0.30 |',
        f'| inference, {setting} | `conv2former_t:deploy=True` | 0.50, 0.75 | 0.20, 0.30 |',
    ):
        assert row in output
        assert row in page.read_text()
    assert 'Inference:\n\nplain_t, plain_t:channels_last=True, conv2former_t, ' in page.read_text()
    assert page.read_text().count('old') == 4


def test_counts(run, page):
    output = run(benchmark, '--count', NANO[0], NANO[2], '--size', 64, 64, '--page')
    assert '1x3x64x64, bfloat16, cpu, counted' in output
    assert re.search(r'`plain_n` \| [\d,]+ \(1.00\) \| \d.\d \(1.00\) \| \d+ \(1.00\)', output)
    assert '`conv2former_n:deploy=True` |  |  |' in output
    assert page.read_text().count('old') == 5


def test_sweeps(run, page, monkeypatch):
    """Two models whose inference takes 3 us per pixel."""

    def measure(specs, training, setting, rounds):
        height, width = setting.size
        return {spec: Cost([3e-6 * setting.batch * height * width] * rounds) for spec in specs}

    monkeypatch.setattr(benchmark, 'measure_models', measure)
    monkeypatch.setattr(benchmark, 'macs', lambda spec, setting: 1e9 * (1 + len(spec)))
    monkeypatch.setattr(benchmark, 'SWEPT', {'kernel': (3, 21), 'resolution': (100, 200)})
    models = ['conv2former_n', 'conv2former_n:with_cp=True']
    output = run(benchmark, *models, '--sweep', 'resolution', '--batch', 2, '--page')
    assert output.splitlines()[4:] == [
        '| `conv2former_n` | 100 | 14.0 G | 60 | 3000 |',
        '| `conv2former_n` | 200 | 14.0 G | 240 | 3000 |',
        '| `conv2former_n:with_cp=True` | 100 | 27.0 G | 60 | 3000 |',
        '| `conv2former_n:with_cp=True` | 200 | 27.0 G | 240 | 3000 |',
    ]
    output = run(benchmark, *models, '--sweep', 'kernel', '--size', 10, 10, '--page')
    assert output.splitlines()[4:] == [
        '| `conv2former_n` | 3 | 28.0 G | 0 | 3000 |',  # with `:kernel_size=3`
        '| `conv2former_n` | 21 | 29.0 G | 0 | 3000 |',
        '| `conv2former_n:with_cp=True` | 3 | 41.0 G | 0 | 3000 |',
        '| `conv2former_n:with_cp=True` | 21 | 42.0 G | 0 | 3000 |',
    ]
    assert page.read_text().count('old') == 4


def test_every_mark_of_the_pages_is_filled():
    pages = [page.read_text() for page in benchmark.PAGES]
    tables = re.findall(r'<!-- table ([^>]+) -->\n(.*?)<!-- end -->', ''.join(pages), re.DOTALL)
    assert len(tables) >= 10
    for name, text in tables:
        assert text.count('\n|') >= 3, name


# ------------------------------------------------------------------------------------- depthwise
@pytest.mark.parametrize('kind', [*GPU_PASSES, 'backward'])
def test_each_pass_is_the_one_named(kind):
    """Against stock autograd; tensors are (N, H, W, C)."""
    x, grad, weight, bias = tensors((2, 3, 8, 7), 5, Setting((1, 1)))
    leaves = [tensor.detach().requires_grad_() for tensor in (x, weight, bias)]
    first = leaves[0].permute(0, 3, 1, 2)
    y = F.conv2d(first, *leaves[1:], padding=2, groups=3).permute(0, 2, 3, 1)
    result = one_pass(kind, grad, x, weight, bias, 'stock')()
    if kind == 'forward':
        torch.testing.assert_close(result, y.detach())
        return
    needed = {'input gradient': [0], 'weight gradient': [1, 2], 'backward': [0, 1, 2]}[kind]
    for index, expected in enumerate(torch.autograd.grad(y, leaves, grad)):
        if index in needed:
            torch.testing.assert_close(result[index], expected, rtol=1e-4, atol=1e-4)
        else:
            assert result[index] is None


def test_depthwise_rates(monkeypatch):
    """Worked out by hand, for a time of 2 ms; a pass that fails is a cell."""
    monkeypatch.setattr(benchmark_depthwise, 'device_seconds', lambda function, device: 2e-3)
    ceilings = Ceilings(copy=1e9, products={'float32': 1e9})
    setting, shapes = Setting((1, 1), dtype='bfloat16'), [(2, 6, 5, 4)]
    timings = measure_passes((11, 3), shapes, setting, ceilings, Budget(60))
    assert {(timing.kernel, timing.shape) for timing in timings} == {
        (11, (2, 6, 5, 4)),
        (3, (2, 24, 5, 4)),  # of the feed-forward part
    }
    assert {timing.implementation for timing in timings} >= {'stock', 'matmul'}
    for timing in timings:
        numbers = 240 if timing.kernel == 11 else 960
        operations = 2 * timing.kernel**2 * numbers
        moved = 2 * (2 * numbers + timing.kernel**2 * timing.shape[1])
        assert timing.tflops == pytest.approx(operations / 2e-3 / 1e12)
        assert timing.share == pytest.approx(max(operations, moved) / 1e9 / 2e-3)
        assert timing.is_chosen == (timing.implementation == 'stock')  # small, and not float32
    lines = passes_table(timings).splitlines()
    assert lines[0].startswith('| kernel | N, C, H, W | pass | stock, ms (TFLOP/s')
    cell = '2.000 (2.9e-05, 3%)'  # of 58,080 operations
    assert lines[6].startswith(f'| 11 | 2, 6, 5, 4 | input gradient | **{cell}** | {cell} |')
    assert measure_passes((11, 3), shapes, setting, ceilings, Budget(0)) == []

    def fail(function, device):
        raise RuntimeError('too large')

    monkeypatch.setattr(benchmark_depthwise, 'device_seconds', fail)
    timings = measure_passes((5,), shapes, setting, ceilings, Budget(60))
    assert 'RuntimeError: too large' in passes_table(timings)


def test_depthwise_command(run, monkeypatch):
    known = Ceilings(copy=1e9, products={'float32': 1e9})
    monkeypatch.setattr(benchmark_depthwise, 'measure_ceilings', lambda device: known)
    monkeypatch.setattr('mmconv2former.ops.depthwise.is_interpreted', lambda: False)  # slow
    monkeypatch.setattr(benchmark_depthwise, 'CPU_SHAPES', [(1, 4, 6, 6)])
    rows = run(benchmark_depthwise, '--kernel-sizes', 5, 7).splitlines()[-2:]
    for row, size in zip(rows, (5, 7), strict=True):
        assert re.match(rf'\| {size} \| 1, 4, 6, 6 \| backward \| \*\*\d+\.\d+ \(', row)


@pytest.mark.skipif(
    not triton_support.is_interpreted(), reason='no Triton from 3.3 on in its interpreter'
)
def test_pointwise(monkeypatch):
    """The products of a block and their gradients, by torch and by the kernel with each tile."""
    monkeypatch.setattr(benchmark_pointwise, 'CALLS', 1)
    setting = Setting((32, 32), dtype='bfloat16')
    products = list(benchmark_pointwise.products(setting))
    assert len(products) == 32
    network = Conv2Former('t')
    for product, module in zip(
        (products[i] for i in (1, 2, 3, 25, 26, 27)),
        (f(stage[0]) for stage in (network.stages[0], network.stages[3])
         for f in (lambda b: b.attn.proj, lambda b: b.mlp.fc1, lambda b: b.mlp.fc2)),
        strict=True,
    ):  # fmt: skip
        assert (product.c_in, product.c_out) == (module.in_channels, module.out_channels)
    used = []
    pointwise_triton = triton_support.load('pointwise_triton')
    multiply = pointwise_triton.multiply
    monkeypatch.setattr(
        pointwise_triton, 'multiply', lambda *args: used.append(args) or multiply(*args)
    )
    tiles = ((32, 32, 32, 1, 4), (16, 32, 32, 1, 4))
    lines = benchmark_pointwise.measure(setting, products[:1] + products[5:6], tiles).splitlines()
    assert lines[0] == (
        '| product | N, H, W | channels | to | torch | kernel | 32x32x32x1x4 | 16x32x32x1x4 |'
    )
    assert lines[2].startswith('| gate and value | 1x8x8 | 72 | 144 |')
    assert lines[3].startswith('| proj, gradient | 1x8x8 | 72 | 72 |')
    assert all(line.count('(') == 4 for line in lines[2:])
    assert {args[0].shape for args in used} == {(1, 8, 8, 72)}
    assert {None if args[4] is None else args[4].shape for args in used} == {None, (1, 8, 8, 72)}


@pytest.mark.skipif(
    triton_support.installation_problem() is not None, reason='no Triton from 3.3 on'
)
def test_host_time():
    """In a process of its own, because launchers are kept."""
    command = [sys.executable, 'tools/benchmark_host.py', '--rounds', '2']
    output = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout
    rows = re.findall(r'\| (.+) \| (\d+) \| (\S+) \| (\S+) \|', output)
    assert [name for name, *_ in rows] == ['training step', 'inference', 'deployed']
    assert [int(kernels) for _, kernels, *_ in rows] == [538, 182, 181]  # change on purpose only
    assert all(0 < float(fastest) <= float(median) for _, _, median, fastest in rows)


def test_shapes_are_those_of_the_network():
    network = Conv2Former('t')
    assert [
        (batch, channels, height // stride, width // stride)
        for batch, height, width in ((2, 800, 1280), (2, 512, 512), (64, 224, 224))
        for channels, stride in zip(network.channels, network.strides, strict=True)
    ] == benchmark_depthwise.GPU_SHAPES
    kernels = {
        module.in_channels // network.channels[0]: module.kernel_size[0]
        for module in network.stages[0][0].modules()
        if getattr(module, 'groups', 1) > 1
    }
    assert kernels == {1: 11, 4: benchmark_depthwise.FEED_FORWARD}


# ---------------------------------------------------------------------------------------- report
@needs_float16
def test_report(run, tmp_path, monkeypatch):
    """A real one, of tiny sizes: every part is in both files."""
    recipe = str(write_tiny_config(tmp_path / 'tiny.py'))
    plan = Plan(('conv2former_n', NANO[2]), SMALL, ((1, 8, 6, 6),), (5,), {recipe: (64, 64)})
    monkeypatch.setattr(benchmark, 'QUICK', plan)
    monkeypatch.setattr('mmconv2former.ops.depthwise.is_interpreted', lambda: False)  # slow
    options = ['--quick', '--rounds', 2, '--batch', 2, '--size', 32, 32, '--budget', 3600]
    output = run(benchmark, '--report', tmp_path / 'out', *options)
    content = json.loads((tmp_path / 'out/report.json').read_text())
    assert content['command'].startswith('python benchmark --report ')
    assert content['machine']['torch'] == torch.__version__
    assert content['notes'] == []
    parts = ['depthwise convolution', 'launches', 'training step', 'inference', 'recipe tiny']
    assert list(content['seconds']) == parts
    assert content['ceilings']['copy'] > 1e8
    passes = {(timing['implementation'], timing['kind']) for timing in content[parts[0]]}
    assert passes >= {(name, kind) for name in ('stock', 'matmul') for kind in GPU_PASSES}
    assert content['launches']['stock, forward'] > content['launches']['torch.add'] > 0
    assert list(content['training step']) == ['conv2former_n']
    assert list(content['inference']) == list(plan.models)
    assert list(content['recipe tiny']) == ['Conv2Former', 'published code', 'ConvNeXt-T', 'Swin-T']
    for part in parts[2:]:
        for cost in content[part].values():
            assert (len(cost['wall']), cost['error']) == (2, '')
            # The profiled step lasts about as long as the others, on a machine that others use too.
            assert 0.02 < cost['activity']['busy'] / min(cost['wall']) < 20
            assert cost['activity']['launches'] > 100
            assert len(cost['new_sizes']) == (0 if part == 'recipe tiny' else 3)
    assert content['training step']['conv2former_n']['activity']['depthwise'] > 0
    assert content['recipe tiny']['Swin-T']['activity']['depthwise'] == 0
    text = (tmp_path / 'out/report.md').read_text()
    assert [line[3:].lower() for line in text.splitlines() if line.startswith('## ')] == parts
    assert text.count('\n2x3x32x32, float32, cpu\n') == 2
    assert set(text.splitlines()) <= set(output.splitlines())  # among what mmengine logs


def test_report_survives_failures(tmp_path, monkeypatch):
    """One of a part, and an interruption after it; a wrong model is refused at once."""

    def fail(*_):
        raise RuntimeError('out of memory')

    def interrupt(*_):
        raise KeyboardInterrupt

    known = Ceilings(copy=1.0, products={'float32': 1.0})
    monkeypatch.setattr(benchmark_report, 'measure_ceilings', lambda device: known)
    monkeypatch.setattr(
        benchmark_report, 'measure_host', lambda plan, budget: ({'a': 1}, 'found\n')
    )
    monkeypatch.setattr(benchmark_report, 'measure_depthwise', fail)
    monkeypatch.setattr(benchmark_report, 'measure_backbones', interrupt)
    quick = benchmark_report.QUICK
    with pytest.raises(KeyboardInterrupt):
        write_report(tmp_path, quick, 60)
    content = json.loads((tmp_path / 'report.json').read_text())
    assert content['notes'] == ['depthwise convolution: RuntimeError: out of memory']
    assert content['launches'] == {'a': 1}
    assert '## Launches\n\nfound\n' in (tmp_path / 'report.md').read_text()
    write_report(tmp_path, quick, 0)
    notes = json.loads((tmp_path / 'report.json').read_text())['notes']
    assert len(notes) == 5
    assert all(
        note.endswith('TimeoutError: skipped, the time limit of 0 s is reached') for note in notes
    )
    with pytest.raises(SystemExit, match='unknown model resnet'):
        write_report(tmp_path / 'new', replace(quick, models=('resnet',)), 1)
    assert not (tmp_path / 'new').exists()
    assert all((ROOT / recipe).exists() for recipe in benchmark_report.FULL.recipes)
