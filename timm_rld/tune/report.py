"""What a search has found: tables, a sentence, a file of settings."""

from __future__ import annotations

import dataclasses
import math
import statistics
from collections.abc import Sequence
from typing import Any

import yaml

from ..config import FIELDS, parse_args
from ..runs import mean_std, paired_difference, show_difference


def summarize(found: dict[str, Any]) -> dict[str, Any]:
    """Return what the final runs say: `final` (a dict a role: its settings, seeds, mean and deviation of the top-1),
    `differences` (of pairs of roles: mean and half the 95% interval over the seeds that both have) and `verdict`.

    Args:
        found: with `texts`, `roles` and `runs`.
    """
    by_role: dict[str, dict[int, float]] = {}
    for run in found['runs']:
        by_role.setdefault(run['role'], {})[run['seed']] = run['top1']
    role_of = {role: found['roles'][text] for role, text in found['texts'].items()}
    final = []
    for role in dict.fromkeys(role_of.values()):
        mean, std = mean_std(list(by_role.get(role, {}).values()))
        settings = found['texts'][role]
        final.append({'role': role, 'settings': settings, 'seeds': len(by_role.get(role, {})), 'top1': mean,
                      'top1_std': std})  # fmt: skip
    differences = []
    for a, b in (('winner', 'default'), ('winner', 'none'), ('default', 'none')):
        if role_of[a] != role_of[b] and (a, role_of[a]) != ('winner', 'none'):  # the last pair says it
            of_a, of_b = by_role.get(role_of[a], {}), by_role.get(role_of[b], {})
            mean, interval = paired_difference([of_a[s] - of_b[s] for s in of_a if s in of_b])
            differences.append({'of': a, 'over': b, 'mean': mean, 'interval': interval})
    return {'final': final, 'differences': differences, 'verdict': verdict(found['texts'], role_of, differences)}


def verdict(texts: dict[str, str], role_of: dict[str, str], differences: Sequence[dict[str, Any]]) -> str:
    """Return whether tuning was worth it, in a sentence or two."""
    by_pair = {(d['of'], d['over']): d for d in differences}
    over_default, over_none = by_pair.get(('winner', 'default')), by_pair.get(('winner', 'none'))
    if role_of['winner'] == 'none' or texts['winner'].partition(' ')[0] == 'none':
        text = 'Do not distil: the search ended with `none`'
        if (default := by_pair.get(('default', 'none'))) and default['mean'] is not None:
            text += f'; on validation the default is {_shown(default)} points over it'
        return text + '.'
    if role_of['winner'] == 'default':
        text = 'Tuning changed nothing: the default won the search.'
    elif over_default is None or over_default['mean'] is None:
        return 'Final runs are missing, so that it is not known whether tuning was worth it.'
    else:
        text = _worth(over_default)
    if over_none is not None and over_none['mean'] is not None:
        shown = f'{_shown(over_none)} points over no distillation'
        sure = over_none['interval'] is not None and abs(over_none['mean']) > over_none['interval']
        if over_none['mean'] <= 0:
            text += f' Do not distil: the winner is {shown}.'
        else:
            text += f' It is {shown}{"" if sure else ", which may be chance: distilling is not shown to help here"}.'
    return text


def _worth(difference: dict[str, Any]) -> str:
    mean, interval, shown = difference['mean'], difference['interval'], _shown(difference)
    if interval is None:
        return f'One seed: the winner is {shown} points over the default, which may be chance; give more --seeds.'
    if mean > interval:
        return f'Tuning was worth it: the winner is {shown} points over the default.'
    if mean < -interval:
        return f'Tuning was not worth it: the winner is {shown} points over the default; stay with the default.'
    return (
        f'Whether tuning was worth it is not shown: the winner is {shown} points over the default, an interval that '
        'holds 0; more --seeds would tell.'
    )


def _shown(difference: dict[str, Any]) -> str:
    return show_difference(difference['mean'], difference['interval'])


