"""The report of a comparison: compare.json in, the context of `compare.html` out."""

from __future__ import annotations

import json
import shlex
from pathlib import Path
from typing import Any

from .. import metrics
from ..errors import UserError
from ..poison_study import curve, is_clean, names_of
from ..runs import reference_of
from . import figures, plots
from .page import Cell, Table, render
from .rules import finding


def read_comparison(folder: Path) -> dict[str, Any] | None:
    """Return what compare.json of a folder holds; None where there is none.

    Raises:
        UserError: where it is damaged.
    """
    file = folder / 'compare.json'
    if not file.exists():
        return None
    try:
        found = json.loads(file.read_text(encoding='utf-8'))
        found['criteria'], found['runs'], found['seeds'], found['teacher'], found['student'], found['flags']
        return found
    except (OSError, ValueError, KeyError, TypeError) as e:
        raise UserError(f'{file}: is damaged; the command of the comparison writes it again') from e


def baseline_of(run: Path) -> Path | None:
    """Return the run without distillation of the comparison or search that a run is part of, of the same seed; None
    where there is none."""
    if (run.parent.parent / 'search.json').exists() and run.parent.name == 'final':  # of `timm-rld tune`
        role, _, of_seed = run.name.rpartition('-seed')
        none = run.with_name(f'none-seed{of_seed}')
        return none if role not in ('', 'none') and (none / 'results.json').exists() else None
    found = read_comparison(run.parent)
    runs = found['runs'] if found else []
    seed = next((row['seed'] for row in runs if row['run'] == run.name and row['criterion'] != 'none'), None)
    names = (row['run'] for row in runs if row['criterion'] == 'none' and row['seed'] == seed)
    return next((run.parent / name for name in names if '/' not in name), None)


def compare_page(folder: Path, found: dict[str, Any]) -> str:
    """Return the page of a comparison."""
    runs = [r for r in found['runs'] if is_clean(r)]
    by_name = {e['criterion']: {r['seed']: r for r in runs if r['criterion'] == e['criterion']}
               for e in found['criteria']}  # fmt: skip
    names = [name for name, rows in by_name.items() if rows]
    reference = reference_of(names) or (names[0] if names else None)
    facts = comparison_facts(folder, found, by_name, reference)
    return render(
        'compare.html', folder=folder.name, found=found, meaning=finding('comparison', facts),
        table=_table(found, reference_of(names)), top1=_top1_plot(by_name, names) if names else None,
        differences=_differences(by_name, names, reference), runs=_runs_table(found['runs']),
        attacks=_attacks(found.get('poison') or [], facts),
        title=f'{found["student"]} from {found["teacher"]}', seeds=' '.join(map(str, found['seeds'])),
    )  # fmt: skip


def comparison_facts(
    folder: Path, found: dict[str, Any], by_name: dict[str, dict[int, Any]], reference: str | None
) -> dict[str, Any]:
    """Return what the rules see: the reference (rld) beside the best of the others, on the same seeds."""
    facts: dict[str, Any] = {'seeds': len(found['seeds']), **_commands(folder, found, by_name, reference)}
    others = {n: figures.paired_values(by_name[reference], rows) for n, rows in by_name.items()
              if n != reference} if reference else {}  # fmt: skip
    others = {n: values for n, values in others.items() if len(values) > 1}
    if others:
        second = min(others, key=lambda n: metrics.mean_interval(others[n])[0])
        gain, half = metrics.mean_interval(others[second])
        facts.update(reference=reference, second=second, gain=gain, gain_half=half)
    return facts


def _commands(
    folder: Path, found: dict[str, Any], by_name: dict[str, dict[int, Any]], reference: str | None
) -> dict[str, str]:
    flags = shlex.split(found['flags'])
    launcher = ['--launcher', found['launcher']] if found.get('launcher') else []
    more = [*map(str, found['seeds']), *(str(max(found['seeds'], default=-1) + i) for i in (1, 2))]
    criteria = [*by_name, *(n for n in names_of(found.get('poison') or [], 'criterion') if n not in by_name)]
    words = ['timm-rld', 'compare', '--criteria', *criteria, '--seeds', *more, *found.get('poison_flags', []),
             '--output', str(folder), *launcher, *flags]  # fmt: skip
    runs = by_name.get(reference or '', {}).values()
    best = max(runs, key=lambda r: r['top1'], default=None)
    push = ['timm-rld', 'report', str(folder / best['run'])] if best else ['timm-rld', 'list', 'criteria']
    return {'more_seeds': shlex.join(words), 'push': shlex.join(push)}


def _table(found: dict[str, Any], reference: str | None) -> Table:
    """The table of compare.md."""
    several = len(found['seeds']) > 1
    against = [] if reference is None else [f'{reference} minus this#']
    columns = ['criterion', 'top-1, last epoch#', 'best epoch#', 'macro accuracy#', 'gain over none#', *against,
               'agreement#', 'images/s#', 'seeds#']  # fmt: skip

    def cell(value: float | None, shown: str = '.2f', spread: float | None = None) -> Cell | str:
        if value is None:
            return ''
        return Cell(format(value, shown) + ('' if spread is None else f' ± {spread:.2f}'), value)

    rows: list[list[Any]] = []
    for e in found['criteria']:
        if not e['seeds']:
            rows.append([e['criterion'], 'failed', *[''] * (len(columns) - 3), 0])
            continue
        rows.append([
            e['criterion'], cell(e['top1'], spread=e['top1_std']), cell(e['top1_best'], spread=e['top1_best_std']),
            cell(e.get('macro')), cell(e['gain_over_none'], '+.2f', e.get('gain_interval')),
            *([cell(e['rld_minus_this'], '+.2f', e['interval'])] if against else []),
            cell(e['agreement'], '.1f'), cell(e['images_per_second'], ',.0f'), e['seeds'],
        ])  # fmt: skip
    note = '± is the deviation over seeds; of differences, half the 95% interval' if several else 'One seed'
    return Table(columns, rows, f'Top-1 and agreement in percent. {note}.')


