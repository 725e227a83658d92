"""The numbers of a report, from a run's files. Nothing here draws or reads an image."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from .. import metrics
from ..errors import UserError

Array = np.ndarray[Any, Any]
CONFIDENT = 0.5  # a probability above which a wrong answer counts as confident
_PARTS = ('data', 'teacher', 'student', 'other')
_COLUMNS = ('top1', 'top1_prob', 'target_prob', 'loss')


@dataclass(frozen=True)
class Answers:
    """What a network said of each validation image: `[N]` each.

    Attributes:
        top1: class of the highest probability.
        top1_prob, target_prob: probability of that class, and of the true one; NaN of a closed teacher that gave
            classes alone.
        loss: cross-entropy; NaN of such a teacher.
        right: whether the two classes are the same.
    """

    top1: Array
    top1_prob: Array
    target_prob: Array
    loss: Array
    right: Array

    @property
    def has_probabilities(self) -> bool:
        """Whether more than classes is known."""
        return not np.isnan(self.top1_prob).any()


@dataclass(frozen=True)
class Predictions:
    """A run's predictions.parquet.

    Attributes:
        index: of the images in their split, `[N]`.
        file: name of each, empty where it has none.
        target: true classes, `[N]`.
        student, teacher: what they said; no teacher: None.
    """

    index: Array
    file: Sequence[str]
    target: Array
    student: Answers
    teacher: Answers | None

    def __len__(self) -> int:
        return len(self.target)


def read_predictions(path: Path) -> Predictions | None:
    """Return the predictions of a run, sorted by index; None where there is no such file.

    Raises:
        UserError: where the file is not one of predictions.
    """
    if not path.exists():
        return None
    import pyarrow.parquet as pq

    try:
        with pq.ParquetFile(path) as file:  # read_table() would load pandas, 70 MB of it
            table = file.read()
        order = np.argsort(table.column('index').to_numpy(), kind='stable')
        column = {name: table.column(name) for name in table.column_names}
        target = column['target'].to_numpy()[order].astype(np.int64)
        found: list[Answers | None] = []
        for who in ('student', 'teacher'):
            if f'{who}_top1' not in column and who == 'teacher':
                found.append(None)
                continue
            top1, prob, target_prob, loss = (column[f'{who}_{name}'].to_numpy()[order] for name in _COLUMNS)
            prob, target_prob, loss = (x.astype(np.float64) for x in (prob, target_prob, loss))
            found.append(Answers(top1.astype(np.int64), prob, target_prob, loss, top1 == target))
        student, teacher = found
        if student is None or not len(target) or min(target.min(), student.top1.min()) < 0:
            raise ValueError('holds no images')
        names = column['file'].to_pylist()
        files = [names[i] or '' for i in order]
        return Predictions(column['index'].to_numpy()[order].astype(np.int64), files, target, student, teacher)
    except (OSError, ValueError, KeyError, TypeError) as e:
        why = f'no column {e}' if isinstance(e, KeyError) else str(e).partition('\n')[0]
        raise UserError(f'{path}: not a file of predictions ({why}); delete it to have a report without them') from e


# --------------------------------------------------------------------------------------------------------- intervals


def interval(right: float, count: int) -> tuple[float, float]:
    """Return Wilson's 95% interval of a share of ``count`` images, in percent."""
    low, high = metrics.wilson(round(right), count)
    return 100 * low, 100 * high


def paired_difference(a: Array, b: Array) -> tuple[float, float, float]:
    """Return how many points more of the same images ``a`` has right than ``b``, and the 95% interval of that.

    Args:
        a, b: whether each image is right, `[N]`.
    """
    difference, low, high = metrics.mcnemar_interval(a, b)
    return 100 * difference, 100 * low, 100 * high


def paired_values(a: Mapping[int, Mapping[str, Any]], b: Mapping[int, Mapping[str, Any]]) -> list[float]:
    """Return a - b of top-1 on each seed that both have."""
    return [a[seed]['top1'] - b[seed]['top1'] for seed in a if seed in b]


# ---------------------------------------------------------------------------------------------------- right and wrong


