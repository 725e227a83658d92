"""The report of a run: its files in, the context of `run.html` out."""

from __future__ import annotations

import csv
import io
import math
import os
import re
import shlex
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from .. import metrics
from ..config import FIELDS, Config, flag_of, resolve
from ..errors import UserError
from ..loss import published_defaults
from ..run_folder import RunFiles, read_exports
from . import figures, plots
from .figures import Array, Predictions
from .images import Images, class_counts, data_config, first_images, read_facts
from .page import Cell, Picture, Table, render, thumbnail
from .rules import Finding, finding

SHOWN = 8  # thumbnails of a group
SUSPECTS = 24  # of them on the page; all are in the CSV
PAIRS = 6  # confused pairs with pictures
MATRIX = 30  # classes up to which the whole matrix is shown
ROWS = 100  # classes in the table; all are in the CSV


@dataclass
class Report:
    """A report in the making.

    Attributes:
        run: its files.
        images: its data.
        predictions: of the student and its teacher, or None.
        baseline: a run without distillation, and its predictions.
        names: of the classes.
        facts: what the rules see.
        files: CSVs to be written beside the page, by their suffix.
        page: the page's file, from which those files have their names.
    """

    run: RunFiles
    images: Images
    predictions: Predictions | None
    baseline: tuple[RunFiles, Predictions | None] | None
    names: list[str]
    page: Path
    facts: dict[str, Any] = field(default_factory=dict)
    files: dict[str, str] = field(default_factory=dict)

    @property
    def stem(self) -> str:
        """Name of the page without `.html`."""
        return self.page.stem

    @property
    def results(self) -> dict[str, Any]:
        """results.json of the run."""
        return self.run.results

    def name(self, index: int) -> str:
        """The name of a class."""
        return self.names[index] if index < len(self.names) else f'class {index}'

    def model(self, who: str) -> dict[str, Any]:
        """What results.json says of a network; of older runs little."""
        models = self.results.get('models')
        found = models.get(who) if isinstance(models, dict) else None
        return found if isinstance(found, dict) else {}


def run_page(report: Report) -> str:
    """Return the page of a run; fills in ``report.files``."""
    r, results = report, report.results
    report.facts.update(base_facts(report))
    blocks: list[dict[str, Any]] = []
    for key, title, make in (
        ('verdict', 'Verdict', verdict), ('answers', 'Right and wrong', answers), ('curves', 'Curves', curves),
        ('classes', 'Classes', classes), ('calibration', 'Calibration', calibration),
        ('generated', 'Generated images', generated),
        ('images', 'What the networks saw', seen), ('time', 'Where the time went', time_spent),
        ('settings', 'Command and settings', settings),
    ):  # fmt: skip
        block = make(report)
        if not block:
            continue
        if block.get('meaning') is None and not block.get('missing'):
            block['meaning'] = _with_own_cache(finding(key, report.facts), r.run.settings.get('teacher_cache'))
        blocks.append({'key': key, 'title': title, 'missing': '', 'missing_command': '', **block})
    about = [results.get('student'), results.get('teacher') and f'from {results["teacher"]}']
    return render(
        'run.html', run=r.run.folder.name, blocks=blocks, title=' '.join(filter(None, about)),
        about=_about(report), why=r.images.why,
    )  # fmt: skip


def _with_own_cache(found: Finding, cache: str | None) -> Finding:
    """Return a finding whose command names a teacher cache of its own, where it trains again and the run had one: other
    augmentation or epochs have other logits."""
    words = shlex.split(found.command)
    if not cache or words[:2] != ['accelerate', 'launch'] or '--experiment' not in words:
        return found
    own = f'{cache}-{words[words.index("--experiment") + 1]}'
    return replace(found, command=f'{found.command} --teacher-cache {shlex.quote(own)}')


def _method(results: dict[str, Any]) -> str:
    """What a run distilled by, as `--criteria` of a comparison takes it."""
    features = results.get('feature_distill', 'none')
    return results['distill'] if features == 'none' else f'{results["distill"]}+{features}'


def _about(r: Report) -> str:
    settings, results = r.run.settings, r.results
    data = settings.get('dataset') or settings.get('data_dir') or 'UCI handwritten digits'
    split = settings['val_split']
    if settings.get('val_fraction') is not None:
        split = f'{settings.get("train_split")} ({100 * settings["val_fraction"]:g} % of it held out)'
    return (
        f'{_method(results)}, {results["epochs"]} epoch(s), seed {results["seed"]}; {data}, split {split}, '
        f'{results["num_classes"]:,} classes'
    )


# ------------------------------------------------------------------------------------------------------------ commands


