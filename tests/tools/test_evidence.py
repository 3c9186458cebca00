"""`evidence.py`: what its runs change in a recipe, what it records, and the tables of that."""

import json
from types import SimpleNamespace
from unittest.mock import Mock

import evidence
import pytest
from evidence import ADE_SAMPLE, ENDLESS, FITS, Fit, fit_config, steps_config
from helpers import ROOT
from helpers.tiny import without_values
from helpers.tools import run_tool
from make_tables import (
    BACKBONES,
    OURS,
    backbone_names,
    evidence_table,
    level,
    read_evidence,
    recipes,
)
from mmengine.registry import MODELS, init_default_scope
from time_budget import TimeBudgetHook

from mmconv2former.models.baselines import BASELINES


# -------------------------------------------------------------------------------- steps and fits
@pytest.fixture
def samples(sample, tmp_path, monkeypatch):
    """The embedded sample under the names of the real ones."""
    folder = tmp_path / 'samples'
    (folder / ADE_SAMPLE).parent.mkdir(parents=True)
    for name in (ADE_SAMPLE, 'semantic_sample'):
        (folder / name).symlink_to(sample / 'ade/ADEChallengeData2016')
    (folder / 'coco_sample').symlink_to(sample / 'coco')
    monkeypatch.setenv('MMCONV2FORMER_SAMPLES', str(folder))


@pytest.mark.slow
@pytest.mark.parametrize(
    ('name', 'key'),
    [
        ('mask_rcnn_conv2former_t', 'coco/bbox_mAP'),
        ('cascade_mask_rcnn_conv2former_t', 'coco/bbox_mAP'),
        ('upernet_conv2former_t', 'mIoU'),
        ('conv2former_t_folders', 'accuracy/top1'),
    ],
)
def test_fit_in_small(name, key, samples, tmp_path):
    out = tmp_path / 'evidence.json'
    options = ['--side', 64, '--images', 2, '--seconds', 5, '--out', out]
    output = run_tool('evidence.py', 'fit', name, *options)
    assert 'Mixed precision: bfloat16' in output
    result = json.loads(out.read_text())[name]['fit']
    assert 0 <= result['metrics'][key] <= 100
    assert 0 < result['iterations'] < ENDLESS
    assert result['training_seconds'] == 5 <= result['seconds']
    assert result['machine']
    assert set(result['versions']) >= {'torch', 'mmengine', 'cuda', 'python'}
    assert result['command'].startswith(f'python tools/evidence.py fit {name} --side 64 ')
    log = (tmp_path / result['log']).read_text()
    assert 'eta: ' not in log
    assert 'Iter(val)' in log


@pytest.mark.parametrize('name', FITS)
@pytest.mark.parametrize('side', [None, 96])
def test_fits_change_what_hinders_learning_by_heart(name, side):
    config = fit_config(Fit(name, 'coco_sample', 8), recipes()[name], 5, side)
    assert config.model.backbone.drop_path_rate == config.optim_wrapper.optimizer.weight_decay == 0
    pipeline = [step.type for step in config.train_dataloader.dataset.pipeline]
    assert not any('Random' in step and step != 'RandomCrop' for step in pipeline)
    if name == 'upernet_conv2former_t':
        crop = side or 512
        assert (
            config.model.test_cfg.crop_size == config.model.data_preprocessor.size == (crop, crop)
        )
        assert config.test_dataloader.dataset.pipeline[1].scale == (4 * crop, crop)
    init_default_scope(config.default_scope)
    with without_values():
        model = MODELS.build(config.model)
    if hasattr(model, 'neck') and hasattr(model, 'rpn_head'):
        assert model.neck.out_channels == model.rpn_head.in_channels == (128 if side else 256)


def test_steps_have_small_images():
    for name, side in (('upernet_conv2former_l_in22k', 256), ('conv2former_s_in22k', 64)):
        config = steps_config(recipes()[name])
        sizes = {
            value for step in config.train_dataloader.dataset.pipeline
            for key, value in step.items() if key in ('scale', 'crop_size')
        }  # fmt: skip
        assert sizes == ({(4 * side, side), (side, side)} if side == 256 else {side})
        assert config.model.backbone.init_cfg is None


def test_plan_takes_all_images_where_there_are_fewer(samples):
    names = ['mask_rcnn_conv2former_t', 'upernet_conv2former_t']
    plan = evidence.plan_fits(names, [128, 8], all_samples=True)
    assert [(fit.name.split('_')[0], fit.label, fit.batch) for fit in plan] == [
        ('mask', 'coco_sample, 8 images', 2),
        ('mask', 'coco_sample, 39 images', 8),  # one image has no object
        ('upernet', 'ade_sample, 8 images', 8),
        ('upernet', 'ade_sample, 40 images', 8),
        ('upernet', 'semantic_sample, 8 images', 8),
        ('upernet', 'semantic_sample, 40 images', 8),
    ]
    assert len({fit.log for fit in plan}) == len(plan)
    samples = [fit.sample for fit in evidence.plan_fits(names, [8], all_samples=False)]
    assert samples == ['coco_sample', 'semantic_sample']