def quadrants(p: Predictions) -> dict[str, Array]:
    """Return the rows of predictions by who is right: `both`, `teacher`, `student`, `neither`; first those of
    which both networks are most confident."""
    assert p.teacher is not None
    s, t = p.student.right, p.teacher.right
    cells = {'both': s & t, 'teacher': ~s & t, 'student': s & ~t, 'neither': ~s & ~t}
    confidence = np.fmin(p.student.top1_prob, p.teacher.top1_prob)
    return {name: _by_score(mask, confidence) for name, mask in cells.items()}


def suspect_scores(p: Predictions) -> Array:
    """Return for each image how much speaks against its label, `[N]`: the mean over both networks
    (of those that gave probabilities) of log(highest probability / probability of the label), 0 where they do not agree
    on another class than the label."""
    networks = [p.student] if p.teacher is None else [p.student, p.teacher]
    tiny = 1e-12
    odds = np.mean(
        [np.log((a.top1_prob + tiny) / (a.target_prob + tiny)) for a in networks if a.has_probabilities], axis=0
    )
    agreed = np.all([~a.right & (a.top1 == p.student.top1) for a in networks], axis=0)
    return np.where(agreed, odds, 0.0)


def suspects(p: Predictions) -> Array:
    """Return the rows of predictions whose label may be wrong, the most suspect first: both networks (a run without a
    teacher: the student) name the same other class, each with a probability above :data:`CONFIDENT`."""
    score = suspect_scores(p)
    confident = p.student.top1_prob > CONFIDENT
    if p.teacher is not None and p.teacher.has_probabilities:
        confident = confident & (p.teacher.top1_prob > CONFIDENT)
    return _by_score((score > 0) & confident, score)


def _by_score(mask: Array, score: Array) -> Array:
    rows = np.flatnonzero(mask)
    return rows[np.argsort(-score[rows], kind='stable')]


# -------------------------------------------------------------------------------------------------------------- classes


@dataclass(frozen=True)
class ClassFigures:
    """Of each class, `[C]`: validation images, and percent right of student and teacher (NaN without images)."""

    count: Array
    student: Array
    teacher: Array | None


def by_class(p: Predictions, classes: int) -> ClassFigures:
    """Return the accuracy of each class."""
    student = metrics.per_class(p.target, p.student.top1, classes)
    teacher = None
    if p.teacher is not None:
        teacher = 100 * metrics.per_class(p.target, p.teacher.top1, classes)['accuracy']
    return ClassFigures(student['images'], 100 * student['accuracy'], teacher)


def confused_pairs(target: Array, predicted: Array) -> list[tuple[int, int, int]]:
    """Return (true class, predicted class, images) of each pair that occurs, the most frequent first."""
    wrong = target != predicted
    width = int(max(target.max(initial=0), predicted.max(initial=0))) + 1
    codes, counts = np.unique(target[wrong] * width + predicted[wrong], return_counts=True)
    order = np.argsort(-counts, kind='stable')
    return [(int(codes[i]) // width, int(codes[i]) % width, int(counts[i])) for i in order]


# -------------------------------------------------------------------------------------------------------------- curves


def column(history: Sequence[dict[str, float]], name: str) -> list[float]:
    """Return a column of summary.csv; NaN where an epoch has none."""
    return [row.get(name, math.nan) for row in history]


def has(history: Sequence[dict[str, float]], name: str) -> bool:
    """Return whether some epoch has a finite figure of this name."""
    return any(math.isfinite(row.get(name, math.nan)) for row in history)


def late_rise(values: Sequence[float], share: float) -> float | None:
    """Return the mean over the last ``share`` of the epochs less that over as many before; None with fewer than four
    epochs."""
    n = max(1, round(share * len(values)))
    if len(values) < 4:
        return None
    late, before = values[-n:], values[-2 * n : -n]
    found = float(np.mean(late) - np.mean(before))
    return found if math.isfinite(found) else None


def time_shares(history: Sequence[dict[str, float]]) -> dict[str, float]:
    """Return the share of each part in the time of all epochs; empty where summary.csv does not have it."""
    seconds = {part: float(np.nansum(column(history, f'seconds_{part}'))) for part in _PARTS}
    total = sum(seconds.values())
    return {part: value / total for part, value in seconds.items()} if total > 0 else {}
