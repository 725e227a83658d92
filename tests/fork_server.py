"""Processes that are forked from one that has everything loaded, since the imports of a fresh one take seconds.

A test starts trainings with `ForkServer.start`, or has programs that are started with `sys.executable` come from it as
well: `ForkServer.python` is a stand-in for the interpreter (see forked_python.py).

`python fork_server.py FD` is the server, which listens there. A request is a line of JSON (argv: of Python; env, cwd,
executable) with the file descriptors of stdin, stdout and stderr; the answers are the pid and, at its end, the exit
code (minus the number of the signal that ended it), a line each. A process whose connection is closed is killed.
"""

from __future__ import annotations

import contextlib
import gc
import json
import os
import random
import runpy
import select
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).parent.parent


class Training:
    """The running processes of one training."""

    def __init__(self, connections: list[socket.socket], log: Path) -> None:
        self.connections, self.log = connections, log
        self.answers = [c.makefile() for c in connections]
        self.pids = [int(a.readline()) for a in self.answers]

    def signal(self, number: int) -> None:
        for pid in self.pids:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, number)

    def wait(self, timeout: float = 120) -> list[int]:
        """Exit codes, or minus the signal's number."""
        for connection in self.connections:
            connection.settimeout(timeout)
        return [int(a.readline()) for a in self.answers]

    def output(self) -> str:
        return self.log.read_text(errors='replace')


class ForkServer:
    """The process that others are forked from."""

    def __init__(self) -> None:
        self.folder = Path(tempfile.mkdtemp())  # the path of a socket is short
        self.env = dict(os.environ, HF_HUB_OFFLINE='1', OMP_NUM_THREADS='1', OMP_WAIT_POLICY='PASSIVE')
        self.path = str(self.folder / 'socket')
        with socket.socket(socket.AF_UNIX) as listener:
            listener.bind(self.path)
            listener.listen(128)
            command = [sys.executable, __file__, str(listener.fileno())]
            self.process = subprocess.Popen(command, stdin=subprocess.PIPE, env=self.env, pass_fds=[listener.fileno()])
        self.python = self.folder / 'python'
        stand_in = Path(__file__).with_name('forked_python.py').read_text()
        self.python.write_text(f'#!{sys.executable} -IS\n{stand_in}')
        self.python.chmod(0o755)
        settings = {'socket': self.path, 'python': sys.executable, 'env': dict(os.environ)}
        (self.folder / 'settings.json').write_text(json.dumps(settings))

    def start(self, argv: list[str], log: Path, processes: int = 1, env: dict[str, str] | None = None) -> Training:
        """Start a training on some processes."""
        with socket.socket() as s:
            s.bind(('127.0.0.1', 0))
            port = str(s.getsockname()[1])
        connections = []
        for rank in range(processes):
            place = {}
            if processes > 1:
                place = dict(RANK=rank, LOCAL_RANK=rank, WORLD_SIZE=processes, LOCAL_WORLD_SIZE=processes,
                             MASTER_ADDR='127.0.0.1', MASTER_PORT=port, ACCELERATE_USE_CPU='true')  # fmt: skip
            place = {k: str(v) for k, v in {**self.env, **place, **(env or {})}.items()}
            request = dict(argv=['train_distill.py', *argv], env=place, cwd=str(ROOT), executable=sys.executable)
            connection = socket.socket(socket.AF_UNIX)
            connection.connect(self.path)
            with open(os.devnull, 'rb') as nothing, log.open('ab') as out:
                files = [nothing.fileno(), out.fileno(), out.fileno()]
                socket.send_fds(connection, [json.dumps(request).encode() + b'\n'], files)
            connections.append(connection)
        return Training(connections, log)

    def run(self, argv: list[str], log: Path, processes: int = 1, **kwargs) -> Training:
        """Start a training and wait for its end, which must be a good one."""
        training = self.start(argv, log, processes, **kwargs)
        codes = training.wait()
        assert codes == [0] * processes, (codes, training.output())
        return training

    def close(self) -> None:
        self.process.stdin.close()
        self.process.wait(30)
        shutil.rmtree(self.folder)


