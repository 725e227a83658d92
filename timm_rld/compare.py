"""Criteria compared: one pair, several criteria and seeds, everything else equal."""

from __future__ import annotations

import contextlib
import csv
import dataclasses
import functools
import io
import json
import math
import os
import re
import shlex
import signal
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .config import FIELDS, Config, flag_of, load_yaml, marked, parse_args, resolve, to_yaml
from .errors import Stopped, UsageError, UserError, writing
from .files import write_atomic
from .loss import choose_criterion

# 97.5% quantiles of Student's t for 1, 2, … degrees of freedom
_T = (
    12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228, 2.201, 2.179, 2.160, 2.145, 2.131, 2.120,
    2.110, 2.101, 2.093, 2.086, 2.080, 2.074, 2.069, 2.064, 2.060, 2.056, 2.052, 2.048, 2.045, 2.042,
)  # fmt: skip
_COLUMNS = ('criterion', 'seed', 'top1', 'top1_best', 'macro', 'teacher_top1', 'agreement', 'images_per_second', 'run')


@dataclass(frozen=True)
class Variant:
    """A criterion to compare, and the flags that choose it.

    Attributes:
        label: as it was written; the name in tables and folders.
        flags: for `train_distill.py`.
    """

    label: str
    flags: tuple[str, ...]


def parse_variant(text: str) -> Variant:
    """Return the variant that a text names: `rld`, or with options and weights
    `rld:beta=2,temperature=1,distill_warmup_epochs=1`, `kd:standardize=true`.

    Raises:
        UsageError: for an unknown criterion or option.
    """
    name, _, rest = text.partition(':')
    options, flags = [], ['--distill', name]
    for item in filter(None, re.split(r',(?![^\[]*\])', rest)):  # not within a list
        key, sep, value = item.partition('=')
        if not sep:
            raise UsageError(f"--criteria {text}: expected name=value after the colon, got '{item}'")
        if key == 'standardize':
            if value.lower() not in ('true', 'false'):
                raise UsageError(f'--criteria {text}: standardize must be true or false, got {value}')
            flags += ['--standardize' if value.lower() == 'true' else '--no-standardize']
        elif key in marked('belongs_to', 'distill'):
            flags += [flag_of(key), value]
        else:
            options.append(item)
    if options:
        flags += ['--distill-kwargs', *options]
    try:
        config = parse_args(flags)
        choose_criterion(config.distill, config.standardize, config.distill_kwargs)
    except UsageError as e:
        raise UsageError(f'--criteria {text}: {str(e).partition(": ")[2]}') from e
    return Variant(text, tuple(flags))


