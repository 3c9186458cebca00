"""Checkpoints in the forms they come in: read safely, loaded wholly or refused with the reason."""

import argparse
import io
import pickle
import re
import sys
import tarfile
import threading
import time
from collections import Counter
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer

import numpy as np
import pytest
import torch
from helpers.checkpoints import (
    CALLED,
    HOSTILE,
    in_mmpretrain,
    published_names,
    published_state_dict,
    replace_pickle,
    write_call,
    write_torchscript,
)
from helpers.comparisons import SMALL_ARCHS, randomized
from helpers.tiny import SMALL_SEGMENTATION as SEGMENTATION
from helpers.tiny import quick_segmentation
from helpers.tools import run_tool
from mmengine.logging import HistoryBuffer, MMLogger
from mmengine.runner import CheckpointLoader
from safetensors.torch import save_file

from mmconv2former import Conv2Former, Conv2FormerIsotropic
from mmconv2former.checkpoint import reading
from mmconv2former.checkpoint.architecture import recognise_arch
from mmconv2former.checkpoint.loading import load_pretrained
from mmconv2former.checkpoint.reading import (
    SAFE_GLOBALS,
    TRUST_VARIABLE,
    CheckpointError,
    read_checkpoint,
    read_state_dict,
)
from mmconv2former.models.cls_head import Conv2FormerClsHead
from mmconv2former.models.conv2former import ARCHS, Arch


def small(**kwargs):
    return Conv2Former(SMALL_ARCHS['narrow'], **kwargs)


@pytest.mark.parametrize('name', ARCHS)
def test_published_checkpoint_loads_whole(name, tmp_path):
    state = published_state_dict(ARCHS[name], 'module.', constant=name in ('base', 'large'))
    path = tmp_path / f'conv2former_{name[0]}.pth.tar'
    arguments = argparse.Namespace(model=f'conv2former_{name}', lr=1e-3, opt_betas=None)
    content = dict(epoch=299, arch=name, state_dict=state, args=arguments, optimizer={'state': {}})
    torch.save(content | dict(metric=np.float64(83.2)), path)
    with torch.device('meta'):  # for its time: initial weights of L take longer than all the rest
        model = Conv2Former(name, init_cfg=dict(type='Pretrained', checkpoint=str(path)))
    model.to_empty(device='cpu').init_weights()
    loaded = model.state_dict()
    for key in [key for key in loaded if not re.match(r'norm\d', key)]:
        assert torch.equal(loaded[key], state[f'module.{key}']), key
    left_out = {key[len('module.') :] for key in state} - set(loaded)
    assert {key.split('.')[0] for key in left_out} == {'head', 'pred'}


FORMS = ['plain', 'state_dict', 'model', 'module', 'detector', 'wrapped detector', 'prefix',
         'safetensors']  # fmt: skip


@pytest.mark.parametrize('form', FORMS)
def test_forms_give_the_same_output(form, tmp_path):
    source = randomized(small(out_norm=False)).eval()
    state = source.state_dict()
    prefixes = {'module': 'module.', 'detector': 'backbone.', 'prefix': 'encoder.'}
    prefix = prefixes.get(form, 'module.backbone.' if form == 'wrapped detector' else '')
    state = {prefix + name: value for name, value in state.items()}
    if form == 'detector':  # as mmengine saves a detector
        history = HistoryBuffer([1.0, 2.0], [1, 1])
        state |= {'neck.weight': torch.ones(2)}
        state = dict(meta=dict(epoch=1), state_dict=state, message_hub=dict(loss=history))
    elif form in ('state_dict', 'model'):
        state = {form: state, 'epoch': 3}
    path = tmp_path / ('file.safetensors' if form == 'safetensors' else 'file.pth')
    save = save_file if form == 'safetensors' else torch.save
    save(state, path)
    init_cfg = dict(type='Pretrained', checkpoint=str(path))
    if form == 'prefix':
        init_cfg['prefix'] = 'encoder'
    model = small(out_norm=False, init_cfg=init_cfg).eval()
    x = torch.randn(1, 3, 64, 64)
    assert not torch.allclose(model(x)[-1], source(x)[-1])
    model.init_weights()
    torch.testing.assert_close(model(x), source(x), rtol=0, atol=0)


def test_part_of_the_network_takes_a_whole_checkpoint(tmp_path):
    torch.save(randomized(small()).state_dict(), tmp_path / 'file.pth')
    part = small(out_indices=(0, 1))
    load_pretrained(part, str(tmp_path / 'file.pth'))
    assert part.norm1.weight[0] != 1


