"""Images a second of the check of a dataset, `timm-rld data`, on JPEGs of about 32 KB.

python benchmarks/data_check.py
"""

from __future__ import annotations

import argparse
import io
import os
import sys
import tempfile
import time
from pathlib import Path

import numpy as np

from timm_rld.bench.measure import markdown, run_script
from timm_rld.bench.photographs import draw_photograph
from timm_rld.data import check_data, open_splits
from timm_rld.errors import UsageError
from timm_rld.files import cores

CLASSES = 10


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument('--images', type=int, default=20_000, metavar='N', help='default: 20000, of 32 KB each')
    differ = 'images that differ; the others are copies with other bytes at their end (default: 300)'
    parser.add_argument('--distinct', type=int, default=300, metavar='N', help=differ)
    parser.add_argument('--threads', type=int, nargs='+', default=[cores()], metavar='N', help='default: one a core')
    parser.add_argument('--output', metavar='DIR', help='for the images meanwhile; default: a temporary folder')


def run(args: argparse.Namespace) -> str:
    """The table as Markdown."""
    for name, least in (('images', 10 * CLASSES), ('distinct', 1)):
        if (value := getattr(args, name)) < least:
            raise UsageError(f'--{name} {value}: must be at least {least}')
    with tempfile.TemporaryDirectory(dir=args.output) as folder:
        size = write_images(Path(folder), args.images, args.distinct)
        rows = [measure(folder, threads) for threads in args.threads]
    return f'{args.images:,} JPEGs of {size / 1024:.0f} KB on average, read before.\n\n{markdown(rows)}'


def write_images(root: Path, count: int, distinct: int) -> float:
    """Write a training split of nine tenths of the images and a validation split; return the mean size in bytes."""
    rng = np.random.default_rng(0)
    originals = []
    for _ in range(distinct):
        file = io.BytesIO()
        draw_photograph(rng, (400, 300)).save(file, 'JPEG', quality=88)
        originals.append(file.getvalue())
    for i in range(count):
        path = root / ('validation' if i % 10 == 9 else 'train') / f'class{i // 10 % CLASSES}' / f'{i:06}.jpg'
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(originals[i % distinct] + i.to_bytes(4, 'big'))  # what follows an image is not read
    return sum(map(len, originals)) / distinct


def measure(folder: str, threads: int) -> dict[str, float | str]:
    """Check the images, and return the time and the processor's time."""
    splits = open_splits(None, data_dir=folder)
    started, cpu = time.perf_counter(), os.times()
    findings = check_data(*splits, threads=threads, progress=True)
    seconds, after = time.perf_counter() - started, os.times()
    images = sum(map(len, findings.splits))
    work = after.user + after.system - cpu.user - cpu.system
    return {
        'threads': str(threads), 'images/s': images / seconds, 'seconds': seconds, 'user + sys, seconds': work,
        'user + sys an image, ms': 1000 * work / images,
    }  # fmt: skip


def main(argv: list[str] | None = None) -> int:
    """Run the benchmark and print its result. Returns the exit code."""
    return run_script(sys.modules[__name__], argv)


if __name__ == '__main__':
    sys.exit(main())
