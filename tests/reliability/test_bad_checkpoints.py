"""Checkpoints that are damaged, hostile or of another model, through every way into the tools."""

import socket
import time
from contextlib import nullcontext

import pytest
import torch
from helpers.checkpoints import CALLED, write_call, write_getattr_chain
from helpers.in_process import refusal_of, with_data, write_tiny_config
from mmengine.config import Config
from mmengine.optim import build_optim_wrapper
from mmengine.registry import MODELS, init_default_scope

from mmconv2former.checkpoint import reading

AREA = 'Checkpoints'
pytestmark = pytest.mark.usefixtures('in_process')


@pytest.fixture
def tiny(tmp_path):
    return write_tiny_config(tmp_path / 'tiny.py')


def content_of_a_run(config_file, **options):
    """The content of a checkpoint after four iterations."""
    config = Config.fromfile(config_file)
    config.merge_from_dict(options)
    init_default_scope(config.default_scope)
    model = MODELS.build(config.model)
    optimizer = build_optim_wrapper(model, config.optim_wrapper)
    hub = dict(log_scalars={}, runtime_info={}, resumed_keys={})
    return dict(
        meta=dict(epoch=0, iter=4),
        state_dict=model.state_dict(),
        optimizer=optimizer.state_dict(),
        param_schedulers=[],
        message_hub=hub,
    )


def of_other_network(path, **changes):
    def write(tmp_path):
        config = write_tiny_config(tmp_path / 'other.py', **changes)
        torch.save(content_of_a_run(config), path)

    return write


def of_resnet(names):
    """A ResNet's first layers, with prefixes as in a classifier or a detector."""
    state = {
        f'{name}{layer}': torch.ones(8, 3, 3, 3)
        for name in names
        for layer in ('conv1.weight', 'layer1.0.conv1.weight')
    }
    return dict(state_dict=state, **RUN)


