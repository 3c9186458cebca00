"""Checkpoints that are damaged, hostile or of another model, through every way into the tools."""

import io
import socket
import time
import zipfile
from contextlib import nullcontext

import pytest
import torch
from helpers.checkpoints import CALLED, replace_pickle, write_call, write_getattr_chain
from helpers.in_process import refusal_of, with_data, write_tiny_config
from helpers.tiny import tiny_config
from mmengine.config import Config
from mmengine.optim import OptimWrapper, build_optim_wrapper
from mmengine.registry import MODELS, init_default_scope

from mmconv2former import ReliableRunner
from mmconv2former.checkpoint import reading
from mmconv2former.checkpoint.reading import CheckpointError
from mmconv2former.checkpoint.resumption import check_optimizer

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


def hostile_names():
    """Escape sequences, forged lines and lone surrogates, and 20,000 of them."""
    names = ['\x1b[2K\rok', 'a\nerror: none', '\udc80.b', 'x' * 10**6]
    return {name: torch.ones(1) for name in [*names, *map('key{}'.format, range(20_000))]}


def of_other_network(path, **changes):
    config = write_tiny_config(path.with_name('other.py'), **changes)
    torch.save(content_of_a_run(config), path)


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


def overwrite(path, good):
    """Bytes of a tensor are overwritten in the middle, as by a bad disk."""
    data = bytearray(good.read_bytes())
    with zipfile.ZipFile(good) as archive:
        tensors = [record for record in archive.infolist() if '/data/' in record.filename]
    record = max(tensors, key=lambda record: record.file_size)
    start = record.header_offset + 256
    size = min(4096, record.file_size // 2)
    data[start : start + size] = bytes(size)
    path.write_bytes(data)


def mark_as_folder(path, good):
    """One byte of the directory, for which torch returns memory as it finds it."""
    data = bytearray(good.read_bytes())
    with zipfile.ZipFile(good) as archive:
        start = archive.start_dir
    data[data.find(b'data/0', start) - len('good/') - 46 + 38] ^= 0x10
    path.write_bytes(data)


def with_weights(change):
    """Writes a checkpoint with changed weights, of the same names."""

    def write(path, good):
        content = reading.read_checkpoint(str(good))
        weights = content['state_dict']
        content['state_dict'] = {name: change(name, value) for name, value in weights.items()}
        torch.save(content, path)

    return write


def nested_tuples(path, good):
    """A key of a dict whose hash would recurse once for each of its levels, in a small file."""
    whole, program = io.BytesIO(), b'\x80\x02)' + b'\x85' * 400_000 + b'q\x00}h\x00Ns.'
    torch.save({}, whole)
    replace_pickle(whole, path, lambda _: program)


CANNOT = 'cannot be read: '
NAN, LAST = float('nan'), 'decode_head.conv_seg.weight'
OTHER_KINDS = {
    'sparse': lambda value: value.to_sparse(),
    'quantized': lambda value: torch.quantize_per_tensor(value, 0.1, 0, torch.qint8),
    'meta': lambda value: value.to('meta'),
}
# What is written, and what every way says about it.
FAULTS = {
    'text file': (lambda path, _: path.write_text('not weights\n' * 99), CANNOT),
    'web page': (
        lambda path, _: path.write_text('\n<!DOCTYPE html><title>Sign in</title>'),
        'file is a web page',
    ),
    'empty file': (lambda path, _: path.touch(), 'file is empty'),
    'truncated file': (
        lambda path, good: path.write_bytes(good.read_bytes()[: good.stat().st_size // 2]),
        'file is truncated (incomplete download?)',
    ),
    'pickle that calls a function': (
        lambda path, good: write_call(path, path.with_name('trace'), torch.load(good)),
        f'file contains {CALLED}, which is not plain data',
    ),
    'pickle that reaches exec by getattr': (
        lambda path, good: write_getattr_chain(path, path.with_name('trace'), torch.load(good)),
        'file contains builtins.getattr, which is not plain data',
    ),
    'folder': (lambda path, _: path.mkdir(), 'is a folder'),
    'no file': (lambda path, _: None, 'does not exist'),
    'a ResNet': (lambda path, _: torch.save(of_resnet(['']), path), 'names missing'),
    'a detector with a ResNet': (
        lambda path, _: torch.save(of_resnet(['backbone.', 'neck.']), path),
        'names missing',
    ),
    'weights of a deeper network of the same widths': (
        lambda path, _: of_other_network(path, depths=(1, 1, 3, 1)),
        'depths is (1, 1, 3, 1) in the file, (1, 1, 2, 1) in the model',
    ),
    'weights of kernel size 7 for 11': (
        lambda path, _: of_other_network(path, kernel=7),
        'kernel_size is (7, 7, 7, 7) in the file, (5, 5, 5, 5) in the model',
    ),
    'a dict of no tensors': (
        lambda path, _: torch.save(dict(RUN, state_dict={'a': 1}), path),
        'contains no tensors',
    ),
    'a tensor': (lambda path, _: torch.save(torch.ones(3), path), 'must hold a'),
    'a tensor that is overwritten in part': (overwrite, "file is damaged: record 'good/data/"),
    'a record that is marked as a folder': (mark_as_folder, 'file is damaged: record '),
    'nested tuples': (nested_tuples, 'objects are nested in more than 100 levels'),
    'weights that are NaN': (
        with_weights(lambda _, value: value * NAN if value.is_floating_point() else value),
        ' tensors are NaN or infinite, such as [',
    ),
    'one infinite statistic of BatchNorm': (
        with_weights(lambda name, value: value / 0 if name.endswith('.2.running_var') else value),
        'is damaged: 1 tensors are NaN or infinite',
    ),
    'weights that are integers': (
        with_weights(lambda _, value: value.to(torch.int8)),
        ' weights are int8 instead of floats, such as [',
    ),
    **{
        f'a {kind} tensor': (
            with_weights(
                lambda name, value, change=change: change(value) if name == LAST else value
            ),
            f'cannot be loaded: {LAST} is ',
        )
        for kind, change in OTHER_KINDS.items()
    },
    'names that a terminal would obey': (
        lambda path, _: torch.save(dict(RUN, state_dict=hostile_names()), path),
        'names missing',
    ),
}
# What the converter says, which has no model to compare with, by the message of the others.
OF_CONVERTER = {
    'names missing': 'is not a Conv2Former',
    ' in the model': '--arch tiny was expected',
    'NaN or infinite': '--arch tiny was expected',
    'int8 instead of': '--arch tiny was expected',
}
if not hasattr(torch.serialization, 'safe_globals'):  # torch < 2.5 does not admit them
    write_quantized, _ = FAULTS['a quantized tensor']
    FAULTS['a quantized tensor'] = (write_quantized, 'file contains torch._utils._rebuild_q')


def refusals(path, sample, tmp_path):
    """What the tools say about a checkpoint, by every way in which they read one."""
    config = write_tiny_config(tmp_path / 'tiny.py')
    init_cfg = dict(type='Pretrained', checkpoint=str(path))
    pretrained = write_tiny_config(tmp_path / 'pretrained.py', init_cfg=init_cfg)
    work_dir = tmp_path / 'work'
    routes = {
        '--resume': with_data(['train', config, '--resume', path], sample, work_dir),
        'load_from': with_data(['train', config], sample, work_dir, f'load_from={path}'),
        'init_cfg': with_data(['train', pretrained], sample, work_dir),
        'test.py': with_data(['test', config, path], sample, work_dir),
        'convert_weights.py': ['convert_weights', path, tmp_path / 'out.pth', '--arch', 'tiny'],
    }
    return {route: refusal_of(*arguments) for route, arguments in routes.items()}


@pytest.mark.parametrize('fault', FAULTS)
def test_refused_by_every_way_in_one_line(fault, sample, tmp_path, no_data, fault_report):
    write, message = FAULTS[fault]
    good, path = tmp_path / 'good.pth', tmp_path / 'bad.pth'
    torch.save(content_of_a_run(write_tiny_config(tmp_path / 'good.py')), good)
    write(path, good)
    said = refusals(path, sample, tmp_path)
    expected = dict.fromkeys(said, message)
    for words, of_converter in OF_CONVERTER.items():
        if words in message:
            expected['convert_weights.py'] = of_converter
    if fault in ('folder', 'no file'):
        expected['init_cfg'] = f'{message}. The published weights'
    survived = [route for route, text in said.items() if is_refusal(text, expected[route])]
    is_untouched = not (tmp_path / 'trace').exists() and not list(tmp_path.glob('out*'))
    seen = said['--resume'].replace(f'{tmp_path}/', '')
    fault_report(AREA, fault, len(said), len(survived) * is_untouched, seen)
    assert survived == list(said), '\n'.join(said.values())
    assert is_untouched


def is_refusal(text, message):
    is_line = text.isprintable() and len(text) < 5000
    return text.startswith('error: ') and message in text and is_line


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


# ------------------------------------------------------------------------- the newest is damaged
def of_state(change):
    def changed(content):
        change(content['optimizer']['state'])

    return changed


def last_vector(state):
    """The averages of the last parameter that is a vector."""
    return [averages for averages in state.values() if averages['exp_avg'].dim() == 1][-1]


def history(content, name):
    return content['message_hub']['log_scalars'][name]


DAMAGED = {  # change of the content of the newest checkpoint, message
    'an optimizer without its state': (
        lambda content: content['optimizer'].pop('state'), 'optimizer.state is None'
    ),
    'an average of gradients that is NaN': (
        of_state(lambda state: state[0]['exp_avg'].fill_(NAN)),
        "optimizer.state[0].'exp_avg' is NaN or infinite",
    ),
    'an average of gradients of another shape': (
        of_state(lambda state: state[0].update(exp_avg=state[0]['exp_avg'][:3])),
        "optimizer.state[0].'exp_avg' has the shape (3,",
    ),
    'an average of the gradients of a bias of another shape': (
        of_state(lambda state: last_vector(state).update(exp_avg=torch.ones(3))),
        ".'exp_avg' has the shape (3,), its parameter (",
    ),
    'an average of gradients that is a text': (
        of_state(lambda state: state[0].update(exp_avg='none')), "optimizer.state[0].'exp_avg' is '"
    ),
    'an average of gradients that is missing': (
        of_state(lambda state: state[0].pop('exp_avg')), "optimizer.state[0] has no 'exp_avg'"
    ),
    'averages of no parameter': (
        of_state(lambda state: state.update({'0': state.pop(0)})),
        "optimizer.state['0'] is of no parameter",
    ),
    'no learning rate': (
        lambda content: content['optimizer']['param_groups'][0].pop('lr'),
        'optimizer.param_groups.0.lr is None',
    ),
    'a learning rate that is a text': (
        lambda content: content['optimizer']['param_groups'][0].update(lr='fast'),
        "optimizer.param_groups.0.lr is 'fast'",
    ),
    'no schedules': (
        lambda content: content.update(param_schedulers=None), 'cannot be resumed from: TypeError: '
    ),
    'a schedule at no position': (
        lambda content: content['param_schedulers'][0].update(last_step='third'),
        "param_schedulers.0.last_step is 'third'",
    ),
    'a seed out of range': (
        lambda content: content['meta'].update(seed=2**32), 'meta.seed is 4294967296'
    ),
    'another number of iterations': (
        lambda content: content['meta'].update(iter=10**12),
        'meta.iter is 1000000000000, message_hub.runtime_info.iter 3',
    ),
    'a best score that is a text': (
        lambda content: content['message_hub']['runtime_info'].update(best_score='high'),
        "message_hub.runtime_info.best_score is 'high'",
    ),
    'a list of checkpoints that is a number': (
        lambda content: content['message_hub']['runtime_info'].update(keep_ckpt_ids=2),
        'message_hub.runtime_info.keep_ckpt_ids is 2',
    ),
    'a log without values': (
        lambda content: setattr(history(content, 'train/loss'), '_log_history', None),
        'message_hub.log_scalars.train/loss has no list of numbers',
    ),
    'no log': (
        lambda content: content['message_hub'].update(log_scalars=3),
        'message_hub.log_scalars is 3, not a dict',
    ),
    'weights that are NaN': (
        lambda content: content['state_dict'][LAST].fill_(NAN), '1 tensors are NaN or infinite'
    ),
    'an averaged weight that is NaN': (
        lambda content: content.update(
            ema_state_dict={
                f'module.{LAST}': content['state_dict'][LAST] * NAN, 'steps': torch.tensor(2)
            }
        ),
        '1 tensors are NaN or infinite',
    ),
    'averaged weights that are a text': (
        lambda content: content.update(ema_state_dict='none'), 'cannot be resumed from: '
    ),
    'a parameter that is a list': (
        lambda content: content['optimizer']['param_groups'][0]['params'].__setitem__(0, []),
        "cannot be resumed from: TypeError: unhashable type: 'list'",
    ),
}  # fmt: skip


@pytest.fixture(scope='module')
def runner(sample, tmp_path_factory):
    """A runner that is about to load or resume, with a list of its warnings."""
    config = tiny_config('segmentation', sample, tmp_path_factory.mktemp('runner'), 4, 2)
    config.resume = 'auto'
    config.custom_hooks = [dict(type='EMAHook')]
    runner = ReliableRunner.from_cfg(config)
    runner.warnings = []
    runner.logger.warning = runner.warnings.append
    runner.optim_wrapper = runner.build_optim_wrapper(runner.optim_wrapper)
    runner.param_schedulers = runner.build_param_scheduler(runner.param_schedulers)
    runner.call_hook('before_run')
    return runner


def resume(runner, finished, work_dir):
    """Resumes from the newest readable of two checkpoints, which may be in the work dir."""
    for name in ('iter_2.pth', 'iter_4.pth'):
        if not (work_dir / name).exists():
            (work_dir / name).symlink_to(finished / name)
    runner._work_dir, runner._has_loaded, runner._resume = str(work_dir), False, 'auto'
    runner.warnings.clear()
    runner.load_or_resume()


@pytest.mark.parametrize('fault', DAMAGED)
def test_the_one_before_is_taken(fault, runner, finished, tmp_path, fault_report):
    change, message = DAMAGED[fault]
    content = reading.read_checkpoint(str(finished / 'iter_4.pth'))
    change(content)
    torch.save(content, tmp_path / 'iter_4.pth')
    resume(runner, finished, tmp_path)
    said = next(text for text in runner.warnings if 'Trying the previous checkpoint' in text)
    survived = runner.iter == 2 and message in said and said.isprintable()
    seen = said.replace(f'{tmp_path}/', '')
    fault_report(AREA, f'--resume, the newest with {fault}', 1, int(survived), seen)
    assert survived, runner.warnings
    before = reading.read_checkpoint(str(finished / 'iter_2.pth'))
    torch.testing.assert_close(dict(runner.model.state_dict()), dict(before['state_dict']))


def test_nothing_remains_of_a_checkpoint_that_fails_late(runner, finished, tmp_path):
    """mmengine loads the log and the optimizer before the schedules."""
    content = reading.read_checkpoint(str(finished / 'iter_4.pth'))
    content['param_schedulers'] = None
    content['message_hub']['runtime_info']['epoch_position'] = [1, 2]
    for group in content['optimizer']['param_groups']:
        group['weight_decay'] = 0.7
    torch.save(content, tmp_path / 'iter_4.pth')
    resume(runner, finished, tmp_path)
    assert runner.iter == 2
    assert 'epoch_position' not in runner.message_hub.runtime_info
    assert all(group['weight_decay'] < 0.7 for group in runner.optim_wrapper.param_groups)


GARBLED = {
    'zeros': b'\0' * 300,
    'a checkpoint': b'PK\3\4\xff\n' * 10_000,
    'a long name': b'x' * 3000,
}


@pytest.mark.parametrize('fault', GARBLED)
def test_garbled_last_checkpoint(fault, runner, finished, tmp_path, fault_report):
    (tmp_path / 'last_checkpoint').write_bytes(GARBLED[fault])
    resume(runner, finished, tmp_path)
    survived = runner.iter == 4 and not runner.warnings
    seen = 'the checkpoint with the highest number is taken'
    fault_report(AREA, f'`last_checkpoint` contains {fault}', 1, int(survived), seen)
    assert survived, runner.warnings


def test_unchanged_checkpoint_is_resumed(runner, finished, tmp_path):
    resume(runner, finished, tmp_path)
    assert (runner.iter, runner.warnings) == (4, [])


def test_setting_of_another_kind_is_that_of_the_config(runner, finished, tmp_path):
    """mmengine saves the lowest rate as None if the config gives it as a ratio."""
    content = reading.read_checkpoint(str(finished / 'iter_4.pth'))
    content['param_schedulers'][1]['eta_min'] = None
    torch.save(content, tmp_path / 'iter_4.pth')
    resume(runner, finished, tmp_path)
    assert runner.iter == 4
    assert runner.param_schedulers[1].eta_min == 0
    assert 'param_scheduler.1.eta_min 0 (checkpoint: None)' in runner.warnings[0]


def test_optimizer_without_weight_decay_is_resumed():
    optimizer = OptimWrapper(torch.optim.Rprop([torch.nn.Parameter(torch.ones(2))]))
    check_optimizer(optimizer.state_dict(), optimizer, 'a.pth')
    saved = optimizer.state_dict()
    saved['param_groups'][0].pop('lr')
    with pytest.raises(CheckpointError, match=r'param_groups\.0\.lr is None'):
        check_optimizer(saved, optimizer, 'a.pth')


def test_optimizer_in_8_bits_is_resumed():
    """bitsandbytes keeps averages as bytes and two tables, of parameters from 4096 elements on."""
    shapes = [(4096,), (64, 64), (8,), (8, 8)]
    parameters = [torch.nn.Parameter(torch.ones(shape)) for shape in shapes]
    optimizer = OptimWrapper(torch.optim.AdamW(parameters))
    saved = optimizer.state_dict()
    for number, shape in enumerate(shapes):
        is_large = number < 2
        dtype = torch.uint8 if is_large else torch.float32
        state = saved['state'][number] = dict(step=4)
        for name in ('1', '2'):
            state[f'state{name}'] = torch.ones(shape, dtype=dtype)
            if is_large:
                state[f'qmap{name}'], state[f'absmax{name}'] = torch.ones(256), torch.ones(16)
    check_optimizer(saved, optimizer, 'a.pth')
    saved['state'][1].pop('state2')
    with pytest.raises(CheckpointError, match=r"state\[1\] has no 'state2', others have"):
        check_optimizer(saved, optimizer, 'a.pth')
