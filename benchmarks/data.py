"""Images a second of our loader beside timm's own, from the same files with the same augmentation.

python benchmarks/data.py
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import Dataset, default_collate

from timm_rld.bench.measure import interleaved, markdown, run_script
from timm_rld.bench.photographs import write_photographs
from timm_rld.data import Loader, Source, open_split, train_transform
from timm_rld.errors import UsageError, UserError
from timm_rld.files import cores

NORM = dict(mean=(0.485, 0.456, 0.406), std=(0.229, 0.224, 0.225))
SEED = 0


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument('--data-dir', metavar='DIR', help='as in train_distill.py; default: synthetic photographs')
    parser.add_argument('--dataset', metavar='NAME', help='as in train_distill.py')
    parser.add_argument('--train-split', metavar='NAME', default='train', help='default: train')
    parser.add_argument('--input-key', metavar='NAME', help='image column')
    parser.add_argument('--target-key', metavar='NAME', help='label column')
    parser.add_argument('--photo', metavar='WxH', default='500x375', help='size of synthetic ones (default: 500x375)')
    parser.add_argument('--img-size', type=int, default=224, metavar='N', help='default: 224')
    parser.add_argument('--batch-size', type=int, default=128, metavar='N', help='default: 128')
    parser.add_argument('--workers', type=int, default=min(4, cores()), metavar='N', help="default: a run's")
    parser.add_argument('--batches', type=int, default=6, metavar='N', help='in a round (default: 6)')
    parser.add_argument('--repeats', type=int, default=7, metavar='N', help='rounds (default: 7)')


def run(args: argparse.Namespace) -> str:
    """The table as Markdown, and what a worker's time goes into."""
    for name, least in (('img_size', 1), ('batch_size', 1), ('workers', 0), ('batches', 1), ('repeats', 1)):
        if (value := getattr(args, name)) < least:
            raise UsageError(f'--{name.replace("_", "-")} {value}: must be at least {least}')
    columns = dict(dataset=args.dataset, input_key=args.input_key, target_key=args.target_key)
    with contextlib.ExitStack() as stack:
        root, note = args.data_dir, ''
        if root is None and args.dataset is None:
            size = parse_size(args.photo)
            # enough for a round; a folder of a few hundred also stays in the system's cache, as the clock wants it
            count = min(args.batches * args.batch_size, 512)
            root = stack.enter_context(tempfile.TemporaryDirectory())
            write_photographs(Path(root) / args.train_split, count, size)
            note = f'No --data-dir: {count} synthetic JPEGs of {size[0]}×{size[1]}.\n\n'
        source = open_split(split=args.train_split, flag='--train-split', data_dir=root, **columns)
        rows, shares = bench_data(
            source, args.img_size, args.batch_size, workers=args.workers, batches=args.batches, repeats=args.repeats
        )
    most = max(shares, key=shares.get)
    listed = ', '.join(f'{name} {100 * share:.0f}%' for name, share in shares.items())
    return f'{note}{markdown(rows)}\n\nWhere the time of a worker goes: {listed}; {most} limits.'


def bench_data(
    source: Source, img_size: int, batch_size: int, *, workers: int, batches: int, repeats: int
) -> tuple[list[dict[str, float | str]], dict[str, float]]:
    """Images a second of each loader: median over rounds of ``batches`` batches in which all take turns.

    All give normalised float batches in the end: timm's in a worker (without its prefetcher) or in the training process
    (with it), ours in the training process, as the networks do it.

    Returns:
        A row for each loader: `loader`, `images/s`, `of timm` (its prefetcher); and the shares of decode, augment and
        collate in the time of a worker of ours.
    """
    if source.streamed:
        raise UserError(f'--dataset: {source.split!r} is streamed; this benchmark needs one that can be read by index')
    images = _Images(source.dataset, batches * batch_size)
    size = (3, img_size, img_size)
    loaders: dict[str, Callable[[], Iterable[Tensor]]] = {
        'timm, prefetcher': _timms(images, size, batch_size, workers, use_prefetcher=True),
        'timm, no prefetcher': _timms(images, size, batch_size, workers, use_prefetcher=False),
    }
    ours = dataclasses.replace(source, dataset=images)
    for name, draft in (('timm_rld', False), ('timm_rld --jpeg-draft', True)):
        transform = train_transform(size, **NORM, jpeg_draft=draft)
        loaders[name] = _ours(Loader(ours, transform, batch_size, training=True, seed=SEED, workers=workers))
    with _one_thread():  # further ones would spin between two batches, on the cores of the workers
        seconds = interleaved({name: _epoch(batches_of) for name, batches_of in loaders.items()}, repeats, 'cpu')
    reference = seconds['timm, prefetcher']
    rows: list[dict[str, float | str]] = [
        {'loader': name, 'images/s': len(images) / s, 'of timm': reference / s} for name, s in seconds.items()
    ]
    return rows, _shares(ours, train_transform(size, **NORM), min(batch_size, 64))


