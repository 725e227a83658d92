"""A look at the images before a run: what was left out, and files that cannot be read."""

from __future__ import annotations

import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
from PIL import Image

from ..errors import UserError
from .folders import note_left_out
from .images import decode, reason
from .names import printable
from .skip_list import skip_name
from .sources import Source

LOOKED_AT = 2000  # images of a split: a second or two
_UNSCALED = ('I', 'F')


def first_look(train: Source, val: Source, on_bad_image: str, log: Callable[[str], None]) -> None:
    """Say what the splits leave out, and look at up to :data:`LOOKED_AT` images of each, evenly spread, by their
    headers; those whose end is missing, and null rows (all of them), are found too.

    Args:
        on_bad_image: `skip`, where another image takes the place of a training image that cannot be read.
        log: for notes, a line each.

    Raises:
        UserError: for images that cannot be read; of the training split only where they are not skipped, which those of
            a stream cannot be.
    """
    if train.streamed and on_bad_image == 'skip':
        raise UserError(
            f'--on-bad-image skip: split {train.split!r} is streamed, so no replacement can be drawn; remove the flag'
        )
    for source in (train, val):
        if source.left_out and not (source is val and val.dataset is train.dataset):
            log(f'{source.split}: left out: {note_left_out(source.left_out)}')
    if note := note_unlisted(train, val):
        log(note)
    for source, flag in ((train, '--train-split'), (val, '--val-split')):
        bad, count = look_at(source)
        if not bad:
            continue
        listed = '; '.join(f'{name} ({why})' for name, why in bad[:5]) + ('; …' if len(bad) > 5 else '')
        found = f'{flag} {source.split}: {len(bad)} of {count:,} images looked at cannot be read: {listed}'
        if source is train and on_bad_image == 'skip':
            log(f'{found}\n--on-bad-image skip: others take their place')
            continue
        other = (
            'or take others in their place with --on-bad-image skip'
            if source is train
            else 'which leaves them out with a note: --on-bad-image skip is for training images alone'
        )
        raise UserError(f'{found}\nRemove them, or list them for --skip-list FILE (one path per line), {other}')


def note_unlisted(train: Source, val: Source) -> str:
    """Return a line on what a `--skip-list` names that neither split has, or an empty text."""
    if not (unknown := sorted(train.unlisted & val.unlisted)):
        return ''
    listed = ', '.join(map(printable, unknown[:3])) + (', …' if len(unknown) > 3 else '')
    return f'--skip-list: {len(unknown)} of its lines name no image of either split: {listed}'


def look_at(source: Source, count: int = LOOKED_AT) -> tuple[list[tuple[str, str]], int]:
    """Look at images of a split without decoding those that seem whole.

    Args:
        count: how many, evenly spread.

    Returns:
        Name and reason of each that cannot be read, in order, and how many were looked at. Streams, and datasets whose
        images are not in files, are not looked at.
    """
    reader: Any = getattr(source.dataset, 'reader', None)
    if source.streamed or reader is None:
        return [], 0
    indices = set(np.linspace(0, len(source) - 1, min(count, len(source))).astype(int).tolist())
    indices.update(null := source.null_images())
    with ThreadPoolExecutor(16) as threads:
        reasons = threads.map(lambda i: None if i in null else fault(reader, source.place(i)), sorted(indices))
        found = list(zip(sorted(indices), reasons))
    bad = [(i, source.why(source.place(i), ValueError()) if i in null else why) for i, why in found if why or i in null]
    return [(_name(source, i), str(why)) for i, why in bad], len(found)


def _name(source: Source, index: int) -> str:
    path = source.path(index)
    return printable(str(path) if path is not None else skip_name(source, index))


def fault(reader: Any, place: int) -> str | None:
    """Return why an image cannot be read, by its header and its last bytes; None where it seems whole."""
    try:
        with reader[place][0] as file:
            size = file.seek(0, os.SEEK_END)
            if not size:
                return 'an empty file'
            file.seek(max(0, size - 64))
            end = file.read()
            file.seek(0)
            with Image.open(file) as image:
                whole = {'JPEG': b'\xff\xd9', 'MPO': b'\xff\xd9', 'PNG': b'IEND'}.get(image.format or '', b'')
                # a file may go on after the image: only decoding tells
                if whole not in end or image.mode in _UNSCALED:
                    decode(image, 'RGB')
    except Exception as e:
        return reason(e)
    return None
