"""What the runner fills in for the machine; settings of the config stay."""

import inspect

import pytest
import torch
from helpers.half_precision import needs_float16, needs_scaler
from helpers.runs import final, run
from helpers.tiny import tiny_config
from mmengine.optim import OptimWrapperDict, build_optim_wrapper
from mmengine.registry import init_default_scope
from torch import nn

from mmconv2former import ReliableRunner
from mmconv2former.engine import device_defaults
from mmconv2former.engine.device_defaults import (
    distributed_wrapper,
    keep_own_step,
    usable_loader,
    with_fused_step,
)

CUDA, CPU = torch.device('cuda'), torch.device('cpu')
has_fused_sgd = 'fused' in inspect.signature(torch.optim.SGD).parameters
# before that, torch has fused steps on CUDA only
needs_fused_on_cpu = pytest.mark.skipif(
    tuple(map(int, torch.__version__.split('.')[:2])) < (2, 4), reason='torch is older than 2.4'
)


# ----------------------------------------------------------------------------------- fused steps
@pytest.mark.parametrize(
    ('optimizer', 'device', 'expected'),
    [
        (dict(type='AdamW', lr=1.0), CUDA, True),
        (dict(type=torch.optim.AdamW, lr=1.0), CUDA, True),
        pytest.param(
            dict(type='SGD', lr=1.0), CUDA, True,
            marks=pytest.mark.skipif(not has_fused_sgd, reason='torch is too old'),
        ),
        (dict(type='AdamW', lr=1.0), CPU, None),
        (dict(type='RMSprop', lr=1.0), CUDA, None),  # has no such argument
        (dict(type='mmpretrain.Lamb', lr=1.0), CUDA, None),  # is not torch's
        (dict(type='NoOptimizer', lr=1.0), CUDA, None),
        (dict(type='Adagrad', lr=1.0), CUDA, None),  # fused on CPUs only, in some releases
        (dict(type='AdamW', lr=1.0, fused=False), CUDA, False),
        (dict(type='AdamW', lr=1.0, foreach=True), CUDA, None),
        (dict(type='AdamW', lr=1.0, differentiable=True), CUDA, None),
    ],
)  # fmt: skip
def test_fused_where_torch_has_it(optimizer, device, expected):
    settings = dict(type='OptimWrapper', optimizer=optimizer)
    before = repr(settings)
    found = with_fused_step(settings, device)
    assert found['optimizer'].get('fused') is expected
    assert repr(settings) == before
    assert (found is settings) == (expected is not True)


def test_built_optimizers_are_left_alone():
    optimizer = torch.optim.AdamW([nn.Parameter(torch.zeros(1))])
    for settings in (dict(optimizer=optimizer), dict(generator=object())):
        assert with_fused_step(settings, CUDA) is settings


HALF = {
    'type': 'mmconv2former.CpuAmpOptimWrapper', 'dtype': 'float16', 'loss_scale': 'dynamic',
    'clip_grad.max_norm': 1.0, 'accumulative_counts': 2,
}  # fmt: skip


@needs_fused_on_cpu
@needs_float16
@needs_scaler
def test_fused_steps_train_as_others_do(sample, tmp_path, monkeypatch):
    """With loss scaling, clipped and accumulated gradients."""
    options = {f'optim_wrapper.{key}': value for key, value in HALF.items()}
    options |= {'log_level': 'INFO', 'train_cfg.val_begin': 1000}
    weights = {}
    for name, devices in (('stock', ()), ('fused', ('cpu',))):
        monkeypatch.setattr(device_defaults, 'FUSED_ON', devices)
        config = tiny_config('segmentation', sample, tmp_path / name, 4, 4, options=options)
        runner = run(config)
        groups = runner.optim_wrapper.optimizer.param_groups
        assert {group['fused'] for group in groups} == {True if devices else None}
        (log,) = tmp_path.glob(f'{name}/*/*.log')
        assert log.read_text().count('in fused kernels (optimizer.fused=True)') == len(devices)
        weights[name] = final(tmp_path / name, 'iter_4.pth')['state_dict']
    torch.testing.assert_close(weights['fused'], weights['stock'], rtol=1e-3, atol=1e-4)
    start = ReliableRunner.from_cfg(config).model.state_dict()
    assert any(not torch.equal(start[name], value) for name, value in weights['fused'].items())


@needs_fused_on_cpu
def test_resumed_runs_step_as_their_own_machine_does(sample, tmp_path, monkeypatch):
    """torch would load `fused` from the checkpoint."""
    for length, is_fused in ((4, True), (6, False), (8, True)):
        monkeypatch.setattr(device_defaults, 'FUSED_ON', ('cpu',) if is_fused else ())
        options = {'train_cfg.val_begin': 1000}
        config = tiny_config('segmentation', sample, tmp_path, length, 2, options=options)
        runner = run(config, resume=True)
        groups = runner.optim_wrapper.optimizer.param_groups
        assert {group['fused'] for group in groups} == {True if is_fused else None}
        steps = {float(state['step']) for state in runner.optim_wrapper.optimizer.state.values()}
        assert steps == {float(length)}


