"""Kill a run at random moments, go on with it, and count the ends that are bit for bit those of the run left alone.

python tests/soak.py [--kills 50] [--processes 1] [--seed 0]
"""

from __future__ import annotations

import argparse
import random
import shutil
import signal
import tempfile
import time
from pathlib import Path

from fork_server import ForkServer

FLAGS = [
    '--teacher', 'test_resnet', '--student', 'test_vit', '--no-teacher-pretrained', '--teacher-epochs', '1',
    '--min-teacher-acc', '0', '--epochs', '3', '--batch-size', '128', '--lr', '0.01', '--img-size', '32',
    '--cpu-threads', '1', '--workers', '1', '--drop', '0.2', '--drop-path', '0.2', '--mixup', '0.3', '--reprob', '0.5',
    '--model-ema', '--grad-accum-steps', '2', '--checkpoint-interval', '2',
]  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument('--kills', type=int, default=50)
    parser.add_argument('--processes', type=int, default=1)
    parser.add_argument('--seed', type=int, default=0)
    args = parser.parse_args()
    rng, fork_server = random.Random(args.seed), ForkServer()
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder)
        flags = [*FLAGS, '--output', folder, '--resume', 'auto', '--experiment']
        fork_server.run([*flags, 'whole'], out / 'warm-up.log', args.processes)
        shutil.rmtree(out / 'whole')
        started = time.monotonic()
        fork_server.run([*flags, 'whole'], out / 'whole.log', args.processes)
        longest = time.monotonic() - started
        files = ['student/model.safetensors', 'student_ema/model.safetensors', 'teacher/model.safetensors']
        expected = [(out / 'whole' / f).read_bytes() for f in files]
        print(f'the run left alone: {longest:.1f} s', flush=True)
        same = kills = runs = 0
        while kills < args.kills:
            training = fork_server.start([*flags, 'killed'], out / 'killed.log', args.processes)
            time.sleep(rng.uniform(0, longest))
            training.signal(signal.SIGKILL)
            killed = any(training.wait())
            kills += killed
            runs += 1
            fork_server.run([*flags, 'killed'], out / 'killed.log', args.processes)
            identical = [(out / 'killed' / f).read_bytes() for f in files] == expected
            same += killed and identical
            print(f'kill {kills}: {"the same" if identical else "ANOTHER END"}', flush=True)
            shutil.rmtree(out / 'killed')
        print(f'{same} of {kills} ends bit-identical')
    fork_server.close()


if __name__ == '__main__':
    main()