def base_facts(r: Report) -> dict[str, Any]:
    """Return the commands and settings that sentences name."""
    run, settings, results = r.run.folder, r.run.settings, r.results
    config = ['--config', str(run / 'args.yaml')]
    trained = (run / 'teacher' / 'config.json').exists()
    teacher = ['--teacher', f'local-dir:{run / "teacher"}', '--teacher-epochs', '0', '--teacher-pretrained']
    both = [*config, *(teacher if trained else [])]
    start = ['accelerate', 'launch', 'train_distill.py']
    train = [*start, *both]
    name, out = shlex.quote(run.name), f'{run}-compare'
    epochs, options = results['epochs'], results.get('distill_options') or {}
    temperature = options.get('temperature')
    words = shlex.split(results['command'])
    padding = settings.get('crop_padding') or 4
    beside = os.path.dirname(settings.get('labels') or '') or '.'  # where the files of a table are sought
    target = settings.get('dataset') or settings.get('data_dir') or beside
    data = [target, *(x for n in ('data_dir', 'labels', 'train_split', 'val_split', 'val_fraction')
                      if settings.get(n) not in (None, target)
                      for x in (flag_of(n), str(settings[n])))]  # fmt: skip
    measured = {'teacher': settings.get('teacher'), 'student': results.get('student'),
                'img_size': data_config(r.run)['input_size'][-1], 'batch_size': settings.get('batch_size')}  # fmt: skip
    bench = [x for n, v in measured.items() if v and not str(v).startswith(('local-dir:', 'hf-hub:'))
             for x in (flag_of(n), str(v))]  # fmt: skip

    def comparison(*criteria: str) -> str:
        flags = ['--criteria', *criteria, '--seeds', '0', '1', '2', '--output', out, *both]
        return shlex.join(['timm-rld', 'compare', *flags])

    def another_seed() -> str:
        seed = results['seed'] + 1
        held_out = settings.get('val_seed')
        same = [] if held_out is None else ['--val-seed', str(held_out)]
        return shlex.join([*train, '--seed', str(seed), *same, '--experiment', f'{run.name}-seed{seed}'])

    images = settings.get('data_dir')
    method, features = _method(results), results.get('feature_distill', 'none')
    own = method if method != 'none' else 'rld'
    no_features = ' --feature-distill none' if features != 'none' else ''
    return {
        'epochs': epochs, 'chance': 100 / results['num_classes'], 'run': shlex.quote(str(run)), 'name': name,
        'train': shlex.join(train),
        'train_none': None if own != method else (
            f'{shlex.join(train)} --distill none{no_features} --experiment {name}-none'
        ),
        'better_teacher': f'{shlex.join([*start, *config])} --teacher-epochs {2 * longer} --experiment {name}-taught'
        if (longer := settings.get('teacher_epochs')) else f"timm-rld list models '{_family(settings.get('teacher'))}'",
        'report_baseline': shlex.join(['timm-rld', 'report', 'RUN', '--baseline', str(run)]),
        'compare': comparison('none', own) if results.get('teacher') else another_seed(),
        'compare_kd': comparison('kd', 'rld'),
        'compare_dkd': comparison(own, 'dkd' if own != 'dkd' else 'rld'), 'twice_epochs': 2 * epochs,
        'teacher_family': _family(settings.get('teacher')), 'student_family': _family(results.get('student')),
        'again': shlex.join([*start, *config, '--experiment', f'{run.name}-again']),
        'with_augmentation': shlex.join(['accelerate', 'launch', *(w for w in words if w != '--no-aug'),
                                         '--experiment', f'{run.name}-augmented']),
        'check_data': shlex.join(['timm-rld', 'data', *data]),
        'bench': shlex.join(['timm-rld', 'bench', 'step', *bench]),
        'half_weight': (settings.get('distill_loss_weight') or 1) / 2, 'temperature': temperature,
        'smoothing': settings.get('smoothing'), 'no_aug': bool(settings.get('no_aug')),
        'gentler': f'--crop-padding {padding // 2}' if settings.get('train_crop_mode') == 'pad' else '--scale 0.35 1',
        'larger': 2 * data_config(r.run)['input_size'][-1], 'student_top1': results['student_top1'],
        'teacher_top1': results.get('teacher_top1'), 'best_epoch': results['best_epoch'],
        'use': shlex.join(['timm-rld', 'predict', str(run), images]) if images and Path(images).is_dir() else None,
        'suspects_file': shlex.quote(str(r.page.with_name(f'{r.stem}-suspects.csv'))),
    }  # fmt: skip


