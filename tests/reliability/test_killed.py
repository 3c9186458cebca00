"""Training that is killed repeatedly (SIGKILL) ends as if nothing had happened."""

import random
import time
from contextlib import suppress

import pytest
import torch
from helpers.tiny import scalars, write_config

TASKS = {
    # task: length and interval, in epochs of four iterations or in iterations
    'detection': (6, 1),
    'segmentation': (24, 3),
}
SECONDS = 4  # random kills come within this time


class Run:
    """A run whose work dir is watched."""

    def __init__(self, server, config, folder):
        self.server = server
        self.config = config
        self.work_dir = folder / 'work'
        self.log = folder / 'output.txt'
        self.newest = 0

    def start(self):
        self.log.write_text('')
        argv = ['train.py', self.config, '--work-dir', self.work_dir, '--resume']
        self.server.start(argv, self.log)

    def moment(self, kind, rng):
        """A function that says whether the time for a kill has come."""
        begin = time.monotonic()
        before = set(self.work_dir.glob('*.pth'))
        partial_before = self.partial_time()  # of a file that an earlier kill left behind
        later = begin + rng.uniform(0.5, SECONDS)
        return {
            'at a random moment': lambda: time.monotonic() > later,
            'while a checkpoint is written': lambda: (
                self.partial_time() not in (None, partial_before)
            ),
            'when a checkpoint is there': lambda: set(self.work_dir.glob('*.pth')) - before,
            'in an evaluation': lambda: '(val)' in self.log.read_text(),
        }[kind]

    def partial_time(self):
        """When the checkpoint that is being written was last changed; None if there is none."""
        times = []
        for path in self.work_dir.glob('.checkpoint.*partial'):
            with suppress(FileNotFoundError):
                times.append(path.stat().st_mtime_ns)
        return max(times, default=None)

    def check(self):
        """All checkpoint files are complete, and no progress is lost."""
        for path in self.work_dir.glob('*.pth'):
            checkpoint = torch.load(path, weights_only=False)
            assert {'state_dict', 'meta', 'message_hub'} <= checkpoint.keys(), path
            if not path.name.startswith('best_'):
                assert 'optimizer' in checkpoint, path
        marker = self.work_dir / 'last_checkpoint'
        if self.newest or marker.exists():
            newest = torch.load(marker.read_text(), weights_only=False)['meta']['iter']
            assert newest >= self.newest
            self.newest = newest

    def files(self):
        return {path.name for path in self.work_dir.iterdir() if not path.is_dir()}


@pytest.mark.parametrize(
    'task', [pytest.param('detection', marks=pytest.mark.slow), 'segmentation']
)
def test_killed_repeatedly(task, server, sample, tmp_path, fault_report, slow):
    length, interval = TASKS[task]
    options = {
        'train_dataloader.num_workers': 1,
        'val_dataloader.num_workers': 1,
        'log_level': 'INFO',
    }
    runs = {}
    for name in ('whole', 'killed'):
        (tmp_path / name).mkdir()
        path = tmp_path / name / 'config.py'
        config = write_config(path, task, sample, length, interval, options=options)
        runs[name] = Run(server, config, tmp_path / name)
    whole, killed = runs.values()
    whole.start()
    assert server.wait() == [0], whole.log.read_text()

    rng = random.Random(0)
    kinds = ['at a random moment', 'while a checkpoint is written', 'when a checkpoint is there',
             'in an evaluation']  # fmt: skip
    counts = dict.fromkeys(kinds, 0)
    for kind in kinds * (5 if slow else 1):
        killed.start()
        counts[kind] += server.kill_when(killed.moment(kind, rng))
        server.wait()
        killed.check()
    killed.start()
    assert server.wait() == [0], killed.log.read_text()

    expected, actual = (
        torch.load((run.work_dir / 'last_checkpoint').read_text(), weights_only=False)
        for run in (whole, killed)
    )
    for part in ('state_dict', 'optimizer'):
        torch.testing.assert_close(actual[part], expected[part], rtol=0, atol=0)
    assert actual['meta']['iter'] == expected['meta']['iter']
    rates, other_rates = (
        {key: value for key, value in scalars(run.work_dir).items() if key[0] == 'lr'}
        for run in (whole, killed)
    )
    assert other_rates == rates
    assert killed.files() == whole.files()
    for kind, count in counts.items():
        seen = 'nothing: `--resume` continues, the result is that of a run without interruption'
        fault_report('Killed', f'{task}: SIGKILL {kind}', count, count, seen)
    assert min(counts.values()) >= 1
    assert not slow or sum(counts.values()) >= 16
