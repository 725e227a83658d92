"""A list of images to leave out: one path per line, below `--data-dir` or absolute."""

from __future__ import annotations

import codecs
import os
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from ..errors import UserError

if TYPE_CHECKING:
    from .sources import Source


def read_skip_list(path: str) -> frozenset[str]:
    """Return the lines of a list; blank ones do not count.

    Raises:
        UserError: where it cannot be read.
    """
    try:
        # as the system gives the names of files, whatever their letters
        lines = os.fsdecode(Path(path).expanduser().read_bytes().removeprefix(codecs.BOM_UTF8)).split('\n')
    except OSError as e:
        raise UserError(f'--skip-list {path}: cannot be read ({e.strerror or e})') from e
    return frozenset(line.strip() for line in lines if line.strip())


def skip_name(source: Source, index: int, data_dir: str | None = None) -> str:
    """Return how a list names an image: by its file, below ``data_dir`` where it lies there (`train/cat/1.jpg`, of a
    tar `train.tar/cat/1.jpg`); an image without a file by split and row (`train/17`).
    A line break in a name is written as `\\n`."""
    reader = getattr(source.dataset, 'reader', None)
    samples = getattr(source.dataset if reader is None else reader, 'samples', None)
    place = source.place(index)
    if samples is None or not isinstance(samples[place][0], str):
        return f'{getattr(reader, "split", source.split)}/{place}'  # also of a part that is held out
    path = os.path.abspath(samples[place][0]).replace('\n', '\\n').replace('\r', '\\r')
    below = os.path.join(os.path.abspath(os.path.expanduser(data_dir)), '') if data_dir else ''
    return path.removeprefix(below) if below else path


def leave_out(source: Source, path: str | None, data_dir: str | None = None) -> Source:
    """Return a split without the images that a list names.

    Args:
        path: of the list; None: nothing is left out.

    Raises:
        UserError: for a stream, which has no names; where the list cannot be read, or names every image.
    """
    if path is None:
        return source
    if source.streamed:
        raise UserError(f'--skip-list {path}: the images of a streamed dataset have no names; leave them out of it')
    root = os.path.abspath(os.path.expanduser(data_dir)) if data_dir else ''
    below = os.path.join(root, '')
    lines = read_skip_list(path)
    by_name = {os.path.normpath(os.path.join(root, line)).removeprefix(below if root else ''): line for line in lines}
    names = [skip_name(source, i, data_dir) for i in range(len(source))]
    named = np.array([name in by_name for name in names], dtype=bool)
    if named.all():
        raise UserError(f'--skip-list {path}: names every image of the split {source.split!r}')
    out, kept = np.flatnonzero(named), np.flatnonzero(~named)
    part = source.subset(kept) if len(out) else source
    part.left_out = [*source.left_out, *((source.key(i), 'in the --skip-list') for i in out.tolist())]
    part.unlisted = lines - {by_name[names[i]] for i in out.tolist()}
    return part
