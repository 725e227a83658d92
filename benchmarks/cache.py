"""Filling a teacher cache and looking rows up in it, by the number of rows.

python benchmarks/cache.py
"""

from __future__ import annotations

import argparse
import statistics
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import torch

from timm_rld.bench.measure import markdown, run_script
from timm_rld.cache import DTYPES, Rows, rounded
from timm_rld.errors import UsageError


def add_arguments(parser: argparse.ArgumentParser) -> None:
    rows = [10**4, 10**5, 10**6]
    parser.add_argument('--rows', type=int, nargs='+', default=rows, metavar='N', help='default: 10000 100000 1000000')
    parser.add_argument('--num-classes', type=int, default=1000, metavar='N', help='default: 1000')
    parser.add_argument('--batch-size', type=int, default=256, metavar='N', help='default: 256')
    parser.add_argument('--dtype', choices=tuple(DTYPES), default='float16', help='default: float16')
    parser.add_argument('--folder', metavar='DIR', help='on the disk to measure (default: the temporary folder)')


def run(args: argparse.Namespace) -> str:
    """The table as Markdown."""
    for name in ('num_classes', 'batch_size'):
        if getattr(args, name) < 1:
            raise UsageError(f'--{name.replace("_", "-")} {getattr(args, name)}: must be at least 1')
    if min(args.rows) < args.batch_size:
        raise UsageError(f'--rows {min(args.rows)}: must be at least a batch ({args.batch_size})')
    rows = [bench_cache(n, args.num_classes, args.batch_size, args.dtype, args.folder) for n in args.rows]
    return markdown(rows)


def bench_cache(
    length: int, classes: int, batch_size: int, dtype: str = 'float16', folder: str | None = None, lookups: int = 200
) -> dict[str, float | str]:
    """Fill a file of rows in random order, batch by batch, then read random batches of it.

    Args:
        length: rows N.
        classes: C.
        lookups: batches that are read.

    Returns:
        A row: `rows`, `MB`, `create ms`, `open ms`, `round ms`, `write ms`, `lookup ms`, `complete ms`: of a batch, but
        for create, open, and complete (to find out whether all rows are there).
    """
    generator = np.random.default_rng(0)
    logits = 4 * torch.randn(batch_size, classes, generator=torch.Generator().manual_seed(0))
    target = torch.arange(batch_size) % classes
    clock = time.perf_counter
    with tempfile.TemporaryDirectory(dir=folder) as made:
        path = Path(made) / 'rows.safetensors'
        started = clock()
        rows = Rows.create(path, length, classes, DTYPES[dtype])
        create = clock() - started
        order = generator.permutation(length)
        rounding, writing, reading = [], [], []
        for start in range(0, length, batch_size):
            where = order[start : start + batch_size]
            started = clock()
            stored = rounded(logits[: len(where)], target[: len(where)], DTYPES[dtype])
            rounding.append(clock() - started)
            started = clock()
            rows.write(where, stored)
            writing.append(clock() - started)
        started = clock()
        rows = Rows(path)
        opening = clock() - started
        started = clock()
        assert rows.filled().all()
        complete = clock() - started
        for _ in range(lookups):
            where = generator.integers(length, size=batch_size)
            started = clock()
            found = rows.read(where).float()
            reading.append(clock() - started)
            assert found.shape == (batch_size, classes)
        size = path.stat().st_size
    median = {'round': rounding, 'write': writing, 'lookup': reading}
    return {
        'rows': f'{length:,}', 'MB': size / 1e6, 'create ms': 1000 * create, 'open ms': 1000 * opening,
        **{f'{name} ms': 1000 * statistics.median(times) for name, times in median.items()},
        'complete ms': 1000 * complete,
    }  # fmt: skip


def main(argv: list[str] | None = None) -> int:
    """Run the benchmark and print its result. Returns the exit code."""
    return run_script(sys.modules[__name__], argv)


if __name__ == '__main__':
    sys.exit(main())