def test_other_initializers_still_run(tmp_path):
    torch.save(randomized(small(out_norm=False)).state_dict(), tmp_path / 'file.pth')
    constant = dict(type='Constant', layer='LayerNorm', val=0.5)
    pretrained = dict(type='Pretrained', checkpoint=str(tmp_path / 'file.pth'))
    model = small(init_cfg=[pretrained, constant])
    model.init_weights()
    assert (model.norm0.weight == 0.5).all()
    assert (model.stages[0][0].attn.norm.weight != 0.5).all()
    assert model.init_cfg == [pretrained, constant]


def save_without(name, path):
    state = small().state_dict()
    del state[name]
    torch.save(state, path)


REFUSED = {
    'text': (lambda p: p.write_text('hello'), 'cannot be read: '),
    'truncated': (
        lambda p: (torch.save(small().state_dict(), p), p.write_bytes(p.read_bytes()[:5000])),
        'cannot be read: ',
    ),
    'empty': (lambda p: p.write_bytes(b''), 'cannot be read: '),
    'a tensor': (lambda p: torch.save(torch.ones(1), p), 'must hold a state dict, got Tensor'),
    'no tensors': (lambda p: torch.save(dict(epoch=1), p), r"no tensors, only \['epoch'\]"),
    'other model': (lambda p: torch.save({'conv1.weight': torch.ones(1)}, p), 'names missing'),
    'a name missing': (
        lambda p: save_without('stages.1.0.attn.v.weight', p),
        r"1 of \d+ names missing, such as \['stages.1.0.attn.v.weight'\]",
    ),
    'other kernel': (
        lambda p: torch.save(small(kernel_size=7).state_dict(), p),
        r'kernel_size is \(7, 7, 7, 7\) in the file, \(5, 5, 5, 5\) in the model'
        r'.*\(8, 1, 7, 7\) in the file, \(8, 1, 5, 5\) in the model',
    ),
}


@pytest.mark.parametrize('case', REFUSED)
def test_refused_file_leaves_the_model_unchanged(case, tmp_path):
    write, message = REFUSED[case]
    write(tmp_path / 'file.pth')
    model = small()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    with pytest.raises(ValueError, match=message) as error:
        load_pretrained(model, str(tmp_path / 'file.pth'))
    assert str(tmp_path / 'file.pth') in str(error.value)
    torch.testing.assert_close(model.state_dict(), before, rtol=0, atol=0)


def test_wrong_prefix_is_refused(tmp_path):
    torch.save(small().state_dict(), tmp_path / 'file.pth')
    with pytest.raises(ValueError, match=r"prefix='encoder.'; the names begin with \['downsample"):
        load_pretrained(small(), str(tmp_path / 'file.pth'), prefix='encoder')


def test_missing_file_says_what_to_do():
    with pytest.raises(FileNotFoundError, match=r'pretrain/none.pth.*init_cfg=None'):
        read_state_dict('pretrain/none.pth')


def test_safetensors_without_the_package(tmp_path, monkeypatch):
    path = tmp_path / 'file.safetensors'
    save_file({'a': torch.ones(1)}, path)
    monkeypatch.setitem(sys.modules, 'safetensors', None)
    with pytest.raises(CheckpointError, match=r'file.safetensors.* pip install safetensors'):
        read_state_dict(str(path))


def test_broken_safetensors(tmp_path):
    (tmp_path / 'file.safetensors').write_bytes(b'\xff' * 40)
    with pytest.raises(CheckpointError, match=r'cannot be read: not safetensors'):
        read_state_dict(str(tmp_path / 'file.safetensors'))


AVERAGED = {  # what the file holds -> what is the average
    'timm': (dict(state_dict=1, state_dict_ema=2), 2),
    'model': (dict(model=1, model_ema=2), 2),
    'EMAHook of mmengine': (dict(state_dict=2, ema_state_dict=1), 2),
    'none': (dict(state_dict=1, epoch=3), None),
    'plain': ({'a': torch.ones(1)}, None),
}


