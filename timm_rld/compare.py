"""Criteria compared: one pair, several criteria and seeds, everything else equal."""

from __future__ import annotations

import csv
import functools
import io
import json
import shlex
import statistics
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from . import poison_study
from .config import Config, resolve
from .engine import check_settings
from .errors import UserError, writing
from .files import write_atomic
from .poison_study import COLUMNS, Poisoning, is_clean, plan_study, without_attack
from .runs import (
    Variant,
    check_flags,
    check_unique,
    check_variant,
    claim,
    launch_command,
    mean_std,
    paired_difference,
    parse_variant,
    reference_of,
    run_training,
    same_held_out,
    show_difference,
    slug,
    train_teacher,
    wait_until_free,
)

_COLUMNS = ('criterion', 'seed', 'top1', 'top1_best', 'macro', 'teacher_top1', 'agreement', 'images_per_second', 'run')


def compare(
    criteria: Sequence[str],
    seeds: Sequence[int],
    flags: Sequence[str],
    output: str | Path,
    *,
    poison: Sequence[str] = (),
    poison_fractions: Sequence[float] = (),
    launcher: str = '',
    log: Callable[[str], None] = print,
) -> dict[str, Any]:
    """Run a pair under several criteria and seeds, each as `python -m train_distill`, and write tables of the results.

    A teacher that has to be trained is trained once, with the first seed, and shared. Where a run fails the others
    continue, and the tables are made of those that there are. Runs that are complete are not repeated, so that the same
    call continues an interrupted comparison, or repeats what failed, and a criterion or a seed can be added.

    Args:
        criteria: names, or with options and a method on features (:func:`parse_variant`).
        seeds: of the students' weights, order and augmentation.
        flags: of `train_distill.py`, for all runs alike.
        output: folder of the runs, `compare.md`, `compare.csv` and `compare.json`.
        poison, poison_fractions: attacks on the teacher's logits, and the fractions of the training images that they
            change (:func:`timm_rld.poison_study.plan_study`): each criterion is run under each. Runs without attack
            (fraction 0, `none`) are shared by all attacks.
        launcher: a command in place of `python`, e.g. `accelerate launch --num_processes 2`.
        log: prints a line.

    Returns:
        What compare.json holds: also, as `failed`, the criterion, seed and reason of each run that failed.

    Raises:
        UsageError: settings that contradict each other.
        UserError: where the teacher's training failed, or the folder holds another comparison or cannot be written.
        Stopped: after SIGTERM or SIGINT.
    """
    output = Path(output).expanduser()
    given = list(flags)
    config = _check(criteria, seeds, given)
    flags = [*given, *same_held_out(config)]
    answers = resolve(config).black_box
    variants = [parse_variant(c, answers) for c in criteria]
    study = plan_study(poison, poison_fractions, config, variants)
    for variant in variants:
        check_variant(variant, [*flags, *_without_features(config)], check_settings)
    launch = launch_command(launcher)
    claim(output, without_attack(config), 'a comparison')
    with_teacher = config.teacher is not None and bool(resolve(config).teacher_epochs)
    jobs = [
        (v, p, s, output / f'{slug(v.label)}{p.suffix}-seed{s}') for s in seeds for v in variants for p in study.of(v)
    ]
    log(f'{len(jobs)} run(s) in {output}' + (', and a teacher for all' if with_teacher else ''))
    common = flags
    if with_teacher:
        common = train_teacher(launch, flags, output, log, '--seed', str(seeds[0]))
    rows, failed, versions = _run_all(jobs, [*launch, *common, *_without_features(config)], config.teacher_cache, log)
    found = {
        'teacher': config.teacher_name, 'student': config.student, 'epochs': resolve(config).epochs,
        'flags': shlex.join(given), 'launcher': launcher, 'seeds': list(seeds), 'versions': versions, 'runs': rows,
        'failed': failed,
        'criteria': summarize([r for r in rows if is_clean(r)], [v.label for v in variants if study.has_clean(v)]),
        **study.found(rows),
    }  # fmt: skip
    table = io.StringIO()
    writer = csv.DictWriter(table, [*_COLUMNS, *COLUMNS], lineterminator='\n')
    writer.writeheader()
    writer.writerows(rows)
    with writing(f'--output: {output}'):
        write_atomic(output / 'compare.json', json.dumps(found, indent=2, ensure_ascii=False))
        write_atomic(output / 'compare.csv', table.getvalue())
        write_atomic(output / 'compare.md', markdown(found))
    return found


