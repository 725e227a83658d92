"""What asking ahead gains with a teacher that answers slowly: it sleeps for as long as the student's steps take, or
some times that, and `--query-workers` batches are asked about at once.

python benchmarks/query.py
"""

from __future__ import annotations

import argparse
import contextlib
import csv
import io
import os
import statistics
import sys
import tempfile
import time
from pathlib import Path

import numpy as np

from timm_rld.bench.measure import markdown, run_script
from timm_rld.errors import UserError

SECONDS = 'TIMM_RLD_BENCH_QUERY_SECONDS'  # that a call takes: the trainer imports this file as another module
BATCH = 64


def ask(images: np.ndarray) -> np.ndarray:
    """What `--teacher-query` calls here."""
    time.sleep(float(os.environ[SECONDS]))
    return np.full((len(images), 10), 0.1, np.float32)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument('--student', default='cifar_resnet8', metavar='NAME', help='default: cifar_resnet8')
    parser.add_argument('--workers', type=int, nargs='+', default=[0, 1, 2, 4], metavar='N', help='default: 0 1 2 4')
    parser.add_argument('--times', type=float, nargs='+', default=[1, 4], metavar='X',
                        help="what a call takes, in steps of the student (default: 1 4)")  # fmt: skip
    parser.add_argument('--rounds', type=int, default=3, metavar='N', help='default: 3')


def run(args: argparse.Namespace) -> str:
    """Return the table as Markdown: the time of a step over the student's own, medians of the rounds' ratios. In each
    round the student's own is measured first, so that variation in machine speed affects all alike."""
    found: dict[tuple[float, int], list[float]] = {}
    for _ in range(args.rounds):
        alone = step_seconds(args.student, 0.0, '--distill', 'none')
        for times in args.times:
            for workers in args.workers:
                flags = ['--teacher-query', f'{Path(__file__).parent.name}.query:ask', '--query-workers', str(workers)]
                found.setdefault((times, workers), []).append(step_seconds(args.student, times * alone, *flags) / alone)
    return markdown([
        {'a call takes': f'{times:g} steps', **{f'{w} ahead': statistics.median(found[times, w]) for w in args.workers}}
        for times in args.times
    ])  # fmt: skip


def step_seconds(student: str, seconds: float, *flags: str) -> float:
    """Return the seconds of a step in the second epoch on the sample."""
    from train_distill import main

    os.environ[SECONDS] = str(seconds)
    with tempfile.TemporaryDirectory() as folder, contextlib.redirect_stdout(io.StringIO()):
        argv = ['--student', student, '--epochs', '2', '--workers', '0', '--no-speed', '--min-teacher-acc', '0',
                '-b', str(BATCH), '--output', folder, '--experiment', 'x', *flags]  # fmt: skip
        if main(argv):
            raise UserError(f'a run failed: {" ".join(argv)}')
        rows = list(csv.DictReader((Path(folder) / 'x' / 'summary.csv').open(encoding='utf-8')))
    return BATCH / float(rows[-1]['images_per_second'])


def main(argv: list[str] | None = None) -> int:
    """Run the benchmark and print its result. Returns the exit code."""
    return run_script(sys.modules[__name__], argv)


if __name__ == '__main__':
    sys.exit(main())
