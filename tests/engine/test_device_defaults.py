"""What the runner fills in for the machine: a config's own settings stay."""

import inspect

import pytest
import torch
from helpers.half_precision import needs_float16, needs_scaler
from helpers.runs import final, run
from helpers.tiny import tiny_config
from make_tables import recipes
from mmengine.config import Config
from mmengine.optim import OptimWrapperDict, build_optim_wrapper
from mmengine.registry import MODELS, init_default_scope
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
# torch before 2.4 has fused steps on CUDA alone
needs_fused_on_cpu = pytest.mark.skipif(
    tuple(map(int, torch.__version__.split('.')[:2])) < (2, 4), reason='torch is older than 2.4'
)


# ----------------------------------------------------------------------------------- fused steps
@pytest.mark.parametrize(
    ('optimizer', 'device', 'expected'),
    [
        (dict(type='AdamW', lr=1.0), CUDA, True),
        (dict(type='Adam', lr=1.0), CUDA, True),
        (dict(type=torch.optim.AdamW, lr=1.0), CUDA, True),
        pytest.param(
            dict(type='SGD', lr=1.0), CUDA, True,
            marks=pytest.mark.skipif(not has_fused_sgd, reason='torch is too old'),
        ),
        (dict(type='AdamW', lr=1.0), CPU, None),
        (dict(type='RMSprop', lr=1.0), CUDA, None),  # has no such argument
        (dict(type='mmpretrain.Lamb', lr=1.0), CUDA, None),  # is not torch's
        (dict(type='NoOptimizer', lr=1.0), CUDA, None),
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


def test_wrappers_that_are_built_already_are_left_alone():
    optimizer = torch.optim.AdamW([nn.Parameter(torch.zeros(1))])
    for settings in (dict(optimizer=optimizer), dict(generator=object())):
        assert with_fused_step(settings, CUDA) is settings


@pytest.fixture
def fused_on_cpu(monkeypatch):
    """The runner's choice on a GPU, made on this CPU."""
    monkeypatch.setattr(device_defaults, 'FUSED_ON', ('cpu',))


HALF = {
    'type': 'mmconv2former.CpuAmpOptimWrapper', 'dtype': 'float16', 'loss_scale': 'dynamic',
    'clip_grad.max_norm': 1.0, 'accumulative_counts': 2,
}  # fmt: skip


@needs_fused_on_cpu
@pytest.mark.parametrize(
    'settings', [{}, pytest.param(HALF, marks=[needs_float16, needs_scaler])], ids=['plain', 'half']
)
def test_fused_steps_train_as_others_do(settings, sample, tmp_path, monkeypatch):
    """Also with loss scaling, clipped and accumulated gradients."""
    options = {f'optim_wrapper.{key}': value for key, value in settings.items()}
    weights = {}
    for name, devices in (('stock', ()), ('fused', ('cpu',))):
        monkeypatch.setattr(device_defaults, 'FUSED_ON', devices)
        config = tiny_config('segmentation', sample, tmp_path / name, 4, 4, options=options)
        runner = run(config)
        groups = runner.optim_wrapper.optimizer.param_groups
        assert {group['fused'] for group in groups} == {True if devices else None}
        weights[name] = final(tmp_path / name, 'iter_4.pth')['state_dict']
    torch.testing.assert_close(weights['fused'], weights['stock'], rtol=1e-3, atol=1e-4)
    start = ReliableRunner.from_cfg(config).model.state_dict()
    assert any(not torch.equal(start[name], value) for name, value in weights['fused'].items())


def test_the_log_says_so(fused_on_cpu, sample, tmp_path):
    run(tiny_config('segmentation', sample, tmp_path, 4, 4, options={'log_level': 'INFO'}))
    (log,) = tmp_path.glob('*/*.log')
    assert log.read_text().count('optimizer steps in fused kernels (optimizer.fused=True)') == 1


@needs_fused_on_cpu
@pytest.mark.parametrize('first', [True, False], ids=['fused first', 'fused second'])
def test_resumed_run_steps_as_its_own_machine_does(first, sample, tmp_path, monkeypatch):
    """torch takes over `fused` from a checkpoint."""
    for length, is_fused in ((4, first), (6, not first)):
        monkeypatch.setattr(device_defaults, 'FUSED_ON', ('cpu',) if is_fused else ())
        config = tiny_config('segmentation', sample, tmp_path, length, 2)
        runner = run(config, resume=True)
        groups = runner.optim_wrapper.optimizer.param_groups
        assert {group['fused'] for group in groups} == {True if is_fused else None}
    assert runner.iter == 6
    steps = {float(state['step']) for state in runner.optim_wrapper.optimizer.state.values()}
    assert steps == {6.0}


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


# Two groups, with and without weight decay, for each layer or stage of the decay.
GROUPS = {
    'mask_rcnn_conv2former_n': 14,
    'mask_rcnn_conv2former_t': 18,
    'cascade_mask_rcnn_conv2former_t': 18,
    'cascade_mask_rcnn_conv2former_l_in22k': 28,
    'upernet_conv2former_t': 12,
    'upernet_conv2former_l_in22k': 12,
    'conv2former_t_in1k': 2,
    'conv2former_l_in22k_finetune_in1k': 28,
}


@pytest.mark.parametrize('name', GROUPS)
def test_no_two_groups_of_a_recipe_are_alike(name):
    """A fused step launches kernels for each group."""
    config = Config.fromfile(recipes()[name])
    init_default_scope(config.default_scope)
    with torch.device('meta'):
        model = MODELS.build(config.model)
    groups = build_optim_wrapper(model, config.optim_wrapper).optimizer.param_groups
    assert len({(group['lr'], group['weight_decay']) for group in groups}) == len(groups)
    assert len(groups) == GROUPS[name]


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


@pytest.mark.parametrize('task', ['detection', 'segmentation'])
def test_no_workers_is_one_option(task, sample, tmp_path, recwarn):
    """`persistent_workers`, which the recipes have, goes by itself, and torch has no complaint."""
    options = {
        f'{part}_dataloader.{option}': value
        for part in ('train', 'val')
        for option, value in dict(num_workers=0, persistent_workers=True, pin_memory=True).items()
    }
    config = tiny_config(task, sample, tmp_path, 1, 1, options=options)
    runner = ReliableRunner.from_cfg(config)
    for settings in (config.train_dataloader, config.val_dataloader):
        loader = runner.build_dataloader(settings, seed=0)
        assert not loader.persistent_workers
        assert loader.num_workers == 0
        assert next(iter(loader))['inputs']
    assert not [warning for warning in recwarn if 'pin_memory' in str(warning.message)]


@pytest.mark.parametrize('name', GROUPS)
def test_loaders_of_recipes_keep_their_workers(name):
    config = Config.fromfile(recipes()[name])
    loaders = [config[f'{part}_dataloader'] for part in ('train', 'val', 'test')]
    for settings in filter(None, loaders):
        assert settings.num_workers >= 2
        assert settings.persistent_workers
        assert settings.pin_memory


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