def _family(name: str | None) -> str:
    """A pattern that finds the networks of a name's family: `*resnet*` of `cifar_resnet20.x`."""
    stem = (name or '').rpartition('/')[2].rpartition(':')[2].partition('.')[0].removeprefix('cifar_')
    letters = stem.rstrip('0123456789_')
    return f'*{letters.partition("_")[0] or "resnet"}*'.replace("'", '')


# ------------------------------------------------------------------------------------------------------------- verdict


def _points(value: float | None) -> str:
    return '' if value is None or not math.isfinite(value) else f'{value:.2f} %'


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
        tiles.append((f'{who}, top-1', _points(top1), note, who if who != 'without distillation' else 'third'))
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
            cells = [_points(check['top1']['file']), f'{100 * same:.2f} %', f'{ms["1"]:.2f} ms' if '1' in ms else '']
            device = check.get('latency_device') or device
        rows.append([export.file.name, about['weights'], about['precision'], f'{about["bytes"] / 1e6:.1f} MB', *cells])
    columns = ['file', 'weights', 'precision', 'size#', 'top-1#', 'same class as torch#', 'an image#']
    return Table(columns, rows, f'Exports{f" ({device})" if device else ""}') if rows else None


# ---------------------------------------------------------------------------------------------------- right and wrong


def _no_predictions(r: Report) -> dict[str, Any]:
    teacher = r.run.settings.get('teacher')  # of a run that trained its teacher, this means the trained one
    words = ['timm-rld', 'evaluate', str(r.run.folder), *(['--teacher', teacher] if teacher else []),
             '--output', str(r.run.folder)]  # fmt: skip
    return {'missing': 'This run has no predictions.parquet, so that this block is empty. This makes it:',
            'missing_command': shlex.join(words)}  # fmt: skip


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
        return _no_predictions(r)
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


def as_csv(header: Sequence[str], rows: Sequence[Sequence[Any]]) -> str:
    """Return a table as CSV; a text that a spreadsheet would take for a formula gets an apostrophe before it."""

    def safe(value: Any) -> Any:
        if re.fullmatch(r'[+-]\d+(\.\d+)?', str(value)):
            return str(value).removeprefix('+')
        return f"'{value}" if isinstance(value, str) and value[:1] in ('=', '+', '@', '\t', '\r') else value

    text = io.StringIO()
    writer = csv.writer(text, lineterminator='\n')
    writer.writerow(header)
    writer.writerows([safe(value) for value in row] for row in rows)
    return text.getvalue()


# -------------------------------------------------------------------------------------------------------------- curves

_DIAGNOSTICS = {
    'scd': 'Sample confidence (scd)', 'mcd': 'Masked correlation (mcd)', 'teacher_wrong': 'Teacher wrong, share',
    'masked_classes': 'Classes masked', 'masked_mass': "Teacher's probability masked",
    'main_top1': 'Main head, top-1 in training', 'distill_top1': 'Distillation head, top-1 in training',
}  # fmt: skip


def curves(r: Report) -> dict[str, Any]:
    """Losses, top-1, agreement, learning rate and the criterion's diagnostics, over the epochs."""
    h = r.run.history
    epochs = figures.column(h, 'epoch')

    def series(*wanted: tuple[str, str, str]) -> list[tuple[str, str, list[float]]]:
        return [(name, colour, figures.column(h, key)) for key, name, colour in wanted if figures.has(h, key)]

    top1, teacher = figures.column(h, 'eval_top1'), r.results.get('teacher_top1')
    losses = series(('train_task_loss', 'training', 'third'), ('eval_loss', 'validation', 'student'))
    drawn = [
        plots.lines('Cross-entropy', epochs, losses),
        plots.lines('Validation top-1', epochs, series(
            ('eval_top1', 'student', 'student'), ('eval_top1_ema', 'averaged weights', 'fourth'),
        ), level=('teacher', teacher) if teacher is not None else None, unit='%'),
    ]  # fmt: skip
    if figures.has(h, 'eval_agreement'):
        drawn.append(plots.lines('Same answer as the teacher', epochs,
                                 series(('eval_agreement', 'agreement', 'teacher')), unit='%'))  # fmt: skip
    if figures.has(h, 'train_kd_loss'):
        drawn.append(plots.lines('Distillation loss', epochs, series(('train_kd_loss', 'loss', 'fourth'))))
    drawn.append(plots.lines('Learning rate', epochs, series(('lr', 'learning rate', 'accent'))))
    known = {'train_loss', 'train_task_loss', 'train_kd_loss'}
    others = [k for k in dict.fromkeys(k for row in h for k in row) if k.startswith('train_') and k not in known]
    diagnostics = [
        plots.lines(_DIAGNOSTICS.get(k[6:], k[6:].replace('_', ' ').capitalize()), epochs, series((k, k[6:], 'accent')))
        for k in others
        if figures.has(h, k)
    ]
    last = h[-1]
    gap = last['eval_loss'] - last['train_task_loss'] if {'eval_loss', 'train_task_loss'} <= set(last) else None
    agreement = figures.column(h, 'eval_agreement')
    r.facts.update(
        top1_rise=figures.late_rise(top1, 0.1), loss_gap=gap, best_lead=top1[r.results['best_epoch'] - 1] - top1[-1],
        agreement=last.get('eval_agreement'), agreement_rise=figures.late_rise(agreement, 0.2),
    )  # fmt: skip
    return {'plots': drawn, 'diagnostics': diagnostics}


