"""`evidence.py fit --true-size`: its plan, its time and what it writes, in small."""

import argparse
import json
import time
from types import SimpleNamespace
from unittest.mock import Mock

import evidence
import pytest
from evidence import ADE_SAMPLE, ENDLESS, Fit
from helpers.tools import run_tool
from make_tables import on_gpu, true_size_table
from mmengine.runner import EpochBasedTrainLoop, IterBasedTrainLoop
from time_budget import TimeBudgetHook


@pytest.fixture
def samples(sample, tmp_path, monkeypatch):
    """The embedded sample under the names of the real ones."""
    folder = tmp_path / 'samples'
    (folder / ADE_SAMPLE).parent.mkdir(parents=True)
    for name in (ADE_SAMPLE, 'semantic_sample'):
        (folder / name).symlink_to(sample / 'ade/ADEChallengeData2016')
    (folder / 'coco_sample').symlink_to(sample / 'coco')
    monkeypatch.setenv('MMCONV2FORMER_SAMPLES', str(folder))


KINDS = [
    ('mask_rcnn_conv2former_t', 'coco_sample', 'coco/bbox_mAP'),
    pytest.param(
        'cascade_mask_rcnn_conv2former_t', 'coco_sample', 'coco/bbox_mAP', marks=pytest.mark.slow
    ),
    pytest.param('upernet_conv2former_t', 'semantic_sample', 'mIoU', marks=pytest.mark.slow),
]


@pytest.mark.parametrize(('name', 'sample_name', 'metric'), KINDS)
def test_whole_path_in_small(name, sample_name, metric, samples, tmp_path):
    out = tmp_path / 'evidence.json'
    options = [name, '--true-size', '--images', 2, '--quick', '--device', 'cpu', '--budget', 25]
    output = run_tool('evidence.py', 'fit', *options, '--out', out)
    found = json.loads(out.read_text())[name]['true_size']
    result = found[f'{sample_name}, 2 images']
    assert '--amp bfloat16' in output
    assert 'Mixed precision: bfloat16' in output
    assert result['images'] == 2
    assert 0 <= result['metrics'][metric] <= 100
    iterations = [int(iteration) for iteration in result['curve']]
    assert iterations[0] == 1
    assert iterations[-1] == result['iterations'] < ENDLESS
    assert (
        list(result['curve'].values())[:: max(1, len(iterations) - 1)]
        == ([result['first_loss'], result['last_loss']][: len(iterations)])
    )
    assert result['training_seconds'] <= result['seconds'] < 60
    assert result['machine']
    assert set(result['versions']) >= {'torch', 'mmengine', 'cuda', 'python'}
    assert result['command'].startswith(f'python tools/evidence.py fit {name} --true-size ')
    log = (tmp_path / result['log']).read_text()
    assert log.count('Iter(train)') == result['iterations']
    assert 'eta: ' not in log.split('Iter(val)')[0]
    assert f'_base_ = {str(evidence.recipes()[name])!r}' in log
    assert on_gpu({'true_size': found}) == {}  # neither a GPU nor the true size


def test_plan_takes_all_images_where_there_are_fewer(samples):
    names = ['mask_rcnn_conv2former_t', 'upernet_conv2former_t']
    plan = evidence.plan_true_size(names, [128, 8])
    assert [(fit.name.split('_')[0], fit.label) for fit in plan] == [
        ('mask', 'coco_sample, 8 images'),
        ('mask', 'coco_sample, 39 images'),  # one image has no object
        ('upernet', 'ade_sample, 8 images'),
        ('upernet', 'ade_sample, 40 images'),
        ('upernet', 'semantic_sample, 8 images'),
        ('upernet', 'semantic_sample, 40 images'),
    ]
    assert len({fit.log for fit in plan}) == len(plan)


@pytest.mark.parametrize(
    ('name', 'images', 'batch'),
    [('mask_rcnn', 4, 2), ('mask_rcnn', 8, 2), ('mask_rcnn', 128, 8), ('upernet', 4, 8)],
)
def test_batch(name, images, batch):
    assert evidence.batch_of(Fit(f'{name}_conv2former_t', 'coco_sample', images)) == batch


def test_time_is_shared_and_a_failure_stops_nothing(monkeypatch, tmp_path, capsys):
    """Fits that take no time leave it to those after them; the results of others are kept."""
    given = []

    def measure(fit, config, seconds, args):
        given.append(seconds)
        if fit.images == 8:
            raise SystemExit('error: no')
        return {'images': fit.images}

    monkeypatch.setattr(evidence, 'measure_true_size', measure)
    plan = [Fit('a', 'coco_sample', images) for images in (8, 32, 128)]
    args = argparse.Namespace(budget=700.0, out=tmp_path / 'evidence.json')
    with pytest.raises(SystemExit, match=r'no result: a \(coco_sample, 8 images\)$'):
        evidence.fit_true_size(plan, {'a': None}, args)
    besides = [30 + 1.6, 30 + 6.4, 30 + 25.6]
    wanted = [(700 - sum(besides)) / 7, (700 - sum(besides[1:])) / 3, 700 - besides[2]]
    assert given == pytest.approx(wanted, abs=1)
    kept = json.loads(args.out.read_text())['a']['true_size']
    assert list(kept) == ['coco_sample, 128 images', 'coco_sample, 32 images']


