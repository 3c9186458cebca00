"""The benchmark counts what it says, and its models are what they are called."""

import json
import re
import sys
from types import SimpleNamespace

import benchmark
import pytest
import torch
from benchmark import (
    BUILDERS,
    FREE,
    GOALS,
    LEAST,
    MEMORY,
    SPEED,
    SWEEP,
    Result,
    Setting,
    TrafficCounter,
    build,
    build_fake,
    count_bytes_kept,
    count_macs,
    count_table,
    count_traffic,
    machine,
    profile_table,
    self_time,
    show,
    sweep,
    verdict,
)
from conftest import run_tool
from mmengine.utils import digit_version
from test_backbone import randomized, relative_error
from torch._subclasses.fake_tensor import FakeTensorMode

from mmconv2former import Conv2Former

counts_operators = pytest.mark.skipif(
    digit_version(torch.__version__) < digit_version('2.4'),
    reason='torch < 2.4 cannot count operators that write into given memory',
)

SMALL = Setting((64, 64))
NANO = 'conv2former_n:recompute=expansion'


def test_traffic_of_known_operators():
    x, y = torch.zeros(10, 20), torch.zeros(20, dtype=torch.double)
    with TrafficCounter() as counter:
        view = x.t().reshape(4, 50)[1:]  # a copy, as the transposed cannot be seen so
        assert (counter.launches, counter.bytes) == (1, 2 * 800)
        view = view.view(150).unsqueeze(0)
        assert counter.launches == 1
        view.add_(1)  # reads and writes 600
        assert (counter.launches, counter.bytes) == (2, 1600 + 1200)
        x.to(torch.double) + y
    assert (counter.launches, counter.bytes) == (4, 2800 + (800 + 1600) + (1600 + 160 + 1600))
    assert all(name.startswith('aten::') for name in FREE)


def test_bytes_kept_are_those_of_autograd():
    """Fake tensors against the hooks on real ones, and the size of one known tensor."""
    model = build(NANO).train()
    kept = {}

    def pack(tensor):
        kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    x = torch.randn(1, 3, 64, 64)
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        model(x)
    for tensor in (x, *model.parameters()):
        kept.pop(tensor.untyped_storage().data_ptr(), None)
    assert count_bytes_kept(NANO, SMALL) == pytest.approx(sum(kept.values()), rel=0.02)
    double = Setting((64, 64), batch=2)
    assert count_bytes_kept(NANO, double) > 1.8 * count_bytes_kept(NANO, SMALL)


def test_multiply_adds_are_the_published_ones():
    """2.2, 4.4 and 8.7 G at 224x224 (official repository), to their precision."""
    for spec, published in (('conv2former_n', 2.2), ('conv2former_t', 4.4), ('conv2former_s', 8.7)):
        macs = count_macs(spec, Setting((224, 224))) / 1e9
        assert published - 0.15 < macs < published + 0.15, spec
        assert count_macs(spec.replace('conv2former', 'plain'), Setting((224, 224))) / 1e9 == macs


def test_plain_model_computes_the_same():
    ours, plain = build('conv2former_n'), build('plain_n:channels_last=True')
    randomized(ours)
    plain.network.load_state_dict(ours.state_dict())
    x = torch.randn(1, 3, 64, 64)
    for output, reference in zip(ours.eval()(x), plain.eval()(x)):
        assert relative_error(output, reference) < 1e-5


def test_options_of_a_model():
    model = build('conv2former_n:with_cp=True,kernel_size=5,recompute=elementwise')
    assert isinstance(model, Conv2Former)
    assert model.with_cp is True
    assert model.stages[0][0].attn.att[2].kernel_size == (5, 5)
    assert model.stages[0][0].recompute == 'elementwise'
    assert build('conv2former_n:deploy=True').is_deployed
    with pytest.raises(SystemExit, match='unknown model resnet; there are conv2former_n'):
        build('resnet')


def test_birder_is_asked_for(monkeypatch):
    monkeypatch.setattr(benchmark, 'find_spec', lambda name: None)
    with pytest.raises(SystemExit, match='birder_t: pip install birder'):
        build('birder_t')


@pytest.mark.parametrize('name', ['convnext_tiny', 'deit3_small'])
def test_comparators_have_four_outputs(name):
    model = BUILDERS[name]()
    model.eval()
    with torch.no_grad():
        outputs = model(torch.randn(1, 3, 64, 64))
    assert [output.shape[-1] for output in outputs] == [16, 8, 4, 2]


