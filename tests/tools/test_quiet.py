"""Known messages are kept off the terminal, all others are shown."""

import logging
import os
import subprocess
import sys
import warnings

import pycocotools.coco
import pytest
from common.quiet import KNOWN, PRINTING, hide_known_messages, is_known
from helpers import ROOT
from helpers.tiny import tiny_config
from mmengine.logging import MMLogger, print_log


@pytest.fixture
def quiet(monkeypatch):
    monkeypatch.setattr(MMLogger, 'callHandlers', MMLogger.callHandlers)
    for module in PRINTING:
        monkeypatch.setattr(module, 'print', print, raising=False)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter('always')
        hide_known_messages()
        yield caught


@pytest.mark.parametrize(('task', 'length'), [('detection', 1), ('segmentation', 4)])
def test_short_run_prints_nothing_known(sample, tmp_path, task, length):
    """In a process of its own, which imports the libraries."""
    config = tiny_config(task, sample, tmp_path / 'work', length, options={'log_level': 'INFO'})
    config.dump(tmp_path / 'tiny.py')
    command = [sys.executable, str(ROOT / 'tools/train.py'), str(tmp_path / 'tiny.py')]
    result = subprocess.run(
        command,
        cwd=ROOT,
        env={**os.environ, 'PYTHONPATH': str(ROOT)},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    assert result.returncode == 0, result.stdout
    assert 'Saving checkpoint' in result.stdout
    messages = [line.rpartition(' - ')[2] for line in result.stdout.splitlines()]
    assert not [message for message in messages if is_known(message)]
    for noise in (*KNOWN, 'UserWarning', 'deprecated', 'System environment'):
        assert noise not in result.stdout
    (log,) = (tmp_path / 'work').glob('*/*.log')
    assert 'System environment' in log.read_text()


def test_known_messages_are_hidden_but_logged(quiet, capsys, tmp_path):
    path = tmp_path / 'run.log'
    logger = MMLogger('quiet', log_file=str(path), log_level='INFO')
    for message in KNOWN:
        logger.warning(f'{message} ...')
        print_log(f'{message} ...')
        pycocotools.coco.print(f'{message} ...')
        warnings.warn(f'{message} ...', stacklevel=1)
    assert ''.join(capsys.readouterr()) == ''
    assert not quiet
    assert all(message in path.read_text() for message in KNOWN)


@pytest.mark.parametrize(
    'message',
    ['something new', 'Failed to search registry with scope "mmdte"', 'see the Config: above'],
)
def test_others_are_shown(quiet, capsys, message):
    logger = MMLogger('others', log_level='WARNING')
    logger.warning(message)
    logger.info('not due at this level')
    print_log(message, logger=None, level=logging.INFO)
    warnings.warn(message, stacklevel=1)
    shown = ''.join(capsys.readouterr())
    assert shown.count(message) == 2
    assert 'not due' not in shown
    assert [str(warning.message) for warning in quiet] == [message]
