"""Whether validation images are training images too, as far as names, sizes and paths tell."""

from __future__ import annotations

import filecmp
import os
from collections import defaultdict
from collections.abc import Iterable
from typing import Any

import numpy as np

from .sources import Source

LOOKED_AT = 2000  # validation images, spread over the split; all where one of these is a training image too
COMPARED = 16  # pairs of files that are read: icons and bitmaps of one size have equal sizes


def overlap(train: Source, val: Source) -> str:
    """Return a line on validation images that are training images too, or an empty text.

    Files are the same where their real paths are, or their class, name and size; of those with equal names and sizes a
    few are compared byte by byte. Rows of a table of `hfds/` are the same where both splits are slices of one.
    """
    where = f'--val-split {val.split} and --train-split {train.split}'
    if (count := _common_rows(train, val)) > 0:
        return f'{where}: {count:,} of {len(val):,} validation images are training images too, rows of the same split'
    if val.streamed or train.streamed:
        return ''
    if (archive := _tar(val)) and archive == _tar(train):
        return f'{where}: both are {archive}'
    pairs = _same_files(train, val, np.unique(np.linspace(0, len(val) - 1, min(LOOKED_AT, len(val))).astype(int)))
    if pairs and len(val) > LOOKED_AT:
        pairs = _same_files(train, val, range(len(val)))
    if not pairs:
        return ''
    a, b = pairs[0]
    return (
        f'{where}: {len(pairs):,} of {len(val):,} validation images are training images too (the same file, or class, '
        f'name and size): {b} is {a}. The validation accuracy will be too high.'
    )


def _same_files(train: Source, val: Source, indices: Iterable[int]) -> list[tuple[str, str]]:
    """Return the pairs (training file, validation file) that are the same, of the validation images at some indices."""
    theirs, ours = train.files(), val.files()
    if theirs is None or ours is None or train.targets is None or val.targets is None:
        return []
    classes = val.targets.tolist()
    looked_for = [(ours[i], (classes[i], os.path.basename(ours[i]))) for i in indices]
    wanted = {name for _, name in looked_for}
    by_name: dict[tuple[int, str], list[str]] = defaultdict(list)
    for file, target in zip(theirs, train.targets.tolist()):
        if (name := (target, os.path.basename(file))) in wanted:
            by_name[name].append(file)
    same: list[tuple[str, str]] = []
    alike: list[tuple[str, str]] = []
    for path, name in looked_for:
        others = by_name.get(name, [])
        if not others or (there := _stat(path)) is None:
            continue
        for other in others:
            if (found := _stat(other)) is None or found.st_size != there.st_size:
                continue
            one_file = (found.st_dev, found.st_ino) == (there.st_dev, there.st_ino) and there.st_ino
            (same if one_file else alike).append((other, path))
            break
    some = alike[:: max(1, len(alike) // COMPARED)][:COMPARED]
    if some and sum(_equal(*pair) for pair in some) * 2 >= len(some):
        same += alike
    return same


def _tar(source: Source) -> str:
    """Return the real path of the tar that a split is read from, or an empty text."""
    root = str(getattr(getattr(source.dataset, 'reader', None), 'root', None) or '')
    return os.path.realpath(root) if root.endswith('.tar') else ''


def _stat(path: str) -> os.stat_result | None:
    try:
        return os.stat(path)
    except OSError:
        return None


def _equal(a: str, b: str) -> bool:
    try:
        return filecmp.cmp(a, b, shallow=False)
    except OSError:
        return False


def _common_rows(train: Source, val: Source) -> int:
    """Return how many rows two slices of one split of `hfds/` (`train[:80%]`, `train[70%:]`) have in common."""
    a, b = (_slices(source) for source in (train, val))
    return sum(max(0, min(x[2], y[2]) - max(x[1], y[1])) for x in a for y in b if x[0] == y[0])


def _slices(source: Source) -> list[tuple[str, int, int]]:
    """Return the slices (split, from, to) that a split of `hfds/` is made of; none where that is not known."""
    columns: Any = getattr(getattr(source.dataset, 'reader', None), 'dataset', None)
    if not hasattr(columns, 'unique') or not columns.info.splits:
        return []
    import datasets

    lengths = {name: info.num_examples for name, info in columns.info.splits.items()}
    try:
        parts = datasets.ReadInstruction.from_spec(source.split).to_absolute(lengths)
    except Exception:  # a spec of another kind
        return []
    bounds = ((p.splitname, p.from_, p.to) for p in parts)
    return [(name, start or 0, lengths[name] if end is None else end) for name, start, end in bounds]
