#!/usr/bin/env python
"""Seconds, memory and size of the report of a large run: planted files of 50,000 validation images and 1,000 classes.

python benchmarks/report.py
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np

from timm_rld.bench.measure import markdown, run_script
from timm_rld.bench.photographs import write_photographs
from timm_rld.config import Config, resolve, to_yaml
from timm_rld.errors import UsageError
from timm_rld.loss import published_defaults

# what `timm-rld` runs; it then says its highest memory in KiB (a parent is told that of the fork, if it is higher)
PROGRAM = """
import sys
from timm_rld.__main__ import main
code = main(sys.argv[1:])
print(next(line for line in open('/proc/self/status') if line.startswith('VmHWM')).split()[1])
sys.exit(code)
"""


def plant_predictions(
    target: np.ndarray, classes: int, files: list[str], accuracy: dict[str, float], seed: int = 0
) -> dict[str, Any]:
    """Return the columns of a predictions.parquet: networks that are right on these shares of the images.

    Args:
        target: true classes `[N]`.
        accuracy: by `student` and `teacher`.
    """
    rng, n = np.random.default_rng(seed), len(target)
    columns: dict[str, Any] = {'index': np.arange(n), 'file': files, 'target': target}
    hard = rng.random(n)  # the same images are hard for both
    for who, share in accuracy.items():
        right = 0.7 * hard + 0.3 * rng.random(n) < share
        other = (target + np.where(rng.random(n) < 0.5, 1, rng.integers(1, classes, n))) % classes
        top1_prob = rng.uniform(0.35, 1, n)
        columns[f'{who}_top1'] = np.where(right, target, other)
        columns[f'{who}_top1_prob'] = top1_prob
        columns[f'{who}_target_prob'] = np.where(right, top1_prob, (1 - top1_prob) * rng.random(n))
        columns[f'{who}_loss'] = -np.log(np.maximum(columns[f'{who}_target_prob'], 1e-9))
    return columns


def plant_run(
    run: Path, names: list[str], columns: dict[str, Any] | None, *, epochs: int = 12, size: int = 32,
    facts: dict[str, Any] | None = None, models: bool = True, **settings: Any,
) -> Path:  # fmt: skip
    """Write the files that a finished run leaves, without weights.

    Args:
        run: its folder.
        names: of the classes.
        columns: of predictions.parquet; None: a run without.
        settings: that differ from the defaults.
    """
    import pyarrow as pa
    import pyarrow.parquet as pq

    given = Config(**{'teacher': 'cifar_resnet20', 'student': 'cifar_resnet8', 'epochs': epochs, **settings})
    config = resolve(given, published=published_defaults)
    (run / 'student').mkdir(parents=True)
    size_of = dict(input_size=[3, size, size], mean=[0.5, 0.5, 0.5], std=[0.25, 0.25, 0.25], interpolation='bilinear',
                   crop_pct=1.0, crop_mode='center', label_names=names)  # fmt: skip
    found = dict(architecture='cifar_resnet8', pretrained_cfg=size_of)
    (run / 'student' / 'config.json').write_text(json.dumps(found), encoding='utf-8')
    (run / 'args.yaml').write_text(to_yaml(config), encoding='utf-8')
    (run / 'facts.json').write_text(json.dumps({'processes': 1, 'device': 'cpu', **(facts or {})}), encoding='utf-8')
    top1 = {who: 100 * float(np.mean(columns[f'{who}_top1'] == columns['target'])) for who in ('student', 'teacher')
            if columns and f'{who}_top1' in columns}  # fmt: skip
    ramp = 1 - np.exp(-np.arange(1, epochs + 1) / (epochs / 4))
    last = top1.get('student', 60.0)
    history = [
        dict(epoch=e, train_loss=3 - 2 * x, train_task_loss=2.5 - 2 * x, train_kd_loss=2 - x, eval_loss=2.6 - 1.9 * x,
             eval_top1=last * x / ramp[-1], eval_top5=100 * x, lr=0.1 * (1 - x), images_per_second=500 + 10 * e,
             seconds_data=1.0, seconds_teacher=4.0, seconds_student=8.0, seconds_other=0.4, eval_agreement=80 * x,
             train_scd=1 - x / 2, train_mcd=1 - x / 3, train_teacher_wrong=0.2, train_masked_classes=2.0,
             train_masked_mass=0.4)
        for e, x in enumerate(ramp, 1)
    ]  # fmt: skip
    lines = [','.join(history[0]), *(','.join(f'{v:.6g}' for v in row.values()) for row in history)]
    (run / 'summary.csv').write_text('\n'.join(lines) + '\n', encoding='utf-8')
    network = dict(parameters=78_042, multiply_adds=12_600_000, weights_mb=0.31, latency_ms={'1': 1.1, '64': 20.5},
                   latency_device='CPU', best_temperature=1.1)  # fmt: skip
    teacher = dict(network, parameters=272_474, multiply_adds=41_000_000, weights_mb=1.1, best_temperature=1.9,
                   latency_ms={'1': 2.7, '64': 52.0})  # fmt: skip
    results = dict(
        teacher=config.teacher, student=config.student, distill=config.distill, epochs=epochs, seed=config.seed,
        distill_options={'alpha': 1.0, 'beta': 8.0, 'temperature': 4.0, 'alpha_temperature': None},
        num_classes=len(names), teacher_top1=top1.get('teacher', 70.0 if config.teacher else None),
        command='train_distill.py --teacher cifar_resnet20 --student cifar_resnet8', paper='A paper, 2025',
        teacher_sha256='0' * 64, versions={'python': '3.11', 'torch': '2.6'}, student_top1=history[-1]['eval_top1'],
        student_top1_best=history[-1]['eval_top1'], best_epoch=epochs, student_top1_ema=None, agreement=80.0,
        train_images_per_second=500.0, **(dict(models=dict(student=network, teacher=teacher)) if models else {}),
    )  # fmt: skip
    (run / 'results.json').write_text(json.dumps(results), encoding='utf-8')
    if columns is not None:
        pq.write_table(pa.table(columns), run / 'predictions.parquet')
    return run


def plant_photographs(root: Path, classes: int, images: int, files: int = 200) -> np.ndarray:
    """Write folders of photographs: few files, and links to them. Returns the class of each validation image."""
    write_photographs(root / 'files', files, (500, 375))
    photographs = sorted((root / 'files').rglob('*.jpg'))
    for split, count in (('train', 2 * classes), ('validation', images)):
        for i in range(count):
            folder = root / split / f'class {i % classes:05}'
            folder.mkdir(parents=True, exist_ok=True)
            (folder / f'{i:06}.jpg').symlink_to(photographs[i % files])
    return np.repeat(np.arange(classes), -(-images // classes))[:images]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument('--images', type=int, default=50_000, metavar='N', help='of validation (default: 50000)')
    parser.add_argument('--num-classes', type=int, default=1000, metavar='N', help='default: 1000')
    parser.add_argument('--epochs', type=int, default=100, metavar='N', help='default: 100')


def run(args: argparse.Namespace) -> str:
    """Plant a run, and measure `timm-rld report` on it as a program of its own; a table as Markdown."""
    for name, least in (('images', 1), ('num_classes', 2), ('epochs', 1)):
        if getattr(args, name) < least:
            raise UsageError(f'--{name.replace("_", "-")} {getattr(args, name)}: must be at least {least}')
    with tempfile.TemporaryDirectory() as folder:
        root, names = Path(folder) / 'photographs', [f'class {c:05}' for c in range(args.num_classes)]
        target = plant_photographs(root, args.num_classes, args.images)
        files = [f'{names[c]}/{i}.jpg' for i, c in enumerate(target)]
        columns = plant_predictions(target, args.num_classes, files, {'student': 0.7, 'teacher': 0.76})
        planted = plant_run(Path(folder) / 'run', names, columns, epochs=args.epochs, size=224, data_dir=str(root))
        started = time.perf_counter()
        command = [sys.executable, '-c', PROGRAM, 'report', str(planted)]
        done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
        seconds = time.perf_counter() - started
        memory = int(done.stdout.split()[-1]) / 1024
        row: dict[str, float | str] = {
            'images': f'{args.images:,}', 'classes': f'{args.num_classes:,}', 'seconds': seconds,
            'memory, MiB': f'{memory:.0f}', 'page, MB': (planted / 'report.html').stat().st_size / 1e6,
        }  # fmt: skip
    return markdown([row])


def main(argv: list[str] | None = None) -> int:
    return run_script(sys.modules[__name__], argv)


if __name__ == '__main__':
    sys.exit(main())