RUN = dict(
    meta=dict(epoch=0, iter=4),
    optimizer=dict(state={}, param_groups=[]),
    message_hub=dict(log_scalars={}, runtime_info={}, resumed_keys={}),
)
CANNOT = 'cannot be read: '
# What is written, what every way says about it, and what the converter says if it differs.
FAULTS = {
    'text file': (lambda path, _: path.write_text('not weights\n' * 99), CANNOT, None),
    'web page': (
        lambda path, _: path.write_text('\n<!DOCTYPE html><title>Sign in</title>'),
        'file is a web page',
        None,
    ),
    'empty file': (lambda path, _: path.touch(), 'file is empty', None),
    'truncated file': (
        lambda path, good: path.write_bytes(good.read_bytes()[: good.stat().st_size // 2]),
        'file is truncated (incomplete download?)',
        None,
    ),
    'pickle that calls a function': (
        lambda path, good: write_call(path, path.with_name('trace'), torch.load(good)),
        f'file contains {CALLED}, which is not plain data',
        None,
    ),
    'pickle that reaches exec by getattr': (
        lambda path, good: write_getattr_chain(path, path.with_name('trace'), torch.load(good)),
        'file contains builtins.getattr, which is not plain data',
        None,
    ),
    'folder': (lambda path, _: path.mkdir(), 'is a folder', None),
    'no file': (lambda path, _: None, 'does not exist', None),
    'a ResNet': (
        lambda path, _: torch.save(of_resnet(['']), path),
        'names missing',
        'is not a Conv2Former',
    ),
    'a detector with a ResNet': (
        lambda path, _: torch.save(of_resnet(['backbone.', 'neck.']), path),
        'names missing',
        'is not a Conv2Former',
    ),
    'weights of a deeper network of the same widths': (
        lambda path, _: of_other_network(path, depths=(1, 1, 3, 1))(path.parent),
        'depths is (1, 1, 3, 1) in the file, (1, 1, 2, 1) in the model',
        '--arch tiny was expected',
    ),
    'weights of kernel size 7 for 11': (
        lambda path, _: of_other_network(path, kernel=7)(path.parent),
        'kernel_size is (7, 7, 7, 7) in the file, (5, 5, 5, 5) in the model',
        '--arch tiny was expected',
    ),
    'a dict of no tensors': (
        lambda path, _: torch.save(dict(RUN, state_dict={'a': 1}), path),
        'contains no tensors',
        None,
    ),
    'a tensor': (lambda path, _: torch.save(torch.ones(3), path), 'must hold a', None),
}


def refusals(path, sample, tmp_path):
    """What the tools say about a checkpoint, by every way in which they read one."""
    config = write_tiny_config(tmp_path / 'tiny.py')
    init_cfg = dict(type='Pretrained', checkpoint=str(path))
    pretrained = write_tiny_config(tmp_path / 'pretrained.py', init_cfg=init_cfg)
    work_dir = tmp_path / 'work'
    resume = with_data(['train', config, '--resume', path], sample, work_dir)
    load_from = with_data(['train', config], sample, work_dir, f'load_from={path}')
    init_cfg = with_data(['train', pretrained], sample, work_dir)
    test = with_data(['test', config, path], sample, work_dir)
    convert = ['convert_weights', path, tmp_path / 'out.pth', '--arch', 'tiny']
    return {
        '--resume': refusal_of(*resume),
        'load_from': refusal_of(*load_from),
        'init_cfg': refusal_of(*init_cfg),
        'test.py': refusal_of(*test),
        'convert_weights.py': refusal_of(*convert),
    }


@pytest.mark.parametrize('fault', FAULTS)
def test_refused_by_every_way_in_one_line(fault, sample, tmp_path, no_data, fault_report):
    write, message, message_of_converter = FAULTS[fault]
    good, path = tmp_path / 'good.pth', tmp_path / 'bad.pth'
    torch.save(content_of_a_run(write_tiny_config(tmp_path / 'good.py')), good)
    write(path, good)
    said = refusals(path, sample, tmp_path)
    expected = dict.fromkeys(said, message)
    if message_of_converter is not None:
        expected['convert_weights.py'] = message_of_converter
    if fault in ('folder', 'no file'):
        expected['init_cfg'] = f'{message}. The published weights'
    survived = [route for route, text in said.items() if is_refusal(text, expected[route])]
    is_untouched = not (tmp_path / 'trace').exists() and not list(tmp_path.glob('out*'))
    seen = said['--resume'].replace(f'{tmp_path}/', '')
    fault_report(AREA, fault, len(said), len(survived) * is_untouched, seen)
    assert survived == list(said), '\n'.join(said.values())
    assert is_untouched


def is_refusal(text, message):
    return text.startswith('error: ') and message in text and '\n' not in text


ADDRESSES = {
    'an address where nothing listens': 'http://127.0.0.1:9/file.pth',
    'an address of no host': 'https://no-such-host.invalid/file.pth',
    'an address that does not answer': None,
    'an address without its scheme': 'no-such-host.invalid/file.pth',
    'an address of an unknown scheme': 'gopher://no-such-host.invalid/file.pth',
}


@pytest.mark.parametrize('fault', ADDRESSES)
def test_address_without_network(fault, sample, tmp_path, no_data, fault_report, monkeypatch):
    monkeypatch.setattr(reading, 'DOWNLOAD_TIMEOUT', 0.5)
    begin = time.monotonic()
    with socket.create_server(('127.0.0.1', 0)) if ADDRESSES[fault] is None else nullcontext() as s:
        address = ADDRESSES[fault] or f'http://127.0.0.1:{s.getsockname()[1]}/file.pth'
        said = refusals(address, sample, tmp_path)
    seconds = time.monotonic() - begin
    survived = [text for text in said.values() if is_refusal(text, address)]
    fault_report(AREA, fault, len(said), len(survived), said['--resume'])
    assert len(survived) == len(said), said
    assert seconds < 60


def test_home_is_found_by_every_way(sample, tmp_path, monkeypatch):
    """In a path that no shell has expanded: the checkpoint is found, and the next step fails."""

    def build_dataloader(*args, **kwargs):
        raise SystemExit('error: the data would be loaded')

    monkeypatch.setattr('mmconv2former.ReliableRunner.build_dataloader', build_dataloader)
    monkeypatch.setenv('HOME', str(tmp_path))
    torch.save(content_of_a_run(write_tiny_config(tmp_path / 'good.py')), tmp_path / 'good.pth')
    said = refusals('~/good.pth', sample, tmp_path)
    assert '--arch tiny was expected' in said.pop('convert_weights.py')
    assert said == dict.fromkeys(said, 'error: the data would be loaded')
    said = refusals('~/bad.pth', sample, tmp_path)
    assert len(said) == 5
    assert all('/bad.pth' in text for text in said.values())


def without(*keys):
    return lambda content: [content.pop(key) for key in keys]


SGD = dict(_delete_=True, type='SGD', lr=0.1, weight_decay=0.05)
NOT_RESUMABLE = {  # options of the config that saved it, change of the content, message
    'a checkpoint with no optimizer': (
        {},
        without('optimizer'),
        'it has no optimizer. To start a new run',
    ),
    'a checkpoint with no message hub': ({}, without('message_hub'), 'it has no message_hub.'),
    'a checkpoint with no meta': ({}, without('meta'), 'it has no meta with epoch and iter.'),
    'a checkpoint with meta of no counts': (
        {},
        lambda content: content.update(meta=dict(epoch='last', iter=None)),
        'it has no meta with epoch and iter.',
    ),
    'a checkpoint with a missing tensor': (
        {},
        lambda content: content['state_dict'].pop('decode_head.conv_seg.bias'),
        "1 of 215 names missing, such as ['decode_head.conv_seg.bias']",
    ),
    'a run with other parameter groups': (
        {'model.backbone.frozen_stages': 1},
        None,
        'its optimizer has parameter groups of sizes [',
    ),
    'a run with another optimizer': (
        {'optim_wrapper.optimizer': SGD},
        None,
        "with ['momentum'], this config has",
    ),
}


@pytest.mark.parametrize('fault', NOT_RESUMABLE)
def test_not_resumable(fault, tiny, sample, tmp_path, request, fault_report):
    options, change, message = NOT_RESUMABLE[fault]
    content, path = content_of_a_run(tiny, **options), tmp_path / 'bad.pth'
    if change is not None:  # seen before the optimizer is built, hence before the data are loaded
        change(content)
        request.getfixturevalue('no_data')
    torch.save(content, path)
    said = refusal_of(*with_data(['train', tiny, '--resume', path], sample, tmp_path / 'work'))
    survived = is_refusal(said, message)
    seen = said.replace(f'{tmp_path}/', '')
    fault_report(AREA, f'--resume of {fault}', 1, int(survived), seen)
    assert survived, said


def test_resuming_does_not_run_a_config_in_the_checkpoint(tiny, sample, tmp_path):
    """Found through `last_checkpoint`: plain data, with Python code in one of its strings."""
    trace, work_dir = tmp_path / 'trace', tmp_path / 'work'
    work_dir.mkdir()
    content = content_of_a_run(tiny)
    content['meta']['config'] = f'open({str(trace)!r}, "w")'
    torch.save(content, work_dir / 'iter_4.pth')
    (work_dir / 'last_checkpoint').write_text(str(work_dir / 'iter_4.pth'))
    assert refusal_of(*with_data(['train', tiny, '--resume'], sample, work_dir)) == ''
    (log,) = work_dir.glob('*/*.log')
    assert 'resumed epoch: 0, iter: 4' in log.read_text()
    assert not trace.exists()


# EMAHook, and one scale instead of six to save time.
EMA_AND_TTA = """
custom_hooks = [dict(type='EMAHook', momentum=0.5)]
tta_pipeline = [
    dict(type='LoadImageFromFile'),
    dict(
        type='TestTimeAug',
        transforms=[
            [dict(type='Resize', scale=(128, 48), keep_ratio=True)],
            [dict(type='RandomFlip', prob=0.0), dict(type='RandomFlip', prob=1.0)],
            [dict(type='LoadAnnotations')],
            [dict(type='PackSegInputs')],
        ],
    ),
]
"""


def test_averaged_weights_are_trained_resumed_and_augmented(sample, tmp_path):
    """mmengine's EMAHook exchanges the weights in a checkpoint; the TTA model wraps the model."""
    config, work_dir = write_tiny_config(tmp_path / 'a.py', more=EMA_AND_TTA), tmp_path / 'work'
    assert refusal_of(*with_data(['train', config], sample, work_dir)) == ''
    half, first = (reading.read_checkpoint(str(work_dir / f'iter_{i}.pth')) for i in (2, 4))
    name = 'decode_head.conv_seg.weight'
    assert not torch.equal(half['ema_state_dict'][f'module.{name}'], half['state_dict'][name])
    arguments = ['train', config, '--resume', work_dir / 'iter_2.pth']
    assert refusal_of(*with_data(arguments, sample, work_dir)) == ''
    last = reading.read_checkpoint(str(work_dir / 'iter_4.pth'))
    assert last['ema_state_dict']['steps'] == first['ema_state_dict']['steps'] == 4
    torch.testing.assert_close(last['state_dict'], first['state_dict'])
    torch.testing.assert_close(last['ema_state_dict'], first['ema_state_dict'])
    arguments = ['test', config, work_dir / 'iter_4.pth', '--tta']
    assert refusal_of(*with_data(arguments, sample, work_dir)) == ''
