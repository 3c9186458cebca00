"""Non-finite losses, gradients and weights, and low precision, in real runs."""

import math
import re
from pathlib import Path
from statistics import mean
from types import SimpleNamespace

import pytest
import torch
from helpers.half_precision import needs_scaler
from helpers.tiny import scalars, tiny_config

from mmconv2former import ReliableRunner
from mmconv2former.checkpoint.reading import read_checkpoint, read_state_dict
from mmconv2former.engine.amp import CpuAmpOptimWrapper
from mmconv2former.engine.finite import NonFiniteError, image_paths

TASKS = ('detection', 'segmentation')
# One term of the loss by task: its module, and its name in the log.
TERMS = {
    'detection': ('roi_head.bbox_head.loss_bbox', 'loss_bbox'),
    'segmentation': ('auxiliary_head.loss_decode', 'aux.loss_ce'),
}


@pytest.fixture
def run(sample, tmp_path, guarded, at_moment):
    """A runner of six iterations, with a checkpoint and a validation at every second one.

    A fault is a function that changes the model before an iteration, counted from 1.
    """

    def start(task, iteration=None, fault=None, **options):
        length, interval = (3, 1) if task == 'detection' else (6, 2)
        config = tiny_config(task, sample, tmp_path, length, interval, images=4, options=options)
        if fault is not None:
            at_moment(before_train_iter=(iteration, lambda runner: fault(runner.model)))
        return ReliableRunner.from_cfg(config)

    return start


def assert_only_finite_weights(work_dir):
    for path in work_dir.glob('*.pth'):
        for key, value in read_state_dict(str(path)).items():
            assert torch.isfinite(value).all(), (path, key)


def without_folders(message):
    return re.sub(r'/\S*/', '', message)


def name_of(task, iteration):
    return f'epoch_{iteration // 2}.pth' if task == 'detection' else f'iter_{iteration}.pth'


# ------------------------------------------------------------------------------------ not a number
@pytest.mark.parametrize(
    ('task', 'value', 'options'),
    [
        ('detection', math.nan, {}),
        ('segmentation', math.inf, {'default_hooks.runtime_info': None}),  # no losses in the log
    ],
)
def test_non_finite_loss(task, value, options, run, tmp_path, fault_report):
    part, term = TERMS[task]

    def spoil(model):
        model.get_submodule(part).loss_weight = value

    runner = run(task, 3, spoil, **options)
    with pytest.raises(NonFiniteError) as error:
        runner.train()
    message = str(error.value)
    good = tmp_path / name_of(task, 2)
    fault_report('Numbers', f'a loss term is {value} ({task})', 1, 1,
                 'error: ' + without_folders(message))  # fmt: skip
    assert message.startswith('iteration 3: loss is ')
    assert f'{term} is ' in message
    assert message.count('.jpg') == 2
    assert f'last good checkpoint: {good}' in message
    assert runner.iter == 2
    assert good.exists()
    assert not (tmp_path / name_of(task, 4)).exists()
    assert_only_finite_weights(tmp_path)


def test_divergence_by_a_learning_rate(run, tmp_path, fault_report):
    """Nothing is injected: the loss itself grows until it overflows."""
    runner = run('segmentation', **{'optim_wrapper.optimizer.lr': 1e20})
    with pytest.raises(NonFiniteError) as error:
        runner.train()
    fault_report('Numbers', 'learning rate of 1e20', 1, 1,
                 f'error: {without_folders(str(error.value))[:100]}...')  # fmt: skip
    assert_only_finite_weights(tmp_path)


def spoil_gradient(model):
    weight = model.backbone.stages[1][0].mlp.fc1.weight
    weight.register_hook(lambda gradient: gradient * math.nan)


@pytest.mark.parametrize(
    'task', [pytest.param('detection', marks=pytest.mark.slow), 'segmentation']
)
def test_non_finite_weights_are_not_saved(task, run, tmp_path, fault_report):
    """A non-finite gradient with a finite loss, right before a checkpoint."""
    runner = run(task, 4, spoil_gradient)
    with pytest.raises(NonFiniteError, match=r'mlp\.fc1\.weight') as error:
        runner.train()
    message = str(error.value)
    fault_report('Numbers', f'a gradient is NaN before a checkpoint ({task})', 1, 1,
                 'error: ' + without_folders(message))  # fmt: skip
    assert str(tmp_path / name_of(task, 2)) in message
    assert not (tmp_path / name_of(task, 4)).exists()
    assert (tmp_path / 'last_checkpoint').read_text() == str(tmp_path / name_of(task, 2))
    assert_only_finite_weights(tmp_path)


