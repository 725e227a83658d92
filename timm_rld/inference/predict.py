"""A model asked about image files."""

from __future__ import annotations

import csv
import dataclasses
import json
import os
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from tqdm import tqdm

from ..config import Config
from ..data import Loader, Source, eval_transform
from ..data.folders import IMAGE_TYPES, FileDataset, FileReader, is_junk, leads_back
from ..distributed import create_accelerator
from ..engine import wants_channels_last
from ..errors import SampleError, UsageError, UserError, check_file, writing
from ..files import cores, write_atomic
from ..pairing import to_memory_format
from .files import csv_of, parquet_rows
from .model import OpenModel, open_model

FORMATS = ('csv', 'json', 'parquet')
Row = dict[str, Any]


def find_images(paths: Iterable[str]) -> list[str]:
    """Return files as they are, and of folders the images in them and below, by name; in the order of the arguments.

    Raises:
        UserError: for a path that is not there, and a folder without images.
    """
    found: list[str] = []
    for path in paths:
        path = os.path.expanduser(path)
        if not os.path.isdir(path):
            if not os.path.exists(path):
                raise UserError(f'{path}: no such file or folder')
            found.append(path)
            continue
        inside: list[str] = []
        for folder, folders, names in os.walk(path, followlinks=True):
            folders[:] = sorted(name for name in folders if not is_junk(name) and not leads_back(folder, name))
            images = (n for n in names if os.path.splitext(n)[1].lower() in IMAGE_TYPES and not is_junk(n))
            inside += [os.path.join(folder, name) for name in images]
        if not inside:
            raise UserError(f'{path}: no images in this folder or below it (expected {", ".join(IMAGE_TYPES)})')
        found += sorted(inside, key=lambda name: name.split(os.sep))
    return found


class ImageFiles(Source):
    """Image files as a split, whose "class" is 0 for an image that could be read. In the place of another comes a blank
    one of class -1."""

    @classmethod
    def of(cls, paths: Sequence[str], in_chans: int) -> ImageFiles:
        """Return the split of some files."""
        dataset = FileDataset(FileReader('', [(path, 0) for path in paths]))
        return cls(dataset, 'files', 1, None, False, {1: 'L', 3: 'RGB'}[in_chans])

    def name(self, index: int) -> str:
        """Return the path of an image, as it was given."""
        return self.dataset.reader.filename(index, absolute=True)

    def read(self, index: int, decode: Callable[[Image.Image], Image.Image] | None = None) -> tuple[Image.Image, int]:
        try:
            return super().read(index, decode)
        except SampleError:
            blank = Image.new(self.image_mode, (64, 64))
            return (decode(blank) if decode else blank), -1

    def explain(self, index: int) -> str:
        """Return why an image cannot be read, as a line."""
        try:
            super().read(index)
        except SampleError as e:
            return f'{self.name(index)}: cannot be read: {str(e).partition("cannot be read: ")[2]}'
        return f'{self.name(index)}: could not be read'  # it can now


def predict_files(
    name: str,
    paths: Sequence[str],
    *,
    top_k: int = 5,
    format: str | None = None,
    output: str | None = None,
    weights: str = 'last',
    device: str | None = None,
    batch_size: int = 64,
    workers: int | None = None,
) -> None:
    """Write the most probable classes of image files, one row per image in the order of the arguments.

    Args:
        name: a run, a model folder, `hf-hub:user/model`, or a timm name.
        paths: files and folders.
        top_k: classes of each image.
        format: `csv`, `json` or `parquet`; None for that of the output's name, else CSV.
        output: a file; None for stdout.
        weights: of a run: `last`, `best` or `ema`.
        device: `cpu`, `cuda`, or None for a GPU where there is one.
        batch_size: images at a time.
        workers: processes that read; None: 4, or the cores if fewer.

    Raises:
        UserError: after all others are written, where some images could not be read; before, for a path or model that
            is not there, or an output that cannot be written.
    """
    format = format or (Path(output).suffix[1:].lower() if output else '') or 'csv'
    if format not in FORMATS:
        raise UsageError(f'--output {output}: of which --format is it: {", ".join(FORMATS)}?')
    if format == 'parquet' and output is None:
        raise UsageError('--format parquet: give --output FILE')
    for flag, value, least in (('--top-k', top_k, 1), ('--batch-size', batch_size, 1), ('--workers', workers, 0)):
        if value is not None and value < least:
            raise UsageError(f'{flag} {value}: must be at least {least}')
    if int(os.environ.get('WORLD_SIZE', 1)) > 1:
        raise UsageError('predict works in one process; give each its own files, or use --batch-size and --workers')
    if device == 'cuda' and not torch.cuda.is_available():
        raise UsageError('--device cuda: torch finds no GPU; use cpu')
    file = None if output is None else Path(output).expanduser()
    if file is not None:
        check_file('--output', file)
    files = find_images(paths)
    opened = open_model(name, weights)
    source = ImageFiles.of(files, opened.data_config['input_size'][0])
    source.exif = not (opened.settings or Config()).no_exif
    rows, broken = [], []
    printer = _Printer(min(top_k, len(opened.class_names))) if file is None and format == 'csv' else None
    batches = predictions(opened, source, top_k, batch_size, workers, device)
    with tqdm(total=len(files), unit='image', disable=not sys.stderr.isatty(), leave=False) as bar:
        for index, row in batches:
            bar.update()
            if row is None:
                broken.append(index)
                bar.write(source.explain(index), file=sys.stderr)
            elif printer is not None:
                printer.print(row)
            else:
                rows.append(row)
    if printer is None:
        _write(rows, format, file, min(top_k, len(opened.class_names)))
    if broken:
        raise UserError(f'{len(broken):,} of {len(files):,} images could not be read; the others are written')