def compare(
    criteria: Sequence[str],
    seeds: Sequence[int],
    flags: Sequence[str],
    output: str | Path,
    *,
    launcher: str = '',
    log: Callable[[str], None] = print,
) -> dict[str, Any]:
    """Run a pair under several criteria and seeds, each as `python -m train_distill`, and write tables of the results.

    A teacher that has to be trained is trained once, with the first seed, and shared. Where a run fails the others
    continue, and the tables are made of those that there are. Runs that are complete are not repeated, so that the same
    call continues an interrupted comparison, or repeats what failed, and a criterion or a seed can be added.

    Args:
        criteria: names, or with options (:func:`parse_variant`).
        seeds: of the students' weights, order and augmentation.
        flags: of `train_distill.py`, for all runs alike.
        output: folder of the runs, `compare.md`, `compare.csv` and `compare.json`.
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
    config = _check(criteria, seeds, list(flags))
    flags = [*flags, *_same_held_out(config)]
    variants = [parse_variant(c) for c in criteria]
    _claim(output, config)
    launch = [*(shlex.split(launcher) or [sys.executable]), '-m', 'train_distill']
    train_teacher = config.teacher is not None and bool(resolve(config).teacher_epochs)
    jobs = [(v, s, output / f'{_slug(v.label)}-seed{s}') for s in seeds for v in variants]
    log(f'{len(jobs)} run(s) in {output}' + (', and a teacher for all' if train_teacher else ''))
    common = flags
    if train_teacher:
        folder = output / 'teacher'
        _run([*launch, *flags, '--epochs', '0', '--seed', str(seeds[0])], folder, 'the teacher', log)
        common = [*flags, '--teacher', f'local-dir:{folder / "teacher"}', '--teacher-epochs', '0',
                  '--teacher-pretrained']  # fmt: skip
    rows, failed, versions = [], [], {}
    for n, (variant, seed, folder) in enumerate(jobs, 1):
        command = [*launch, *common, *variant.flags, '--seed', str(seed)]
        if config.teacher_cache is not None:  # the images of another seed are others
            command += ['--teacher-cache', str(Path(config.teacher_cache) / f'seed-{seed}')]
        name, log_run = f'{variant.label} seed {seed}', functools.partial(_log_numbered, log, f'[{n}/{len(jobs)}]')
        try:
            results = _run(command, folder, name, log_run)
        except UserError as e:
            log_run(str(e))
            failed.append({'criterion': variant.label, 'seed': seed, 'reason': str(e), 'run': folder.name})
            continue
        versions = results['versions']
        values = (
            variant.label, seed, results['student_top1'], results['student_top1_best'], results.get('student_macro'),
            results['teacher_top1'], results['agreement'], results['train_images_per_second'], folder.name,
        )  # fmt: skip
        rows.append(dict(zip(_COLUMNS, values)))
    found = {
        'teacher': config.teacher, 'student': config.student, 'epochs': resolve(config).epochs,
        'flags': shlex.join(flags), 'seeds': list(seeds), 'versions': versions, 'runs': rows, 'failed': failed,
        'criteria': summarize(rows, [v.label for v in variants]),
    }  # fmt: skip
    table = io.StringIO()
    writer = csv.DictWriter(table, _COLUMNS, lineterminator='\n')
    writer.writeheader()
    writer.writerows(rows)
    with writing(f'--output: {output}'):
        write_atomic(output / 'compare.json', json.dumps(found, indent=2, ensure_ascii=False))
        write_atomic(output / 'compare.csv', table.getvalue())
        write_atomic(output / 'compare.md', markdown(found))
    return found


def summarize(rows: Sequence[dict[str, Any]], names: Sequence[str] = ()) -> list[dict[str, Any]]:
    """Return for each criterion: last and best top-1 (mean, and deviation over seeds), gain over `none`, and how much
    better RLD is on the same seed: the mean difference with its 95% confidence interval (Student's t). Differences are
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
    variants = (runs for name, runs in by_name.items() if name.partition(':')[0] == 'rld' and runs)
    rld = by_name.get('rld') or next(variants, None)
    found = []
    for name, runs in by_name.items():
        entry: dict[str, Any] = {'criterion': name, 'seeds': len(runs)}
        for key in ('top1', 'top1_best'):
            entry[key], entry[f'{key}_std'] = _mean_std([r[key] for r in runs.values()])
        entry['gain_over_none'] = _difference(runs, none)[0] if none and name != 'none' else None
        entry['rld_minus_this'], entry['interval'] = _difference(rld, runs) if rld not in (None, runs) else (None, None)
        for key in ('macro', 'agreement', 'images_per_second'):
            values = [r[key] for r in runs.values() if r.get(key) is not None]
            entry[key] = statistics.fmean(values) if values else None
        found.append(entry)
    return found


def _difference(a: dict[int, dict[str, Any]], b: dict[int, dict[str, Any]]) -> tuple[float | None, float | None]:
    """Return the mean of a - b over their common seeds, and half the width of its 95% interval; None without them."""
    mean, std = _mean_std([a[s]['top1'] - b[s]['top1'] for s in a if s in b])
    n = len(set(a) & set(b))
    return mean, None if std is None else (_T[n - 2] if n - 2 < len(_T) else 1.96) * std / math.sqrt(n)


def _mean_std(values: list[float]) -> tuple[float | None, float | None]:
    return statistics.fmean(values) if values else None, statistics.stdev(values) if len(values) > 1 else None


def markdown(found: dict[str, Any]) -> str:
    """Return the tables of a comparison as Markdown."""
    seeds = found['seeds']
    teachers = {r['teacher_top1'] for r in found['runs'] if r['teacher_top1'] is not None}
    teacher = f' (top-1 {teachers.pop():.2f})' if len(teachers) == 1 else ''
    shown = ' '.join(map(str, seeds))
    names = [e['criterion'] for e in found['criteria'] if e['seeds']]
    reference = 'rld' if 'rld' in names else next((n for n in names if n.startswith('rld:')), 'RLD')
    lines = [
        f'{found["teacher"]}{teacher} → {found["student"]}, {found["epochs"]} epochs, seeds {shown}.',
        '',
        '| criterion | top-1, last epoch | best epoch | macro accuracy | gain over none | '
        f'{reference} minus this | agreement | images/s |',
        '| --- | --- | --- | --- | --- | --- | --- | --- |',
    ]
    for e in found['criteria']:
        name = e['criterion'] + (f' ({e["seeds"]} of {len(seeds)} seeds)' if 0 < e['seeds'] < len(seeds) else '')
        if not e['seeds']:
            lines.append(f'| {name} | failed | | | | | | |')
            continue
        last, best = (
            f'{e[k]:.2f}' + ('' if e[f'{k}_std'] is None else f' ± {e[f"{k}_std"]:.2f}') for k in ('top1', 'top1_best')
        )
        gain = '' if e['gain_over_none'] is None else f'{e["gain_over_none"]:+.2f}'
        against = '' if e['rld_minus_this'] is None else f'{e["rld_minus_this"]:+.2f}'
        if against and e['interval'] is not None:
            against += f' ± {e["interval"]:.2f}'
        agreement = '' if e['agreement'] is None else f'{e["agreement"]:.1f}'
        macro = '' if e['macro'] is None else f'{e["macro"]:.2f}'
        lines.append(
            f'| {name} | {last} | {best} | {macro} | {gain} | {against} | {agreement} | {e["images_per_second"]:.0f} |'
        )
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
        '',
    ]
    return '\n'.join(lines)