@needs_scaler
def test_bfloat16_of_amp_skips_no_gradient(run, tmp_path):
    """Without loss scaling, as `train.py --amp` sets it, a run ends as in float32."""
    runner = run('segmentation', 3, spoil_gradient, **{
        'optim_wrapper.type': 'mmconv2former.CpuAmpOptimWrapper',
        'optim_wrapper.loss_scale': dict(enabled=False),
    })  # fmt: skip
    with pytest.raises(NonFiniteError, match='iteration 4: loss is nan'):
        runner.train()
    assert not (tmp_path / 'iter_4.pth').exists()
    assert_only_finite_weights(tmp_path)


@pytest.mark.parametrize('phase', ['train', 'val'])
def test_images_of_any_failure_are_logged(phase, run, tmp_path, fault_report):
    runner = run('segmentation')

    def fail(module, inputs):
        is_in_phase = module.training == (phase == 'train')
        if is_in_phase and (phase == 'train' or runner.iter > 0):  # not in the dry run
            raise ZeroDivisionError('injected')

    runner.model.backbone.register_forward_pre_hook(fail)
    with pytest.raises(ZeroDivisionError):
        runner.train()
    (log,) = tmp_path.glob('*/*.log')
    line = log.read_text().splitlines()[-1]
    count = 2 if phase == 'train' else 1
    fault_report('Numbers', f'the network fails in an iteration ({phase})', 1, 1,
                 without_folders(line[line.index('The failing'):]))  # fmt: skip
    assert 'The failing batch has the images ' in line
    assert line.count('.jpg') == count


def test_paths_of_images():
    a, b = SimpleNamespace(img_path='a'), SimpleNamespace(img_path=Path('b'))
    assert image_paths(dict(inputs=[torch.ones(1)], data_samples=[a, b])) == ['a', 'b']
    assert image_paths(dict(data_samples=[[a, b], [a, b]])) == ['a', 'b']  # test-time augmentation
    for batch in (None, [], dict(inputs=1), dict(data_samples=[object()])):
        assert image_paths(batch) == []


# ---------------------------------------------------------------------------------- low precision
class Product(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.ones(4, 4))


@needs_scaler
def test_the_scaler_skips_an_overflow():
    model = Product()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    wrapper = CpuAmpOptimWrapper(dtype='float16', loss_scale=dict(init_scale=2.0**17),
                                 optimizer=optimizer)  # fmt: skip
    scales, weights = [], []
    for _ in range(3):
        with wrapper.optim_context(model):
            output = torch.ones(2, 4) @ model.weight
            assert output.dtype == torch.float16
            loss = output.float().sum() / 2
        wrapper.update_params(loss)
        scales.append(wrapper.loss_scaler.get_scale())
        weights.append(model.weight.detach().clone())
    # The gradient is 1; scaled by 2^17 and by 2^16 it is above float16's largest number, 65,504.
    assert scales == [2.0**16, 2.0**15, 2.0**15]
    assert torch.equal(weights[0], torch.ones(4, 4))
    assert torch.equal(weights[1], torch.ones(4, 4))
    assert torch.allclose(weights[2], torch.ones(4, 4) - 0.1)


@needs_scaler
def test_a_run_survives_overflows(run, tmp_path, fault_report):
    scale = 2.0**60
    runner = run('segmentation', **{
        'optim_wrapper.type': 'mmconv2former.CpuAmpOptimWrapper',
        'optim_wrapper.dtype': 'float16',
        'optim_wrapper.loss_scale': dict(init_scale=scale),
        'train_cfg.max_iters': 2,
    })  # fmt: skip
    runner.model.init_weights()
    before = {name: value.clone() for name, value in runner.model.named_parameters()}
    runner.train()
    after = read_checkpoint(str(tmp_path / 'iter_2.pth'))
    survived = after['optimizer']['loss_scaler']['scale'] == scale / 4 and all(
        torch.equal(after['state_dict'][name], value) for name, value in before.items()
    )
    fault_report('Numbers', 'gradients overflow in float16', 2, 2 * survived,
                 'nothing: no update, and the loss scale is halved')  # fmt: skip
    assert survived
    assert math.isfinite(scalars(tmp_path)['loss', 2])


