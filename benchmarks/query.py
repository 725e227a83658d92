"""What asking ahead gains with a teacher that answers slowly. Student and teacher sleep: a step of the student takes a
fixed time, a call of the teacher some times that, and `--query-workers` batches are asked about at once, in `fit()`.

python benchmarks/query.py
"""

from __future__ import annotations

import argparse
import contextlib
import io
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import torch
from torch import nn

from timm_rld import DistillationTask, QueryTeacher
from timm_rld.bench.measure import markdown, run_script
from timm_rld.config import Config, resolve
from timm_rld.data import create_loaders, open_splits
from timm_rld.distributed import create_accelerator
from timm_rld.engine import fit

BATCH = 16


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument('--seconds', type=float, default=0.2, metavar='X', help='of a step (default: 0.2)')
    parser.add_argument('--times', type=float, nargs='+', default=[1, 4], metavar='X',
                        help="what a call takes, in steps of the student (default: 1 4)")  # fmt: skip
    parser.add_argument('--workers', type=int, nargs='+', default=[0, 1, 2, 4], metavar='N', help='default: 0 1 2 4')
    parser.add_argument('--steps', type=int, default=20, metavar='N', help='default: 20')


def run(args: argparse.Namespace) -> str:
    """Return the table as Markdown: the time of a step over what the student sleeps in it."""
    rows: list[dict[str, float | str]] = []
    for times in args.times:
        row: dict[str, float | str] = {'a call takes': f'{times:g} steps'}
        for workers in args.workers:
            seconds = step_seconds(args.seconds, times * args.seconds, workers, args.steps)
            row[f'{workers} ahead'] = seconds / args.seconds
        rows.append(row)
    return markdown(rows)


class Sleeping(nn.Module):
    """A linear classifier whose forward pass takes a while in training."""

    def __init__(self, seconds: float) -> None:
        super().__init__()
        self.seconds, self.head = seconds, nn.Linear(3, 10)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if self.training:
            time.sleep(self.seconds)
        return self.head(x.mean((2, 3)))


def step_seconds(of_student: float, of_teacher: float, workers: int, steps: int) -> float:
    """Return the seconds of a step of the second epoch, on the sample."""

    def ask(images: np.ndarray) -> np.ndarray:
        time.sleep(of_teacher)
        return np.full((len(images), 10), 0.1, np.float32)

    config = resolve(Config(teacher='none', student='sleeping', batch_size=BATCH, epochs=2, lr=0.1, workers=0,
                            teacher_epochs=0, log_interval=10**9))  # fmt: skip
    data = dict(input_size=(3, 32, 32), mean=(0.5,) * 3, std=(0.25,) * 3, interpolation='bilinear', crop_pct=1.0,
                crop_mode='center')  # fmt: skip
    train, val = open_splits(None, 'train', 'test')
    loaders = create_loaders(train, val, data, batch_size=BATCH, validation_batch_size=BATCH)
    loaders[0].sampler.length, loaders[1].sampler.length = steps * BATCH, BATCH
    teacher = QueryTeacher(ask, 10, workers=workers)
    task = DistillationTask(Sleeping(of_student), teacher, 'kd', normalize=lambda x: x / 255)
    accelerator = create_accelerator(**config.arguments_of('create_accelerator'))
    with tempfile.TemporaryDirectory() as folder, contextlib.redirect_stdout(io.StringIO()):
        rows = fit(task, *loaders, accelerator, config, log_file=Path(folder) / 'log.csv')
    return BATCH / rows[-1]['images_per_second']


def main(argv: list[str] | None = None) -> int:
    """Run the benchmark and print its result. Returns the exit code."""
    return run_script(sys.modules[__name__], argv)


if __name__ == '__main__':
    sys.exit(main())
