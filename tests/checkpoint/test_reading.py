"""Any file is read as data only, or refused with the reason; nothing in it is executed."""

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
    replace_pickle,
    write_call,
    write_torchscript,
)
from mmengine.logging import HistoryBuffer, MMLogger
from mmengine.runner import CheckpointLoader
from safetensors.torch import save_file
from torch import nn

from mmconv2former.checkpoint import safe_pickle
from mmconv2former.checkpoint.reading import (
    TRUST_VARIABLE,
    CheckpointError,
    read_checkpoint,
    read_state_dict,
)


# ----------------------------------------------------------------------------------------- hostile
@pytest.mark.parametrize('hostile', HOSTILE)
def test_hostile_file_is_not_run_by_torch_in_a_tool(hostile, tmp_path, guarded):
    """What our readers say is in tests/reliability/test_bad_checkpoints.py."""
    trace, path = tmp_path / 'trace', tmp_path / 'file.pth'
    HOSTILE[hostile](path, trace, dict(state_dict=nn.Linear(2, 2).state_dict()))
    with pytest.raises(pickle.UnpicklingError):
        torch.load(str(path))
    assert not trace.exists()


@pytest.mark.parametrize('hostile', HOSTILE)
def test_hostile_file_would_run(hostile, tmp_path, monkeypatch):
    """Otherwise the test above would show nothing."""
    trace, path = tmp_path / 'trace', tmp_path / 'file.pth'
    HOSTILE[hostile](path, trace)
    if hostile == 'call':
        torch.load(path, weights_only=False)
    else:
        safe = [*safe_pickle.SAFE_GLOBALS[:2], getattr]
        monkeypatch.setattr(safe_pickle, 'SAFE_GLOBALS', safe)
        uncached = safe_pickle.admitted_globals.__wrapped__  # of torch before 2.5
        monkeypatch.setattr(safe_pickle, 'admitted_globals', uncached)
        safe_pickle.load_data(str(path), 'cpu')
    assert trace.exists()


@pytest.mark.filterwarnings('ignore:.*torch.jit')
def test_torchscript_is_not_run(tmp_path):
    trace, path = tmp_path / 'trace', tmp_path / 'file.pth'
    write_torchscript(path, trace)
    with pytest.raises(CheckpointError, match='file is TorchScript, a program'):
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
    with pytest.raises(CheckpointError, match='file is a tar archive'):
        read_checkpoint(str(path))


def test_trusted_file_is_run_with_a_warning(tmp_path, monkeypatch, caplog):
    trace, path = tmp_path / 'trace', tmp_path / 'file.pth'
    write_call(path, trace, dict(state_dict={'a': torch.ones(1)}))
    monkeypatch.setenv(TRUST_VARIABLE, '1')
    logger = MMLogger.get_current_instance()
    logger.addHandler(caplog.handler)
    read_checkpoint(str(path))
    logger.removeHandler(caplog.handler)
    assert trace.exists()
    assert f'{TRUST_VARIABLE}=1: {path} may run any code' in caplog.text


def test_config_in_a_checkpoint_is_left_out(tmp_path, guarded):
    """mmengine would run it as Python on `resume`."""
    meta = dict(epoch=1, iter=4, config='print("run")')
    path = str(tmp_path / 'file.pth')
    torch.save(dict(meta=meta, state_dict={'a': torch.ones(1)}), path)
    assert CheckpointLoader.load_checkpoint(path)['meta'] == dict(epoch=1, iter=4)


@pytest.mark.parametrize('name', ['torchvision://resnet50', 'mmcls://a', 'gopher://host/a.pth'])
def test_model_zoos_and_unknown_schemes_are_refused(name, guarded):
    with pytest.raises(CheckpointError, match=rf'{name}.*unknown scheme.*give the file or its'):
        CheckpointLoader.load_checkpoint(name)


# ----------------------------------------------------------------------------------------- formats
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


