"""How many images each class has, and weights of the classes that make up for it."""

from __future__ import annotations

import contextlib
import csv
import math
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ..errors import UserError
from .sources import Source

LONG_TAIL = 10  # the largest class over the smallest from which on a run says so


def class_counts(source: Source) -> NDArray[np.int64] | None:
    """Return the images of each class `[C]`; None where they are not known without reading them."""
    targets = source.targets
    return None if targets is None else np.bincount(targets[targets >= 0], minlength=source.num_classes)


def describe_classes(source: Source) -> list[str]:
    """Return a line where the largest class of a training split has over ten times the images of the smallest."""
    counts = class_counts(source)
    if counts is None or not (counts.max() > LONG_TAIL * counts[counts > 0].min()):
        return []
    some = np.flatnonzero(counts)
    most, least = (int(some[i]) for i in (counts[some].argmax(), counts[some].argmin()))
    names = source.class_names or [f'class {i}' for i in range(source.num_classes)]
    return [
        f'classes of {counts[least]:,} ({names[least]}) to {counts[most]:,} images ({names[most]}): top-1 says little '
        'of the small ones, macro accuracy counts all alike; see --class-weights auto and --best-by macro'
    ]


def class_weights(source: Source, weights: str | None) -> Tensor | None:
    """Return a weight for each class, with a mean of 1 over the images of the split, so that they move weight between
    classes and none between cross-entropy and distillation.

    Args:
        source: the training split.
        weights: `auto`: n / (C · n_c), for n images, n_c of class c, and C classes that have any. Else a CSV file with
            a line for each class: its name or index, and a weight.

    Returns:
        float32 `[C]`; None where none are asked for. A class without images has 1. Where a stream does not tell its
        classes, weights of a file are taken as they are.

    Raises:
        UserError: where the images of a class are not known, and for a file that is not as above.
    """
    if weights is None:
        return None
    counts = class_counts(source)
    if weights != 'auto':
        found = _read_weights(Path(weights).expanduser(), source)
    elif counts is None:
        raise UserError(
            f'--class-weights auto: how many images each class of {source.split!r} has is not known without reading '
            'them; give a CSV file with one class and weight per line'
        )
    else:
        found = np.divide(1.0, counts, out=np.zeros(len(counts)), where=counts > 0)
    if counts is not None:
        total = float((counts * found).sum())
        if not total:
            raise UserError(f'--class-weights {weights}: all classes that have images have weight 0')
        found = np.where(counts > 0, found * (counts.sum() / total), 1.0)
    return torch.tensor(found, dtype=torch.float32)


def _read_weights(file: Path, source: Source) -> NDArray[np.float64]:
    """Read a CSV of classes, by name or index, and weights; a first line `class,weight` is passed over."""
    flag, names = f'--class-weights {file}', source.class_names or []
    by_name: dict[str, int] = {str(i): i for i in range(source.num_classes)}
    by_name.update({name: i for i, name in enumerate(names)})  # a name wins over an index
    try:
        with file.open(encoding='utf-8-sig', newline='') as f:
            rows = [[cell.strip() for cell in row] for row in csv.reader(f)]
    except (OSError, UnicodeDecodeError, csv.Error) as e:
        what = getattr(e, 'strerror', None) or 'not a text file'
        raise UserError(f"{flag}: cannot be read ({what}); expected 'auto', or a CSV file: cat,2.5 and so on") from e
    found: dict[int, float] = {}
    for number, row in enumerate(rows, 1):
        if not any(row) or (number == 1 and row == ['class', 'weight']):
            continue
        weight = math.nan
        if len(row) == 2:
            with contextlib.suppress(ValueError):
                weight = float(row[1])
        if not (math.isfinite(weight) and weight >= 0):
            raise UserError(f'{flag}, line {number}: expected a class and a weight of at least 0, e.g. cat,2.5')
        if row[0] not in by_name:
            raise UserError(f'{flag}, line {number}: no class {row[0]!r} in {source.split!r}')
        if by_name[row[0]] in found:
            raise UserError(f'{flag}, line {number}: the class {row[0]!r} is there twice')
        found[by_name[row[0]]] = weight
    if missing := [names[i] if names else str(i) for i in range(source.num_classes) if i not in found]:
        raise UserError(f'{flag}: no line for {len(missing)} class(es): {", ".join(missing[:5])}')
    return np.array([found[i] for i in range(source.num_classes)])
