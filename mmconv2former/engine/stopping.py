"""Ends a run on request: SIGTERM, SIGUSR1 (the warning that Slurm can send) or Ctrl-C.

The iteration is finished and a checkpoint is written, from which `--resume` continues as if the run
had not been interrupted. A second signal ends the run at once.
"""

from __future__ import annotations

import multiprocessing
import os
import shlex
import signal
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from types import FrameType
from typing import Any

import torch
from mmengine.dist import all_reduce, barrier, get_world_size, is_main_process
from mmengine.hooks import Hook
from mmengine.runner import BaseLoop, EpochBasedTrainLoop
from torch.utils.data import DataLoader

from ..registry import HOOKS, register
from ..text import printable
from .hooks import EPOCH_POSITION, ReliableCheckpointHook
from .work_dir import checkpoints_of

STOPPED = 75  # exit code; EX_TEMPFAIL of sysexits.h: try again
SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)
EVERY = 10  # iterations between two questions to the other processes
# Set by the scripts in `tools/`: the command that the user typed, and a file for the last line.
COMMAND, MESSAGE_FILE = 'MMCONV2FORMER_COMMAND', 'MMCONV2FORMER_MESSAGE_FILE'


@register(HOOKS)
class StoppingHook(Hook):
    """Stops training after the iteration in which a signal arrives, with a checkpoint.

    The process ends with the exit code `STOPPED`. With several processes, all stop after the same
    iteration, at most `EVERY` iterations after the signal; one of them needs to receive it. A
    validation is aborted at once if its iteration has a checkpoint, and repeated by the resumed
    run; otherwise it is finished first.

    Without effect outside of the main thread, where Python allows no handlers of signals.
    """

    priority = 'LOWEST'  # after CheckpointHook

    def __init__(self) -> None:
        self.received: signal.Signals | None = None
        self.stopped = False
        self.previous: dict[signal.Signals, Any] = {}
        self.work_dir = Path()
        self.shortest_validation = 0

    # -------------------------------------------------------------------------------------- signals
    def before_run(self, runner: Any) -> None:
        """Installs the handlers, if this is a training run that can save when it is stopped."""
        can_save = checkpoint_hooks(runner) and runner.is_training
        if can_save and threading.current_thread() is threading.main_thread():
            self.work_dir = Path(runner.work_dir)
            self.previous = {number: signal.signal(number, self.receive) for number in SIGNALS}

    def restore(self) -> None:
        """Restores the previous handlers, at the end of training.

        In a stopped run of several processes, signals are ignored instead: when the first process
        has ended, launchers send a signal to the others.
        """
        ignore = self.stopped and get_world_size() > 1
        for number, handler in self.previous.items():
            signal.signal(number, signal.SIG_IGN if ignore else handler or signal.SIG_DFL)
        self.previous = {}

    def receive(self, number: int, frame: FrameType | None) -> None:
        """Handles a signal. The text is written directly: printing cannot be interrupted."""
        name = signal.Signals(number).name
        if self.received is not None:
            found = checkpoints_of(self.work_dir)
            last = f'the last checkpoint is {found[0]}' if found else 'there is no checkpoint'
            say(f'stopped at once by {name}; {last}')
            signal.signal(number, signal.SIG_DFL)
            os.kill(os.getpid(), number)
            return
        self.received = signal.Signals(number)
        if is_main_process():
            say(f'{name}: stopping after this iteration; a second signal stops at once')

    # --------------------------------------------------------------------------------------- checks
    def after_train_iter(
        self, runner: Any, batch_idx: int, data_batch: Any = None, outputs: Any = None
    ) -> None:
        loop = runner.train_loop
        counts_epochs = isinstance(loop, EpochBasedTrainLoop)
        length = len(loop.dataloader) if counts_epochs else 0
        if batch_idx + 1 == length:
            return  # `after_train_epoch` follows, with a checkpoint of CheckpointHook
        iteration = runner.iter + 1
        is_last = not counts_epochs and iteration == loop.max_iters
        if (is_last or self.asks(iteration)) and self.is_wanted():
            if counts_epochs:
                runner.message_hub.update_info(EPOCH_POSITION, [batch_idx + 1, length])
            self.stop(runner, iteration, runner.epoch)

    def after_train_epoch(self, runner: Any) -> None:
        if isinstance(runner.train_loop, EpochBasedTrainLoop) and self.is_wanted():
            self.stop(runner, runner.iter, runner.epoch + 1)

    def before_val_epoch(self, runner: Any) -> None:
        if isinstance(runner._train_loop, BaseLoop):
            length = torch.tensor(len(runner.val_dataloader))
            all_reduce(length, 'min')  # processes may have one batch more than others
            self.shortest_validation = int(length)

    def after_val_iter(
        self, runner: Any, batch_idx: int, data_batch: Any = None, outputs: Any = None
    ) -> None:
        if (
            isinstance(runner._train_loop, BaseLoop)
            and batch_idx < self.shortest_validation
            and self.asks(batch_idx)
            and any(hook.saved == runner.iter for hook in checkpoint_hooks(runner))
            and self.is_wanted()
        ):
            self.stop(runner, runner.iter, runner.epoch)

    def after_val_epoch(self, runner: Any, metrics: dict[str, float] | None = None) -> None:
        if isinstance(runner._train_loop, BaseLoop) and self.is_wanted():
            self.stop(runner, runner.iter, runner.epoch)

    def after_run(self, runner: Any) -> None:
        self.restore()

    @staticmethod
    def asks(iteration: int) -> bool:
        """Whether the processes ask each other now; a single one asks itself each time."""
        return get_world_size() == 1 or iteration % EVERY == 0

    def is_wanted(self) -> bool:
        """Whether a process has received a signal; all have the same answer."""
        number = torch.tensor(int(self.received or 0))
        all_reduce(number, 'max')
        if int(number):
            self.received = signal.Signals(int(number))
        return self.received is not None

    # ----------------------------------------------------------------------------------------- stop
    def stop(self, runner: Any, iteration: int, epoch: int) -> None:
        """Saves, and ends the process.

        Args:
            runner: The runner.
            iteration: Number of finished iterations.
            epoch: Number of finished epochs.

        Raises:
            SystemExit: With the exit code `STOPPED`.
            CheckpointNotSaved, NonFiniteError, WorkDirError: See `ReliableRunner.save_checkpoint`.
        """
        for hook in checkpoint_hooks(runner):
            hook.save_between(runner, iteration, epoch)
        barrier()  # launchers end the others when the first process has ended
        self.stopped = True
        name = self.received.name if self.received is not None else 'request'
        message = f'stopped by {name} after iteration {iteration}; resume with: {command()}'
        if is_main_process():
            runner.logger.info(message)
            say(message)
        if MESSAGE_FILE in os.environ and os.environ.get('LOCAL_RANK', '0') == '0':
            Path(os.environ[MESSAGE_FILE]).write_text(message + '\n')
        raise SystemExit(STOPPED)


