"""`train.py --amp`: which format it takes on which device, and resuming in another one.

No GPU here: torch is told of one, up to where the runner would be built.
"""

import os
import subprocess
import sys
from functools import partial
from unittest.mock import Mock

import pytest
import torch
from helpers import ROOT
from helpers.commands import parse
from helpers.half_precision import needs_float16, needs_scaler
from helpers.in_process import SEGMENTATION, load_tool, refusal_of, with_data, write_tiny_config
from helpers.tiny import WITHOUT_WORKERS
from mmengine.optim import AmpOptimWrapper, OptimWrapper

from mmconv2former.checkpoint.reading import read_checkpoint
from mmconv2former.engine.amp import CpuAmpOptimWrapper, ReliableAmpOptimWrapper

pytestmark = pytest.mark.usefixtures('in_process')

OFF = dict(enabled=False)
CPU = 'mmconv2former.CpuAmpOptimWrapper'
GPU = 'mmconv2former.ReliableAmpOptimWrapper'
GPUS = {'A100': (8, 0), 'H100': (9, 0), 'V100': (7, 0), 'T4': (7, 5)}  # compute capability


@pytest.fixture
def use_device(monkeypatch):
    """Makes `train.py` see one of GPUS, 'cpu' or another device of mmengine."""

    def use(name):
        monkeypatch.setattr(load_tool('train'), 'get_device',
                            lambda: 'cuda' if name in GPUS else name)  # fmt: skip
        if name in GPUS:
            is_new = GPUS[name] >= (8, 0)
            fakes = {
                'get_device_name': lambda device=None: f'NVIDIA {name}',
                'get_device_capability': lambda device=None: GPUS[name],
                # As torch answers: by default emulation counts.
                'is_bf16_supported': lambda including_emulation=True: including_emulation or is_new,
            }
            for function, fake in fakes.items():
                monkeypatch.setattr(torch.cuda, function, fake)

    return use


@pytest.fixture
def configure(monkeypatch, tmp_path):
    """The `optim_wrapper` that `train.py` makes of a command line, and what it logs."""
    train = load_tool('train')

    def run(*words):
        configs, runner = [], Mock()
        monkeypatch.setattr(train, 'check_files', lambda *args, **kwargs: None)
        monkeypatch.setattr(train, 'build_runner', lambda config: configs.append(config) or runner)
        train.main([*map(str, words), '--work-dir', str(tmp_path)])
        logged = [call.args[0] for call in runner.logger.info.call_args_list]
        return configs[0].optim_wrapper, logged

    return run


CHOICES = [
    # device, --amp and the config's own; dtype and loss_scale, with what the log says
    ('A100', ['--amp'], [], 'bfloat16', OFF, 'bfloat16 (the default on NVIDIA A100)'),
    ('H100', ['--amp', 'auto'], [], 'bfloat16', OFF, 'loss scaling: off'),
    ('V100', ['--amp'], [], 'float16', 'dynamic', 'on NVIDIA V100, which has no bfloat16'),
    ('T4', ['--amp'], [], 'float16', 'dynamic', 'loss scaling: dynamic'),
    ('cpu', ['--amp'], [], 'bfloat16', OFF, 'bfloat16 (the default on cpu)'),
    ('npu', ['--amp'], [], 'float16', 'dynamic', 'float16 (the default on npu)'),
    ('A100', ['--amp', 'float16'], [], 'float16', 'dynamic', 'float16 (--amp float16)'),
    ('A100', ['--amp', 'bfloat16'], [], 'bfloat16', OFF, 'bfloat16 (--amp bfloat16)'),
    ('V100', ['--amp', 'float16'], [], 'float16', 'dynamic', 'float16 (--amp float16)'),
    ('cpu', ['--amp', 'float16'], [], 'float16', 'dynamic', 'float16 (--amp float16)'),
    ('cpu', ['--amp=bfloat16'], [], 'bfloat16', OFF, 'bfloat16 (--amp bfloat16)'),
    # The config's own stay without a format on the command line.
    ('A100', ['--amp'], ['dtype=float16'], 'float16', 'dynamic', '(optim_wrapper.dtype=float16)'),
    ('A100', ['--amp'], ['loss_scale=8.0'], 'bfloat16', 8.0, 'loss scaling: 8.0'),
    ('A100', ['--amp'], ['dtype=float16', 'loss_scale=8.0'], 'float16', 8.0, ': 8.0'),
    ('cpu', ['--amp'], ['dtype=bfloat16'], 'bfloat16', OFF, '(optim_wrapper.dtype=bfloat16)'),
    # One on the command line wins; a scale for the other format goes.
    ('A100', ['--amp', 'bfloat16'], ['dtype=float16', 'loss_scale=8.0'], 'bfloat16', OFF, ''),
    ('A100', ['--amp', 'float16'], ['dtype=bfloat16', 'loss_scale.enabled=False'],
     'float16', 'dynamic', ''),
    ('A100', ['--amp', 'float16'], ['dtype=float16', 'loss_scale=8.0'], 'float16', 8.0, ''),
    ('A100', ['--amp', 'float16'], ['loss_scale=8.0'], 'float16', 8.0, ''),
    ('V100', ['--amp', 'float16'], ['dtype=bfloat16'], 'float16', 'dynamic', ''),
    # Types that mixed precision has already, also in the config that an earlier run saved.
    ('A100', ['--amp'], ['type=AmpOptimWrapper'], 'bfloat16', OFF, ''),
    ('A100', ['--amp'], [f'type={CPU}'], 'bfloat16', OFF, ''),
    ('cpu', ['--amp'], [f'type={GPU}'], 'bfloat16', OFF, ''),
]  # fmt: skip