@torch.inference_mode()
def predictions(
    opened: OpenModel, source: ImageFiles, top_k: int, batch_size: int, workers: int | None, device: str | None
) -> Iterator[tuple[int, Row | None]]:
    """Yield for each image its index and its row: `file`, `class_1`, `prob_1`, `class_2`, …; None where it cannot be
    read."""
    settings = dataclasses.replace(opened.settings or Config())
    cpu = device == 'cpu' or not torch.cuda.is_available()
    precision = None if cpu and settings.mixed_precision == 'fp16' else settings.mixed_precision
    accelerator = create_accelerator(cpu=device == 'cpu', mixed_precision=precision, cpu_threads=settings.cpu_threads)
    c, names = opened.data_config, opened.class_names
    transform = eval_transform(
        c['input_size'], interpolation=c['interpolation'], crop_pct=c['crop_pct'], crop_mode=c['crop_mode'],
        mean=c['mean'], jpeg_draft=settings.jpeg_draft,
    )  # fmt: skip
    few = len(source) <= batch_size
    loader = Loader(
        source, transform, batch_size, training=False,
        workers=(0 if few else min(4, cores())) if workers is None else workers,
        pin_memory=accelerator.device.type == 'cuda',
    )  # fmt: skip
    model, normalize = opened.model.to(accelerator.device), opened.normalize.to(accelerator.device)
    channels_last = wants_channels_last(settings, accelerator)
    to_memory_format(model, torch.channels_last if channels_last else torch.contiguous_format)
    loader.set_epoch(0)
    for pixels, readable, indices in loader:
        with accelerator.autocast():
            logits = model(normalize(pixels.to(accelerator.device, non_blocking=True)))
        found = logits.float().softmax(dim=1).topk(min(top_k, logits.shape[1]), dim=1)
        for index, there, probs, classes in zip(
            indices.tolist(), readable.tolist(), found.values.tolist(), found.indices.tolist()
        ):
            row: Row = {'file': source.name(index)}
            for place, (label, prob) in enumerate(zip(classes, probs), 1):
                row |= {f'class_{place}': names[label], f'prob_{place}': prob}
            yield index, None if there < 0 else row


def _columns(top_k: int) -> list[str]:
    return ['file', *(f'{what}_{i}' for i in range(1, top_k + 1) for what in ('class', 'prob'))]


class _Printer:
    """Writes CSV to stdout, a row as soon as it is known."""

    def __init__(self, top_k: int) -> None:
        self.writer = csv.DictWriter(sys.stdout, _columns(top_k), lineterminator='\n')
        self.writer.writeheader()

    def print(self, row: Row) -> None:
        """Write a row."""
        self.writer.writerow({k: f'{v:.6g}' if isinstance(v, float) else v for k, v in row.items()})


def _write(rows: list[Row], format: str, file: Path | None, top_k: int) -> None:
    data: str | bytes
    if format == 'json':
        places = range(1, top_k + 1)
        data = json.dumps(
            [
                {
                    'file': row['file'],
                    'predictions': [{'class': row[f'class_{i}'], 'prob': row[f'prob_{i}']} for i in places],
                }
                for row in rows
            ],
            indent=1,
            ensure_ascii=False,
        )
    elif format == 'csv':
        data = csv_of(rows) if rows else ','.join(_columns(top_k)) + '\n'
    else:
        data = parquet_rows([{k: _text(v) for k, v in row.items()} for row in rows], _columns(top_k))
    if file is None:
        print(data)
        return
    with writing(f'--output {file}'):
        write_atomic(file, data)


def _text(value: Any) -> Any:
    """A name without bytes that are no text, which Parquet has none of."""
    return (
        value.encode('utf-8', 'surrogateescape').decode('utf-8', 'backslashreplace')
        if isinstance(value, str)
        else value
    )
