"""What is wrong with a dataset, before training on it: every image is read once and compared with all the others."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from ..files import cores
from .names import printable
from .scan import read_all
from .skip_list import skip_name
from .sources import Source

_NAMED = 5  # images of a group that an item names
_LISTED = 1000  # items of a finding that may be true of all images
IMBALANCE = 10  # largest class / smallest, from which on it is noted
SMALL, LARGE = 0.5, 8  # shorter side / training size, below and above which it is noted


@dataclass(frozen=True)
class Finding:
    """One kind of thing that was found.

    Attributes:
        name: its heading: `broken`, `identical`, …
        hurts: whether training would stop at it, or learn or measure something else than meant.
        text: what was found and what to do, in a sentence or two.
        items: each of them, by name.
        more: how many there are beyond those in ``items``.
    """

    name: str
    hurts: bool
    text: str
    items: list[str]
    more: int = 0

    def __len__(self) -> int:
        return len(self.items) + self.more


@dataclass
class SplitSummary:
    """What a split holds.

    Attributes:
        name: of the split.
        targets: class of each image, int `[N]`; -1 where it is not known.
        readable: of each image, whether it could be decoded, bool `[N]`.
        per_class: images of each class, int `[C]`.
        formats, modes: how many images of each format (as Pillow names it) and of each of Pillow's modes.
        widths, heights: smallest, median and largest in pixels; empty where no image could be read.
    """

    name: str
    targets: np.ndarray
    readable: np.ndarray
    per_class: np.ndarray
    formats: dict[str, int]
    modes: dict[str, int]
    widths: tuple[int, ...]
    heights: tuple[int, ...]

    def __len__(self) -> int:
        return len(self.targets)


@dataclass
class Findings:
    """What :func:`check_data` found.

    Attributes:
        splits: the training split, and the validation split where there is one.
        class_names: by index.
        findings: those that would hurt first.
        broken: the lines of a list of images to leave out, for `--skip-list`.
    """

    splits: list[SplitSummary]
    class_names: list[str]
    findings: list[Finding] = field(default_factory=list)
    broken: list[str] = field(default_factory=list)

    @property
    def hurting(self) -> list[Finding]:
        """The findings that would hurt."""
        return [f for f in self.findings if f.hurts]

    def get(self, name: str) -> Finding | None:
        """The finding of a name, or None."""
        return next((f for f in self.findings if f.name == name), None)


def check_data(
    train: Source,
    val: Source | None = None,
    *,
    image_size: int | None = None,
    threads: int | None = None,
    progress: bool = False,
) -> Findings:
    """Decode every image of the splits, and compare their contents.

    Args:
        train, val: the splits, as :func:`open_splits` gives them. A streamed one is read once, in its order.
        image_size: that of the training, for the sizes that make no sense with it; None for 224.
        threads: that decode (Pillow decodes outside of Python's lock); None for one a core.
        progress: show a bar, if stderr is a terminal.

    Returns:
        What was found. Of each image about 60 bytes are kept.
    """
    sources = [train] if val is None else [train, val]
    rows, reasons = [], []
    for source in sources:
        of_split, why = read_all(source, threads or cores(), progress)
        rows.append(of_split)
        reasons.append(why)
    names = _Names(sources)
    class_names = train.class_names or [str(i) for i in range(train.num_classes)]
    splits = [_summary(s, r, len(class_names)) for s, r in zip(sources, rows)]
    images = _together(names, rows, class_names)
    found = [
        _broken(names, reasons), *_short_streams(sources, rows), *_copies(images), *_classes(splits, class_names),
        _left_out(names), _alike(images), *_sizes(images, image_size or 224),
    ]  # fmt: skip
    present = sorted((f for f in found if f is not None), key=lambda f: not f.hurts)
    broken = [names.line(s, i) for s, why in enumerate(reasons) for i in why]
    return Findings(splits, class_names, present, broken)


# ------------------------------------------------------------------------------------------------------------ comparing


class _Names:
    """Names of images: their paths below the folder that holds both splits, else split and place."""

    def __init__(self, sources: list[Source]) -> None:
        self.sources = sources
        roots = [str(root) for s in sources if (root := getattr(getattr(s.dataset, 'reader', None), 'root', None))]
        folders = {os.path.abspath(root) for root in roots}
        whole = len(folders) > 1 or sources[0].split == '.'  # `.`: the classes lie right in the folder that was named
        self.root = os.path.commonpath([f if whole else os.path.dirname(f) for f in folders] or ['.'])

    def __call__(self, split: int, index: int) -> str:
        source = self.sources[split]
        if source.streamed:
            return f'{source.split}[{index}]'
        if (path := source.path(index)) is not None:
            return printable(self.below(os.path.abspath(path)))
        key = source.key(index)
        return f'{source.split}[{key}]' if key.isdigit() else printable(f'{source.split}/{key}')

    def line(self, split: int, index: int) -> str:
        """The line of an image in a list for `--skip-list`."""
        return skip_name(self.sources[split], index)

    def left_out(self) -> Iterator[str]:
        """The files that the splits leave out, and why."""
        for source in self.sources:
            root = os.path.abspath(getattr(getattr(source.dataset, 'reader', None), 'root', None) or '.')
            for path, reason in source.left_out:
                yield f'{printable(self.below(os.path.join(root, path)))}: {reason}'

    def below(self, path: str) -> str:
        """Return a path below the folder of both splits as relative to it, and any other as it is."""
        inside = path.startswith(self.root + os.sep)
        return os.path.relpath(path, self.root) if inside else path


def _summary(source: Source, rows: np.ndarray, num_classes: int) -> SplitSummary:
    seen = rows[rows['readable']]
    known = rows['target'][(rows['target'] >= 0) & (rows['target'] < num_classes)]

    def counted(column: str) -> dict[str, int]:
        return {value.decode(): n for value, n in Counter(seen[column].tolist()).most_common() if value}

    def sizes(column: str) -> tuple[int, ...]:
        values = seen[column]
        return (int(values.min()), int(np.median(values)), int(values.max())) if len(values) else ()

    return SplitSummary(
        source.split, rows['target'], rows['readable'], np.bincount(known, minlength=num_classes), counted('format'),
        counted('mode'), sizes('width'), sizes('height'),
    )  # fmt: skip


def _broken(names: _Names, reasons: list[dict[int, str]]) -> Finding | None:
    items = [f'{names(s, i)}: {printable(reason)}' for s, why in enumerate(reasons) for i, reason in why.items()]
    n = _count(len(items), 'image')
    text = f'{n} cannot be read, and would stop a training: repair or remove them, or leave them out with --skip-list'
    return Finding('broken', True, text, items) if items else None


def _short_streams(sources: list[Source], rows: list[np.ndarray]) -> Iterator[Finding]:
    short = [(s, len(r)) for s, r in zip(sources, rows) if s.streamed and len(r) < (s.declared or 0)]
    if short:
        items = [f'{s.split}: {n:,} of {s.declared:,}' for s, n in short]
        yield Finding(
            'missing', True, 'a stream holds fewer images than it declares; broken ones are passed over', items
        )


def _groups(keys: np.ndarray) -> Iterator[np.ndarray]:
    """The positions of each row of ``keys`` `[N, K]` that is there more than once, in ascending order."""
    order = np.lexsort(keys.T)
    ordered = keys[order]
    starts = (
        np.flatnonzero(np.append(True, (ordered[1:] != ordered[:-1]).any(axis=1))) if len(keys) else np.zeros(0, int)
    )
    ends = np.append(starts[1:], len(keys))
    for start, end in zip(starts[ends - starts > 1], ends[ends - starts > 1]):
        yield order[start:end]


@dataclass
class _All:
    """The images of all splits, one after the other."""

    names: _Names
    rows: np.ndarray
    split: np.ndarray
    index: np.ndarray
    class_names: list[str]

    def name(self, position: int, with_class: bool = False) -> str:
        name = self.names(int(self.split[position]), int(self.index[position]))
        if with_class and self.rows['target'][position] >= 0:
            name += f' ({printable(self.class_names[self.rows["target"][position]])})'
        return name

    def equal(self, positions: np.ndarray, with_class: bool = False) -> str:
        """The names of images, as equal."""
        listed = ' = '.join(self.name(p, with_class) for p in positions[:_NAMED].tolist())
        return listed + (f' and {len(positions) - _NAMED:,} more' if len(positions) > _NAMED else '')


def _together(names: _Names, rows: list[np.ndarray], class_names: list[str]) -> _All:
    lengths = [len(r) for r in rows]
    split = np.repeat(np.arange(len(rows)), lengths)
    return _All(names, np.concatenate(rows), split, np.concatenate([np.arange(n) for n in lengths]), class_names)


def _copies(images: _All) -> Iterator[Finding]:
    """Files of the same content: in both splits, in two classes, and else."""
    across, conflicts, repeated, shared = [], [], [], 0
    readable = np.flatnonzero(images.rows['readable'])
    for group in _groups(images.rows['digest'][readable]):
        group = readable[group]
        target, split = images.rows['target'][group], images.split[group]
        if len(np.unique(target[target >= 0])) > 1:
            # one of each class first, so that the classes are named
            first = np.unique(target, return_index=True)[1]
            others = np.setdiff1d(np.arange(len(group)), first)
            conflicts.append(images.equal(group[np.concatenate([first, others])], with_class=True))
        if split[0] != split[-1]:
            held = group[split == 1]
            shared += len(held)
            across += [f'{images.name(p)} = {images.equal(group[split == 0])}' for p in held.tolist()]
        elif len(np.unique(target)) == 1:
            repeated.append(images.equal(group))
    if across:
        total = int((images.split == 1).sum())
        which = 'all' if shared == total else f'{shared:,} of the'
        text = (
            f'{which} {total:,} validation images are training images too, byte for byte, so the accuracy would be too '
            'high: keep one copy of each'
        )
        yield Finding('identical', True, text, across)
    if conflicts:
        text = f'{_count(len(conflicts), "image")} in more than one class, byte for byte: keep the right label'
        yield Finding('two classes', True, text, conflicts)
    if repeated:
        text = f'{_count(len(repeated), "image")} more than once in a class of a split, byte for byte'
        yield Finding('repeated', False, text, repeated)


def _alike(images: _All) -> Finding | None:
    """Different files that look the same; first those in two splits, then those in two classes."""
    known = np.flatnonzero(images.rows['readable'] & (images.rows['look'] != 0))
    found = []
    for group in _groups(images.rows['look'][known, None]):
        group = known[group]
        _, first = np.unique(images.rows['digest'][group], axis=0, return_index=True)
        if len(first) < 2:
            continue  # copies
        group = group[np.sort(first)]
        splits, classes = len(np.unique(images.split[group])), len(np.unique(images.rows['target'][group]))
        found.append((-splits, -classes, group))
    if not found:
        return None
    found.sort(key=lambda x: (*x[:2], int(x[2][0])))
    splits, classes = (sum(entry[i] < -1 for entry in found) for i in (0, 1))
    text = (
        f'{_count(len(found), "group")} of different files that look the same on 9×8 cells of grey ({splits:,} with '
        f'images of both splits, {classes:,} of two classes): copies of another size or quality, or nearly the same'
    )
    return _capped('look alike', False, text, [x[2] for x in found], lambda group: images.equal(group, True))


def _classes(splits: list[SplitSummary], class_names: list[str]) -> Iterator[Finding]:
    """Classes without images, and how unequal they are."""
    train, *others = splits
    readable = train.targets[train.readable & (train.targets >= 0) & (train.targets < len(class_names))]
    counts = np.bincount(readable, minlength=len(class_names))
    names = [printable(name) for name in class_names]
    if empty := [names[i] for i in np.flatnonzero(counts == 0)]:
        text = f'{_count(len(empty), "class", "es")} without a training image that can be read'
        for val in others:
            if lost := int(val.per_class[counts == 0].sum()):
                text += f', though with {_count(lost, "validation image")}'
        yield Finding('no training images', True, text, empty)
    for val in others:
        if empty := [names[i] for i in np.flatnonzero((val.per_class == 0) & (counts > 0))]:
            text = f'{_count(len(empty), "class", "es")} without a validation image, so that nothing measures them'
            yield Finding('no validation images', False, text, empty)
    there = np.flatnonzero(counts)
    if len(there) and counts.max() > IMBALANCE * counts[there].min():
        ordered = there[np.argsort(counts[there], kind='stable')]
        ratio = counts.max() / counts[there].min()
        text = (
            f'the largest class has {ratio:.0f} times the training images of the smallest, and a network may give the '
            'small ones up; --class-weights auto weighs them by their counts'
        )
        yield _capped('imbalance', False, text, [*ordered], lambda i: f'{names[i]}: {_count(int(counts[i]), "image")}')


def _left_out(names: _Names) -> Finding | None:
    items = list(dict.fromkeys(names.left_out()))
    return Finding('left out', False, f'{_count(len(items), "file")} not used', items) if items else None


def _sizes(images: _All, image_size: int) -> Iterator[Finding]:
    rows = images.rows
    shorter = np.minimum(rows['width'], rows['height'])
    small, large = SMALL * image_size, LARGE * image_size
    for name, which, order, text in (
        ('small', shorter < small, shorter, f'below {small:g} pixels on the shorter side, half of the training size '
         f'{image_size}: they are enlarged, and a smaller --img-size trains faster'),
        ('large', shorter > large, -shorter, f'above {large:g} pixels on the shorter side, {LARGE} times the training '
         f'size {image_size}: decoding takes most of the time; --jpeg-draft decodes JPEGs at a lower scale, or shrink '
         'the files first'),
    ):  # fmt: skip
        found = np.flatnonzero(which & rows['readable'])
        if len(found):
            text = f'{len(found):,} of {int(rows["readable"].sum()):,} images {text}'
            found = found[np.argsort(order[found], kind='stable')]
            yield _capped(name, False, text, [*found], lambda p: f'{images.name(p)}: {_size(rows[p])}')


def _size(row: np.void) -> str:
    return f'{row["width"]}×{row["height"]}'


def _capped(name: str, hurts: bool, text: str, found: list[Any], show: Callable[[Any], str]) -> Finding:
    """A finding that may be true of all images: the first thousand are named."""
    return Finding(name, hurts, text, [show(x) for x in found[:_LISTED]], max(0, len(found) - _LISTED))


def _count(n: int, what: str, plural: str = 's') -> str:
    return f'{n:,} {what}{"" if n == 1 else plural}'


# -------------------------------------------------------------------------------------------------------------- showing


def describe(findings: Findings, at_most: int = 10) -> str:
    """Return what was found as text: the splits, their classes, and up to ``at_most`` items of each finding."""
    lines = [line for split in findings.splits for line in _describe_split(split)]
    lines += ['', *_class_table(findings, 2 * at_most)]
    for f in findings.findings:
        lines += ['', f'{f.name}{"" if f.hurts else " (note)"}: {f.text}']
        lines += [f'  {item}' for item in f.items[:at_most]]
        lines += [f'  and {len(f) - at_most:,} more'] if len(f) > at_most else []
    return '\n'.join(lines)


def _describe_split(split: SplitSummary) -> Iterator[str]:
    yield f'{split.name}: {_count(len(split), "image")}, {_count(int((split.per_class > 0).sum()), "class", "es")}'
    if split.widths:
        yield f'  {split_sizes(split)}'
        parts = [', '.join(f'{k} {n:,}' for k, n in counts.items()) for counts in (split.formats, split.modes)]
        yield f'  {"; ".join(filter(None, parts))}'


def split_sizes(split: SplitSummary) -> str:
    """Return the sizes of a split's images as text."""
    if not split.widths:
        return ''
    (w0, w1, w2), (h0, h1, h2) = split.widths, split.heights
    return f'width {w0} to {w2} (median {w1}), height {h0} to {h2} (median {h1})'


def _class_table(findings: Findings, at_most: int) -> Iterator[str]:
    """Images of each class and split; of many classes those with the fewest training images."""
    names = [printable(name) for name in findings.class_names]
    order = list(range(len(names)))
    if len(names) > at_most:
        order = np.argsort(findings.splits[0].per_class, kind='stable')[: at_most // 2].tolist()
    title = 'class' if len(names) <= at_most else f'{len(order)} smallest of {len(names):,} classes'
    width = max([len(title), *(len(names[i]) for i in order)])
    heads = [s.name for s in findings.splits]
    yield '  '.join([title.ljust(width), *(h.rjust(8) for h in heads)])
    for i in order:
        counts = (f'{s.per_class[i]:,}'.rjust(max(8, len(h))) for s, h in zip(findings.splits, heads))
        yield '  '.join([names[i].ljust(width), *counts])
