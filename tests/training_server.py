"""Starts tools/train.py in forked processes, which saves each the five seconds of its imports.

    python training_server.py      # then lines of JSON on its input: {"argv": [...], "log": FILE}

Each run is a session of its own with all its processes, whose number is printed; when it has ended,
its exit status is printed (negative: the signal that killed it). `TrainingServer` is the client.
"""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

TESTS = Path(__file__).parent


def serve():
    answers = os.fdopen(os.dup(1), 'w')
    os.dup2(2, 1)  # what is printed elsewhere is no answer
    sys.path.insert(0, str(TESTS.parent / 'tools'))
    import mmseg.evaluation
    import mmseg.models  # noqa: F401
    import train

    for line in sys.stdin:
        request = json.loads(line)
        pid = os.fork()
        if pid == 0:
            os.setsid()
            log = os.open(request['log'], os.O_WRONLY | os.O_CREAT | os.O_APPEND)
            for stream in (1, 2):
                os.dup2(log, stream)
            sys.argv = ['train.py', *request['argv']]
            os.environ |= request.get('environment', {})
            train.main()
            sys.stdout.flush()
            os._exit(0)
        print(pid, file=answers, flush=True)
        _, status = os.waitpid(pid, 0)
        print(os.waitstatus_to_exitcode(status), file=answers, flush=True)


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

    def start(self, argv, log):
        """Starts a run and returns the number of its process group."""
        request = dict(argv=[str(arg) for arg in argv], log=str(log))
        self.process.stdin.write(json.dumps(request) + '\n')
        self.process.stdin.flush()
        self.pid = int(self.process.stdout.readline())
        return self.pid

    def is_running(self):
        """Whether the run's main process is there (a zombie, not waited for yet, is not)."""
        try:
            state = Path(f'/proc/{self.pid}/stat').read_text().rpartition(')')[2].split()[0]
        except FileNotFoundError:
            return False
        return state != 'Z'

    def kill_when(self, moment, seconds=120):
        """Kills the run when `moment()` is true; returns whether that was before its end."""
        deadline = time.monotonic() + seconds
        while self.is_running():
            assert time.monotonic() < deadline, f'{moment} did not come in {seconds} s'
            if moment():
                # between the test and the signal the run may end by itself
                os.killpg(self.pid, signal.SIGKILL)
                break
            time.sleep(0.0002)
        return self.wait() == -signal.SIGKILL

    def wait(self):
        """The exit status of the run."""
        return int(self.process.stdout.readline())

    def close(self):
        self.process.stdin.close()
        self.process.wait()


if __name__ == '__main__':
    serve()
