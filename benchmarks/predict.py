"""Images a second of a run's own evaluation, of the same with predictions recorded and written, and of `timm-rld
predict`, on the same folder.

python benchmarks/predict.py
"""

from __future__ import annotations

import argparse
import contextlib
import io
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import timm
import torch

from timm_rld.bench.measure import markdown, run_script
from timm_rld.bench.photographs import write_photographs
from timm_rld.data import Loader, eval_transform, open_split
from timm_rld.distributed import create_accelerator
from timm_rld.engine import Recorder, evaluate, figures, gather, parquet_of
from timm_rld.errors import UsageError
from timm_rld.files import cores
from timm_rld.hub import export_model
from timm_rld.inference import open_model
from timm_rld.inference.files import csv_of
from timm_rld.inference.predict import ImageFiles, find_images, predictions
from timm_rld.pairing import to_memory_format


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument('--model', metavar='NAME', default='resnet18', help='default: resnet18, with random weights')
    parser.add_argument('--num-classes', type=int, default=1000, metavar='N', help='default: 1000')
    parser.add_argument('--img-size', type=int, default=224, metavar='N', help='default: 224')
    parser.add_argument('--photo', metavar='WxH', default='500x375', help='size of the photographs (default: 500x375)')
    parser.add_argument('--images', type=int, default=512, metavar='N', help='default: 512')
    parser.add_argument('--batch-size', type=int, default=64, metavar='N', help='default: 64')
    parser.add_argument('--workers', type=int, default=min(4, cores()), metavar='N', help="default: a run's")
    parser.add_argument('--rounds', type=int, default=5, metavar='N', help='default: 5, after one that does not count')


def run(args: argparse.Namespace) -> str:
    """The table as Markdown: each row the median of its rounds, each ratio the median of the rounds' own."""
    for name, least in (('num_classes', 2), ('images', 1), ('batch_size', 1), ('workers', 0), ('rounds', 1)):
        if (value := getattr(args, name)) < least:
            raise UsageError(f'--{name.replace("_", "-")} {value}: must be at least {least}')
    width, _, height = args.photo.partition('x')
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        write_photographs(root / 'validation', args.images, (int(width), int(height)))
        shares: list[float] = []
        ways = _ways(root, args, shares)
        seconds: dict[str, list[float]] = {name: [] for name in ways}
        for _ in range(args.rounds + 1):
            for name, way in ways.items():
                started = time.perf_counter()
                way()
                seconds[name].append(time.perf_counter() - started)
    first = next(iter(seconds))
    rows: list[dict[str, float | str]] = []
    for name, found in seconds.items():
        ratios = [a / b for a, b in zip(seconds[first][1:], found[1:])]
        rate = args.images / statistics.median(found[1:])
        ratio, spread = f'{statistics.median(ratios):.3f}', f'{min(ratios):.3f} to {max(ratios):.3f}'
        rows.append({'': name, 'images/s': rate, 'of the evaluation': ratio, 'rounds': spread})
    return f'{markdown(rows)}\n\nRecording took {100 * statistics.median(shares[1:]):.2f}% of the rest of its pass.'


def _ways(root: Path, args: argparse.Namespace, shares: list[float]) -> dict[str, Callable[[], object]]:
    """What is measured. Of each pass that records predictions, `shares` gets the time of that over that of the rest."""
    size = (3, args.img_size, args.img_size)
    config = dict(
        input_size=size, mean=(0.485, 0.456, 0.406), std=(0.229, 0.224, 0.225), interpolation='bicubic', crop_pct=0.875,
        crop_mode='center',
    )  # fmt: skip
    torch.manual_seed(0)
    model = timm.create_model(args.model, num_classes=args.num_classes)
    with contextlib.redirect_stdout(io.StringIO()):
        opened = open_model(str(export_model(model, root / 'model', data_config=config)))
    accelerator = create_accelerator()
    source = open_split(None, 'validation', flag='--val-split', data_dir=str(root), num_classes=None)
    center = eval_transform(size, interpolation='bicubic', crop_pct=0.875, crop_mode='center')
    network, normalize = opened.model.to(accelerator.device), opened.normalize.to(accelerator.device)
    to_memory_format(network, torch.channels_last)

    def judge(recorder: Recorder | None) -> None:
        place = dict(workers=args.workers, pin_memory=accelerator.device.type == 'cuda')
        loader = Loader(source, center, args.batch_size, training=False, **place)
        spent = [0.0]

        def timed(*batch: torch.Tensor) -> None:
            began = time.perf_counter()
            recorder(*batch)
            spent[0] += time.perf_counter() - began

        started = time.perf_counter()
        evaluate(lambda x: network(normalize(x)), loader, accelerator, on_batch=None if recorder is None else timed)
        if recorder is not None:
            ended = time.perf_counter()
            table = gather({'student': recorder}, accelerator, args.num_classes)
            figures(table, 'student', recorder.temperature, args.num_classes)
            parquet_of(table, source.file_names())
            shares.append((spent[0] + time.perf_counter() - ended) / (ended - started - spent[0]))

    def ask() -> None:
        files = ImageFiles.of(find_images([str(root / 'validation')]), 3)
        csv_of([row for _, row in predictions(opened, files, 5, args.batch_size, args.workers, None) if row])

    return {
        'evaluation of a run': lambda: judge(None),
        'with predictions': lambda: judge(Recorder()),
        'timm-rld predict': ask,
    }


def main(argv: list[str] | None = None) -> int:
    """Run the benchmark and print its result. Returns the exit code."""
    return run_script(sys.modules[__name__], argv)


if __name__ == '__main__':
    sys.exit(main())