@pytest.mark.parametrize('case', AVERAGED)
def test_averaged_weights(case, tmp_path):
    content, expected = AVERAGED[case]
    content = {
        key: {'module.a': torch.tensor(value)} if 'state' in key or 'model' in key else value
        for key, value in content.items()
    }
    path = str(tmp_path / 'file.pth')
    torch.save(content, path)
    if expected is None:
        with pytest.raises(CheckpointError, match=rf"no averaged .*got \['{next(iter(content))}'"):
            read_state_dict(path, averaged=True)
    else:
        assert read_state_dict(path, averaged=True) == {'a': torch.tensor(expected)}


@pytest.mark.parametrize('package', ['core', '_core'])
def test_files_of_both_numpy_families(package, tmp_path):
    """NumPy 2 writes `numpy._core` where NumPy 1 wrote `numpy.core`."""
    buffer = io.BytesIO()
    history = HistoryBuffer([1.0, 2.0], [1, 1])
    content = dict(metric=np.float64(83.2), array=np.arange(3, dtype=np.uint8), history=history)
    torch.save(content, buffer)
    path = str(tmp_path / 'file.pth')
    replace_pickle(
        buffer, path, lambda pickle: re.sub(rb'numpy\._?core', f'numpy.{package}'.encode(), pickle)
    )
    read = read_checkpoint(path)
    assert read['metric'] == 83.2
    assert read['array'].tolist() == [0, 1, 2]
    assert read['history'].mean() == 1.5


RECOGNISED = {
    **ARCHS,
    'base with 22K weights': Arch(ARCHS['base'].channels, ARCHS['base'].depths, kernel_size=7),
    'of no name': Arch((8, 12, 16), (1, 2, 1), kernel_size=(11, 7, 3)),
}


@pytest.mark.parametrize('name', RECOGNISED)
def test_recognised_by_shapes(name):
    arch = RECOGNISED[name]
    with torch.device('meta'):
        state = {key: torch.empty(shape) for key, shape in published_names(arch, 21841).items()}
    found = recognise_arch(state)
    sizes = arch.kernel_size
    assert (found.channels, found.depths) == (arch.channels, arch.depths)
    assert found.kernel_size == (sizes if isinstance(sizes, tuple) else (sizes,) * len(arch.depths))
    assert (found.mlp_ratio, found.in_channels, found.num_classes) == (4, 3, 21841)


def test_nothing_is_recognised_in_another_network():
    found = recognise_arch({'conv1.weight': torch.ones(8, 3, 3, 3), 'fc.weight': torch.ones(2, 2)})
    assert (found.channels, found.depths, found.kernel_size) == ((), (), ())
    assert (found.mlp_ratio, found.in_channels, found.num_classes) == (None, None, None)


def test_deeper_network_of_the_same_widths_is_refused(tmp_path):
    """As S into T: every name is there, in its shape, and still it is another network."""
    channels = (8, 12, 16, 20)
    torch.save(
        Conv2Former(dict(channels=channels, depths=(1, 2, 4, 1))).state_dict(), tmp_path / 'f.pth'
    )
    flat = Conv2Former(dict(channels=channels, depths=(1, 2, 2, 1)))
    with pytest.raises(
        CheckpointError, match=r'depths is \(1, 2, 4, 1\) in the file, \(1, 2, 2, 1\)'
    ):
        load_pretrained(flat, str(tmp_path / 'f.pth'))


ADAPTED = {  # kernel in the file, in the model
    'one size': (7, 11),
    'a size a stage': (5, (11, 9, 7, 5)),
    'from sizes a stage': ((7, 5, 3, 3), (7, 7, 7, 7)),
}


@pytest.mark.parametrize('case', ADAPTED)
def test_padded_kernels_give_the_same_output(case, tmp_path):
    old, new = ADAPTED[case]
    source = randomized(small(out_norm=False, kernel_size=old)).double().eval()
    torch.save(source.state_dict(), tmp_path / 'file.pth')
    init_cfg = dict(type='Pretrained', checkpoint=str(tmp_path / 'file.pth'), adapt_kernel=True)
    model = small(out_norm=False, kernel_size=new, init_cfg=init_cfg).double().eval()
    model.init_weights()
    x = torch.randn(2, 3, 70, 50).double()
    for output, expected in zip(model(x), source(x)):
        torch.testing.assert_close(output, expected, rtol=1e-11, atol=1e-11)
    assert model.stages[0][0].attn.att[2].weight.shape[-1] == (new if new == 11 else new[0])


