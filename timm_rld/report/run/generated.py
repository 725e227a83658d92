"""Generated images, and the training of the generator that made them."""

from __future__ import annotations

import csv
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from ... import metrics
from .. import figures, plots
from ..page import Picture, Table, thumbnail
from .report import ROWS, Report, points


def generated(r: Report) -> dict[str, Any]:
    """Of a student trained on generated images: some of them with both networks' answers, how the teacher spreads them
    over the classes, and the generator's training. Of other runs nothing."""
    found = r.model('generator')
    if not found.get('counts'):
        return {}
    counts, names = np.asarray(found['counts']), [r.name(c) for c in range(len(found['counts']))]
    tiles = [
        ('student = teacher, generated', points(found['agreement']), f'{found["images"]:,} images', 'student'),
        ('student, validation', points(r.results['student_top1']), 'top-1', 'student'),
        ('teacher, validation', points(r.results.get('teacher_top1')), 'top-1', 'teacher'),
        ('classes that occur', f'{found["classes"]} of {len(counts)}', f'entropy {found["entropy"]:.2f} of 1', 'third'),
        ("student's confidence", f'{100 * found["student_confidence"]:.1f} %', 'on generated images', 'student'),
    ]
    if found.get('answers') != 'hard':
        confidence = f'{100 * found["teacher_confidence"]:.1f} %'
        tiles.append(("teacher's confidence", confidence, 'on generated images', 'teacher'))
    if 'd_real' in found:
        sides = f'{found["d_real"]:.2f} / {found["d_fake"]:.2f}'
        tiles.append(('discriminator: real / generated', sides, 'mean, last epoch of phase 1', 'fourth'))
    said = metrics.collapse(counts.tolist(), names)
    r.facts.update(
        generated_agreement=found['agreement'], generated_classes=found['classes'],
        generated_entropy=found['entropy'], collapsed=said[:1].upper() + said[1:],
        more_steps=2 * (r.run.settings.get('steps_per_epoch') or 1),
    )  # fmt: skip
    share = 100 * counts / max(counts.sum(), 1)
    order = np.argsort(-counts, kind='stable')[:ROWS].tolist()
    rows = [[names[c], int(counts[c]), f'{share[c]:.1f} %'] for c in order]
    table = Table(['class', 'images#', 'share#'], rows, 'Generated images by the class that the teacher names')
    return {'tiles': tiles, 'table': table, 'mosaic': _generated_pictures(r, found), 'plots': _phase_1(r.run.folder)}


def _generated_pictures(r: Report, found: dict[str, Any]) -> list[Picture]:
    """The tiles of generated.png, with what both networks say of each."""
    n, columns = found['img_size'], found['columns']
    try:
        with Image.open(r.run.folder / 'generated.png') as file:
            grid = file.copy()
    except OSError:
        return []
    pictures = []
    for i, (teacher, teacher_prob, student, student_prob) in enumerate(found['shown']):
        y, x = divmod(i, columns)
        sure = '' if found.get('answers') == 'hard' else f' {100 * teacher_prob:.0f}%'
        lines = [('teacher', f'{r.name(teacher)}{sure}'), ('student', f'{r.name(student)} {100 * student_prob:.0f}%')]
        tile = thumbnail(grid.crop((x * n, y * n, x * n + n, y * n + n)))
        pictures.append(Picture(tile, lines, 'generated image', 'good' if teacher == student else 'bad'))
    return pictures


def _phase_1(folder: Path) -> list[Any]:
    """Curves of generator.csv, where this run trained its generator."""
    try:
        with (folder / 'generator.csv').open(encoding='utf-8') as f:
            rows = [{k: float(v) for k, v in row.items() if v} for row in csv.DictReader(f)]
    except (OSError, ValueError):
        return []
    epochs, drawn = figures.column(rows, 'epoch'), []
    for title, wanted in (
        ('Losses of phase 1', (('d_loss', 'discriminator', 'fourth'), ('g_loss', 'generator', 'accent'))),
        ('Discriminator, mean', (('d_real', 'real', 'third'), ('d_fake', 'generated', 'fourth'))),
        ("Entropy of the teacher's classes, of 1", (('entropy', 'entropy', 'teacher'),)),
    ):
        series = [(name, colour, figures.column(rows, k)) for k, name, colour in wanted if figures.has(rows, k)]
        if series:
            drawn.append(plots.lines(title, epochs, series))
    return drawn