@counts_operators
def test_training_moves_less_than_the_published_code():
    """What is counted holds on any machine, so it may stand in a test: goals of the project."""
    setting = Setting((512, 512), dtype='bfloat16')
    plain, ours = (count_traffic(spec, setting, True) for spec in ('plain_t', LEAST))
    assert ours[0] <= 0.60 * plain[0]
    assert ours[1] <= 0.70 * plain[1]
    setting = Setting((256, 256))
    plain = count_bytes_kept('plain_t', setting)
    for _, model, kind, must, _ in GOALS:
        if kind == 'bytes':
            assert count_bytes_kept(model, setting) <= must * plain


@counts_operators
def test_tables(tmp_path):
    text = count_table(['plain_n', 'conv2former_n', 'conv2former_n:deploy=True'], SMALL)
    assert len(text.splitlines()) == 5
    assert '(1.00)' in text.splitlines()[2]
    plot = tmp_path / 'sweep.png'
    text = sweep(['conv2former_n'], 'kernel', SWEEP, 2, plot)
    assert len(text.splitlines()) == 8
    assert plot.stat().st_size > 5000


def test_command(tmp_path):
    output = run_tool(
        'benchmark.py', 'plain_n', NANO, 'conv2former_n:deploy=True', '--size', 64, 64,
        '--rounds', 2, '--json', tmp_path / 'results.json',
    )  # fmt: skip
    assert f'| `{NANO}` | 13.1 M |' in output
    results = json.loads((tmp_path / 'results.json').read_text())['results']
    assert [len(result['training']) for result in results] == [2, 2, 0]
    assert [len(result['inference']) for result in results] == [2, 2, 2]
    assert results[0]['bytes_kept'] > results[1]['bytes_kept'] > 0
    assert 'at least 2' in run_tool('benchmark.py', '--rounds', 1, succeeds=False)


def test_profile_adds_up():
    text = profile_table('conv2former_n', Setting((64, 64)))
    shares = [int(share) for share in re.findall(r'(\d+)% \|', text)]
    assert shares == sorted(shares, reverse=True)
    assert 50 < sum(shares) <= 105
    assert '`aten::convolution_backward`' in text


# --------------------------------------------------------------- what the command line asks for
@pytest.fixture
def asked(monkeypatch, tmp_path):
    """Runs the command with nothing measured; gives the settings that were to be measured."""
    settings = {'timed': [], 'kept': [], 'profiled': [], 'counted': [], 'rate': []}

    def measure(specs, setting, rounds, kinds):
        settings['timed'].append(setting)
        times = {kind: [1.0] * rounds for kind in kinds}
        return [Result(spec, parameters=1, gmacs=1.0, **times) for spec in specs]

    def count(kind, value):
        return lambda spec, setting, *_: settings[kind].append(setting) or value

    def rate(device):
        settings['rate'].append(device)
        return 1.0

    def run(*arguments):
        monkeypatch.setattr(sys, 'argv', ['benchmark.py', *map(str, arguments)])
        benchmark.main()
        return settings

    page = tmp_path / 'page.md'
    page.write_text('<!-- table goals -->\n<!-- end -->\n')
    monkeypatch.setattr(benchmark, 'PAGE', page)
    monkeypatch.setattr(benchmark, 'measure', measure)
    monkeypatch.setattr(benchmark, 'measure_product_rate', rate)
    monkeypatch.setattr(benchmark, 'count_bytes_kept', count('kept', 1))
    monkeypatch.setattr(benchmark, 'count_traffic', count('counted', (1, 1)))
    monkeypatch.setattr(benchmark, 'profile_table', count('profiled', ''))
    return run


@pytest.fixture
def gpu(monkeypatch):
    monkeypatch.setattr(torch.cuda, 'is_available', lambda: True)
    monkeypatch.setattr(torch.cuda, 'get_device_name', lambda: 'Some GPU')


OPTIONS = [
    (['--device', 'cuda'], dict(device='cuda')),
    (['--dtype', 'bfloat16'], dict(dtype='bfloat16')),
    (['--size', 64, 64], dict(size=(64, 64))),
    (['--batch', 2], dict(batch=2)),
]