# ------------------------------------------------------------------------------------------------------------- classes


def classes(r: Report) -> dict[str, Any]:
    """Student − teacher of each class; the most confused pairs; the whole matrix where it can be read."""
    p = r.predictions
    if p is None:
        return _no_predictions(r)
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


# --------------------------------------------------------------------------------------------------------- calibration


def calibration(r: Report) -> dict[str, Any]:
    """Reliability diagrams of both networks, with calibration error and best temperature."""
    p = r.predictions
    if p is None:
        return _no_predictions(r)
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


# ---------------------------------------------------------------------------------------------------- generated images


def generated(r: Report) -> dict[str, Any]:
    """Of a student trained on generated images: some of them with both networks' answers, how the teacher spreads them
    over the classes, and the generator's training. Of other runs nothing."""
    found = r.model('generator')
    if not found.get('counts'):
        return {}
    counts, names = np.asarray(found['counts']), [r.name(c) for c in range(len(found['counts']))]
    tiles = [
        ('student = teacher, generated', _points(found['agreement']), f'{found["images"]:,} images', 'student'),
        ('student, validation', _points(r.results['student_top1']), 'top-1', 'student'),
        ('teacher, validation', _points(r.results.get('teacher_top1')), 'top-1', 'teacher'),
        ('classes that occur', f'{found["classes"]} of {len(counts)}', f'entropy {found["entropy"]:.2f} of 1', 'third'),
        ("student's confidence", f'{100 * found["student_confidence"]:.1f} %', 'on generated images', 'student'),
    ]
    if found.get('answers') != 'hard':
        confidence = f'{100 * found["teacher_confidence"]:.1f} %'
        tiles.append(("teacher's confidence", confidence, 'on generated images', 'teacher'))
    if 'd_real' in found:
        sides = f'{found["d_real"]:.2f} / {found["d_fake"]:.2f}'
        tiles.append(('discriminator: real / generated', sides, 'mean, last epoch of phase 1', 'fourth'))
    seed, said = r.results['seed'] + 1, metrics.collapse(counts.tolist(), names)
    r.facts.update(
        generated_agreement=found['agreement'], generated_classes=found['classes'],
        generated_entropy=found['entropy'], collapsed=said[:1].upper() + said[1:],
        another_generator=f'{r.facts["train"]} --seed {seed} --experiment {r.facts["name"]}-seed{seed}',
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


# ------------------------------------------------------------------------------------------------ what the networks saw


def seen(r: Report) -> dict[str, Any]:
    """A mosaic of augmented training images, and what normalisation makes of them; nothing where the student saw
    none."""
    if r.model('generator'):
        return {}
    try:
        found = first_images(r.run, r.images)
    except (UserError, OSError, KeyError, ValueError) as e:
        return {'missing': f'No pictures: {str(e).partition(chr(10))[0]}'}
    if found is None:
        again = ['timm-rld', 'report', str(r.run.folder), '--data-dir', 'DIR']
        return {'missing': r.images.why, 'missing_command': shlex.join(again)}
    pictures = []
    for i, (source, target) in enumerate(zip(found.pictures(), found.target)):
        lines: list[str | tuple[str, str]] = [r.name(target)]
        if found.other[i] != target:
            share = 100 * found.lam[i]
            lines = [f'{r.name(target)} {share:.0f}%', f'{r.name(found.other[i])} {100 - share:.0f}%']
        tone = ''
        if found.teacher is not None:
            tone = 'good' if found.teacher[i] == target else 'bad'
            lines.append(('teacher', r.name(found.teacher[i])))
        pictures.append(Picture(source, lines, f'training image of {r.name(target)}', tone))
    config = data_config(r.run)
    mean, std = found.statistics()
    after_mean, after_std = (mean - config['mean']) / config['std'], std / np.asarray(config['std'])
    worst = int(np.argmax(abs(after_mean) + abs(np.log(np.maximum(after_std, 1e-6)))))
    of_data = {'data_mean': ' '.join(f'{x:.3f}' for x in mean), 'data_std': ' '.join(f'{x:.3f}' for x in std)}
    r.facts.update(worst_mean=float(after_mean[worst]), worst_std=float(after_std[worst]), **of_data)
    if found.teacher is not None:
        r.facts['teacher_wrong_seen'] = 100 * float(np.mean(np.asarray(found.teacher) != np.asarray(found.target)))
    channels = ('red', 'green', 'blue') if len(mean) == 3 else ('grey',)
    rows = [[name, f'{m:.3f}', f'{s:.3f}', f'{am:+.2f}', f'{as_:.2f}']
            for name, m, s, am, as_ in zip(channels, mean, std, after_mean, after_std)]  # fmt: skip
    columns = ['channel', 'mean#', 'deviation#', 'mean, normalised#', 'deviation, normalised#']
    size = ' × '.join(map(str, found.pixels.shape[2:]))
    return {'mosaic': pictures, 'table': Table(columns, rows), 'size': size}


# ------------------------------------------------------------------------------------------------ time, settings


def time_spent(r: Report) -> dict[str, Any]:
    """Where the time of the epochs went, by part."""
    shares, h = figures.time_shares(r.run.history), r.run.history
    s = r.run.settings
    mixed = any(s.get(name) for name in ('mixup', 'cutmix', 'cutmix_minmax'))
    r.facts.update({f'share_{part}': 100 * share for part, share in shares.items()},
                   can_cache=not s.get('teacher_cache') and not mixed and not r.model('generator'))  # fmt: skip
    if not shares:
        return {'plots': [], 'tiles': []}
    total = sum(float(np.nansum(figures.column(h, f'seconds_{part}'))) for part in shares)
    names = {'data': 'waiting for images', 'teacher': 'teacher', 'student': 'student', 'other': 'other'}
    tiles = [(names[part], f'{100 * share:.1f} %', _duration(share * total)) for part, share in shares.items()]
    speed = r.results.get('train_images_per_second')
    tiles.append(('training', _duration(total), f'{speed:,.0f} images a second' if speed else ''))
    parts: dict[str, Sequence[float]] = {names[part]: figures.column(h, f'seconds_{part}') for part in shares}
    return {'plots': [plots.stacked_time(figures.column(h, 'epoch'), parts)], 'tiles': tiles}


def _duration(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    if hours or minutes >= 10:
        return f'{hours} h {minutes:02} min' if hours else f'{minutes} min'
    return f'{minutes} min {rest:02} s' if minutes else f'{seconds:.1f} s'


def settings(r: Report) -> dict[str, Any]:
    """Command, settings that differ from the defaults, versions, digests."""
    defaults = _defaults(r)
    changed = [[flag_of(name), _shown(value), _shown(getattr(defaults, name))]
               for name, value in r.run.settings.items()
               if name in FIELDS and _shown(value) != _shown(getattr(defaults, name))]  # fmt: skip
    facts = read_facts(r.run)
    if r.results.get('teacher_sha256'):
        facts["SHA-256 of the teacher's weights"] = r.results['teacher_sha256']
    if r.results.get('paper'):
        facts['criterion'] = r.results['paper']
    facts |= {f'version of {name}': version for name, version in (r.results.get('versions') or {}).items()}
    return {
        'changed': Table(['setting', 'value', 'default'], changed, 'Settings that differ from the defaults'),
        'recorded': Table(['fact', 'value'], [[k, _shown(v)] for k, v in facts.items()], 'Data, machine, versions'),
    }  # fmt: skip


_OF_THE_RUN = ('teacher', 'student', 'dataset', 'data_dir')


def _defaults(r: Report) -> Config:
    """The settings of a run of this pair, data and length that gave no other."""
    then = r.run.settings
    given: dict[str, Any] = {
        n: then.get(n) for n in (*_OF_THE_RUN, 'distill', 'feature_distill', 'epochs') if then.get(n)
    }
    facts = read_facts(r.run)
    try:
        found = resolve(
            Config(**given), int(facts.get('processes', 1)), facts.get('training images'), published_defaults
        )
        without: dict[str, Any] = {name: getattr(Config(), name) for name in given}
        return replace(found, **without)
    except (UserError, ValueError):
        return Config()


def _shown(value: Any) -> str:
    if isinstance(value, (list, tuple)):
        return ' '.join(map(str, value))
    if isinstance(value, dict):
        return ' '.join(f'{k}={v}' for k, v in value.items())
    return '' if value is None else f'{value:g}' if isinstance(value, float) else str(value)
