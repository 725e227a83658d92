"""Every image of a split read once: its size, format and mode, a digest of its bytes, and a hash of how it looks."""

from __future__ import annotations

import copy
import hashlib
import io
import threading
import warnings
from collections import deque
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import numpy as np
from PIL import Image
from tqdm import tqdm

from ..errors import SampleError
from .images import decode
from .sources import Source

# Of each image: its class, digest of its bytes, difference hash (0 where it says nothing), size, format, PIL mode.
ROW = np.dtype([
    ('target', 'i4'), ('digest', 'u8', 2), ('look', 'u8'), ('width', 'i4'), ('height', 'i4'), ('format', 'S8'),
    ('mode', 'S8'), ('readable', '?'),
])  # fmt: skip
_CHUNK = 32  # images that a thread reads at a time
Chunk = tuple[np.ndarray, dict[int, str]]


def read_all(source: Source, threads: int, progress: bool) -> tuple[np.ndarray, dict[int, str]]:
    """Return a row of :data:`ROW` for each image, and by index why it cannot be read."""
    chunks = _of_stream(source) if source.streamed else _of_files(source, threads)
    total = source.declared if source.streamed else len(source)
    rows, reasons, read = [np.zeros(0, ROW)], dict[int, str](), 0
    with warnings.catch_warnings(), tqdm(total=total, desc=source.split, unit=' images', leave=False,
                                         disable=None if progress else True) as bar:  # fmt: skip
        warnings.simplefilter('ignore')  # Pillow's, of odd EXIF and of palettes
        for chunk, why in chunks:
            rows.append(chunk)
            reasons.update({read + i: reason for i, reason in why.items()})
            read += len(chunk)
            bar.update(len(chunk))
    return np.concatenate(rows), reasons


def _of_files(source: Source, threads: int) -> Iterator[Chunk]:
    """Read an indexable split, in its order."""
    lock = threading.Lock()

    def read(indices: range) -> Chunk:
        rows, reasons = np.zeros(len(indices), ROW), dict[int, str]()
        for place, index in enumerate(indices):
            try:
                _look_at(source, index, lock, rows[place])
            except SampleError as e:
                reasons[place] = str(e).partition('cannot be read: ')[2] or str(e)
        return rows, reasons

    starts = range(0, len(source), _CHUNK)
    with ThreadPoolExecutor(threads) as pool:
        waiting: deque[Future[Chunk]] = deque()
        for start in starts:
            waiting.append(pool.submit(read, range(start, min(start + _CHUNK, len(source)))))
            if len(waiting) > 2 * threads:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()


def _look_at(source: Source, index: int, lock: threading.Lock, row: np.void) -> None:
    """Fill in the row of an image.

    Raises:
        SampleError: where a training could not read it.
    """
    row['target'] = -1 if source.targets is None else source.targets[index]
    try:
        content = _content(source, source.place(index), lock)
        if isinstance(content, Image.Image):
            _describe(row, content, _pixels(content), source)
        else:
            with Image.open(io.BytesIO(content)) as image:
                _describe(row, image, content, source)
    except Exception:
        with lock:  # the way of a training has the last word
            image, target = source.read(index)
        row['target'] = target
        _describe(row, image, _pixels(image), source)


def _content(source: Source, place: int, lock: threading.Lock) -> bytes | Image.Image:
    """The bytes of an image's file; of a dataset of torchvision, the image."""
    reader: Any = getattr(source.dataset, 'reader', None)
    if hasattr(reader, 'samples'):  # files, each opened anew
        with reader[place][0] as file:
            return file.read()
    with lock:
        if reader is None:
            return source.dataset[place][0]
        with reader[place][0] as file:
            return file.read()


def _pixels(image: Image.Image) -> bytes:
    return f'{image.mode} {image.size}'.encode() + image.tobytes()


def _describe(row: np.void, image: Image.Image, content: bytes, source: Source) -> None:
    """Decode an image, and fill in all of its row but the class."""
    row['digest'] = np.frombuffer(hashlib.blake2b(content, digest_size=16).digest(), 'u8')
    row['format'], row['mode'] = (image.format or '').encode(), image.mode.encode()
    row['width'], row['height'] = image.size
    row['look'] = difference_hash(_decode_small(image, source, 72))
    row['readable'] = True


def read_small(source: Source, index: int, side: int) -> Image.Image:
    """Return an image as a run sees it, but a JPEG decoded at the lowest scale with ``side`` pixels a side.

    Raises:
        SampleError: where it cannot be read.
    """
    return source.read(index, lambda image: _decode_small(image, source, side))[0]


def _decode_small(image: Image.Image, source: Source, side: int) -> Image.Image:
    image.draft(None, (side, side))  # libjpeg then reads the whole file too, and computes fewer pixels
    return decode(image, source.image_mode, source.exif)


def difference_hash(image: Image.Image) -> int:
    """Return 64 bits that tell how an image looks: whether grey values rise from left to right, on a grid of 9×8 cells.

    Most copies of another size or quality have the same. 0 where fewer than 16 of the 64 steps are of three grey values
    and more: flat images of different things have the same bits, too.
    """
    cells = np.asarray(image.convert('L').resize((9, 8), Image.Resampling.LANCZOS), np.int16)
    steps = cells[:, 1:] - cells[:, :-1]
    if (np.abs(steps) >= 3).sum() < 16:
        return 0
    return int(np.packbits(steps >= 3).view('u8')[0])


def _of_stream(source: Source) -> Iterator[Chunk]:
    """Read a stream once, in its order."""
    reader = copy.copy(source.dataset.reader)
    reader.is_training = False  # neither shuffled nor from its start again
    reader.set_loader_cfg(num_workers=0)
    images = iter(reader)
    while True:
        rows, reasons = np.zeros(_CHUNK, ROW), dict[int, str]()
        for place in range(_CHUNK):
            try:
                image, target = next(images)
                rows[place]['target'] = target
                _describe(rows[place], image, _pixels(image), source)
            except StopIteration:
                yield rows[:place], reasons
                return
            except Exception as e:
                reasons[place] = f'{type(e).__name__}: {e}; nothing after it was read'
                yield rows[: place + 1], reasons
                return
        yield rows, reasons
