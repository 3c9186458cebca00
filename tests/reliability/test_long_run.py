"""Memory, open files and time of an iteration do not grow, and logs are complete."""

import json
import os
import time
from pathlib import Path
from statistics import median

import numpy as np
import pytest
from helpers.tiny import write_config
from mmengine.logging import HistoryBuffer, MessageHub
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from mmconv2former.engine.hooks import SHORTEST_LOG, LogLengthHook

ITERATIONS, WARM_UP = 2000, 500


def processes_of(session):
    """The processes of a session."""
    for path in Path('/proc').iterdir():
        if path.name.isdecimal():
            try:
                if os.getsid(int(path.name)) == session:
                    yield path
            except (ProcessLookupError, PermissionError):
                continue


def resources(session):
    """Resident memory in MiB and open files of all processes of a session."""
    memory, files = 0, 0
    for path in processes_of(session):
        try:
            memory += int((path / 'statm').read_text().split()[1]) * os.sysconf('SC_PAGE_SIZE')
            files += len(list((path / 'fd').iterdir()))
        except (FileNotFoundError, ProcessLookupError, IndexError):
            continue
    return memory / 2**20, files


@pytest.mark.slow
def test_two_thousand_iterations(server, sample, tmp_path, fault_report):
    options = {
        'train_dataloader.num_workers': 2,
        'train_dataloader.persistent_workers': True,
        'val_dataloader.num_workers': 1,
        'log_level': 'INFO',
        'default_hooks.logger.interval': 10,
        'default_hooks.checkpoint.interval': 500,
        'train_cfg.val_interval': 500,
    }
    path, sizes = tmp_path / 'config.py', (ITERATIONS, ITERATIONS, 40)
    config = write_config(path, 'segmentation', sample, *sizes, options=options)
    work_dir = tmp_path / 'work'
    argv = ['train.py', config, '--work-dir', work_dir, '--tensorboard']
    server.start(argv, tmp_path / 'output.txt')
    measured = []  # iteration, MiB, files
    while server.is_running():
        time.sleep(0.5)
        logs = list(work_dir.glob('*/vis_data/scalars.json'))
        lines = logs[0].read_text().splitlines() if logs else []
        iteration = json.loads(lines[-1])['step'] if lines else 0
        measured.append((iteration, *resources(server.pids[0])))
    assert server.wait() == [0], (tmp_path / 'output.txt').read_text()

    # The last iterations include the worker of evaluation, and a checkpoint in memory.
    steady = np.array([row for row in measured if WARM_UP < row[0] < ITERATIONS - 10])
    iterations, memory, files = steady.T
    growth = np.polyfit(iterations, memory, 1)[0] * 1000
    records = [json.loads(line) for line in logs[0].read_text().splitlines()]
    training = [record for record in records if 'loss' in record]
    times = {record['step']: record['time'] for record in training}
    middle = (WARM_UP + ITERATIONS) // 2
    early = median(value for step, value in times.items() if WARM_UP < step <= middle)
    late = median(value for step, value in times.items() if step > middle)

    assert [record['step'] for record in training] == list(range(10, ITERATIONS + 1, 10))
    assert [record['step'] for record in records if 'mIoU' in record] == [500, 1000, 1500, 2000]
    (events,) = work_dir.glob('*/vis_data/events.out.tfevents.*')
    accumulator = EventAccumulator(str(events), size_guidance={'scalars': 0}).Reload()
    assert [event.step for event in accumulator.Scalars('loss')] == list(times)
    fault = f'{ITERATIONS} iterations, 2 data workers, from iteration {WARM_UP} on'
    seen = (
        f'memory {median(memory):.0f} MiB, {growth:+.1f} MiB in 1,000 iterations; open files '
        f'{median(files):.0f}, {np.polyfit(iterations, files, 1)[0] * 1000:+.1f}; an iteration '
        f'of the second half takes {late / early:.2f} of one of the first; JSON and TensorBoard '
        'logs are complete'
    )
    fault_report('Long runs', fault, 1, 1, seen)
    assert abs(growth) < 10
    assert median(files[-len(files) // 4 :]) <= median(files[: len(files) // 4])
    assert late < 1.5 * early


def test_log_in_memory_has_an_end(fault_report):
    """The state after a week, with a scalar that is logged often and one that is not."""

    class Runner:
        iter = SHORTEST_LOG // 100 - 1
        train_dataloader = range(100)
        message_hub = MessageHub('long_run')

    entries = 250_000
    scalars = Runner.message_hub.log_scalars
    scalars['loss'] = HistoryBuffer(np.arange(entries), np.ones(entries))
    scalars['mIoU'] = HistoryBuffer([1.0], [1])
    LogLengthHook().after_train_iter(Runner, 0)
    Runner.message_hub.update_scalar('loss', 7.0)
    Runner.message_hub.update_scalar('mIoU', 7.0)
    values, counts = scalars['loss'].data
    assert len(values) == len(counts) == SHORTEST_LOG
    assert values[-2:].tolist() == [entries - 1, 7]
    assert scalars['mIoU'].data[0].tolist() == [1, 7]
    seen = f'nothing: the last {SHORTEST_LOG:,} values are kept'
    fault_report('Long runs', f'a log of {entries:,} iterations in memory', 1, 1, seen)