def _run_all(
    jobs: Sequence[tuple[Variant, Poisoning, int, Path]],
    command: Sequence[str],
    cache: str | None,
    log: Callable[[str], None],
) -> tuple[list[dict[str, Any]], list[dict[str, Any]], dict[str, str]]:
    """Run what is not there yet.

    Args:
        jobs: criterion, attack, seed and folder of each run.
        command: that all have in common.
        cache: folder of the teacher's logits; those of each seed lie apart, since the images of another are others.

    Returns:
        A row for each run, the failures, and the versions of packages.
    """
    rows, failed, versions = [], [], {}
    for n, (variant, poisoning, seed, folder) in enumerate(jobs, 1):
        flags = [*variant.flags, *poisoning.flags, '--seed', str(seed)]
        if cache is not None:
            flags += ['--teacher-cache', str(Path(cache) / f'seed-{seed}')]
        what, log_run = variant.label + poisoning.title, functools.partial(_log_numbered, log, f'[{n}/{len(jobs)}]')
        try:
            wait_until_free(folder, f'{what} seed {seed}', log_run)
            results = run_training([*command, *flags], folder, f'{what} seed {seed}', log_run)
        except UserError as e:
            log_run(str(e))
            failed.append({'criterion': what, 'seed': seed, 'reason': str(e), 'run': folder.name})
            continue
        versions = results['versions']
        values = (
            variant.label, seed, results['student_top1'], results['student_top1_best'], results.get('student_macro'),
            results['teacher_top1'], results['agreement'], results['train_images_per_second'], folder.name,
        )  # fmt: skip
        rows.append({**dict(zip(_COLUMNS, values)), **poisoning.columns(results)})
    return rows, failed, versions


def summarize(rows: Sequence[dict[str, Any]], names: Sequence[str] = ()) -> list[dict[str, Any]]:
    """Return for each criterion: last and best top-1 (mean, and deviation over seeds), gain over `none`, and how much
    better RLD is on the same seed: mean differences with their 95% confidence intervals (Student's t). Differences are
    over the seeds that both have. With one seed there is no deviation and no interval, without a run there is no
    figure: they are None.

    Args:
        rows: a dict a run, with `criterion`, `seed`, `top1`, `top1_best`, `macro`, `agreement`, `images_per_second`.
        names: of criteria, in the order that they are to have, with or without a run.

    Returns:
        A dict a criterion, in the order of the rows.
    """
    by_name: dict[str, dict[int, dict[str, Any]]] = {name: {} for name in names}
    for row in rows:
        by_name.setdefault(row['criterion'], {})[row['seed']] = row
    none = by_name.get('none')
    reference = reference_of([name for name, runs in by_name.items() if runs])
    rld = by_name[reference] if reference else None
    found = []
    for name, runs in by_name.items():
        entry: dict[str, Any] = {'criterion': name, 'seeds': len(runs)}
        for key in ('top1', 'top1_best'):
            entry[key], entry[f'{key}_std'] = mean_std([r[key] for r in runs.values()])
        gains = _difference(runs, none) if none and name != 'none' else (None, None)
        entry['gain_over_none'], entry['gain_interval'] = gains
        entry['rld_minus_this'], entry['interval'] = _difference(rld, runs) if rld not in (None, runs) else (None, None)
        for key in ('macro', 'agreement', 'images_per_second'):
            values = [r[key] for r in runs.values() if r.get(key) is not None]
            entry[key] = statistics.fmean(values) if values else None
        found.append(entry)
    return found