def test_padded_kernels_of_the_isotropic_network(tmp_path):
    arch = dict(channels=16, depth=3)
    source = randomized(Conv2FormerIsotropic(arch, kernel_size=5)).double().eval()
    torch.save(dict(state_dict=source.state_dict()), tmp_path / 'file.pth')
    init_cfg = dict(type='Pretrained', checkpoint=str(tmp_path / 'file.pth'), adapt_kernel=True)
    model = Conv2FormerIsotropic(arch, kernel_size=9, init_cfg=init_cfg).double().eval()
    model.init_weights()
    x = torch.randn(2, 3, 96, 80).double()
    torch.testing.assert_close(model(x), source(x), rtol=1e-11, atol=1e-11)


def test_unknown_keys_of_init_cfg_are_refused(tmp_path):
    torch.save(small().state_dict(), tmp_path / 'file.pth')
    init_cfg = dict(type='Pretrained', checkpoint=str(tmp_path / 'file.pth'))
    small(init_cfg=init_cfg | dict(map_location='cpu')).init_weights()
    with pytest.raises(TypeError, match='adapt_kernels'):
        small(init_cfg=init_cfg | dict(adapt_kernels=True)).init_weights()


def test_kernels_are_neither_cut_nor_padded_unasked(tmp_path):
    torch.save(small(kernel_size=7).state_dict(), tmp_path / 'file.pth')
    with pytest.raises(CheckpointError, match=r'can only grow.* 7x7 in the file, 5x5 in the model'):
        load_pretrained(small(), str(tmp_path / 'file.pth'), adapt_kernel=True)
    with pytest.raises(CheckpointError, match=r'adapt_kernel=True'):
        load_pretrained(small(kernel_size=9), str(tmp_path / 'file.pth'))


NARROW = Arch((8, 12, 16, 20), (1, 2, 2, 1), 5)


@pytest.mark.parametrize('form', ['official', 'mmpretrain', 'safetensors'])
def test_head_and_backbone_take_the_same_file(form, tmp_path):
    state = published_state_dict(NARROW)
    path = str(tmp_path / ('file.safetensors' if form == 'safetensors' else 'file.pth'))
    if form == 'safetensors':
        save_file(state, path)
    else:
        torch.save(dict(state_dict=in_mmpretrain(state) if form == 'mmpretrain' else state), path)
    init_cfg = dict(type='Pretrained', checkpoint=path)
    head, backbone = Conv2FormerClsHead(20, 10, init_cfg=init_cfg), small(init_cfg=init_cfg)
    head.init_weights()
    backbone.init_weights()
    loaded = head.state_dict() | backbone.state_dict()
    assert all(torch.equal(loaded[name], value) for name, value in state.items())


HEADS_REFUSED = {
    'other classes': (
        lambda: Conv2FormerClsHead(20, 1000),
        'num_classes is 10 in the file, 1000 in the model',
    ),
    'other width': (
        lambda: Conv2FormerClsHead(24, 10),
        r'head.0.weight is \(1280, 20, 1, 1\) in the file',
    ),
}


@pytest.mark.parametrize('case', HEADS_REFUSED)
def test_head_that_does_not_fit(case, tmp_path):
    make, message = HEADS_REFUSED[case]
    torch.save(published_state_dict(NARROW), tmp_path / 'file.pth')
    with pytest.raises(CheckpointError, match=message):
        load_pretrained(make(), str(tmp_path / 'file.pth'))


def test_head_needs_a_head_in_the_file(tmp_path):
    torch.save(small().state_dict(), tmp_path / 'file.pth')
    with pytest.raises(CheckpointError, match=r"6 of 6 names missing, such as \['head.0.weight'"):
        load_pretrained(Conv2FormerClsHead(20, 10), str(tmp_path / 'file.pth'))


READERS = {
    'init_cfg': lambda path: load_pretrained(small(), path),
    'head': lambda path: load_pretrained(Conv2FormerClsHead(20, 10), path),
    'state dict': read_state_dict,
    'mmengine': CheckpointLoader.load_checkpoint,
    'torch': torch.load,
}


@pytest.mark.parametrize('hostile', HOSTILE)
@pytest.mark.parametrize('reader', READERS)
def test_hostile_file_is_not_run(hostile, reader, tmp_path, guarded):
    trace, path = tmp_path / 'trace', tmp_path / 'file.pth'
    HOSTILE[hostile](path, trace, dict(state_dict=published_state_dict(NARROW)))
    with pytest.raises((CheckpointError, OSError, pickle.UnpicklingError)) as error:
        READERS[reader](str(path))
    assert not trace.exists()
    if isinstance(error.value, CheckpointError):
        name = CALLED if hostile == 'call' else 'builtins.getattr'
        assert f'cannot be read: it holds {name}, which is not data. If you trust' in str(
            error.value
        )
        assert '\n' not in str(error.value)