def _check(criteria: Sequence[str], seeds: Sequence[int], flags: list[str]) -> Config:
    """Return the settings that all runs share."""
    for what, values in (('--criteria', criteria), ('--seeds', seeds)):
        if not values:
            raise UsageError(f'{what}: name at least one')
        if twice := [v for i, v in enumerate(values) if v in values[:i]]:
            raise UsageError(f'{what}: {twice[0]} is there twice')
    config = parse_args(flags)
    for name in marked('per_run'):
        if getattr(config, name) != FIELDS[name].default and flag_of(name) in {f.partition('=')[0] for f in flags}:
            raise UsageError(
                f'{flag_of(name)}: is chosen for each run; see --criteria, --seeds and --output of compare'
            )
    if config.student is None or config.teacher is None:
        raise UsageError('--teacher and --student are needed, e.g. --teacher resnet34 --student resnet18')
    for seed in seeds:
        parse_args(['--seed', str(seed)])
    resolve(config)
    return config


def _same_held_out(config: Config) -> list[str]:
    """Return flags that hold the same images out in all runs: the teacher, which is trained once, must not have seen
    them."""
    return ['--val-seed', str(config.seed)] if config.val_fraction is not None and config.val_seed is None else []


def _claim(output: Path, config: Config) -> None:
    """Write the settings into the folder, so that runs under others are never put into one table."""
    file = output / 'settings.yaml'
    try:
        output.mkdir(parents=True, exist_ok=True)
        if not file.exists():
            if any(output.iterdir()):
                raise UserError(f'--output {output}: is not empty; name another folder')
            write_atomic(file, to_yaml(config))
    except OSError as e:
        raise UserError(f'--output {output}: cannot be written ({e.strerror})') from e
    there = load_yaml(str(file), '--output')
    for name, value in dataclasses.asdict(config).items():
        if there.get(name) != value:
            raise UserError(
                f'--output {output}: holds a comparison with {flag_of(name)} {there.get(name)}, not {value}; '
                'name another folder'
            )


def _run(command: list[str], folder: Path, title: str, log: Callable[[str], None]) -> dict[str, Any]:
    """Run one training to its end, or read the results of one that is complete.

    Raises:
        UserError: where it failed; the reason in a line.
    """
    done = folder / 'results.json'
    if done.exists():
        log(f'{title}: already there')
        return _read_results(done)
    log_file = folder.with_name(f'{folder.name}.log')
    started = time.perf_counter()
    command = [*command, '--output', str(folder.parent), '--experiment', folder.name, '--resume', 'auto']
    with contextlib.ExitStack() as stack:
        with writing(f'{title} failed: {log_file}'):
            f = stack.enter_context(log_file.open('ab'))
        begin = f.tell()
        code = _wait(subprocess.Popen(command, stdout=f, stderr=subprocess.STDOUT, env=os.environ))
    if code or not done.exists():
        how = f'was ended by {signal.Signals(-code).name}' if code < 0 else f'failed with code {code}'
        raise UserError(f'{title} {how}: {_last_words(log_file.read_bytes()[begin:])} (its output: {log_file})')
    results = _read_results(done)
    top1 = results.get('student_top1', results['teacher_top1'])
    minutes, seconds = divmod(round(time.perf_counter() - started), 60)
    log(f'{title}: top-1 {top1:.2f} ({minutes}:{seconds:02})')
    return results


def _log_numbered(log: Callable[[str], None], number: str, text: str) -> None:
    log(f'{number} {text}')


def _read_results(file: Path) -> dict[str, Any]:
    try:
        return json.loads(file.read_text(encoding='utf-8'))
    except (OSError, ValueError) as e:
        raise UserError(f'{file}: is damaged; delete it to have the run repeated') from e


def _last_words(output: bytes) -> str:
    """Return the error that a program ended with, else its last line."""
    text = output.decode(errors='replace').strip()
    text = text.rpartition('error: ')[2] if 'error: ' in text else text.rpartition('\n')[2]
    return ' '.join(text.split()) or 'no output'


def _wait(process: subprocess.Popen[bytes]) -> int:
    """Return the exit code of a run. A signal to us is passed on, and the run then has time for a checkpoint."""

    def stop(number: int, _: object) -> None:
        raise Stopped('stopped by SIGTERM; the same command continues', 128 + number)

    before = signal.signal(signal.SIGTERM, stop)
    try:
        return process.wait()
    except KeyboardInterrupt:  # which the run has got too
        process.wait()
        raise Stopped('interrupted; the same command continues', 130) from None
    except BaseException:
        process.terminate()
        process.wait()
        raise
    finally:
        signal.signal(signal.SIGTERM, before)


def _slug(label: str) -> str:
    return ''.join(c if c.isalnum() or c in '._-' else '_' for c in label)
