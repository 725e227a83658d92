"""Two hosts on one machine: two network namespaces joined by a veth pair, each with its own address. Needs root and
iproute2; skips elsewhere.

python tests/two_hosts.py

Trains on both, compares with two processes of one host, kills one host in the middle, waits for the other's error, and
goes on with both.
"""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).parent.parent
HOSTS = {'rldhost0': '10.123.45.1', 'rldhost1': '10.123.45.2'}
FLAGS = [
    '--teacher', 'test_resnet', '--student', 'test_vit', '--no-teacher-pretrained', '--teacher-epochs', '1',
    '--min-teacher-acc', '0', '--batch-size', '32', '--lr', '0.01', '--img-size', '32', '--cpu-threads', '1',
    '--workers', '0', '--drop', '0.1', '--epochs', '6', '--checkpoint-interval', '3',
]  # fmt: skip


def sh(*command: str, check: bool = True) -> int:
    return subprocess.run(command, check=check, stderr=None if check else subprocess.DEVNULL).returncode


def set_up() -> None:
    tear_down()
    for name in HOSTS:
        sh('ip', 'netns', 'add', name)
    sh('ip', 'link', 'add', 'rldveth0', 'type', 'veth', 'peer', 'name', 'rldveth1')
    for i, (name, address) in enumerate(HOSTS.items()):
        sh('ip', 'link', 'set', f'rldveth{i}', 'netns', name)
        sh('ip', '-n', name, 'address', 'add', f'{address}/24', 'dev', f'rldveth{i}')
        for device in ('lo', f'rldveth{i}'):
            sh('ip', '-n', name, 'link', 'set', device, 'up')


def tear_down() -> None:
    for name in HOSTS:
        sh('ip', 'netns', 'delete', name, check=False)


def launch(rank: int, argv: list[str], log: Path) -> subprocess.Popen:
    """The line of one host, in its namespace."""
    host = list(HOSTS)[rank]
    env = dict(os.environ, ACCELERATE_USE_CPU='true', GLOO_SOCKET_IFNAME=f'rldveth{rank}', HF_HUB_OFFLINE='1')
    command = [
        'ip', 'netns', 'exec', host, sys.executable, '-m', 'accelerate.commands.launch', '--quiet', '--multi_gpu',
        '--num_machines', '2', '--num_processes', '2', '--machine_rank', str(rank),
        '--main_process_ip', HOSTS['rldhost0'], '--main_process_port', '29555', 'train_distill.py', *argv,
    ]  # fmt: skip
    with log.open('w', encoding='utf-8') as f:
        return subprocess.Popen(command, env=env, cwd=ROOT, stdout=f, stderr=subprocess.STDOUT, start_new_session=True)


def both(argv: list[str], folder: Path, name: str) -> list[subprocess.Popen]:
    return [launch(rank, argv, folder / f'{name}-{rank}.log') for rank in range(2)]


def finish(processes: list[subprocess.Popen]) -> None:
    codes = [p.wait(300) for p in processes]
    assert codes == [0, 0], codes


def kill_host(dead: int, argv: list[str], folder: Path, expected: Path) -> bool:
    """Kill one host in the middle, wait for the other's error, go on with both, and compare the student."""
    alive, run = 1 - dead, folder / argv[-1]
    victims = both(argv, folder, 'killed')
    log = folder / f'killed-{alive}.log'
    deadline = time.monotonic() + 120
    while 'student epoch 2/' not in (folder / 'killed-0.log').read_text():
        assert time.monotonic() < deadline, log.read_text()
        time.sleep(0.05)
    inside = subprocess.run(['ip', 'netns', 'pids', list(HOSTS)[dead]], capture_output=True, text=True).stdout
    for pid in inside.split():
        os.kill(int(pid), signal.SIGKILL)
    started = time.monotonic()
    code = victims[alive].wait(700)
    said = [line for line in log.read_text().splitlines() if 'train_distill.py: error' in line]
    print(f'host {dead} killed: host {alive} ended with code {code} after {time.monotonic() - started:.1f} s: {said}')
    victims[dead].wait()
    finish(both(argv, folder, 'again'))
    print('both again:', (folder / 'again-0.log').read_text().strip().splitlines()[-1])
    same = (run / 'student' / 'model.safetensors').read_bytes() == expected.read_bytes()
    print(f'the student is {"bit for bit" if same else "NOT"} that of the run that was not killed')
    return bool(same and code and said)


def main() -> int:
    if os.geteuid() or not shutil.which('ip'):
        print('skipped: needs root and iproute2')
        return 0
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        try:
            set_up()
            flags = [*FLAGS, '--output', temporary, '--resume', 'auto', '--experiment']
            weights = Path('student') / 'model.safetensors'

            env = dict(os.environ, ACCELERATE_USE_CPU='true', HF_HUB_OFFLINE='1')
            one = [sys.executable, '-m', 'accelerate.commands.launch', '--quiet', '--multi_gpu', '--num_processes', '2',
                   'train_distill.py', *flags, 'one-host']  # fmt: skip
            subprocess.run(one, env=env, cwd=ROOT, check=True, stdout=subprocess.DEVNULL)

            finish(both([*flags, 'two-hosts'], folder, 'two'))
            same = (folder / 'two-hosts' / weights).read_bytes() == (folder / 'one-host' / weights).read_bytes()
            print('two hosts:', (folder / 'two-0.log').read_text().strip().splitlines()[-1])
            print(f'the student is {"bit for bit" if same else "NOT"} that of two processes of one host')

            good = same
            for dead in (1, 0):
                good = kill_host(dead, [*flags, f'killed-{dead}'], folder, folder / 'two-hosts' / weights) and good
            return 0 if good else 1
        finally:
            tear_down()


if __name__ == '__main__':
    sys.exit(main())
