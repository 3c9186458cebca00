"""A run that is asked to stop saves first; a second signal ends it at once; all processes agree."""

import os
import signal
import time

import pytest
from helpers.in_process import refusal_of
from helpers.tiny import write_config
from helpers.training_server import main_of_tool

from mmconv2former import ReliableRunner
from mmconv2former.engine.stopping import STOPPED

AREA = 'Killed'
QUICK = {'default_hooks.dry_run': None}


def lines_of(log):
    return log.read_text().splitlines() if log.exists() else []


SLOW = pytest.mark.slow


@pytest.mark.parametrize(
    ('number', 'hook'),
    [
        (signal.SIGTERM, 'before_train_iter'),
        pytest.param(signal.SIGUSR1, 'before_train_iter', marks=SLOW),
        (signal.SIGINT, 'before_train_iter'),
        pytest.param(signal.SIGTERM, 'before_val_iter', marks=SLOW),
        pytest.param(signal.SIGUSR1, 'before_val_iter', marks=SLOW),
        pytest.param(signal.SIGINT, 'before_val_iter', marks=SLOW),
    ],
)
def test_one_signal(number, hook, in_process, sample, tmp_path, at_moment, capfd, fault_report):
    config = write_config(tmp_path / 'config.py', 'segmentation', sample, 6, 2, options=QUICK)
    at_moment(**{hook: (3, lambda _: signal.raise_signal(number))})
    code = refusal_of('train', config, '--work-dir', tmp_path / 'work')
    (last,) = (line for line in capfd.readouterr().err.splitlines() if 'resume with' in line)
    iteration = 3 if hook == 'before_train_iter' else 2
    expected = f'stopped by {number.name} after iteration {iteration}; resume with: '
    saved = (tmp_path / f'work/iter_{iteration}.pth').exists()
    survived = code == str(STOPPED) and last.startswith(expected) and saved
    where = 'an iteration' if hook == 'before_train_iter' else 'an evaluation'
    seen = f'`{expected}...`, exit code {STOPPED}'
    fault_report(AREA, f'{number.name} in {where}', 1, survived, seen)
    assert survived, (code, last)


def train_slowly():
    """The third iteration takes a minute."""
    call_hook = ReliableRunner.call_hook

    def call(self, fn_name, **kwargs):
        if fn_name == 'before_train_iter' and self.iter == 2:
            os.write(2, b'waiting\n')
            time.sleep(60)
        call_hook(self, fn_name, **kwargs)

    ReliableRunner.call_hook = call
    main_of_tool()


def test_a_second_signal(server, sample, tmp_path, fault_report):
    config = write_config(tmp_path / 'config.py', 'segmentation', sample, 6, 2, options=QUICK)
    log = tmp_path / 'output.txt'
    work_dir = tmp_path / 'work'
    server.start(['train.py', config, '--work-dir', work_dir], log, main=train_slowly)
    assert server.kill_when(lambda: 'waiting' in lines_of(log), number=signal.SIGUSR1)
    asked = 'SIGUSR1: stopping after this iteration; a second signal stops at once'
    assert server.kill_when(lambda: asked in lines_of(log), number=signal.SIGTERM)
    start = time.monotonic()
    codes = server.wait()
    seconds = time.monotonic() - start
    expected = f'stopped at once by SIGTERM; the last checkpoint is {work_dir}/iter_2.pth'
    last = lines_of(log)[-1]
    survived = codes == [-signal.SIGTERM] and last == expected and seconds < 10
    fault_report(AREA, 'a second signal in the same iteration', 1, survived, f'`{last}`')
    assert survived, (codes, last, seconds)
    assert {path.name for path in work_dir.glob('iter_*')} == {'iter_2.pth'}


def test_one_of_two_processes_is_asked(server, sample, tmp_path, fault_report):
    """Only the second receives the signal."""
    config = write_config(tmp_path / 'config.py', 'segmentation', sample, 200, 200, options=QUICK)
    log = tmp_path / 'output.txt'
    work_dir = tmp_path / 'work'
    server.start(['train.py', config, '--work-dir', work_dir], log, processes=2)

    def has_trained():
        return any(path.read_text() for path in work_dir.glob('*/vis_data/scalars.json'))

    assert server.kill_when(has_trained, rank=1, number=signal.SIGTERM)
    codes = server.wait()
    saved = [path.name for path in work_dir.glob('*.pth')]
    (last,) = (line for line in lines_of(log) if line.startswith('stopped by SIGTERM'))
    survived = codes == [STOPPED, STOPPED] and len(saved) == 1
    seen = f'both end: `{last.split("; ")[0]}; resume with: ...`, one checkpoint'
    fault_report(AREA, 'SIGTERM to one of two processes', 1, survived, seen)
    assert survived, (codes, saved)
    iteration = int(saved[0].removeprefix('iter_').removesuffix('.pth'))
    assert iteration % 10 == 0
    assert f'after iteration {iteration};' in last
