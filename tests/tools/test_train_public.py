"""`train_public.py`: runs differ in one thing only, stop and go on, and give the tables."""

import json
import re
import shutil
from itertools import product

import numpy as np
import pytest
import train_public
from helpers.tiny import ARCH, CHANNELS
from helpers.tools import run_tool
from make_tables import (
    LEVELS,
    PUBLIC,
    PUBLIC_METRICS,
    class_table,
    level,
    mean_and_spread,
    public_table,
)
from mmengine.config import Config
from PIL import Image
from train_public import DATASETS, Run, count, plan, set_iterations, thinned, training_seconds


def without(config, *keys):
    """The config as a dict, without the named parts."""
    content = json.loads(json.dumps(config.to_dict(), default=str))
    for key in keys:
        *parents, last = key.split('.')
        part = content
        for parent in parents:
            part = part[parent]
        part.pop(last, None)
    return content


def test_most_telling_runs_come_first():
    runs = plan(['bccd', 'camvid'], full_size=False, iterations=None)
    labels = [(run.dataset, run.backbone, run.seed) for run in runs if run.kernel_size is None]
    assert labels[:3] == [
        ('bccd', 'conv2former', 0),
        ('camvid', 'conv2former', 0),
        ('bccd', 'convnext_tiny', 0),
    ]
    assert len(set(labels)) == len(labels) == 2 * 3 * 3
    assert {run.kernel_size for run in runs if run.dataset == 'camvid'} == {None, 5, 11, 15}
    assert len({run.stem for run in runs}) == len(runs)
    large = plan(['camvid'], full_size=True, iterations=9)
    assert {run.kernel_size for run in large} == {None, 5, 7, 15}


@pytest.mark.parametrize('dataset', DATASETS)
def test_runs_differ_in_the_backbone_and_the_seed_only(dataset):
    readers = {
        'bccd': ['model.neck'],
        'camvid': ['model.decode_head.in_channels', 'model.auxiliary_head.in_channels'],
    }
    parts = ['model.backbone', 'randomness', 'optim_wrapper.paramwise_cfg', *readers[dataset]]
    ours = Run(dataset, 'conv2former', 0, None, False, 100)
    expected = without(ours.config, *parts)
    for other in (Run(dataset, 'convnext_tiny', 1, None, False, 100),
                  Run(dataset, 'swin_tiny', 2, None, False, 100),
                  Run(dataset, 'conv2former', 0, 5, False, 100)):  # fmt: skip
        assert without(other.config, *parts) == expected
        assert other.config.randomness.seed == other.seed
    convnext = Run(dataset, 'convnext_tiny', 1, None, False, 100).config.model.backbone
    scale = ours.config.model.backbone.layer_scale_init_value
    assert convnext.options.layer_scale_init_value == scale == 0.1
    for backbone, most in (('conv2former', 2e7), ('convnext_tiny', 4e7), ('swin_tiny', 4e7)):
        parameters, flops = count(Run(dataset, backbone, 0, None, False, 100).config)
        assert 1e7 < parameters < most
        assert 5e8 < flops < 6e9


def test_full_size_is_the_recipe():
    config = Run('camvid', 'conv2former', 0, None, True, 12_000).config
    recipe = Config.fromfile(train_public.recipes()['upernet_conv2former_t_camvid'])
    assert config.model == recipe.model
    assert config.train_dataloader == recipe.train_dataloader
    assert config.param_scheduler == recipe.param_scheduler


def test_schedule_covers_the_iterations():
    config = Run('bccd', 'conv2former', 0, None, False, 50).config
    set_iterations(config, 50)
    warmup, decay = config.param_scheduler
    assert (warmup.end, decay.begin, decay.end) == (2, 2, 50)
    assert config.train_cfg.val_interval == config.default_hooks.checkpoint.interval == 10