@pytest.mark.parametrize(
    ('device', 'amp', 'own', 'dtype', 'loss_scale', 'reason'),
    CHOICES,
    ids=[' '.join([case[0], *case[1], *case[2]]) for case in CHOICES],
)
def test_format(device, amp, own, dtype, loss_scale, reason, use_device, configure):
    use_device(device)
    options = [f'optim_wrapper.{option}' for option in own]
    settings, logged = configure(SEGMENTATION, *amp, *(['--cfg-options', *options] if own else []))
    assert settings.type == (CPU if device == 'cpu' else GPU)
    assert settings.dtype == dtype
    assert settings.loss_scale == loss_scale
    (line,) = logged
    assert line.startswith(f'Mixed precision: {dtype} (')
    assert reason in line


def test_without_amp_nothing_changes(use_device, configure):
    use_device('A100')
    settings, logged = configure(SEGMENTATION)
    assert settings.get('type', 'OptimWrapper') == 'OptimWrapper'
    assert not {'dtype', 'loss_scale'} & set(settings)
    assert logged == []


@pytest.mark.parametrize(
    ('amp', 'options', 'source'),
    [
        (['--amp', 'bfloat16'], [], '--amp bfloat16'),
        (
            ['--amp'],
            ['--cfg-options', 'optim_wrapper.dtype=bfloat16'],
            'optim_wrapper.dtype=bfloat16',
        ),
    ],
)
def test_gpu_without_bfloat16(amp, options, source, use_device, no_data):
    use_device('T4')
    assert refusal_of('train', SEGMENTATION, *amp, *options) == (
        f'error: {source}: NVIDIA T4 has no bfloat16, only float16 (bfloat16 needs compute '
        'capability 8.0 or later); use --amp float16'
    )


@pytest.mark.parametrize('device', ['A100', 'cpu'])
@pytest.mark.parametrize('type_', ['ApexOptimWrapper', 'DeepSpeedOptimWrapper'])
def test_other_wrappers_are_refused(device, type_, use_device, no_data):
    use_device(device)
    options = ['--cfg-options', f'optim_wrapper.type={type_}']
    assert refusal_of('train', SEGMENTATION, '--amp', 'float16', *options) == (
        f'error: --amp needs optim_wrapper.type OptimWrapper or AmpOptimWrapper, got {type_}'
    )


# ----------------------------------------------------------------------------------- command line
@pytest.mark.parametrize(
    ('words', 'format_'),
    [
        (['--amp', 'CONFIG'], 'auto'),
        (['CONFIG', '--amp'], 'auto'),
        (['--amp', 'float16', 'CONFIG'], 'float16'),
        (['CONFIG', '--amp', 'float16'], 'float16'),
        (['--amp=float16', 'CONFIG'], 'float16'),
        (['--amp', '--auto-scale-lr', 'CONFIG'], 'auto'),
        (['--resume', '--amp', 'CONFIG'], 'auto'),
        (['--cfg-options', 'a=1', '--amp', 'CONFIG'], 'auto'),
        (['CONFIG'], None),
    ],
)
def test_order_of_arguments(words, format_):
    config = 'configs/segmentation/upernet_conv2former_n.py'
    arguments = parse(['tools/train.py', *(config if word == 'CONFIG' else word for word in words)])
    assert arguments.config == config
    assert arguments.amp == format_


@pytest.mark.parametrize('words', [['CONFIG', '--amp', 'fp16'], ['--amp', 'bf16', 'CONFIG']])
def test_unknown_format(words, capsys):
    with pytest.raises(SystemExit):
        parse(['tools/train.py', *words])
    said = capsys.readouterr().err
    assert 'argument --amp: invalid choice' in said
    for format_ in ('auto', 'bfloat16', 'float16'):
        assert format_ in said