def checkpoint_hooks(runner: Any) -> list[ReliableCheckpointHook]:
    """The hooks of a run that can save between two ordinary checkpoints."""
    return [hook for hook in runner.hooks if isinstance(hook, ReliableCheckpointHook)]


def command() -> str:
    """The command that resumes this run."""
    typed = os.environ.get(COMMAND)
    if typed is None:
        typed = shlex.join(['python', *sys.argv])
    words = shlex.split(typed)
    if '--resume' not in words:
        return printable(f'{typed} --resume')
    after = words.index('--resume') + 1
    if after < len(words) and not words[after].startswith('-'):
        del words[after]  # an earlier checkpoint than that of this stop
        typed = shlex.join(words)
    return printable(typed)


def say(line: str) -> None:
    """Writes a line to stderr, also from a handler of signals."""
    os.write(2, f'{printable(line)}\n'.encode())


# ----------------------------------------------------------------------------------- data workers
class PatientWorker:
    """Initializes a data worker that outlives the signals to its group, until the run has ended.

    Ctrl-C and torchrun's signals reach data workers too, which the last iteration still needs.
    They end with their process, or when it sends them SIGTERM.

    Args:
        initialize: The function that the data loader has for that.
    """

    def __init__(self, initialize: Callable[[int], object] | None) -> None:
        self.initialize = initialize

    def __call__(self, worker: int) -> None:
        for number in (signal.SIGINT, signal.SIGUSR1):
            signal.signal(number, signal.SIG_IGN)
        parent = multiprocessing.parent_process()  # not the system's, which may be a fork server
        if parent is not None:
            # Only a thread that waits for a signal learns who sent it.
            signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGTERM])
            threading.Thread(target=end_for, args=(parent.pid,), daemon=True).start()
        if self.initialize is not None:
            self.initialize(worker)


def end_for(parent: int) -> None:
    """Ends this process when another one sends SIGTERM, whatever others send."""
    while signal.sigwaitinfo([signal.SIGTERM]).si_pid != parent:
        pass
    os._exit(0)  # as torch's own handler; it reports any other code as a crash


def make_patient(loader: DataLoader) -> None:
    """Makes the workers of a data loader `PatientWorker`s."""
    loader.worker_init_fn = PatientWorker(loader.worker_init_fn)