# ------------------------------------------------------------------------------------- real data
@pytest.fixture
def data(real_samples, tmp_path):
    """CamVid with six images of each split."""
    source = real_samples / 'public/camvid'
    if not source.is_dir():
        pytest.skip('MMCONV2FORMER_SAMPLES has no public/camvid')
    for kind in ('images', 'annotations'):
        for split in ('train', 'val', 'test'):
            folder = tmp_path / 'data/camvid' / kind / split
            folder.mkdir(parents=True)
            for path in sorted((source / kind / split).iterdir())[:6]:
                shutil.copy(path, folder)
    return tmp_path / 'data'


def test_classes_of_camvid_are_weighted_by_median_frequency(real_samples):
    masks = sorted((real_samples / 'public/camvid/annotations/train').glob('*.png'))
    if not masks:
        pytest.skip('MMCONV2FORMER_SAMPLES has no public/camvid')
    counts = np.stack([np.bincount(np.asarray(Image.open(m)).ravel(), minlength=12) for m in masks])
    pixels = counts.sum(1, keepdims=True) * (counts > 0)  # of the images that have a class
    frequencies = (counts.sum(0) / pixels.sum(0))[:11]  # without void
    loss = Run('camvid', 'conv2former', 0, None, False, 9).config.model.decode_head.loss_decode
    weights = np.sqrt(np.median(frequencies) / frequencies)
    assert loss.class_weight == pytest.approx(weights, abs=6e-3)


@pytest.fixture
def small(monkeypatch):
    """Networks and images of no size."""
    monkeypatch.setitem(
        train_public.DATASETS,
        'camvid',
        train_public.Public('upernet_conv2former_{}_camvid', 'mIoU', 32, 2, 4),
    )
    stock = Run.config.func

    def config(run):
        small = stock(run)
        small.model.backbone.update(arch=ARCH)
        small.model.decode_head.update(in_channels=CHANNELS, channels=8)
        small.model.auxiliary_head.update(in_channels=CHANNELS[2], channels=8)
        for part in ('train', 'val', 'test'):
            small[f'{part}_dataloader'].update(num_workers=0, persistent_workers=False)
        return small

    monkeypatch.setattr(Run, 'config', property(config))


def test_run_in_small(data, small, tmp_path, monkeypatch, capfd):
    out = tmp_path / 'evidence.json'
    command = ['tools/train_public.py', str(data), 'camvid', '--runs', '1', '--out', str(out),
               '--work-dir', str(tmp_path / 'work')]  # fmt: skip
    monkeypatch.setattr('sys.argv', [*command, '--minutes', '1e-4'])
    train_public.main()  # the time is over before the training begins
    assert not out.exists()
    monkeypatch.setattr('sys.argv', command)
    train_public.main()
    record = json.loads(out.read_text())['upernet_conv2former_n_camvid']
    ((label, result),) = record[PUBLIC].items()
    assert label == 'conv2former, seed 0, 4 iterations'
    for tested in (result['metrics'], result['untrained']):
        assert 0 <= tested['mIoU'] <= 100
        assert {'IoU/sky', 'IoU/bicyclist'} <= tested.keys()
    assert result['seconds'] >= 0
    assert level(record) == LEVELS[4] == 'tested on a public test split'
    log = tmp_path / result['log']
    assert 'Iter(train)' in log.read_text()
    curves = json.loads(log.with_suffix('.json').read_text())
    assert [step for step, _ in curves['metric']] == [1, 2, 3, 4]
    assert (tmp_path / 'images/camvid_curves.png').stat().st_size > 1000
    assert (tmp_path / 'images/camvid_predictions.jpg').stat().st_size > 1000
    capfd.readouterr()
    monkeypatch.setattr('sys.argv', [*command, '--list'])
    train_public.main()
    assert f'done: upernet_conv2former_n_camvid, {label}' in capfd.readouterr().out


# ---------------------------------------------------------------------------------------- results
def fake(backbone, value, untrained=None):
    return {
        'dataset': 'camvid', 'backbone': backbone, 'parameters': 15.7e6, 'backbone_flops': 1.9e9,
        'seconds': 600, 'untrained': untrained,
        'metrics': {'mIoU': value, 'aAcc': 80.0, 'IoU/sky': 90.0, 'IoU/car': value},
    }  # fmt: skip