@pytest.mark.parametrize('hostile', HOSTILE)
def test_hostile_file_would_run(hostile, tmp_path, monkeypatch):
    """Else the tests above would show nothing."""
    trace, path = tmp_path / 'trace', tmp_path / 'file.pth'
    HOSTILE[hostile](path, trace)
    if hostile == 'call':
        torch.load(path, weights_only=False)
    else:
        monkeypatch.setattr(reading, 'SAFE_GLOBALS', [*SAFE_GLOBALS[:2], getattr])
        reading.load_data(str(path), 'cpu')
    assert trace.exists()


def test_trusted_file_is_run_with_a_warning(tmp_path, monkeypatch, caplog):
    trace, path = tmp_path / 'trace', tmp_path / 'file.pth'
    write_call(path, trace, dict(state_dict=small().state_dict()))
    monkeypatch.setenv(TRUST_VARIABLE, '1')
    logger = MMLogger.get_current_instance()
    logger.addHandler(caplog.handler)
    load_pretrained(small(), str(path))
    logger.removeHandler(caplog.handler)
    assert trace.exists()
    assert f'{TRUST_VARIABLE}=1: {path} may run any code' in caplog.text


class Answers(SimpleHTTPRequestHandler):
    """Serves files; counts how often, and may promise more bytes than it sends."""

    def __init__(self, *args, counts, missing_bytes, **kwargs):
        self.counts, self.missing_bytes = counts, missing_bytes
        super().__init__(*args, **kwargs)

    def do_GET(self):
        self.counts[self.path] += 1
        time.sleep(0.2)  # in which others ask too
        super().do_GET()

    def send_header(self, keyword, value):
        if keyword == 'Content-Length':
            value = str(int(value) + self.missing_bytes.get(self.path, 0))
        super().send_header(keyword, value)