def test_several_optimizers_keep_their_own_step():
    def wrapper(**options):
        settings = dict(optimizer=dict(type='SGD', lr=1.0, momentum=0.9, **options))
        return build_optim_wrapper(nn.Linear(1, 1), settings)

    both = OptimWrapperDict(a=wrapper(foreach=True), b=wrapper(foreach=False))
    saved = OptimWrapperDict(a=wrapper(), b=wrapper(foreach=True)).state_dict()
    keep_own_step(saved, both)
    both.load_state_dict(saved)
    assert both['a'].optimizer.param_groups[0]['foreach'] is True
    assert both['b'].optimizer.param_groups[0]['foreach'] is False


# ------------------------------------------------------------------------------ several processes
PLAIN = dict(type='MMDistributedDataParallel')


@pytest.mark.parametrize(
    ('settings', 'expected'),
    [
        (None, dict(PLAIN, broadcast_buffers=False, find_unused_parameters=True,
                    gradient_as_bucket_view=True)),
        ({}, dict(PLAIN, gradient_as_bucket_view=True)),
        (dict(PLAIN, static_graph=True),
         dict(PLAIN, static_graph=True, gradient_as_bucket_view=True)),
        (dict(gradient_as_bucket_view=False), dict(PLAIN, gradient_as_bucket_view=False)),
        (dict(type='MMFullyShardedDataParallel'), dict(type='MMFullyShardedDataParallel')),
    ],
)  # fmt: skip
def test_gradients_live_in_their_buckets(settings, expected):
    before = repr(settings)
    assert distributed_wrapper(settings, find_unused_parameters=True) == expected
    assert repr(settings) == before


# ------------------------------------------------------------------------------------ data loaders
WORKERS = dict(persistent_workers=True, prefetch_factor=4)


@pytest.mark.parametrize(
    ('settings', 'device', 'expected'),
    [
        (dict(num_workers=0, **WORKERS), 'cuda', dict(num_workers=0)),
        (WORKERS, 'cuda', {}),
        (dict(num_workers=1, **WORKERS), 'cuda', dict(num_workers=1, **WORKERS)),
        (dict(num_workers=1, pin_memory=True), 'cuda', dict(num_workers=1, pin_memory=True)),
        (dict(num_workers=1, pin_memory=True), 'cpu', dict(num_workers=1)),
    ],
)
def test_loaders_get_what_can_be_had(settings, device, expected, monkeypatch):
    monkeypatch.setattr(device_defaults, 'get_device', lambda: device)
    before = dict(settings)
    assert usable_loader(settings) == expected
    assert settings == before


def test_no_workers_is_one_option(sample, tmp_path, recwarn):
    """The recipes' `persistent_workers` and `pin_memory` need no change."""
    settings = dict(num_workers=0, persistent_workers=True, pin_memory=True)
    options = {f'train_dataloader.{key}': value for key, value in settings.items()}
    config = tiny_config('segmentation', sample, tmp_path, 1, 1, options=options)
    init_default_scope('mmseg')
    loader = ReliableRunner.build_dataloader(config.train_dataloader, seed=0)
    assert not loader.persistent_workers
    assert next(iter(loader))['inputs']
    assert not [warning for warning in recwarn if 'pin_memory' in str(warning.message)]


# ------------------------------------------------------------------------------------------ on GPUs
@pytest.mark.gpu
@pytest.mark.parametrize('dtype', ['bfloat16', 'float16'])
def test_fused_steps_on_a_gpu(dtype):
    """With clipped gradients and, in float16, loss scaling; from a checkpoint of the other step."""
    results = []
    for is_fused in (True, False):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(16, 32), nn.GELU(), nn.Linear(32, 4)).cuda()
        settings = dict(
            type='mmconv2former.ReliableAmpOptimWrapper',
            dtype=dtype,
            loss_scale='dynamic' if dtype == 'float16' else dict(enabled=False),
            clip_grad=dict(max_norm=1.0),
            optimizer=dict(type='AdamW', lr=1e-2),
        )
        saved = None
        for step_is_fused in (is_fused, not is_fused):
            chosen = with_fused_step(settings, CUDA) if step_is_fused else settings
            wrapper = build_optim_wrapper(model, chosen)
            if saved is not None:
                keep_own_step(saved, wrapper)
                wrapper.load_state_dict(saved)
            assert wrapper.optimizer.param_groups[0]['fused'] is (True if step_is_fused else None)
            for index in range(3):
                torch.manual_seed(index)
                with wrapper.optim_context(model):
                    loss = model(torch.randn(8, 16, device='cuda')).square().mean()
                wrapper.update_params(loss)
            saved = wrapper.state_dict()
        results.append([parameter.detach().clone() for parameter in model.parameters()])
    torch.testing.assert_close(*results, rtol=1e-3, atol=1e-4)
