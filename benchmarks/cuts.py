"""Smaller versions of a dataset for studies: its first classes, fewer images a class, a long tail.

python benchmarks/cuts.py --data DIR --output CUT --classes 10
python benchmarks/cuts.py --data DIR --output CUT --classes 20 --imbalance 50
"""

from __future__ import annotations

import argparse
import hashlib
import json
import re
import sys
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from timm_rld.bench.measure import run_script
from timm_rld.errors import UsageError, UserError

METADATA = b'huggingface'  # where `datasets` keeps the features of a Parquet file


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument('--data', type=Path, required=True, metavar='DIR', help='a dataset in Parquet files')
    parser.add_argument('--output', type=Path, required=True, metavar='DIR', help='a folder for the cut')
    parser.add_argument('--classes', type=int, metavar='N', help='the first N classes (default: all)')
    parser.add_argument('--images', type=int, metavar='N', help='at most N training images a class (default: all)')
    parser.add_argument(
        '--imbalance', type=float, default=1, metavar='R',
        help='training images of the largest class over those of the smallest; between them class c of C has '
        'n_max * R^(-c/(C-1)) (default: 1)',
    )  # fmt: skip
    parser.add_argument('--seed', type=int, default=0, metavar='N', help='of the choice of images (default: 0)')
    parser.add_argument('--target-key', default='label', metavar='NAME', help='label column (default: label)')


def run(args: argparse.Namespace) -> str:
    """Write the cut. Returns what it holds as Markdown."""
    for name, least in (('classes', 2), ('images', 1), ('imbalance', 1)):
        if (value := getattr(args, name)) is not None and value < least:
            raise UsageError(f'--{name} {value}: must be at least {least}')
    if args.output.exists() and any(args.output.iterdir()):
        raise UserError(f'--output {args.output}: is not empty')
    lines = ['| split | images | of each class |', '| --- | --- | --- |']
    tables = {split: pa.concat_tables(map(pq.read_table, files)) for split, files in splits_of(args.data).items()}
    if args.target_key not in tables['train'].column_names:
        raise UserError(f'--target-key {args.target_key}: no such column in {args.data}')
    there = int(tables['train'][args.target_key].to_numpy().max()) + 1
    classes = args.classes or there
    if classes > there:
        raise UserError(f'--classes {classes}: {args.data} has {there}')
    for split, table in tables.items():
        labels = table[args.target_key].to_numpy()
        counts = np.bincount(labels, minlength=classes)
        wanted = counts[:classes]
        if split == 'train':
            wanted = long_tail(np.minimum(wanted, args.images or counts.max()), args.imbalance)
        kept = choose(labels, wanted, args.seed)
        cut = first_classes(table.take(kept), args.target_key, classes)
        (args.output / 'data').mkdir(parents=True, exist_ok=True)
        # groups of rows as `datasets` writes them: an image is read without the whole column
        pq.write_table(cut, args.output / 'data' / f'{split}-00000-of-00001.parquet', row_group_size=1000)
        listed = np.bincount(labels[kept], minlength=classes)
        equal = str(listed[0]) if len(set(listed)) == 1 else ', '.join(map(str, listed))
        lines.append(f'| {split} | {len(kept)} | {equal} |')
    return '\n'.join(lines)


def splits_of(folder: Path) -> dict[str, list[Path]]:
    """Return the Parquet files of a dataset by split, `train-00000-of-00001.parquet` and so on."""
    found: dict[str, list[Path]] = {}
    for file in sorted(folder.expanduser().rglob('*.parquet')):
        if match := re.match(r'(train|validation|test)\b', file.name):
            found.setdefault(match[1], []).append(file)
    if 'train' not in found or len(found) < 2:
        raise UserError(f'--data {folder}: expected train-*.parquet and validation-*.parquet or test-*.parquet')
    return found


def long_tail(counts: np.ndarray, imbalance: float) -> np.ndarray:
    """Return how many images each class keeps: n_c = n_max · R^(-c/(C-1)), at least one and no more than there are.

    Args:
        counts: images of each class `[C]`.
        imbalance: R, n of the first class over n of the last.
    """
    shares = imbalance ** (-np.arange(len(counts)) / max(len(counts) - 1, 1))
    return np.minimum(counts, np.maximum(np.rint(counts.max() * shares), 1)).astype(int)


def choose(labels: np.ndarray, wanted: np.ndarray, seed: int) -> np.ndarray:
    """Return the rows that are kept, in their order: of class c the ``wanted[c]`` lowest by a hash of seed and row, so
    that a smaller cut is part of a larger one.

    Args:
        labels: class of each row `[n]`.
        wanted: images of each class that is kept `[C]`.
    """
    of_class = [np.flatnonzero(labels == c) for c in range(len(wanted))]
    kept = [sorted(rows.tolist(), key=lambda row: _hash(seed, row))[:n] for rows, n in zip(of_class, wanted)]
    return np.sort(np.concatenate([np.array(rows, dtype=np.int64) for rows in kept]))


def _hash(seed: int, row: int) -> bytes:
    return hashlib.sha256(f'{seed} {row}'.encode()).digest()


def first_classes(table: pa.Table, target_key: str, classes: int) -> pa.Table:
    """Return a table whose features name its first classes alone."""
    metadata = dict(table.schema.metadata or {})
    if METADATA in metadata:
        about = json.loads(metadata[METADATA])
        feature = about['info']['features'][target_key]
        if 'names' in feature:
            feature['names'] = feature['names'][:classes]
        metadata[METADATA] = json.dumps(about).encode()
    return table.replace_schema_metadata(metadata)


def main(argv: list[str] | None = None) -> int:
    """Write a cut and print what it holds. Returns the exit code."""
    return run_script(sys.modules[__name__], argv)


if __name__ == '__main__':
    sys.exit(main())