def _difference(a: dict[int, dict[str, Any]], b: dict[int, dict[str, Any]]) -> tuple[float | None, float | None]:
    """Return the mean of a - b over their common seeds, and half the width of its 95% interval; None without them."""
    return paired_difference([a[s]['top1'] - b[s]['top1'] for s in a if s in b])


def markdown(found: dict[str, Any]) -> str:
    """Return the tables of a comparison as Markdown."""
    seeds = found['seeds']
    teachers = {r['teacher_top1'] for r in found['runs'] if r['teacher_top1'] is not None}
    teacher = f' (top-1 {teachers.pop():.2f})' if len(teachers) == 1 else ''
    shown = ' '.join(map(str, seeds))
    names = [e['criterion'] for e in found['criteria'] if e['seeds']]
    reference = reference_of(names)
    against = [] if reference is None else [f'{reference} minus this']
    columns = ['criterion', 'top-1, last epoch', 'best epoch', 'macro accuracy', 'gain over none', *against,
               'agreement', 'images/s']  # fmt: skip
    lines = [
        f'{found["teacher"]}{teacher} → {found["student"]}, {found["epochs"]} epochs, seeds {shown}.',
        '',
        f'| {" | ".join(columns)} |',
        f'|{" --- |" * len(columns)}',
    ]
    for e in found['criteria']:
        name = e['criterion'] + (f' ({e["seeds"]} of {len(seeds)} seeds)' if 0 < e['seeds'] < len(seeds) else '')
        if not e['seeds']:
            lines.append(f'| {name} | failed |{" |" * (len(columns) - 2)}')
            continue
        last, best = (
            f'{e[k]:.2f}' + ('' if e[f'{k}_std'] is None else f' ± {e[f"{k}_std"]:.2f}') for k in ('top1', 'top1_best')
        )
        cells = [name, last, best, '' if e['macro'] is None else f'{e["macro"]:.2f}',
                 show_difference(e['gain_over_none'], e['gain_interval'])]  # fmt: skip
        cells += [show_difference(e['rld_minus_this'], e['interval'])] if against else []
        cells += ['' if e['agreement'] is None else f'{e["agreement"]:.1f}', f'{e["images_per_second"]:.0f}']
        lines.append(f'| {" | ".join(cells)} |')
    if len(seeds) == 1:
        lines += ['', 'One seed: no deviation and no interval can be given; a difference may be chance.']
    else:
        lines += ['', f'± is the standard deviation over {len(seeds)} seeds; of differences, half the 95% interval '
                  '(paired by seed).']  # fmt: skip
    if found.get('failed'):
        lines += ['Failed, and so not in these figures: '
                  + ', '.join(f'{f["criterion"]} seed {f["seed"]}' for f in found['failed']) + '.']  # fmt: skip
    lines += [
        'Top-1, macro accuracy (mean over the classes, last epoch) and agreement (same prediction as the teacher) in '
        'percent. `best epoch` is chosen on the validation split itself.',
        *poison_study.markdown(found.get('poison') or []),
        '',
    ]
    return '\n'.join(lines)


def _check(criteria: Sequence[str], seeds: Sequence[int], flags: list[str]) -> Config:
    """Return the settings that all runs share."""
    check_unique('--criteria', criteria)
    check_unique('--seeds', seeds)
    return check_flags(seeds, flags, 'compare')


def _without_features(config: Config) -> list[str]:
    """Return flags that set a method on features of a file aside: in a comparison each variant names its own."""
    return ['--feature-distill', 'none'] if config.feature_distill != 'none' else []


def _log_numbered(log: Callable[[str], None], number: str, text: str) -> None:
    log(f'{number} {text}')
