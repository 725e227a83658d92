"""The verdict on a run: student, teacher and baseline, how much smaller and faster, exports."""

from __future__ import annotations

from typing import Any

import numpy as np

from ...run_folder import read_exports
from .. import figures
from ..images import read_facts
from ..page import Table
from .report import Report, points


def verdict(r: Report) -> dict[str, Any]:
    """Student, teacher and baseline, with intervals; how much smaller and faster."""
    results, p = r.results, r.predictions
    count = len(p) if p else int(read_facts(r.run).get('validation images') or 0)
    tiles = []
    rows = [('student', results['student_top1']), ('teacher', results.get('teacher_top1'))]
    if r.baseline:
        rows.append(('without distillation', r.baseline[0].results['student_top1']))
    for who, top1 in rows:
        if top1 is None:
            continue
        low, high = figures.interval(top1 / 100 * count, count)
        note = f'95% interval {low:.2f} – {high:.2f}' if count else ''
        if who == 'teacher' and count:
            r.facts.update(teacher_low=low)
        tiles.append((f'{who}, top-1', points(top1), note, who if who != 'without distillation' else 'third'))
    r.facts.update(images=count)
    differences = _differences(r)
    return {'tiles': tiles, 'tables': [t for t in (differences, _sizes(r), _exports(r)) if t]}


def _differences(r: Report) -> Table | None:
    """Student against teacher and baseline, on the same images; fills in the facts of the verdict."""
    p, results, rows = r.predictions, r.results, []
    teacher_top1 = results.get('teacher_top1')
    if p and p.teacher is not None:
        low, high = sorted(-x for x in figures.paired_difference(p.student.right, p.teacher.right)[1:])
        behind = -figures.paired_difference(p.student.right, p.teacher.right)[0]
        r.facts.update(behind=behind, behind_low=low, behind_high=high, ahead=-behind, ahead_low=-high, ahead_high=-low)
        rows.append(_difference_row('student − teacher', -behind, (-high, -low)))
    elif teacher_top1 is not None:
        r.facts['behind'] = teacher_top1 - results['student_top1']
        rows.append(_difference_row('student − teacher', -r.facts['behind'], None))
    if r.baseline:
        run, q = r.baseline
        gain = results['student_top1'] - run.results['student_top1']
        if p and q and np.array_equal(p.index, q.index) and np.array_equal(p.target, q.target):
            gain, low, high = figures.paired_difference(p.student.right, q.student.right)
            r.facts.update(gain=gain, gain_low=low, gain_high=high)
            rows.append(_difference_row('student − without distillation', gain, (low, high)))
        else:
            rows.append(_difference_row('student − without distillation', gain, None))
    columns = ['difference', 'points#', '95% interval']
    return Table(columns, rows, 'Differences of top-1, on the same images (paired, McNemar)') if rows else None


def _difference_row(name: str, value: float, interval: tuple[float, float] | None) -> list[Any]:
    shown = f'{interval[0]:+.2f} to {interval[1]:+.2f}' if interval else 'not known: it needs both predictions.parquet'
    return [name, f'{value:+.2f}', shown]


_SIZES = (
    ('parameters', 'parameters', lambda v: f'{v / 1e6:.2f} M'),
    ('multiply_adds', 'multiply-adds', lambda v: f'{v / 1e9:.3f} G'),
    ('weights_mb', 'weights', lambda v: f'{v:.1f} MB'),
)


def _sizes(r: Report) -> Table | None:
    """How much smaller and faster the student is."""
    student, teacher = r.model('student'), r.model('teacher')
    rows: list[list[Any]] = []
    for key, title, shown in _SIZES:
        a, b = student.get(key), teacher.get(key)
        if a is not None:
            ratio = f'{b / a:.2f}×' if b and a else ''
            rows.append([title, shown(a), shown(b) if b is not None else '', ratio])
    device = student.get('latency_device')
    latency, theirs = student.get('latency_ms') or {}, teacher.get('latency_ms') or {}
    for batch, ms in latency.items():
        other = theirs.get(batch)
        name = f'latency, batch of {batch}'
        ratio = f'{other / ms:.2f}×' if other and ms else ''
        rows.append([name, f'{ms:.2f} ms', f'{other:.2f} ms' if other else '', ratio])
    return (
        Table(
            ['quantity', 'student#', 'teacher#', 'teacher / student#'],
            rows,
            f'Size and speed ({device})' if device else 'Size and speed',
        )
        if rows
        else None
    )


def _exports(r: Report) -> Table | None:
    """The exports that lie in the run, with the figures of their checks."""
    rows, device = [], ''
    for export in read_exports(r.run.folder):
        about, check = export.about, export.about['check'] or {}
        cells = ['not checked', '', '']
        if check:
            same, ms = check['same_top1'], (check.get('latency_ms') or {}).get('file', {})
            cells = [points(check['top1']['file']), f'{100 * same:.2f} %', f'{ms["1"]:.2f} ms' if '1' in ms else '']
            device = check.get('latency_device') or device
        rows.append([export.file.name, about['weights'], about['precision'], f'{about["bytes"] / 1e6:.1f} MB', *cells])
    columns = ['file', 'weights', 'precision', 'size#', 'top-1#', 'same class as torch#', 'an image#']
    return Table(columns, rows, f'Exports{f" ({device})" if device else ""}') if rows else None