@pytest.mark.parametrize(
    ('options', 'message'),
    [
        (['fit', '--side', '64'], 'are not evidence: name another file with --out'),
        (['fit', '--side', '64', '--true-size'], '--true-size and --side exclude each other'),
        (['fit', '--images', '0'], '--images and --seconds must be positive'),
        (['steps', 'mask_rcnn'], 'unknown: mask_rcnn; known: mask_rcnn_conv2former_n'),
        (['steps'], 'MMCONV2FORMER_SAMPLES must name'),
    ],
)
def test_refusals(options, message, monkeypatch, capsys):
    monkeypatch.delenv('MMCONV2FORMER_SAMPLES', raising=False)
    monkeypatch.setattr('sys.argv', ['evidence.py', *options])
    with pytest.raises(SystemExit):
        evidence.main()
    assert message in capsys.readouterr().err


# ---------------------------------------------------------------------------------------- results
RESULT = dict(
    images=8, iterations=300, first_loss=6.0, last_loss=0.5, seconds=90, metric='coco/bbox_mAP',
    metrics={'coco/bbox_mAP': 0.5}, goal=0.4, device='cuda', machine='NVIDIA X', log='fit.txt',
)  # fmt: skip


@pytest.mark.parametrize(
    ('fit', 'on_gpu', 'expected'),
    [
        (None, None, 'steps on real data'),
        (dict(goal=0.6), None, 'steps on real data'),
        (dict(), None, 'fits real data'),
        (None, dict(), 'fits at full size on a GPU'),
        (None, dict(goal=0.6), 'steps on real data'),
        (None, dict(images=4), 'steps on real data'),
        (None, dict(device='cpu'), 'steps on real data'),
    ],
)
def test_level_says_what_was_shown(fit, on_gpu, expected):
    record = dict(steps={})
    if fit is not None:
        record['fit'] = RESULT | fit
    if on_gpu is not None:
        record['true_size'] = {'sample': RESULT | on_gpu}
    assert level(record) == expected
    assert level({}) == 'builds'


def test_table_of_runs():
    name = 'mask_rcnn_conv2former_t'
    found = {name: {'true_size': {'coco_sample, 8 images': RESULT}}}
    assert evidence_table(found).splitlines()[2] == (
        f'| {name} | fits coco_sample, 8 images, [full size, NVIDIA X](fit.txt) | 300 '
        '| 6.00 → 0.50 | bbox_mAP 0.5 | 1.5 min |'
    )


def test_counts_are_the_published_ones():
    """Those of every baseline, by the program that counts ours."""
    found = read_evidence(ROOT / 'docs/evidence.json')[BACKBONES]
    assert list(found) == sorted(backbone_names())
    for name, published in BASELINES.items():
        counted = found[name]['classification']
        assert counted['size'] == [published.size, published.size]
        tolerance = {'coatnet': 0.10, 'efficientnet': 0.08}.get(name.split('_')[0], 0.03)
        assert counted['flops'] / 1e9 == pytest.approx(published.flops, rel=tolerance), name
    for name in ('conv2former_small', 'conv2former_base'):  # whose own head costs almost nothing
        counted = found[name]['classification']['flops'] / 1e9
        assert counted == pytest.approx(OURS[name].flops, rel=0.01)


# ---------------------------------------------------------------------------------- TimeBudgetHook
def test_rates_follow_the_clock(monkeypatch):
    now = 100.0
    monkeypatch.setattr('time.monotonic', lambda: now)
    hook = TimeBudgetHook(seconds=20, warmup=4)
    runner = SimpleNamespace(
        train_loop=Mock(_max_iters=ENDLESS),
        iter=0,
        optim_wrapper=Mock(param_groups=[{'lr': 1.0}, {'lr': 0.5}]),
    )
    hook.before_train(runner)
    rates = []
    while runner.iter < runner.train_loop._max_iters:
        hook.before_train_iter(runner, runner.iter)
        rates.append([group['lr'] for group in runner.optim_wrapper.param_groups])
        now += 60 if runner.iter == 0 else 2  # seconds; the first compiles kernels
        hook.after_train_iter(runner, runner.iter)
        runner.iter += 1
    assert [rate for rate, _ in rates] == pytest.approx(
        [0.25, 0.5, 0.75, 1, 1, 1, 1, 0.8, 0.6, 0.4, 0.2]
    )
    assert all(second == pytest.approx(first / 2) for first, second in rates)