def test_what_there_is_no_time_for_is_named(monkeypatch, tmp_path):
    monkeypatch.setattr(evidence, 'measure_true_size', lambda *args: time.sleep(0.02) or {})
    plan = [Fit('a', 'coco_sample', images) for images in (8, 32, 128)]
    args = argparse.Namespace(budget=0.01, out=tmp_path / 'evidence.json')
    with pytest.raises(SystemExit) as refusal:
        evidence.fit_true_size(plan, {'a': None}, args)
    assert str(refusal.value) == (
        'error: no result: a (coco_sample, 32 images): no time left, '
        'a (coco_sample, 128 images): no time left'
    )


def test_every_fit_trains_in_the_shortest_time():
    plan = [Fit('a', 'coco_sample', images) for images in (8, 128)]
    assert evidence.training_seconds(plan, 40) == pytest.approx(40 / 4 / 5)


@pytest.mark.parametrize(
    ('options', 'message'),
    [
        (['--quick'], 'are no evidence: name another file with --out'),
        (['--device', 'cpu'], 'are no evidence: name another file with --out'),
        (['--images', '0'], '--images and --budget must be positive'),
        (['--out', 'other.json'], 'torch finds no CUDA device'),
    ],
)
def test_refusals(options, message, monkeypatch, capsys):
    monkeypatch.setattr('torch.cuda.is_available', lambda: False)
    monkeypatch.setattr('sys.argv', ['evidence.py', 'fit', '--true-size', *options])
    with pytest.raises(SystemExit):
        evidence.main()
    assert message in capsys.readouterr().err


def test_curve_is_thinned_to_both_ends():
    records = [{'step': step} for step in range(1, 101)]
    steps = [record['step'] for record in evidence.thinned(records)]
    assert steps[0] == 1
    assert steps[-1] == 100
    assert len(set(steps)) == len(steps) == evidence.CURVE
    assert evidence.thinned(records[:1]) == records[:1]


def test_table_of_fits_on_gpus():
    name = 'mask_rcnn_conv2former_t'
    result = dict(
        images=8, batch=2, iterations=300, first_loss=6.0, last_loss=0.5, seconds=90,
        metrics={'coco/bbox_mAP': 0.7}, metric='coco/bbox_mAP', goal=0.4, quick=False,
        device='cuda', machine='NVIDIA X', log='fit.txt',
    )  # fmt: skip
    found = {name: {'true_size': {'coco_sample, 8 images': result}}}
    table = true_size_table(found, ['detection'])
    assert table.splitlines()[2] == (
        f'| {name} | coco_sample, 8 images | 300 x 2 | 6.00 → 0.50 | bbox_mAP 0.7 | 1.5 min '
        '| [NVIDIA X](fit.txt) |'
    )
    result['device'] = 'cpu'
    assert true_size_table(found, ['detection']) == ''


# ---------------------------------------------------------------------------------- TimeBudgetHook
def runner_of(loop_type=IterBasedTrainLoop):
    loop = Mock(spec=loop_type)
    groups = [{'lr': 1.0}, {'lr': 0.5}]
    return SimpleNamespace(train_loop=loop, iter=0, optim_wrapper=Mock(param_groups=groups))


def test_rates_follow_the_clock(monkeypatch):
    now = 100.0
    monkeypatch.setattr('time.monotonic', lambda: now)
    hook = TimeBudgetHook(seconds=20, warmup=4)
    runner = runner_of()
    runner.train_loop._max_iters = ENDLESS
    hook.before_train(runner)
    rates = []
    while runner.iter < runner.train_loop._max_iters:
        hook.before_train_iter(runner, runner.iter)
        rates.append([group['lr'] for group in runner.optim_wrapper.param_groups])
        now += 2  # seconds of an iteration
        hook.after_train_iter(runner, runner.iter)
        runner.iter += 1
    assert [rate for rate, _ in rates] == pytest.approx(
        [0.25, 0.5, 0.75, 1, 1, 1, 0.8, 0.6, 0.4, 0.2]
    )
    assert all(second == pytest.approx(first / 2) for first, second in rates)


def test_time_budget_needs_one_process_that_counts_iterations(monkeypatch):
    hook = TimeBudgetHook(seconds=1)
    with pytest.raises(RuntimeError, match='needs an IterBasedTrainLoop'):
        hook.before_train(runner_of(EpochBasedTrainLoop))
    monkeypatch.setattr('time_budget.get_world_size', lambda: 2)
    with pytest.raises(RuntimeError, match='for one process, there are 2'):
        hook.before_train(runner_of())
    with pytest.raises(ValueError, match='seconds must be positive, got 0'):
        TimeBudgetHook(seconds=0)
