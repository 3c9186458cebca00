"""What a run cannot write is reported once; the run continues, an evaluation ends with an error."""

import errno
import logging
import os
import threading

import numpy as np
import pytest
from mmengine.evaluator import DumpResults, metric
from mmengine.visualization import LocalVisBackend, TensorboardVisBackend

from mmconv2former.engine import lost_files
from mmconv2former.engine.lost_files import FilesNotWritten, LostFiles, is_disk_error

FULL = OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def fail(*args, **kwargs):
    raise FULL


@pytest.fixture
def said():
    return []


@pytest.fixture
def lost(said):
    return LostFiles(said.append)


def test_each_name_is_reported_once(lost, said):
    for name in ('a', 'a', 'b'):
        with lost.spared(name):
            fail()
    assert said == [
        f'{name} cannot be written: [Errno 28] No space left on device. The run continues without.'
        for name in 'ab'
    ]
    with pytest.raises(ValueError, match='other'), lost.spared('c'):
        raise ValueError('other')


@pytest.mark.skipif(not os.path.exists('/dev/full'), reason='no device that is always full')
def test_log(lost, said, capsys):
    logger = logging.Logger('test')
    handler = logging.FileHandler('/dev/full')
    logger.handlers = [handler]
    lost.warn = lambda line: (said.append(line), logger.warning(line))
    lost.spare_log(handler)
    for _ in range(3):
        logger.info('line')
    (line,) = said
    assert line.startswith('log /dev/full cannot be written: [Errno 28]')
    assert capsys.readouterr().err == ''
    logger.info('%d', 'no number')
    assert 'Logging error' in capsys.readouterr().err
    with pytest.raises(OSError, match='No space left'):
        handler.close()


def test_drawings_of_the_local_backend(lost, said, tmp_path):
    backend = LocalVisBackend(str(tmp_path))
    lost.spare_backend(backend)
    image = np.full((4, 4, 3), [255, 0, 0], np.uint8)
    backend.add_image('a/b', image, 3)
    stock = LocalVisBackend(str(tmp_path), img_save_dir='stock')
    stock.add_image('b', image, 3)
    written = (tmp_path / 'vis_image/a/b_3.png').read_bytes()
    assert written == (tmp_path / 'stock/b_3.png').read_bytes()
    (tmp_path / 'vis_image/a').rename(tmp_path / 'moved')
    (tmp_path / 'vis_image/a').touch()
    for _ in range(2):
        backend.add_image('a/b', image, 4)
    (line,) = said
    assert line.startswith(f'LocalVisBackend in {tmp_path} cannot be written: ')


def test_tensorboard(lost, said, tmp_path, monkeypatch, capsys):
    """Its thread writes, and ends with the first error."""
    pytest.importorskip('tensorboard')
    monkeypatch.setattr(threading, 'excepthook', threading.__excepthook__)
    backend = TensorboardVisBackend(str(tmp_path))
    lost.spare_backend(backend)
    (writer,) = backend.experiment.all_writers.values()
    events = writer.event_writer._async_writer
    monkeypatch.setattr(events._writer, 'write', fail)
    monkeypatch.setattr(events._writer, 'flush', fail)
    backend.add_scalar('loss', 1.0, 1)
    events._worker.join(timeout=10)
    for step in range(3):
        backend.add_scalar('loss', 1.0, step)
    backend.close()
    (line,) = said
    assert line.startswith(f'TensorboardVisBackend in {tmp_path} cannot be written: [Errno 28]')
    assert 'Traceback' not in capsys.readouterr().err


def test_predictions(lost, said, tmp_path, monkeypatch):
    path = tmp_path / 'predictions.pkl'
    dump = DumpResults(str(path))
    lost.spare_dump(dump)
    assert dump.compute_metrics([1]) == {}
    assert path.exists()

    def half(results, file):
        path.write_text('half')
        fail()

    monkeypatch.setattr(metric, 'dump', half)
    assert dump.compute_metrics([1]) == {}
    assert not path.exists()
    assert said[0].startswith(f'predictions {path} cannot be written: [Errno 28]')


def test_an_evaluation_ends_with_an_error_in_all_processes(lost, tmp_path, monkeypatch):
    lost.check()
    handler = logging.FileHandler(tmp_path / 'log')
    lost.spare_log(handler)
    lost.check()
    os.remove(tmp_path / 'log')
    handler.close()
    with pytest.raises(FilesNotWritten, match=r'not all was written: log .*/log: it was removed'):
        lost.check()
    other = LostFiles(print)
    monkeypatch.setattr(lost_files, 'all_gather_object', lambda mine: [mine, [('a', 'full')]])
    with pytest.raises(FilesNotWritten, match='not all was written: a: full'):
        other.check()


def test_errors_of_disks():
    assert is_disk_error(FULL)
    assert not is_disk_error(FileNotFoundError(errno.ENOENT, 'no file'))
    assert not is_disk_error(ValueError(errno.ENOSPC))
