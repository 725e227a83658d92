"""The page of `timm-rld data`: what was found, and a mosaic of each class."""

from __future__ import annotations

import base64
import io
from collections.abc import Iterator, Sequence

import numpy as np
from PIL import Image, ImageOps

from ..data import Findings, Source
from ..data.check import split_sizes
from ..data.scan import read_small
from ..errors import SampleError
from .page import Table, render

PICTURES = 3_000_000  # bytes of all mosaics together, as they stand in the page
LEAST = 3_000  # bytes of a mosaic; where there is no room for so many, the classes after them have none
ITEMS = 200  # of a finding, that are named
# tiles of a mosaic, their side in pixels, quality of the JPEG: the first that is small enough is taken
_MOSAICS = ((6, 64, 80), (6, 64, 60), (5, 48, 60), (4, 48, 50), (4, 40, 40), (3, 32, 40), (2, 32, 30))


def findings_page(findings: Findings, sources: Sequence[Source], name: str) -> str:
    """Return the page as HTML, below 5 MB, with no picture or script outside of it.

    Args:
        findings: of :func:`check_data`.
        sources: the splits that were checked, for their pictures; a streamed one is not read again.
        name: of the dataset.
    """
    return render(
        'data.html', name=name, findings=findings.findings, hurting=findings.hurting,
        tiles=[(s.name, f'{len(s):,}', split_sizes(s)) for s in findings.splits], kinds=_kinds(findings),
        classes=_class_rows(findings, sources), splits=[s.name for s in findings.splits], at_most=ITEMS,
    )  # fmt: skip


def check_installed() -> None:
    """Raise UserError where a page cannot be made, before the work that it is to show."""
    render('macros.html')


def _kinds(findings: Findings) -> Table:
    """How many images of each format and mode."""
    rows = []
    for what in ('formats', 'modes'):
        counts = [getattr(s, what) for s in findings.splits]
        found = dict.fromkeys(k for c in counts for k in c)
        rows += [[what.removesuffix('s'), k, *(f'{c.get(k, 0):,}' for c in counts)] for k in found]
    return Table(['', '', *(f'{s.name}#' for s in findings.splits)], rows)


def _class_rows(findings: Findings, sources: Sequence[Source]) -> Iterator[tuple[str, list[int], str]]:
    """Name, images in each split and mosaic (a data URI, or an empty text) of each class."""
    room = max(LEAST, PICTURES // max(1, len(findings.class_names)))
    left = PICTURES
    orders = [np.argsort(np.where(s.readable, s.targets, -1), kind='stable') for s in findings.splits]
    sorted_targets = [np.where(s.readable, s.targets, -1)[o] for s, o in zip(findings.splits, orders)]
    for i, name in enumerate(findings.class_names):
        picture = ''
        if left >= room:
            for source, order, targets in zip(sources, orders, sorted_targets):
                if not source.streamed and len(members := order[slice(*np.searchsorted(targets, (i, i + 1)))]):
                    picture = _mosaic(source, members, room)
                    break
        left -= len(picture)
        yield name, [int(s.per_class[i]) for s in findings.splits], picture


def _mosaic(source: Source, members: np.ndarray, room: int) -> str:
    """Some images of a class, evenly spaced, side by side in one JPEG as a data URI of at most ``room`` bytes."""
    most, side, _ = _MOSAICS[0]
    tiles = []
    for index in members[np.unique(np.linspace(0, len(members) - 1, most).astype(int))].tolist():
        try:
            tiles.append(ImageOps.fit(read_small(source, index, 2 * side), (side, side)))
        except SampleError:  # gone since
            continue
    for count, side, quality in _MOSAICS:
        used = tiles[:count]
        if not used:
            return ''
        mosaic = Image.new(used[0].mode, (side * len(used), side))
        for i, tile in enumerate(used):
            mosaic.paste(tile.resize((side, side)), (i * side, 0))
        file = io.BytesIO()
        mosaic.save(file, 'JPEG', quality=quality, optimize=True)
        picture = f'data:image/jpeg;base64,{base64.b64encode(file.getvalue()).decode()}'
        if len(picture) <= room:
            return picture
    return ''
