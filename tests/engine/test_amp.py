"""`train.py --amp`: which format it takes on which device, and resuming in another one.

Without a GPU: torch is told that there is one, up to where the runner would be built.
"""

import sys
from functools import partial

import pytest
import torch
from helpers.commands import parse
from helpers.half_precision import needs_float16, needs_scaler
from helpers.in_process import SEGMENTATION, load_tool, refusal_of, with_data, write_tiny_config
from helpers.tiny import WITHOUT_WORKERS
from mmengine.config import Config
from mmengine.optim import AmpOptimWrapper, OptimWrapper

from mmconv2former.checkpoint.reading import read_checkpoint
from mmconv2former.engine.amp import CpuAmpOptimWrapper, ReliableAmpOptimWrapper

OFF = dict(enabled=False)
CPU = 'mmconv2former.CpuAmpOptimWrapper'
GPU = 'mmconv2former.ReliableAmpOptimWrapper'
GPUS = {'A100': (8, 0), 'V100': (7, 0), 'T4': (7, 5)}  # compute capability


@pytest.fixture
def set_precision(monkeypatch):
    """`train.py`'s function of that name, on a device and for settings of `optim_wrapper`.

    The device is one of GPUS, 'cpu' or another device of mmengine.
    """
    train = load_tool('train')

    def run(device, format_, **own):
        monkeypatch.setattr(train, 'get_device', lambda: 'cuda' if device in GPUS else device)
        monkeypatch.setattr(torch.cuda, 'get_device_name', lambda: f'NVIDIA {device}')
        monkeypatch.setattr(torch.cuda, 'get_device_capability', lambda: GPUS[device])
        config = Config(dict(optim_wrapper=own))
        return config.optim_wrapper, train.set_precision(config, format_)

    return run


CHOICES = [
    # device, --amp, the config's own; dtype, loss scale, words of the log
    ('A100', 'auto', {}, 'bfloat16', OFF, 'bfloat16 (the default on NVIDIA A100)'),
    ('V100', 'auto', {}, 'float16', 'dynamic', 'on NVIDIA V100, which has no bfloat16'),
    ('cpu', 'auto', {}, 'bfloat16', OFF, 'bfloat16 (the default on cpu)'),
    ('npu', 'auto', {}, 'float16', 'dynamic', 'float16 (the default on npu)'),
    ('A100', 'float16', {}, 'float16', 'dynamic', 'float16 (--amp float16)'),
    ('A100', 'bfloat16', {}, 'bfloat16', OFF, 'bfloat16 (--amp bfloat16)'),
    ('cpu', 'float16', {}, 'float16', 'dynamic', 'float16 (--amp float16)'),
    # The config's own stay without a format on the command line.
    ('A100', 'auto', dict(dtype='float16'), 'float16', 'dynamic', '(optim_wrapper.dtype=float16)'),
    ('A100', 'auto', dict(loss_scale=8.0), 'bfloat16', 8.0, 'loss scaling: 8.0'),
    # One on the command line wins, and drops a loss scale of the other format.
    ('A100', 'bfloat16', dict(dtype='float16', loss_scale=8.0), 'bfloat16', OFF, ''),
    ('A100', 'float16', dict(dtype='bfloat16', loss_scale=OFF), 'float16', 'dynamic', ''),
    ('A100', 'float16', dict(dtype='float16', loss_scale=8.0), 'float16', 8.0, ''),
    ('A100', 'float16', dict(loss_scale=8.0), 'float16', 8.0, ''),
    ('A100', 'bfloat16', dict(type='AmpOptimWrapper', loss_scale=8.0), 'bfloat16', OFF, ''),
    ('A100', 'float16', dict(type='AmpOptimWrapper', loss_scale=8.0), 'float16', 8.0, ''),
    ('A100', 'auto', dict(type=OptimWrapper), 'bfloat16', OFF, ''),
    # Types that have mixed precision already, e.g. in the config that an earlier run saved.
    ('A100', 'auto', dict(type='AmpOptimWrapper'), 'bfloat16', OFF, ''),
    ('A100', 'auto', dict(type=CPU), 'bfloat16', OFF, ''),
    ('cpu', 'auto', dict(type=GPU), 'bfloat16', OFF, ''),
]


@pytest.mark.parametrize(('device', 'format_', 'own', 'dtype', 'loss_scale', 'reason'), CHOICES)
def test_format(device, format_, own, dtype, loss_scale, reason, set_precision):
    settings, line = set_precision(device, format_, **own)
    assert settings.type == (CPU if device == 'cpu' else GPU)
    assert settings.dtype == dtype
    assert settings.loss_scale == loss_scale
    assert line.startswith(f'Mixed precision: {dtype} (')
    assert reason in line


@pytest.mark.parametrize(
    ('format_', 'own', 'source'),
    [
        ('bfloat16', {}, '--amp bfloat16'),
        ('auto', dict(dtype='bfloat16'), 'optim_wrapper.dtype=bfloat16'),
    ],
)
def test_gpu_without_bfloat16(format_, own, source, set_precision):
    with pytest.raises(SystemExit) as stop:
        set_precision('T4', format_, **own)
    assert str(stop.value) == (
        f'error: {source}: NVIDIA T4 has no bfloat16, only float16 (bfloat16 needs compute '
        'capability 8.0 or later); use --amp float16'
    )


def test_other_wrappers_are_refused(no_data):
    options = ['--cfg-options', 'optim_wrapper.type=ApexOptimWrapper']
    assert refusal_of('train', SEGMENTATION, '--amp', 'float16', *options) == (
        'error: --amp needs optim_wrapper.type OptimWrapper or AmpOptimWrapper, got '
        'ApexOptimWrapper'
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


def test_unknown_format(capsys):
    with pytest.raises(SystemExit):
        parse(['tools/train.py', 'CONFIG', '--amp', 'fp16'])
    said = capsys.readouterr().err
    assert 'argument --amp: invalid choice' in said
    assert all(format_ in said for format_ in ('auto', 'bfloat16', 'float16'))


# ------------------------------------------------------------------------------------------ resume
@needs_float16
def test_resume_in_another_format(sample, tmp_path):
    """bfloat16, float16, bfloat16 again, float32: one run of real checkpoints on the CPU."""
    config = write_tiny_config(tmp_path / 'tiny.py')

    def logs():
        return ''.join(path.read_text() for path in sorted(tmp_path.glob('work/*/*.log')))

    def train(amp, end, *resume):
        before = logs()  # runs that start in the same second share a file
        options = [*WITHOUT_WORKERS, f'train_cfg.max_iters={end}', 'train_cfg.val_begin=99']
        arguments = ['train', config, *amp, *resume]
        assert refusal_of(*with_data(arguments, sample, tmp_path / 'work', *options)) == ''
        optimizer = read_checkpoint(str(tmp_path / f'work/iter_{end}.pth'))['optimizer']
        return optimizer.get('loss_scaler'), logs().removeprefix(before)

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


@needs_scaler
@pytest.mark.parametrize(
    ('arguments', 'words'),
    [
        (dict(dtype='float8'), "dtype must be one of .*, got 'float8'"),
        (dict(loss_scale='static'), "'static'"),
    ],
)
def test_bad_arguments(arguments, words):
    with pytest.raises(ValueError, match=words):
        make_wrapper(CpuAmpOptimWrapper, **arguments)
