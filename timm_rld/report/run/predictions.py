"""What both networks say of the validation images: right and wrong, classes, calibration."""

from __future__ import annotations

import math
import shlex
from pathlib import Path
from typing import Any

import numpy as np

from ... import metrics
from .. import figures, plots
from ..figures import Array
from ..images import class_counts
from ..page import Cell, Picture, Table, as_csv
from .report import ROWS, Report, no_predictions

SHOWN = 8  # thumbnails of a group
SUSPECTS = 24  # of them on the page; all are in the CSV
PAIRS = 6  # confused pairs with pictures
MATRIX = 30  # classes up to which the whole matrix is shown


def picture(r: Report, row: int, tone: str = '') -> Picture:
    """Return the thumbnail of a row of the predictions, with what was said of it."""
    p = r.predictions
    assert p is not None
    label = r.name(p.target[row])
    lines: list[str | tuple[str, str]] = [label]
    for who, said in (('student', p.student), ('teacher', p.teacher)):
        if said is not None:
            words = [] if said.right[row] and said.has_probabilities else [r.name(said.top1[row])]
            words += [f'{100 * said.top1_prob[row]:.0f}%'] if said.has_probabilities else []
            lines.append((who, ', '.join(words)))
    file = Path(p.file[row]).name or f'image {p.index[row]}'
    return Picture(r.images.thumbnail(int(p.index[row])), lines, f'{file}, label {label}', tone)


def answers(r: Report) -> dict[str, Any]:
    """Teacher against student: counts, the most confident of each, and labels that may be wrong."""
    p = r.predictions
    if p is None:
        return no_predictions(r)
    rows = figures.suspects(p)
    r.facts.update(suspects=len(rows) if p.teacher is not None else None, wrong=int((~p.student.right).sum()),
                   suspects_share=100 * len(rows) / len(p))  # fmt: skip
    r.files['suspects'] = suspects_csv(r, rows)
    block: dict[str, Any] = {
        'suspects': [picture(r, row, 'bad') for row in rows[:SUSPECTS]], 'suspects_count': len(rows),
        'suspects_file': f'{r.stem}-suspects.csv', 'cells': [],
        'suspects_title': 'Both confidently say the same other class: is the label right?' if p.teacher is not None
        else 'The student confidently says another class: is the label right?',
    }  # fmt: skip
    if p.teacher is None:
        return block
    cells = figures.quadrants(p)
    r.facts.update(only_teacher=len(cells['teacher']), only_student=len(cells['student']),
                   neither=len(cells['neither']))  # fmt: skip
    titles = {
        'both': ('Both right', 'good', 'what has been learned'),
        'teacher': ('Teacher right, student wrong', 'bad', 'a longer training or a larger student may win these'),
        'student': ('Student right, teacher wrong', 'good', 'where refined logits claim their gain'),
        'neither': ('Both wrong', 'bad', 'hard images, or wrong labels'),
    }
    for key, (title, tone, note) in titles.items():
        shown = [picture(r, row, tone) for row in cells[key][:SHOWN]]
        share = f'{100 * len(cells[key]) / len(p):.1f} %'
        block['cells'].append({'key': key, 'title': title, 'tone': tone, 'note': note, 'count': f'{len(cells[key]):,}',
                               'share': share, 'pictures': shown})  # fmt: skip
    return block


def suspects_csv(r: Report, rows: Array) -> str:
    """Return the images whose label may be wrong as CSV, the most suspect first."""
    p = r.predictions
    assert p is not None
    score, networks = figures.suspect_scores(p), [('student', p.student), ('teacher', p.teacher)]
    there = [(who, a) for who, a in networks if a is not None and a.has_probabilities]
    lines = [
        [p.index[i], p.file[i], r.name(p.target[i]), r.name(p.student.top1[i]),
         *(f'{a.top1_prob[i]:.4f}' for _, a in there), f'{score[i]:.3f}']
        for i in rows
    ]  # fmt: skip
    return as_csv(['index', 'file', 'label', 'named', *(f'{who}_prob' for who, _ in there), 'score'], lines)