def test_safetensors(tmp_path, monkeypatch):
    path = tmp_path / 'file.safetensors'
    save_file({'a': torch.ones(1)}, path)
    assert read_state_dict(str(path)) == {'a': torch.ones(1)}
    (tmp_path / 'broken.safetensors').write_bytes(b'\xff' * 40)
    with pytest.raises(CheckpointError, match=r'cannot be read: not safetensors'):
        read_state_dict(str(tmp_path / 'broken.safetensors'))
    monkeypatch.setitem(sys.modules, 'safetensors', None)
    with pytest.raises(CheckpointError, match=r'file.safetensors.* pip install safetensors'):
        read_state_dict(str(path))


AVERAGED = {  # what the file contains -> which of it is the average
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


# --------------------------------------------------------------------------------------- downloads
class Answers(SimpleHTTPRequestHandler):
    """Serves files; counts how often, and may announce more bytes than it sends."""

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


def downloads(tmp_path):
    folder = tmp_path / 'torch/hub/checkpoints'
    return [path.name for path in folder.iterdir() if path.suffix != '.lock']


def test_file_at_an_address_is_downloaded_once(website, tmp_path):
    """Also by the processes of a machine, which wait for each other."""
    address, counts, _ = website
    torch.save({'a': torch.ones(3)}, tmp_path / 'file.pth')
    found = []
    threads = [
        threading.Thread(
            target=lambda: found.append(read_state_dict(f'{address}/file.pth?version=1'))
        )
        for _ in range(4)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    found.append(read_state_dict(f'{address}/file.pth?version=1'))
    assert counts == {'/file.pth?version=1': 1}
    (kept,) = downloads(tmp_path)
    assert kept.endswith('-file.pth')
    assert [state['a'].tolist() for state in found] == [[1, 1, 1]] * 5


@pytest.mark.parametrize('fault', ['truncated', 'web page'])
def test_bad_download_is_not_kept(fault, website, tmp_path):
    address, counts, missing_bytes = website
    path, whole = tmp_path / 'file.pth', tmp_path / 'whole'
    torch.save({'a': torch.ones(3)}, whole)
    path.write_bytes(whole.read_bytes() if fault == 'truncated' else b'<html>')
    missing_bytes['/file.pth'] = 1000 if fault == 'truncated' else 0
    with pytest.raises(CheckpointError, match=f'cannot be read: file is (a )?{fault}'):
        read_state_dict(f'{address}/file.pth')
    missing_bytes.clear()
    whole.rename(path)
    read_state_dict(f'{address}/file.pth')
    assert counts == {'/file.pth': 2}


def test_hostile_file_at_an_address_is_not_run(website, tmp_path, guarded):
    trace = tmp_path / 'trace'
    write_call(tmp_path / 'file.pth', trace)
    address, *_ = website
    with pytest.raises(CheckpointError, match=f'file contains {re.escape(CALLED)}'):
        CheckpointLoader.load_checkpoint(f'{address}/file.pth')
    with pytest.raises(CheckpointError, match=r'none\.pth.* cannot be read: HTTP Error 404'):
        CheckpointLoader.load_checkpoint(f'{address}/none.pth')
    assert not trace.exists()
    assert not downloads(tmp_path)


# ------------------------------------------------------------------------------------- inferencers
def test_mmengine_reads_our_checkpoints_as_data(tmp_path, monkeypatch):
    """OneDL's mmengine would warn and run any code in the file instead."""
    checkpoint = pytest.importorskip('mmengine.runner.checkpoint')
    if not hasattr(checkpoint, 'get_torch_safe_globals'):
        pytest.skip("only in OneDL's release")
    history = HistoryBuffer()
    history.update(1.0)
    saved = {'loss': history, 'value': np.float32(1), 'count': np.int8(1)}
    torch.save({'message_hub': saved}, tmp_path / 'epoch_1.pth')
    monkeypatch.delenv('TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD', raising=False)
    read_checkpoint(str(tmp_path / 'epoch_1.pth'))  # admits more for a moment
    with torch.serialization.safe_globals(checkpoint.get_torch_safe_globals()):
        torch.load(tmp_path / 'epoch_1.pth', weights_only=True)