@pytest.mark.parametrize(('options', 'changed'), OPTIONS)
def test_every_path_measures_what_is_asked_for(options, changed, asked, gpu, capsys):
    def expected(size, dtype='float32'):
        return Setting(**(dict(size=size, dtype=dtype) | changed))

    settings = asked(*options)
    assert set(map(str, settings['timed'])) == {str(expected((512, 512)))}
    assert set(map(str, settings['kept'])) == {str(expected((800, 1280)))}
    output = capsys.readouterr().out
    assert 'must' not in output
    assert 'Not judged: the goals are of 1x3x512x512, float32, cpu' in output
    assert f'| bytes kept, {expected((800, 1280)).shape}, default | 1.00 | 1.00 |' in output

    settings['timed'].clear()
    asked(*options, '--sweep', 'kernel')
    assert settings['timed'] == [expected((224, 224))] * 6
    if '--size' not in options:
        settings['timed'].clear()
        asked(*options, '--sweep', 'resolution')
        assert settings['timed'] == [expected((v, v)) for v in (224, 320, 448, 640, 896)]
        batch = changed.get('batch', 1)
        assert f'| 224 | 1.0 G | 1000 | {1e9 / 224**2 / batch:.0f} |' in capsys.readouterr().out
    settings['timed'].clear()
    asked(*options, 'conv2former_n')
    assert settings['timed'] == [expected((512, 512))]
    asked(*options, '--profile')
    assert settings['profiled'] == [expected((512, 512))]
    asked(*options, '--count', 'conv2former_n')
    assert settings['counted'] == [expected((800, 1280), dtype='bfloat16')] * 2
    assert set(settings['rate']) == {changed.get('device', 'cpu')}
    assert ('Some GPU' in output) == (changed.get('device') == 'cuda')


def test_defaults_are_judged_and_kept(asked, gpu, capsys):
    """Even where there is a GPU, which then has no part in it."""
    settings = asked('--page', '--runs', 2, '--device', 'cpu')
    assert settings['timed'] == [SPEED] * 4
    assert set(map(str, settings['kept'])) == {'1x3x800x1280, float32, cpu'} == {str(MEMORY)}
    output = capsys.readouterr().out
    assert (
        '| measure | of the published code, 2 runs | must | aim | reached | of ConvNeXt-T' in output
    )
    assert '| training step, 1x3x512x512, default | 1.00 | 0.80 | 0.65 | NO | 1.00 |' in output
    assert 'Not judged' not in output
    assert 'Some GPU' not in output
    assert output.strip() in benchmark.PAGE.read_text()


@pytest.mark.parametrize(('options', 'changed'), OPTIONS)
@pytest.mark.parametrize('path', [[], ['--count'], ['--profile'], ['--sweep', 'kernel']])
def test_page_is_for_its_own_setting(path, options, changed, asked, gpu):
    if (path, options) == (['--count'], ['--dtype', 'bfloat16']):  # which is what it counts
        asked(*path, *options, '--page')
        return
    with pytest.raises(SystemExit, match=r"^error: --page: the page's table is of .*, not of "):
        asked(*path, *options, '--page')
    assert benchmark.PAGE.read_text() == '<!-- table goals -->\n<!-- end -->\n'


def test_page_has_a_table_of_models_for_each_dtype(asked):
    asked('conv2former_n', '--dtype', 'bfloat16', '--page')
    with pytest.raises(SystemExit, match='not of 2x3x512x512, bfloat16, cpu'):
        asked('conv2former_n', '--dtype', 'bfloat16', '--batch', 2, '--page')


@pytest.mark.parametrize('path', [[], ['--count'], ['--profile'], ['--sweep', 'kernel']])
def test_cuda_without_a_gpu_is_one_error(path, asked, monkeypatch):
    """Of counting too: torch would switch autocast off and count float16 as float32."""
    monkeypatch.setattr(torch.cuda, 'is_available', lambda: False)
    with pytest.raises(SystemExit, match=r'^error: --device cuda: torch finds no CUDA device'):
        asked('--device', 'cuda', *path)


def test_sizes_of_a_sweep_are_its_own(asked, capsys):
    with pytest.raises(SystemExit):
        asked('--sweep', 'resolution', '--size', 64, 64)
    assert 'leave --size out' in capsys.readouterr().err


def test_machine_is_the_device_measured(gpu):
    assert machine(1, 'cuda').startswith('Some GPU, ')
    assert 'Some GPU' not in machine(1, 'cpu')


def test_models_go_to_the_device(monkeypatch):
    """By the one other device that is on every machine, whose tensors have no values either."""
    setting = Setting((64, 64), device='meta')
    fake = build_fake('conv2former_n', FakeTensorMode(), 'meta')
    assert {tensor.device.type for tensor in fake.state_dict().values()} == {'meta'}
    counted = []
    monkeypatch.setattr(
        benchmark, 'train_step', lambda model, images, _: counted.append((model, images))
    )
    count_traffic('conv2former_n', setting, True)
    profile_table('conv2former_n', setting)
    assert len(counted) == 4
    for model, images in counted:
        assert images.device.type == 'meta'
        assert {parameter.device.type for parameter in model.parameters()} == {'meta'}


