"""Runs tools in forked processes, which saves each the five seconds of its imports.

    python training_server.py      # then a line of JSON on its input for each run: see `serve`

Each process of a run is the leader of a session, of which its data workers are members.
`TrainingServer` is the client.
"""

import json
import os
import signal
import socket
import subprocess
import sys
import time
import traceback
from contextlib import suppress
from pathlib import Path

TESTS = Path(__file__).parent


def serve():
    answers = os.fdopen(os.dup(1), 'w')
    os.dup2(2, 1)  # what is printed elsewhere is no answer
    sys.path.insert(0, str(TESTS.parents[1] / 'tools'))
    import mmseg.evaluation
    import mmseg.models  # noqa: F401
    import test as test_tool
    import train
    from yapf.yapflib import yapf_api

    yapf_api.FormatCode = lambda text, **_: (text, True)  # see `quick_runs` in conftest.py

    mains = {'train.py': train.main, 'test.py': test_tool.main}
    for line in sys.stdin:
        request = json.loads(line)
        pids = []
        for environment in request['environments']:
            pid = os.fork()
            if pid == 0:
                run(mains[request['argv'][0]], request['argv'], request['log'], environment)
            pids.append(pid)
        print(json.dumps(pids), file=answers, flush=True)
        statuses = [os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) for pid in pids]
        print(json.dumps(statuses), file=answers, flush=True)


def run(main, argv, log, environment):
    """What a forked process does: the main function of a tool, and no more."""
    os.setsid()
    file = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    for stream in (1, 2):
        os.dup2(file, stream)
    sys.argv = argv
    os.environ |= environment
    status = 1
    try:
        main()
        status = 0
    except SystemExit as error:
        print(error)
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)


class TrainingServer:
    """Client of the above, one run at a time."""

    def __init__(self):
        self.process = subprocess.Popen(
            [sys.executable, str(TESTS / 'training_server.py')],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env=os.environ | {'OMP_NUM_THREADS': '1', 'PYTHONUNBUFFERED': '1'},
            start_new_session=True,
        )
        self.pids = []
        self.is_over = True

    def start(self, argv, log, processes=1, environment=None):
        """Starts a tool, as one process or as one of several of a distributed run."""
        self.stop()  # what a test that failed has left
        environments = [environment or {}]
        if processes > 1:
            argv = [*argv, '--launcher', 'pytorch']
            common = {'MASTER_ADDR': '127.0.0.1', 'MASTER_PORT': str(free_port())}
            environments = [
                common | {'RANK': rank, 'LOCAL_RANK': rank, 'WORLD_SIZE': str(processes)}
                for rank in map(str, range(processes))
            ]
        request = dict(argv=[str(arg) for arg in argv], log=str(log), environments=environments)
        self.process.stdin.write(json.dumps(request) + '\n')
        self.process.stdin.flush()
        self.pids = json.loads(self.process.stdout.readline())
        self.is_over = False

    def is_running(self, rank=0):
        """Whether a process of the run is there (a zombie, not waited for yet, is not)."""
        try:
            stat = Path(f'/proc/{self.pids[rank]}/stat').read_text()
        except (FileNotFoundError, ProcessLookupError):
            return False
        return stat.rpartition(')')[2].split()[0] != 'Z'

    def kill_when(self, moment, rank=0, seconds=240, number=signal.SIGKILL):
        """Signals a process of the run, and its workers, when `moment()` is true.

        Returns whether that was before its end.
        """
        deadline = time.monotonic() + seconds
        while self.is_running(rank):
            assert time.monotonic() < deadline, f'the moment did not come in {seconds} s'
            if moment():
                with suppress(ProcessLookupError):  # before it has made its session
                    os.killpg(self.pids[rank], number)
                    return True
            time.sleep(0.0002)
        return False

    def run(self, argv, log, processes=1, environment=None):
        """Exit statuses of the processes of a whole run."""
        self.start(argv, log, processes, environment)
        return self.wait()

    def wait(self):
        """The exit status of each process (negative: the signal that killed it), when all ended."""
        self.is_over = True
        return json.loads(self.process.stdout.readline())

    def stop(self):
        """Ends the run, if there is one."""
        if self.is_over:
            return
        for pid in self.pids:
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
                os.killpg(pid, signal.SIGKILL)  # none, if it has not made its session yet
        self.wait()

    def close(self):
        self.stop()
        self.process.stdin.close()
        self.process.wait()


def free_port():
    with socket.socket() as server:
        server.bind(('127.0.0.1', 0))
        return server.getsockname()[1]


if __name__ == '__main__':
    serve()