def parse_size(text: str) -> tuple[int, int]:
    """`500x375` → (500, 375)."""
    width, _, height = text.partition('x')
    if not (width.isdigit() and height.isdigit() and int(width) > 0 and int(height) > 0):
        raise UsageError(f'--photo {text}: expected WIDTHxHEIGHT, e.g. 500x375')
    return int(width), int(height)


class _Images(Dataset):
    """``length`` images of a dataset of timm's, from its start and round again, so that a round has as many for all."""

    def __init__(self, dataset: Any, length: int) -> None:
        self.dataset, self.length, self.transform = dataset, length, None
        if (reader := getattr(dataset, 'reader', None)) is not None:
            self.reader = _Repeated(reader)

    def __getitem__(self, index: int) -> tuple[Any, int]:
        image, target = self.dataset[index % len(self.dataset)]
        return (self.transform(image.convert('RGB')) if self.transform else image), target

    def __len__(self) -> int:
        return self.length


class _Repeated:
    """A reader of timm's, from its start again after its end."""

    def __init__(self, reader: Any) -> None:
        self.reader = reader

    def __getitem__(self, index: int) -> Any:
        return self.reader[index % len(self.reader)]

    def filename(self, index: int, **kwargs: Any) -> str:
        return self.reader.filename(index % len(self.reader), **kwargs)


def _epoch(batches_of: Callable[[], Iterable[Tensor]]) -> Callable[[], None]:
    """Take all batches of one epoch. Between epochs workers wait, so that no loader works in another's time."""

    def step() -> None:
        for pixels in batches_of():
            assert pixels.dtype == torch.float32

    return step


def _timms(
    images: _Images, size: tuple[int, int, int], batch_size: int, workers: int, use_prefetcher: bool
) -> Callable[[], Iterable[Tensor]]:
    from timm.data import create_loader

    loader = create_loader(
        _Images(images.dataset, len(images)), size, batch_size, is_training=True, interpolation='random', **NORM,
        num_workers=workers, use_prefetcher=use_prefetcher, device=torch.device('cpu'),
    )  # fmt: skip
    return lambda: (pixels for pixels, _ in loader)


def _ours(loader: Loader) -> Callable[[], Iterable[Tensor]]:
    mean, std = (255 * torch.tensor(NORM[name]).view(-1, 1, 1) for name in ('mean', 'std'))
    epoch = 0

    def batches_of() -> Iterator[Tensor]:
        nonlocal epoch
        epoch += 1
        loader.set_epoch(epoch)
        return (pixels.float().sub_(mean).div_(std) for pixels, _, _ in loader)

    return batches_of


def _shares(source: Source, transform: Callable[[Any], Tensor], count: int) -> dict[str, float]:
    """Shares of decode, augment and collate in the time for ``count`` images, in this process on one thread."""
    with _one_thread():
        marks = [time.perf_counter()]
        images = [source.read(i) for i in range(count)]
        marks.append(time.perf_counter())
        samples = [(transform(image), target, i) for i, (image, target) in enumerate(images)]
        marks.append(time.perf_counter())
        default_collate(samples)
        marks.append(time.perf_counter())
    return {
        name: (end - start) / (marks[-1] - marks[0])
        for name, start, end in zip(('decode', 'augment', 'collate'), marks, marks[1:])
    }


@contextlib.contextmanager
def _one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def main(argv: list[str] | None = None) -> int:
    """Run the benchmark and print its result. Returns the exit code."""
    return run_script(sys.modules[__name__], argv)


if __name__ == '__main__':
    sys.exit(main())