def test_tables_have_means_and_spreads():
    runs = {
        'conv2former, seed 0, 9 iterations': fake('conv2former', 40.0, {'mIoU': 2.0, 'aAcc': 9.0}),
        'conv2former, seed 1, 9 iterations': fake('conv2former', 42.0),
        'conv2former, seed 1, 8 iterations': fake('conv2former', 1.0),
        'swin_tiny, seed 0, 9 iterations': fake('swin_tiny', 39.0),
        'conv2former, 5x5, seed 0, 9 iterations': fake('conv2former', 38.0),
    }
    large = {'conv2former, seed 0, 9 iterations': fake('conv2former', 70.0)}
    evidence = {'upernet_n': {PUBLIC: runs}, 'upernet_t': {PUBLIC: large}}
    n, size = '| `upernet_n` | ', ' | 15.7 M | 1.90 G | '
    assert public_table(evidence).splitlines()[2:] == [
        f'{n}conv2former, 9 iterations{size}2 | 41.0 ± 1.4 | 80.0 ± 0.0 | 10 min |',
        f'{n}conv2former, untrained{size}1 | 2.0 | 9.0 |  |',
        f'{n}conv2former, 8 iterations{size}1 | 1.0 | 80.0 | 10 min |',
        f'{n}swin_tiny, 9 iterations{size}1 | 39.0 | 80.0 | 10 min |',
        f'{n}conv2former, 5x5, 9 iterations{size}1 | 38.0 | 80.0 | 10 min |',
        f'| `upernet_t` | conv2former, 9 iterations{size}1 | 70.0 | 80.0 | 10 min |',
    ]
    classes = class_table(evidence, 'camvid').splitlines()
    assert f'{n}conv2former, 9 iterations | 90.0 | 41.0 |' in classes
    assert set(PUBLIC_METRICS) == set(DATASETS)
    assert mean_and_spread([1.0]) == '1.0'


def test_results_in_the_readme_are_those_of_the_table():
    readme = ' '.join((train_public.ROOT / 'README.md').read_text().split())
    table = public_table(train_public.read_evidence(train_public.EVIDENCE))
    (values,) = re.findall(
        r'test AP of (\S+) on BCCD \(Swin-T (\S+), ConvNeXt-T (\S+)\) '
        r'and a test mIoU of (\S+) on CamVid \((\S+), (\S+)\)',
        readme,
    )
    runs = product(DATASETS, ['conv2former', 'swin_tiny', 'convnext_tiny'])
    for value, (dataset, backbone) in zip(values, runs, strict=True):
        row = rf'_{dataset}` \| {backbone}, \d+ iterations \|.*?\| \d \| {value}[ |]'
        assert re.search(row, table), (dataset, backbone)


def test_helpers(tmp_path):
    assert thinned({}) == []
    assert thinned({step: step / 3 for step in range(1, 101)}, 40)[-1] == (100, 33.3333)
    assert len(thinned(dict.fromkeys(range(100), 0.0), 40)) <= 40
    for name, times in (('1', [1.0, 100.0]), ('2', [3.0])):
        path = tmp_path / name / 'vis_data/scalars.json'
        path.parent.mkdir(parents=True)
        lines = [json.dumps({'loss': 1.0, 'step': 1, 'time': time}) for time in times]
        path.write_text('\n'.join([*lines, json.dumps({'mIoU': 1.0, 'step': 4, 'time': 9.0})]))
    assert training_seconds(tmp_path, 10) == 30.0
    assert plan(['bccd'], True, 7)[0].stem == (
        'faster_rcnn_conv2former_t_bccd_conv2former_seed_0_7_iterations'
    )


@pytest.mark.parametrize(
    ('options', 'message'),
    [
        (['coco'], 'unknown: coco; known: bccd, camvid'),
        ([], 'bccd is missing; docs/data.md says where to get it'),
    ],
)
def test_wrong_arguments_are_refused(options, message, tmp_path):
    assert message in run_tool('train_public.py', tmp_path, *options, succeeds=False)
