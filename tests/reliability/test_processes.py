"""Several processes (gloo): if one dies or hangs, the run ends and can be resumed."""

import json
import signal
import time

import pytest
import torch
from helpers.tiny import write_config

TIME_OUT = 20  # seconds, of collective operations
PROCESSES = [2, pytest.param(4, marks=pytest.mark.slow)]
OTHER_NUMBER = {2: 1, 4: 2}
LENGTH, INTERVAL = 12, 2
OPTIONS = {'env_cfg.dist_cfg.timeout': TIME_OUT, 'log_level': 'INFO'}


def reached(work_dir):
    marker = work_dir / 'last_checkpoint'
    if not marker.exists():
        return 0
    return torch.load(marker.read_text(), weights_only=False)['meta']['iter']


def end_of_others(server, victim):
    """Seconds until all processes but one have ended."""
    begin = time.monotonic()
    others = [rank for rank in range(len(server.processes)) if rank != victim]
    while any(server.is_running(rank) for rank in others):
        assert time.monotonic() - begin < TIME_OUT + 60, 'the others hang'
        time.sleep(0.05)
    return time.monotonic() - begin


@pytest.mark.parametrize('processes', PROCESSES)
@pytest.mark.parametrize(
    'number', [signal.SIGKILL, pytest.param(signal.SIGSTOP, marks=pytest.mark.slow)]
)
def test_one_process_ends_all(processes, number, server, sample, tmp_path, fault_report):
    config = write_config(
        tmp_path / 'config.py', 'segmentation', sample, LENGTH, INTERVAL, options=OPTIONS
    )
    work_dir, log = tmp_path / 'work', tmp_path / 'output.txt'
    argv = ['train.py', config, '--work-dir', work_dir, '--resume']
    server.start(argv, log, processes)
    victim = processes - 1
    assert server.kill_when((work_dir / 'last_checkpoint').exists, victim, number=number)
    seconds = end_of_others(server, victim)
    server.kill_when(lambda: True, victim)  # if it was only stopped
    assert all(server.wait()), log.read_text()
    assert 0 < reached(work_dir) < LENGTH
    error = next(line for line in log.read_text().splitlines()[::-1] if 'Error' in line)

    for again in (processes, OTHER_NUMBER[processes]):
        assert server.run(argv, log, again) == [0] * again, log.read_text()
        assert reached(work_dir) == LENGTH
        for path in work_dir.glob('iter_*.pth'):
            if path.stem != f'iter_{INTERVAL}':
                path.unlink()
        (work_dir / 'last_checkpoint').unlink()
    what = 'killed' if number == signal.SIGKILL else f'frozen, time-out {TIME_OUT} s'
    numbers = f'{processes} and {OTHER_NUMBER[processes]}'
    seen = (
        f'the others end after {seconds:.0f} s: `{error[:120]}`; '
        f'`--resume` with {numbers} processes'
    )
    fault_report('Processes', f'{processes} processes, one {what}', 1, 1, seen)


@pytest.mark.parametrize(
    'task', [pytest.param('detection', marks=pytest.mark.slow), 'segmentation']
)
def test_uneven_batches_and_evaluation(task, server, sample, tmp_path, fault_report, slow):
    """Seven images to train and six to evaluate, for two and four processes."""
    length = {'detection': 1, 'segmentation': 4}[task]
    batches = {'detection': {1: 4, 2: 2, 4: 1}, 'segmentation': dict.fromkeys((1, 2, 4), 4)}[task]
    config = write_config(
        tmp_path / 'config.py', task, sample, length, length, images=7, options=OPTIONS
    )
    log = tmp_path / 'output.txt'
    metrics = {}
    numbers = (1, 2, 4) if slow else (1, 4)
    for number in numbers:
        work_dir = tmp_path / f'train_{number}'
        argv = ['train.py', config, '--work-dir', work_dir]
        assert server.run(argv, log, number) == [0] * number, log.read_text()
        assert reached(work_dir) == batches[number]
        checkpoint = (tmp_path / 'train_1/last_checkpoint').read_text()
        work_dir = tmp_path / f'test_{number}'
        argv = ['test.py', config, checkpoint, '--work-dir', work_dir]
        assert server.run(argv, log, number) == [0] * number, log.read_text()
        (path,) = work_dir.glob('*/*.json')
        values = json.loads(path.read_text())
        metrics[number] = {key: values[key] for key in values if 'time' not in key}
    assert all(values == metrics[1] for values in metrics.values()), metrics
    assert len(metrics[1]) > 2
    count = len(numbers) - 1
    fault = f'{task}: 7 images to train, 6 to evaluate, {numbers[1:]} processes'
    seen = f'all {len(metrics[1])} metrics equal those of one process'
    fault_report('Processes', fault, count, count, seen)