def classes(r: Report) -> dict[str, Any]:
    """Student − teacher of each class; the most confused pairs; the whole matrix where it can be read."""
    p = r.predictions
    if p is None:
        return no_predictions(r)
    n = max(r.results['num_classes'], int(p.target.max()) + 1, int(p.student.top1.max()) + 1)
    found, trained = figures.by_class(p, n), class_counts(r.images.train, n)
    pairs = figures.confused_pairs(p.target, p.student.top1)
    r.facts.update(median_count=int(np.median(found.count[found.count > 0])))
    _class_facts(r, found, trained, pairs)
    rows = [_class_row(r, found, trained, c) for c in range(n) if found.count[c]]
    gap = found.student - found.teacher if found.teacher is not None else found.student
    order = [c for c in np.argsort(gap, kind='stable').tolist() if found.count[c]]
    where = {c: i for i, c in enumerate(c for c in range(n) if found.count[c])}
    shown = order if len(order) <= ROWS else [*order[: ROWS // 2], *order[-ROWS // 2 :]]
    columns = ['class', 'student#', 'teacher#', 'student − teacher#', 'training images#', 'validation images#']
    keep = [0, 1, *([2, 3] if found.teacher is not None else []), *([4] if trained is not None else []), 5]
    table = Table([columns[k] for k in keep], [[rows[where[c]][k] for k in keep] for c in shown])
    plain = [[cell.text if isinstance(cell, Cell) else cell for cell in (row[k] for k in keep)] for row in rows]
    r.files['classes'] = as_csv([columns[k].rstrip('#') for k in keep], plain)
    block: dict[str, Any] = {
        'table': table, 'classes_file': f'{r.stem}-classes.csv', 'left_out': len(order) - len(shown),
        'pairs': [_pair(r, found, pair) for pair in pairs[:PAIRS]], 'matrix': None, 'pair_table': None,
    }  # fmt: skip
    if n <= MATRIX:
        block['matrix'] = plots.matrix(
            'What the student calls each class', metrics.confusion(p.target, p.student.top1, n),
            [r.name(c) for c in range(n)],
        )  # fmt: skip
    else:
        named = [[r.name(a), r.name(b), k, f'{100 * k / found.count[a]:.1f} %'] for a, b, k in pairs]
        header = ['true class', 'called', 'images#', 'of the class#']
        block['pair_table'] = Table(header, named[:ROWS], 'The pairs confused most')
        block['pairs_file'] = f'{r.stem}-confusions.csv'
        r.files['confusions'] = as_csv([h.rstrip('#') for h in header], named)
    return block


def _class_row(r: Report, found: figures.ClassFigures, trained: Array | None, c: int) -> list[Any]:
    student, teacher = found.student[c], found.teacher[c] if found.teacher is not None else math.nan
    gap = student - teacher
    bar = Cell(f'{gap:+.1f}', round(gap, 4), bar=max(-1.0, min(1.0, gap / 30))) if math.isfinite(gap) else ''
    return [r.name(c), f'{student:.1f}', f'{teacher:.1f}', bar,
            int(trained[c]) if trained is not None and c < len(trained) else '', int(found.count[c])]  # fmt: skip


def _class_facts(
    r: Report, found: figures.ClassFigures, trained: Array | None, pairs: list[tuple[int, int, int]]
) -> None:
    """Fill in the facts of the classes: the worst one, the largest loss to the teacher, the pair confused most."""
    enough = found.count >= 10
    if enough.any():
        worst = int(np.argmin(np.where(enough, found.student, np.inf)))
        r.facts.update(worst_class=r.name(worst), worst_top1=float(found.student[worst]))
        if trained is not None and worst < len(trained) and np.median(trained) > 0:
            r.facts.update(worst_train=int(trained[worst]), median_train=int(np.median(trained)),
                           worst_train_share=float(trained[worst] / np.median(trained)))  # fmt: skip
        if found.teacher is not None:
            gap = np.where(enough, found.student - found.teacher, np.inf)
            r.facts.update(worst_gap=float(gap.min()), worst_gap_class=r.name(int(np.argmin(gap))))
    shares = [(100 * k / found.count[a], a, b) for a, b, k in pairs if found.count[a] >= 10]
    if shares:
        share, a, b = max(shares, key=lambda x: x[0])
        r.facts.update(pair_share=float(share), pair_true=r.name(a), pair_said=r.name(b))


def _pair(r: Report, found: figures.ClassFigures, pair: tuple[int, int, int]) -> dict[str, Any]:
    """A confused pair beside examples: of the class, wrongly named, and rightly named of the other."""
    p = r.predictions
    assert p is not None
    a, b, count = pair
    s = p.student
    confident = -s.top1_prob
    wrong = np.flatnonzero((p.target == a) & (s.top1 == b))
    right = np.flatnonzero((p.target == b) & s.right)
    wrong, right = (rows[np.argsort(confident[rows], kind='stable')][:4] for rows in (wrong, right))
    share = f'{100 * count / found.count[a]:.0f} %'
    return {
        'true': r.name(a), 'said': r.name(b), 'count': count, 'share': share,
        'wrong': [Picture(r.images.thumbnail(int(p.index[i])), (), f'{r.name(a)}, called {r.name(b)}', 'bad')
                  for i in wrong],
        'right': [Picture(r.images.thumbnail(int(p.index[i])), (), r.name(b), 'good') for i in right],
    }  # fmt: skip


def calibration(r: Report) -> dict[str, Any]:
    """Reliability diagrams of both networks, with calibration error and best temperature."""
    p = r.predictions
    if p is None:
        return no_predictions(r)
    drawn, rows = [], []
    for who, answers_ in (('student', p.student), ('teacher', p.teacher)):
        if answers_ is None or not answers_.has_probabilities:
            continue
        found, best = metrics.reliability(answers_.top1_prob, answers_.right), r.model(who).get('best_temperature')
        error = 100 * metrics.ece(answers_.top1_prob, answers_.right)
        drawn.append(plots.reliability_diagram(f'{who.capitalize()}: error {error:.1f} points', who, found))
        bias = 100 * float(answers_.top1_prob.mean() - answers_.right.mean())
        rows.append([who, f'{error:.2f}', f'{bias:+.2f}', '' if best is None else f'{best:.2f}',
                     f'{answers_.loss.mean():.3f}'])  # fmt: skip
        r.facts.update({f'{who}_ece': error, f'{who}_bias': bias, f'{who}_best_temperature': best})
    temperature, best = r.facts.get('temperature'), r.facts.get('teacher_best_temperature')
    if isinstance(temperature, (int, float)) and best:
        new = round(max(0.5, min(20.0, temperature * best)), 1)
        options = {**(r.run.settings.get('distill_kwargs') or {}), 'temperature': new}
        r.facts.update(new_temperature=new, options_with_temperature=shlex.join(f'{k}={v}' for k, v in options.items()))
    columns = ['network', 'calibration error, points#', 'overconfidence, points#', 'best temperature#', 'loss#']
    return {'plots': drawn, 'table': Table(columns, rows)}