def markdown(found: dict[str, Any]) -> str:
    """Return the final table, the sentence under it, and the table of the search, as Markdown."""
    seeds, (total, kept, held) = found['seeds'], found['images']
    teachers = {r['teacher_top1'] for r in found['runs'] if r['teacher_top1'] is not None}
    teacher = f' (top-1 {teachers.pop():.2f})' if len(teachers) == 1 else ''
    lines = [
        f'{found["teacher"]}{teacher} → {found["student"]}, {found["epochs"]} epochs, '
        f'seeds {" ".join(map(str, seeds))}.',
        '', f'**{found["verdict"]}**', '',
        '| run in full | settings | top-1 on validation |', '| --- | --- | --- |',
    ]  # fmt: skip
    for entry in found['final']:
        deviation = '' if entry['top1_std'] is None else f' ± {entry["top1_std"]:.2f}'
        some = f' ({entry["seeds"]} of {len(seeds)} seeds)' if 0 < entry['seeds'] < len(seeds) else ''
        shown = 'failed' if entry['top1'] is None else f'{entry["top1"]:.2f}{deviation}{some}'
        lines.append(f'| {entry["role"]} | `{entry["settings"]}` | {shown} |')
    lines += ['', '| difference, paired by seed | points |', '| --- | --- |']
    lines += [f'| {d["of"]} - {d["over"]} | {_shown(d)} |' for d in found['differences'] if d['mean'] is not None]
    spread = 'one seed, so no deviation and no interval can be given'
    if len(seeds) > 1:
        spread = '± is the standard deviation over seeds, of differences half the 95% interval'
    lines += ['', f'Top-1 in percent, of the last epoch; {spread}.']
    if found['failed']:
        lines += ['Failed, and so not in these figures: '
                  + ', '.join(f'{f["role"]} seed {f["seed"]}' for f in found['failed']) + '.']  # fmt: skip
    lines += ['', '## The search', '']
    lines += _search_table(found['rungs'])
    scores = [r['top1'] for r in found['rungs'][-1]['rows'] if r['top1'] is not None]
    p = statistics.fmean(scores) / 100
    error = 100 * math.sqrt(p * (1 - p) / held)
    lines += [
        '', f'Top-1 on {held:,} of {total:,} training images, held out of each class; candidates train on the other '
        f'{kept:,}, seed {found["seed"]}. The standard error of one figure is {error:.1f} '
        'points, so that places next to each other may be chance. A teacher that tune has trained has seen these '
        'images. Settings are written for a whole run; ramps are shorter in shorter ones.',
    ]  # fmt: skip
    if reasons := [
        (r['candidate'], t['epochs'], r['reason']) for t in found['rungs'] for r in t['rows'] if r['reason']
    ]:
        lines += ['', 'Failed, and so lost:', '']
        lines += [f'- `{text}` ({epochs} epochs): {reason}' for text, epochs, reason in reasons]
    return '\n'.join([*lines, ''])


def _search_table(rungs: Sequence[dict[str, Any]]) -> list[str]:
    """Return a line a candidate, with its top-1 in each rung; those that came furthest first."""
    columns = [{row['number']: row for row in rung['rows']} for rung in rungs]
    order: list[int] = []
    for rung in reversed(rungs):
        order += [row['number'] for row in rung['rows'] if row['number'] not in order]
    lines = [
        '| | candidate | from | ' + ' | '.join(f'{rung["epochs"]} epochs' for rung in rungs) + ' |',
        '| --- ' * (3 + len(rungs)) + '|',
    ]
    for place, number in enumerate(order, 1):
        rows = [column.get(number) for column in columns]
        cells = ['' if r is None else 'failed' if r['top1'] is None else f'{r["top1"]:.2f}' for r in rows]
        first = columns[0][number]
        lines.append(f'| {place} | `{first["candidate"]}` | {first["origin"]} | ' + ' | '.join(cells) + ' |')
    return lines


def best_yaml(found: dict[str, Any], flags: Sequence[str]) -> str:
    """Return the winner's settings as a file for `--config`.

    Args:
        found: as :func:`markdown` takes it.
        flags: of a run with them.
    """
    config = parse_args(list(flags)).with_absolute_paths()
    values = dataclasses.asdict(config)
    kept: dict[str, Any] = {'distill': config.distill}
    for name, row in FIELDS.items():
        default = row.default_factory() if callable(row.default_factory) else row.default
        if values[name] != default and not (row.metadata['per_run'] and name != 'distill'):
            kept[name] = list(values[name]) if isinstance(values[name], tuple) else values[name]
    text = yaml.safe_dump(kept, sort_keys=False, allow_unicode=True)
    return f'# {found["texts"]["winner"]}, which `timm-rld tune` has found.\n# {found["verdict"]}\n{text}'