@pytest.fixture
def website(tmp_path, monkeypatch):
    """The address of `tmp_path`, how often each file was asked for, and what of it is not sent."""
    monkeypatch.setenv('TORCH_HOME', str(tmp_path / 'torch'))
    counts, missing_bytes = Counter(), {}
    handler = partial(Answers, directory=str(tmp_path), counts=counts, missing_bytes=missing_bytes)
    with ThreadingHTTPServer(('127.0.0.1', 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f'http://127.0.0.1:{server.server_port}', counts, missing_bytes
        server.shutdown()


def kept_of_downloads(tmp_path):
    folder = tmp_path / 'torch/hub/checkpoints'
    return [path.name for path in folder.iterdir() if path.suffix != '.lock']


def test_file_at_an_address_is_loaded_once(website, tmp_path):
    """By the processes of a machine too, which wait for each other."""
    address, counts, _ = website
    torch.save(small().state_dict(), tmp_path / 'file.pth')
    models = [small() for _ in range(4)]
    threads = [
        threading.Thread(target=load_pretrained, args=(model, f'{address}/file.pth?version=1'))
        for model in models
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    load_pretrained(small(), f'{address}/file.pth?version=1')
    assert counts == {'/file.pth?version=1': 1}
    (kept,) = kept_of_downloads(tmp_path)
    assert kept.endswith('-file.pth')
    expected = torch.load(tmp_path / 'file.pth')
    for model in models:
        torch.testing.assert_close(model.state_dict(), expected, rtol=0, atol=0)


@pytest.mark.parametrize('fault', ['cut off', 'web page'])
def test_bad_download_is_not_kept(fault, website, tmp_path):
    address, counts, missing_bytes = website
    path, whole = tmp_path / 'file.pth', tmp_path / 'whole'
    torch.save(small().state_dict(), whole)
    path.write_bytes(whole.read_bytes() if fault == 'cut off' else b'<html>')
    missing_bytes['/file.pth'] = 1000 if fault == 'cut off' else 0
    message = {'cut off': 'its end is missing', 'web page': 'it is a web page'}[fault]
    with pytest.raises(CheckpointError, match=f'cannot be read: {message}'):
        load_pretrained(small(), f'{address}/file.pth')
    missing_bytes.clear()
    whole.rename(path)
    load_pretrained(small(), f'{address}/file.pth')
    assert counts == {'/file.pth': 2}


def test_hostile_file_at_an_address_is_not_run(website, tmp_path, guarded):
    trace = tmp_path / 'trace'
    write_call(tmp_path / 'file.pth', trace)
    address, *_ = website
    with pytest.raises(CheckpointError, match=f'it holds {re.escape(CALLED)}'):
        CheckpointLoader.load_checkpoint(f'{address}/file.pth')
    with pytest.raises(CheckpointError, match=r'none\.pth.* cannot be read: HTTP Error 404'):
        CheckpointLoader.load_checkpoint(f'{address}/none.pth')
    assert not trace.exists()
    assert not kept_of_downloads(tmp_path)


@pytest.mark.filterwarnings('ignore:.*torch.jit')
def test_torchscript_is_not_run(tmp_path):
    trace, path = tmp_path / 'trace', tmp_path / 'file.pth'
    write_torchscript(path, trace)
    assert not trace.exists()
    with pytest.raises(CheckpointError, match='it is TorchScript, a program'):
        read_checkpoint(str(path))
    assert not trace.exists()
    torch.jit.load(path)
    assert trace.exists(), 'the file would not have done anything'


def test_tar_is_not_unpacked(tmp_path):
    """The member `storages` would be unpacked as what it is: a pipe, at which reading hangs."""
    path = tmp_path / 'file.pth'
    with tarfile.open(path, 'w') as tar:
        member = tarfile.TarInfo('storages')
        member.type = tarfile.FIFOTYPE
        tar.addfile(member)
    with pytest.raises(CheckpointError, match='it is a tar archive'):
        read_checkpoint(str(path))


def test_names_of_zoos_are_refused(guarded):
    with pytest.raises(CheckpointError, match="'torchvision://resnet50' is a name in a model zoo"):
        CheckpointLoader.load_checkpoint('torchvision://resnet50')


def run_of_training(trace):
    """The least that mmengine resumes, with Python where it would look for a config."""
    hub = dict(log_scalars={}, runtime_info={}, resumed_keys={})
    meta = dict(epoch=0, iter=4, config=f'open({str(trace)!r}, "w")')
    return dict(meta=meta, state_dict={}, message_hub=hub)


ROUTES = {
    'resume': ('train.py', ['--resume', 'FILE'], []),
    'load_from': ('train.py', [], ['load_from=FILE']),
    'test': ('test.py', ['FILE'], []),
}


@pytest.mark.parametrize('route', ROUTES)
def test_tools_refuse_a_hostile_file_in_one_line(route, sample, tmp_path):
    tool, arguments, options = ROUTES[route]
    trace, path = tmp_path / 'trace', tmp_path / 'file.pth'
    HOSTILE['getattr chain' if route == 'resume' else 'call'](path, trace, run_of_training(trace))
    output = run_tool(
        tool,
        SEGMENTATION,
        *(path if argument == 'FILE' else argument for argument in arguments),
        *quick_segmentation(sample, tmp_path / 'work'),
        *(option.replace('FILE', str(path)) for option in options),
        succeeds=False,
    )
    assert not trace.exists()
    assert 'Traceback' not in output
    last = output.splitlines()[-1]
    assert last.startswith(f"error: checkpoint '{path}' cannot be read: it holds ")
    assert '--trust-checkpoints' in last


def test_new_layers_keep_their_values(tmp_path):
    """A head for other classes takes the rest of the file."""
    source = randomized(Conv2FormerClsHead(in_channels=6, num_classes=5, hidden_channels=8))
    torch.save({f'head.{n}': v for n, v in source.state_dict().items()}, tmp_path / 'file.pth')
    init_cfg = dict(type='Pretrained', checkpoint=str(tmp_path / 'file.pth'))
    sizes = dict(in_channels=6, num_classes=3, hidden_channels=8)
    with pytest.raises(CheckpointError, match=r'pred.weight is \(5, 8\) in the file, \(3, 8\)'):
        Conv2FormerClsHead(**sizes, init_cfg=init_cfg).init_weights()
    head = Conv2FormerClsHead(**sizes, init_cfg=dict(init_cfg, new_layers=['pred']))
    before = head.pred.weight.clone()
    head.init_weights()
    assert torch.equal(head.pred.weight, before)
    for name, value in head.head.state_dict().items():
        assert torch.equal(value, source.head.state_dict()[name]), name