def _top1_plot(by_name: dict[str, dict[int, Any]], names: list[str]) -> Any:
    groups = [(name, [row['top1'] for row in by_name[name].values()]) for name in names]
    return plots.seeds('Top-1 of the last epoch', '%', groups, [metrics.mean_interval(v) for _, v in groups])


def _differences(by_name: dict[str, dict[int, Any]], names: list[str], reference: str | None) -> dict[str, Any] | None:
    """How much better the reference is on each seed: a plot and a table."""
    if reference is None:
        return None
    groups = [(f'minus {name}', figures.paired_values(by_name[reference], by_name[name]))
              for name in names if name != reference]  # fmt: skip
    groups = [(name, values) for name, values in groups if values]
    if not groups:
        return None
    intervals = [metrics.mean_interval(values) for _, values in groups]
    rows = [
        [f'{reference} {name}', Cell(f'{mean:+.2f}', mean), '' if half is None else f'{mean - half:+.2f} to '
         f'{mean + half:+.2f}', ', '.join(f'{v:+.2f}' for v in values)]
        for (name, values), (mean, half) in zip(groups, intervals)
    ]  # fmt: skip
    table = Table(['difference', 'mean#', '95% interval', 'on each seed'], rows)
    return {
        'plot': plots.seeds(f'{reference}, on the same seed', 'points', groups, intervals, zero=True),
        'table': table,
    }


def _attacks(cells: list[dict[str, Any]], facts: dict[str, Any]) -> dict[str, Any] | None:
    """Top-1 against the poisoned fraction: a plot for each attack, a table, and what they mean."""
    if not cells:
        return None
    drawn, none = [], next((c for c in cells if c['criterion'] == 'none'), None)
    for attack in names_of(cells, 'poison'):
        series = [
            (name, [(c['fraction'], c['top1'], c['half']) for c in curve(cells, name, attack)])
            for name in names_of(cells, 'criterion') if name != 'none'
        ]  # fmt: skip
        level = (none['top1'], none['half']) if none else None
        drawn.append(plots.fractions(f'Poisoned by {attack}', series, level))
    keys = ('top1', 'half', 'minus_clean', 'minus_none', 'train_top1_poisoned', 'train_top1_clean', 'second_class',
            'agreement')  # fmt: skip
    rows = [
        [c['criterion'], c['poison'] or 'clean', f'{c["fraction"]:g}',
         *('' if c[k] is None else Cell(f'{c[k]:{"+" if "minus" in k else ""}.2f}', c[k]) for k in keys), c['seeds']]
        for c in cells
    ]  # fmt: skip
    columns = ['criterion', 'attack', 'fraction#', 'top-1#', '±#', 'minus clean#', 'minus none#',
               'training top-1, poisoned#', 'training top-1, others#', "teacher's second class#", 'agreement#',
               'seeds#']  # fmt: skip
    note = 'In percent. ± is half the 95% interval of the mean (deviation over seeds, pooled over a criterion)'
    damage = {**facts, **_damage(cells)}
    return {'plots': drawn, 'table': Table(columns, rows, note), 'meaning': finding('attacks', damage)}


def _damage(cells: list[dict[str, Any]]) -> dict[str, Any]:
    """What the worst attack cost each criterion: the one that lost most, and the one that lost least."""
    lost: dict[str, dict[str, Any]] = {}
    for c in cells:
        before = lost.get(c['criterion'])
        if c['poison'] and c['minus_clean'] is not None and (not before or c['minus_clean'] < before['minus_clean']):
            lost[c['criterion']] = c
    if not lost:
        return {}
    ends = {'most': min(lost.values(), key=lambda c: c['minus_clean']),
            'least': max(lost.values(), key=lambda c: c['minus_clean'])}  # fmt: skip
    return {
        f'{end}_{name}': value
        for end, c in ends.items()
        for name, value in (('criterion', c['criterion']), ('attack', c['poison']), ('fraction', c['fraction']),
                            ('loss', -c['minus_clean']))
    }  # fmt: skip


def _runs_table(runs: list[dict[str, Any]]) -> Table:
    attacked = any(not is_clean(r) for r in runs)
    columns = [
        'criterion', *(['attack', 'fraction#'] if attacked else []), 'seed#', 'top-1#', 'best epoch#',
        'macro accuracy#', 'teacher#', 'agreement#', 'images/s#', 'folder',
    ]  # fmt: skip
    keys = ('top1', 'top1_best', 'macro', 'teacher_top1', 'agreement', 'images_per_second')
    rows = []
    for r in runs:
        attack = ['', ''] if is_clean(r) else [r['poison'], f'{r["fraction"]:g}']
        figures = ('' if r.get(k) is None else f'{r[k]:.2f}' for k in keys)
        rows.append([r['criterion'], *(attack if attacked else []), r['seed'], *figures, r['run']])
    return Table(columns, rows)