@pytest.mark.parametrize(
    ('amp', 'format_'), [(['--amp'], 'auto'), (['--amp', 'float16'], 'float16')]
)
@pytest.mark.parametrize(
    ('script', 'before', 'after', 'launcher'),
    [('dist_train', [], ['2'], 'pytorch'), ('slurm_train', ['gpu', 'job'], [], 'slurm')],
)
def test_scripts_hand_it_on(script, before, after, launcher, amp, format_, tmp_path):
    for program in ('python', 'srun'):
        path = tmp_path / program
        path.write_text('#!/bin/sh\nprintf "%s\\n" "$@"\n')
        path.chmod(0o755)
    result = subprocess.run(
        [f'tools/{script}.sh', *before, 'config.py', *after, *amp],
        cwd=ROOT,
        env=os.environ | {'PATH': f'{tmp_path}:{os.environ["PATH"]}'},
        capture_output=True,
        text=True,
        check=True,
    )
    words = result.stdout.splitlines()
    arguments = parse(['tools/train.py', *words[words.index('tools/train.py') + 1 :]])
    assert (arguments.config, arguments.amp) == ('config.py', format_)
    assert arguments.launcher == launcher


# ------------------------------------------------------------------------------------------ resume
@needs_float16
def test_resume_in_another_format(sample, tmp_path):
    """bfloat16, float16, bfloat16 again, float32: one run of real checkpoints on the CPU."""
    config = write_tiny_config(tmp_path / 'tiny.py')

    def train(amp, end, *resume):
        options = [*WITHOUT_WORKERS, f'train_cfg.max_iters={end}', 'train_cfg.val_begin=99']
        arguments = ['train', config, *amp, *resume]
        assert refusal_of(*with_data(arguments, sample, tmp_path / 'work', *options)) == ''
        optimizer = read_checkpoint(str(tmp_path / f'work/iter_{end}.pth'))['optimizer']
        log = max(tmp_path.glob('work/*/*.log'), key=os.path.getmtime).read_text()
        return optimizer.get('loss_scaler'), log

    scaler, log = train(['--amp'], 2)
    assert scaler == {}
    assert 'Mixed precision: bfloat16 (the default on cpu); loss scaling: off' in log

    scaler, log = train(['--amp', 'float16'], 4, '--resume')
    assert scaler['scale'] > 1
    assert 'Mixed precision: float16 (--amp float16); loss scaling: dynamic' in log
    assert 'No loss scale in the checkpoint; starting with 65536.' in log
    assert 'resumed epoch: 0, iter: 2' in log

    scaler, log = train(['--amp'], 6, '--resume')
    assert scaler == {}
    assert 'Loss scaling is off; ignoring the loss scale of the checkpoint.' in log
    assert 'resumed epoch: 0, iter: 4' in log

    scaler, log = train([], 8, '--resume', tmp_path / 'work/iter_4.pth')
    assert scaler is None
    assert 'Mixed precision' not in log
    assert 'resumed epoch: 0, iter: 4' in log


def make_wrapper(cls, **arguments):
    weight = torch.nn.Parameter(torch.ones(3))
    wrapper = cls(optimizer=torch.optim.AdamW([weight], lr=0.1), **arguments)
    wrapper.update_params((weight * 0.5).sum())
    return wrapper


STATES = {
    'float32': (OptimWrapper, {}),
    'scaled': (CpuAmpOptimWrapper, dict(loss_scale=256.0)),
    'unscaled': (CpuAmpOptimWrapper, dict(loss_scale=OFF)),
}


@needs_scaler
@pytest.mark.parametrize('saved', STATES)
@pytest.mark.parametrize('cls', [CpuAmpOptimWrapper, ReliableAmpOptimWrapper])
@pytest.mark.parametrize(('loss_scale', 'fresh'), [('dynamic', 2.0**16), (OFF, 1.0)])
def test_optimizer_and_scale_are_loaded(cls, loss_scale, fresh, saved, monkeypatch):
    """The optimizer resumes with or without a loss scale; a scale in use comes from the file."""
    module = sys.modules[AmpOptimWrapper.__module__]
    monkeypatch.setattr(module, 'is_cuda_available', lambda: True)
    monkeypatch.setattr(module, 'GradScaler', partial(torch.amp.GradScaler, 'cpu'))
    messages = []
    monkeypatch.setattr(
        'mmconv2former.engine.amp.print_log', lambda text, logger: messages.append(text)
    )
    kind, arguments = STATES[saved]
    state = make_wrapper(kind, **arguments).state_dict()
    expected = state['state'][0]['exp_avg'].clone()

    wrapper = make_wrapper(cls, loss_scale=loss_scale)
    wrapper.optimizer.state.clear()
    wrapper.load_state_dict(state)
    assert torch.equal(wrapper.state_dict()['state'][0]['exp_avg'], expected)
    scale = 256.0 if saved == 'scaled' and loss_scale == 'dynamic' else fresh
    assert wrapper.loss_scaler.get_scale() == scale
    changes = (saved == 'scaled') != (loss_scale == 'dynamic')
    assert len(messages) == changes