@needs_scaler
def test_parts_that_compute_in_bfloat16(run):
    """All of a segmentor; backbone and neck of a detector, whose outputs are float32."""
    dtypes = {}
    for task, parts in {
        'segmentation': ['backbone.stages.3.0.mlp.fc1', 'decode_head.fpn_bottleneck.conv'],
        'detection': ['backbone.stages.3.0.mlp.fc1', 'neck.fpn_convs.0.conv', 'rpn_head.rpn_conv'],
    }.items():
        runner = run(task, **{'optim_wrapper.type': 'mmconv2former.CpuAmpOptimWrapper'})
        for part in parts:

            def note(module, inputs, output, key=(task, part)):
                dtypes[key] = output.dtype

            runner.model.get_submodule(part).register_forward_hook(note)
        loader = runner.build_dataloader(runner.cfg.train_dataloader, seed=0)
        wrapper = runner.build_optim_wrapper(runner.optim_wrapper)
        runner.model.train_step(next(iter(loader)), wrapper)
        assert 'forward' not in vars(runner.model.backbone)  # it is restored
    assert set(dtypes.values()) == {torch.bfloat16, torch.float32}
    assert [key for key, dtype in dtypes.items() if dtype == torch.float32] == [
        ('detection', 'rpn_head.rpn_conv')
    ]


# ------------------------------------------------------------------------ bfloat16 against float32
METRICS = {'detection': 'coco/bbox_mAP_50', 'segmentation': 'aAcc'}
PRECISIONS = {'float32': 'OptimWrapper', 'bfloat16': 'mmconv2former.CpuAmpOptimWrapper'}


def train(task, precision, seed, iterations, sample, work_dir, options=None):
    """Losses of all iterations, and the metric after each validation on held-out images."""
    by_epoch = task == 'detection'
    length = iterations // 20 if by_epoch else iterations  # 40 images in batches of two
    config = tiny_config(
        task, sample, work_dir, length, length, images=39 if by_epoch else 40,
        options={
            'optim_wrapper.type': PRECISIONS[precision],
            'model.backbone.drop_path_rate': 0.0,
            'randomness.seed': seed,
            'visualizer.name': str(work_dir),  # else it logs to the work dir of the first run
            'param_scheduler.0.end': 10,
            'param_scheduler.1.milestones' if by_epoch else 'param_scheduler.1.begin':
                [max(1, length * 3 // 4)] if by_epoch else 10,
            **(options or {}),
        },
    )  # fmt: skip
    runner = ReliableRunner.from_cfg(config)
    runner.train()
    values = scalars(work_dir)
    losses = [values['loss', i] for i in range(1, runner.iter + 1)]
    assert all(map(math.isfinite, losses))
    return losses, [value for (name, _), value in values.items() if name == METRICS[task]]


@pytest.mark.slow
@needs_scaler
@pytest.mark.parametrize('task', ['detection', 'segmentation'])
def test_bfloat16_follows_float32(task, sample, tmp_path, guarded):
    """With the same samples in the same order, the losses of 20 iterations fall together."""
    no_validation = {'train_cfg.val_begin': 1000}
    losses = {
        precision: train(task, precision, 0, 20, sample, tmp_path / precision, no_validation)[0]
        for precision in PRECISIONS
    }
    first, last = ({key: mean(values[part]) for key, values in losses.items()}
                   for part in (slice(0, 5), slice(-5, None)))  # fmt: skip
    assert losses['bfloat16'] != losses['float32']
    assert last['float32'] < 0.9 * first['float32']
    assert abs(last['bfloat16'] / last['float32'] - 1) < 0.05


@pytest.mark.slow
@needs_scaler
@pytest.mark.parametrize('task', TASKS)
def test_bfloat16_reaches_the_metric_of_float32(task, sample, tmp_path, guarded, fault_report):
    """Three seeds each; the means differ by no more than seeds of one precision do."""
    results = {precision: [] for precision in PRECISIONS}
    for precision, values in results.items():
        for seed in range(3):
            work_dir = tmp_path / f'{precision}_{seed}'
            _, (metric,) = train(task, precision, seed, 300, sample, work_dir)
            values.append(metric)
    expected, actual = mean(results['float32']), mean(results['bfloat16'])
    noise = max(max(values) - min(values) for values in results.values())
    survived = abs(actual - expected) <= max(noise, 0.05 * expected)
    shown = {
        precision: ', '.join(f'{value:.4g}' for value in values)
        for precision, values in results.items()
    }
    fault_report(
        'Numbers',
        f'300 iterations in bfloat16 ({task}), three seeds',
        3,
        3 * survived,
        f'{METRICS[task]} {shown["bfloat16"]}; in float32 {shown["float32"]}',
    )
    assert expected > 0
    assert survived
