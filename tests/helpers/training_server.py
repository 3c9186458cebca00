"""Runs train.py and test.py in processes that tests kill or freeze, or that work together.

Each process is the leader of a session that its data workers belong to. The processes are forked
from one that has imported the host libraries, which saves each of them five seconds.
"""

import os
import signal
import socket
import sys
import time
from contextlib import suppress
from multiprocessing import forkserver, get_context

import torch

from helpers.in_process import load_tool, typed

CONTEXT = get_context('forkserver')


def main_of_tool():
    load_tool(sys.argv[0].removesuffix('.py')).main()


def run(main, argv, log, environment):
    """What a new process does."""
    os.setsid()
    file = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    for stream in (1, 2):
        os.dup2(file, stream)
    os.environ.update(environment)
    torch.set_num_threads(1)
    with typed(argv):
        main()


class TrainingServer:
    """Starts one run at a time, as one process or as several of a distributed run."""

    def __init__(self):
        self.processes = []
        CONTEXT.set_forkserver_preload(
            ['mmconv2former', 'mmdet.models', 'mmseg.models', 'mmseg.evaluation']
        )
        forkserver.ensure_running()  # with the environment that no test has changed

    def start(self, argv, log, processes=1, environment=None, main=main_of_tool):
        """Starts a tool, such as 'train.py' with arguments, or another function that reads argv."""
        self.stop()  # what a failed test left
        environments = [environment or {}]
        if processes > 1:
            argv = [*argv, '--launcher', 'pytorch']
            common = {'MASTER_ADDR': '127.0.0.1', 'MASTER_PORT': str(free_port())}
            environments = [
                common | {'RANK': rank, 'LOCAL_RANK': rank, 'WORLD_SIZE': str(processes)}
                for rank in map(str, range(processes))
            ]
        argv = [str(arg) for arg in argv]
        self.processes = [
            CONTEXT.Process(target=run, args=(main, argv, str(log), variables))
            for variables in environments
        ]
        for process in self.processes:
            process.start()

    @property
    def pids(self):
        return [process.pid for process in self.processes]

    def is_running(self, rank=0):
        return self.processes[rank].is_alive()

    def kill_when(self, moment, rank=0, seconds=240, number=signal.SIGKILL):
        """Signals a process of the run, and its workers, when `moment()` is true.

        Returns whether that was before its end.
        """
        deadline = time.monotonic() + seconds
        while self.is_running(rank):
            assert time.monotonic() < deadline, f'the moment did not come in {seconds} s'
            if moment():
                with suppress(ProcessLookupError):  # it has no session yet
                    os.killpg(self.pids[rank], number)
                    return True
            time.sleep(0.0002)
        return False

    def run(self, *args, **kwargs):
        """Starts a run and returns the exit codes of its processes."""
        self.start(*args, **kwargs)
        return self.wait()

    def wait(self):
        """The exit codes of all processes at their end; negative: the signal that killed one."""
        for process in self.processes:
            process.join()
        return [process.exitcode for process in self.processes]

    def stop(self):
        """Ends the run, if there is one."""
        for process in self.processes:
            if process.is_alive():
                process.kill()
                with suppress(ProcessLookupError):
                    os.killpg(process.pid, signal.SIGKILL)
        self.wait()


def free_port():
    with socket.socket() as server:
        server.bind(('127.0.0.1', 0))
        return server.getsockname()[1]
