"""How many of the labels that were flipped on purpose stand among the first suspects of a run's report.

python benchmarks/suspects.py

Flips some labels of the sample's validation split, trains a teacher and a student on its training split, and reads the
predictions that the run leaves.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import tempfile
from pathlib import Path

import datasets
import numpy as np

from timm_rld.bench.measure import markdown, run_script
from timm_rld.data.sources import SAMPLE_DIR
from timm_rld.errors import UsageError
from timm_rld.report.figures import read_predictions, suspects


def flip(folder: Path, count: int, seed: int) -> np.ndarray:
    """Write the sample with other labels for some validation images. Returns their indices."""
    rng, flipped = np.random.default_rng(seed), np.array([], int)
    for split in ('train', 'test'):
        table = datasets.Dataset.from_parquet(str(SAMPLE_DIR / f'{split}.parquet'), cache_dir=str(folder / 'cache'))
        if split == 'test':
            classes, found = len(table.features['label'].names), np.array(table['label'])
            flipped = rng.choice(len(table), count, replace=False)
            found[flipped] = (found[flipped] + rng.integers(1, classes, count)) % classes
            features = table.features
            table = table.remove_columns('label').add_column('label', found.tolist()).cast(features)
        table.to_parquet(folder / 'data' / f'{split}.parquet')
    return np.sort(flipped)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument('--flipped', type=int, default=20, metavar='N', help='labels (default: 20)')
    parser.add_argument('--first', type=int, default=30, metavar='N', help='suspects looked at (default: 30)')
    parser.add_argument('--seeds', type=int, nargs='+', default=[0], metavar='N', help='of the labels (default: 0)')
    parser.add_argument('--teacher', default='cifar_resnet20', metavar='NAME', help='default: cifar_resnet20')
    parser.add_argument('--student', default='cifar_resnet8', metavar='NAME', help='default: cifar_resnet8')


def run(args: argparse.Namespace) -> str:
    """Train on the flipped sample for each seed, and count; a table as Markdown."""
    if not 1 <= args.flipped <= 360:
        raise UsageError(f'--flipped {args.flipped}: must be from 1 to 360, the images of the split')
    return markdown([count(args, seed) for seed in args.seeds])


def count(args: argparse.Namespace, seed: int) -> dict[str, float | str]:
    """Return how many flipped labels stand among the first suspects of a run."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        flipped = flip(folder, args.flipped, seed)
        command = [
            sys.executable, '-m', 'train_distill', '--dataset', f'hfds/{folder / "data"}', '--val-split', 'test',
            '--teacher', args.teacher, '--student', args.student, '--no-teacher-pretrained',
            '--teacher-epochs', '7', '--epochs', '11', '--img-size', '32', '--batch-size', '64', '--lr', '0.05',
            '--train-crop-mode', 'pad', '--hflip', '0', '--color-jitter', '0', '--clip-grad', '5',
            '--sched-on-updates', '--warmup-epochs', '1', '--distill-warmup-epochs', '3',
            '--output', str(folder), '--experiment', 'run',
        ]  # fmt: skip
        subprocess.run(command, check=True, stdout=sys.stderr)
        p = read_predictions(folder / 'run' / 'predictions.parquet')
    assert p is not None
    found = p.index[suspects(p)]
    hits = np.isin(found[: args.first], flipped).sum()
    return {
        'labels flipped': str(args.flipped), 'seed': str(seed), 'student top-1': f'{100 * p.student.right.mean():.2f}',
        'suspects': str(len(found)), 'flipped among the first': f'{hits} of {min(args.first, len(found))}',
    }  # fmt: skip


def main(argv: list[str] | None = None) -> int:
    return run_script(sys.modules[__name__], argv)


if __name__ == '__main__':
    sys.exit(main())