@pytest.mark.skipif(
    digit_version(torch.__version__) < digit_version('2.2'),
    reason='torch < 2.2 runs no fake tensors of the meta device',
)
def test_multiply_adds_are_those_of_any_device():
    on_meta = count_macs('conv2former_n', Setting((64, 64), device='meta'))
    assert on_meta == count_macs('conv2former_n', SMALL)


def test_time_of_a_profile_is_the_device_s():
    old, new = dict(self_cuda_time_total=2), dict(self_device_time_total=3)
    assert self_time(SimpleNamespace(self_cpu_time_total=1, **old), 'cuda') == 2
    assert self_time(SimpleNamespace(self_cpu_time_total=1, **new), 'cuda') == 3
    assert self_time(SimpleNamespace(self_cpu_time_total=1, **new), 'cpu') == 1


def test_command_of_small_goals(capsys, monkeypatch):
    """A real run, of the smallest models."""
    names = {'PLAIN': ('plain_n', 'plain_n:channels_last=True'), 'DEFAULT': 'conv2former_n',
             'FASTEST': 'conv2former_n:recompute=nothing', 'LEAST': NANO,
             'CHECKPOINTED': 'conv2former_n:with_cp=True',
             'DEPLOYED': 'conv2former_n:deploy=True'}  # fmt: skip
    nano = {getattr(benchmark, key): value for key, value in names.items()}
    goals = [(what, nano[model], *rest) for what, model, *rest in GOALS]
    for key, value in (names | {'GOALS': goals}).items():
        monkeypatch.setattr(benchmark, key, value)
    options = ['--size', '64', '64', '--batch', '2', '--dtype', 'bfloat16', '--rounds', '2']
    monkeypatch.setattr(sys, 'argv', ['benchmark.py', *options])
    benchmark.main()
    output = capsys.readouterr().out
    assert '\n2x3x64x64, bfloat16, cpu, medians of 2 rounds\n' in output
    assert re.search(r'\| bytes kept, 2x3x64x64, default \| 0\.\d\d \| \d\.\d\d \|', output)
    assert re.search(r'\| inference, 2x3x64x64, deployed \| \d+\.\d\d \| \d+\.\d\d \|', output)
    assert output.count('\n|') == 2 + len(GOALS) + 2 + 7 + 5


def test_verdict():
    assert verdict([0.7, 0.81], 0.8, 0.6) == 'NO'
    assert verdict([0.7, 0.8], 0.8, 0.6) == 'must'
    assert verdict([0.5, 0.6], 0.8, 0.6) == 'aim'
    assert verdict([0.5], 0.8, None) == 'must'
    assert verdict([0.5], None, None) == ''


def test_page_keeps_what_is_printed(tmp_path, monkeypatch, capsys):
    page = tmp_path / 'page.md'
    page.write_text('before\n<!-- table a -->\nold\n<!-- end -->\n<!-- table b -->\n<!-- end -->\n')
    monkeypatch.setattr(benchmark, 'PAGE', page)
    show('a', 'new', keep=True)
    show('b', 'not kept', keep=False)
    assert page.read_text() == (
        'before\n<!-- table a -->\nnew\n<!-- end -->\n<!-- table b -->\n<!-- end -->\n'
    )
    assert capsys.readouterr().out == 'new\nnot kept\n'


def test_every_mark_of_the_page_is_filled():
    page = benchmark.PAGE.read_text()
    tables = re.findall(r'<!-- table ([^>]+) -->\n(.*?)<!-- end -->', page, re.DOTALL)
    assert len(tables) >= 10
    for name, text in tables:
        assert text.count('\n|') >= 3, name
    for picture in re.findall(r'\]\((images/\S+)\)', page):
        assert (benchmark.PAGE.parent / picture).is_file()


def test_whole_recipes_and_their_data(sample):
    recipe = 'configs/segmentation/upernet_conv2former_n.py'
    output = run_tool('benchmark_recipe.py', recipe, '--size', 64, 64, '--rounds', 2)
    for name in ('Conv2Former', 'published code', 'ConvNeXt-T'):
        assert re.search(rf'\| {name} \| \d+ \(.*\| \d\.\d\d \| [\d,]+ \| \d\.\d\d \|', output)
    data = ['--data-root', sample / 'ade/ADEChallengeData2016', '--images', 4]
    output = run_tool('benchmark_recipe.py', recipe, *data)
    assert re.search(r'\d images a second with one worker', output)
    assert '| RandomCrop |' in output
