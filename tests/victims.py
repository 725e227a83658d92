"""Training processes to be killed: forked from one that has everything loaded, since a start costs seconds.

`python victims.py` is that process: it reads a request a line (JSON: argv, env, log) and answers with the pid of a fork
that runs `train_distill.main(argv)`, its output going to the log; or (JSON: wait) with how a fork has ended.
"""

from __future__ import annotations

import contextlib
import json
import os
import random
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).parent.parent


class Victim:
    """Running processes of one training."""

    def __init__(self, stable: Stable, pids: list[int], log: Path) -> None:
        self.stable, self.pids, self.log = stable, pids, log

    def signal(self, number: int) -> None:
        for pid in self.pids:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, number)

    def wait(self, timeout: float = 120) -> list[int]:
        """Exit codes, or minus the signal's number."""
        return [self.stable.ask(wait=pid, timeout=timeout) for pid in self.pids]

    def output(self) -> str:
        return self.log.read_text(errors='replace')


class Stable:
    """The process that victims are forked from."""

    def __init__(self) -> None:
        env = dict(os.environ, HF_HUB_OFFLINE='1', OMP_NUM_THREADS='1', OMP_WAIT_POLICY='PASSIVE')
        self.process = subprocess.Popen(
            [sys.executable, __file__], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=env, cwd=ROOT
        )

    def ask(self, **request) -> int:
        self.process.stdin.write(json.dumps(request) + '\n')
        self.process.stdin.flush()
        return int(self.process.stdout.readline())

    def start(self, argv: list[str], log: Path, processes: int = 1, env: dict[str, str] | None = None) -> Victim:
        """Start a training on some processes."""
        log.touch()
        with socket.socket() as s:
            s.bind(('127.0.0.1', 0))
            port = str(s.getsockname()[1])
        pids = []
        for rank in range(processes):
            place = {}
            if processes > 1:
                place = dict(RANK=rank, LOCAL_RANK=rank, WORLD_SIZE=processes, LOCAL_WORLD_SIZE=processes,
                             MASTER_ADDR='127.0.0.1', MASTER_PORT=port, ACCELERATE_USE_CPU='true')  # fmt: skip
            place = {k: str(v) for k, v in {**place, **(env or {})}.items()}
            pids.append(self.ask(argv=argv, env=place, log=str(log)))
        return Victim(self, pids, log)

    def run(self, argv: list[str], log: Path, processes: int = 1, **kwargs) -> Victim:
        """Start a training and wait for its end, which must be a good one."""
        victim = self.start(argv, log, processes, **kwargs)
        codes = victim.wait()
        assert codes == [0] * processes, (codes, victim.output())
        return victim

    def close(self) -> None:
        self.process.stdin.close()
        self.process.wait(30)


def kill_until_done(
    stable: Stable, argv: list[str], log: Path, rng: random.Random, longest: float, kills: int, processes: int = 1
) -> int:
    """Run to the end, with so many kills at random moments on the way (fewer if it ends before). Returns the kills."""
    done = 0
    while done < kills:
        victim = stable.start(argv, log, processes)
        time.sleep(rng.uniform(0.05, longest))
        victim.signal(signal.SIGKILL)
        if all(code == 0 for code in victim.wait()):
            return done
        done += 1
    stable.run(argv, log, processes)
    return done


def serve() -> None:
    import accelerate  # noqa: F401  (what a run loads on its way)
    import datasets  # noqa: F401
    import torch

    import timm_rld.engine  # noqa: F401
    from train_distill import main

    torch.set_num_threads(1)
    for line in sys.stdin:
        request = json.loads(line)
        if 'wait' in request:
            deadline = time.monotonic() + request['timeout']
            code = -99
            while time.monotonic() < deadline:
                pid, status = os.waitpid(request['wait'], os.WNOHANG)
                if pid:
                    code = os.waitstatus_to_exitcode(status)
                    break
                time.sleep(0.01)
            print(code, flush=True)
            continue
        pid = os.fork()
        if pid:
            print(pid, flush=True)
            continue
        os.setpgrp()
        log = os.open(request['log'], os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.dup2(log, 1)
        os.dup2(log, 2)
        os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
        os.environ.update(request['env'])
        sys.exit(main(request['argv']))


if __name__ == '__main__':
    sys.path.insert(0, str(ROOT))
    serve()