def kill_until_done(
    server: ForkServer, argv: list[str], log: Path, rng: random.Random, longest: float, kills: int, processes: int = 1
) -> int:
    """Run to the end, with so many kills at random moments on the way (fewer if it ends before). Returns the kills."""
    done = 0
    while done < kills:
        training = server.start(argv, log, processes)
        time.sleep(rng.uniform(0.05, longest))
        training.signal(signal.SIGKILL)
        if all(code == 0 for code in training.wait()):
            return done
        done += 1
    server.run(argv, log, processes)
    return done


def serve(listener: socket.socket) -> dict:
    """Fork a process for each connection, until stdin is closed. Returns, in a process, what it is to run."""
    import accelerate  # noqa: F401  (what a run loads on its way)
    import datasets  # noqa: F401
    import torch.distributed.run  # noqa: F401

    import timm_rld.compare  # noqa: F401
    import timm_rld.engine  # noqa: F401
    import timm_rld.export  # noqa: F401
    import timm_rld.report  # noqa: F401
    import timm_rld.tune  # noqa: F401
    import train_distill  # noqa: F401

    torch.set_num_threads(1)
    gc.collect()
    gc.freeze()  # or each process would copy all pages when it looks for what may be collected
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # nobody asks how a keeper ended
    while True:
        ready = select.select([listener, sys.stdin], [], [])[0]
        if sys.stdin in ready:
            os._exit(0)
        connection, _ = listener.accept()
        if not os.fork():
            listener.close()
            return keep(connection)
        connection.close()


def keep(connection: socket.socket) -> dict:
    """Fork the process that is asked for, and tell its pid and its end. Returns, in the process, what it is to run."""
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    text, files, _, _ = socket.recv_fds(connection, 1 << 20, 3)
    while text and not text.endswith(b'\n'):
        text += connection.recv(1 << 20)
    if not text:
        os._exit(0)
    pid = os.fork()
    if not pid:
        connection.close()
        os.setpgrp()
        for number, file in enumerate(files):
            os.dup2(file, number)
            os.close(file)
        return json.loads(text)
    for file in (0, 1, 2, *files):
        os.close(file)
    with contextlib.suppress(BrokenPipeError):
        connection.sendall(b'%d\n' % pid)
    while os.waitid(os.P_PID, pid, os.WEXITED | os.WNOHANG | os.WNOWAIT) is None:
        if select.select([connection], [], [], 0.01)[0]:  # closed
            os.kill(pid, signal.SIGKILL)
            break
    _, status = os.waitpid(pid, 0)
    with contextlib.suppress(BrokenPipeError):
        connection.sendall(b'%d\n' % os.waitstatus_to_exitcode(status))
    os._exit(0)


def run(request: dict) -> None:
    """Do what Python does with such arguments."""
    import torch

    os.environ.clear()
    os.environ.update(request['env'])
    os.chdir(request['cwd'])
    for number, stream in enumerate(('stdin', 'stdout', 'stderr')):
        mode, old = 'w' if number else 'r', getattr(sys, stream)
        new = open(number, mode, 1, encoding=old.encoding, errors=old.errors, closefd=False)  # noqa: SIM115
        setattr(sys, stream, new)
    torch.set_num_threads(int(os.environ.get('OMP_NUM_THREADS') or os.cpu_count()))
    sys.executable = request['executable']
    argv = [word for word in request['argv'] if word != '-u']
    folders = os.environ.get('PYTHONPATH', '').split(os.pathsep)
    if argv[0] == '-m':
        sys.argv = argv[1:]
        sys.path[:0] = ['', *folders]
        runpy.run_module(argv[1], run_name='__main__', alter_sys=True)
    elif argv[0] == '-c':
        sys.argv = ['-c', *argv[2:]]
        sys.path[:0] = ['', *folders]
        exec(compile(argv[1], '<string>', 'exec'), {'__name__': '__main__'})
    else:
        sys.argv = argv
        sys.path[:0] = [str(Path(argv[0]).parent), *folders]
        runpy.run_path(argv[0], run_name='__main__')


if __name__ == '__main__':
    sys.path.insert(0, str(ROOT))
    run(serve(socket.socket(fileno=int(sys.argv[1]))))
