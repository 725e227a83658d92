"""The search: successive halving on a share of the training split, then the winner beside what it has to beat."""

from __future__ import annotations

import dataclasses
import json
import shlex
import shutil
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ..config import Config, completing, flag_of, parse_args, resolve
from ..data import Source, open_splits
from ..engine import check_settings
from ..errors import UsageError, UserError, writing
from ..files import write_atomic
from ..loss import CRITERIA
from ..runs import (
    Variant,
    check_flags,
    check_unique,
    check_variant,
    claim,
    launch_command,
    run_training,
    same_held_out,
    train_teacher,
    wait_until_free,
)
from .candidates import Candidate, check_shared, choose, defaults, flags_of, shorter
from .plan import Clock, Rung, duration, parse_budget, plan
from .report import best_yaml, markdown, summarize

Log = Callable[[str], None]


@dataclass
class Search:
    """What the stages of a search share.

    Attributes:
        output: its folder.
        config: of all runs, resolved, with the epochs of a whole run.
        flags: of all runs, with the teacher of all.
        launch: the words that start a training.
        seed: of the candidates; none of the final runs'.
        holdout: share of the training split to choose by.
        cache: of the teacher's logits on the candidates' images; None where they cannot be cached.
        final_cache: the one that `--teacher-cache` names.
        images: of the training split, those that candidates train on, and those that they are compared on.
        log: prints a line.
        clock: what the runs have cost.
    """

    output: Path
    config: Config
    flags: list[str]
    launch: list[str]
    seed: int
    holdout: float
    cache: Path | None
    final_cache: str | None
    images: tuple[int, int, int]
    log: Log
    clock: Clock = field(default_factory=Clock)


def tune(
    criteria: Sequence[str],
    seeds: Sequence[int],
    flags: Sequence[str],
    output: str | Path,
    *,
    budget: str = '6x',
    shared: Sequence[str] = (),
    holdout: float = 0.1,
    launcher: str = '',
    log: Log = print,
) -> dict[str, Any]:
    """Search the settings of some criteria for a pair, and run the winner, the default and `none` again in full.

    Candidates train on the training split but a share of each class, and are compared on that share. The validation
    split is opened for the final runs alone. What is complete is not run again, so that the same call continues an
    interrupted search.

    Args:
        criteria: names, or with options, which are then not searched (:func:`timm_rld.runs.parse_variant`). The first
            one at its published settings is the default that the winner has to beat.
        seeds: of the final runs.
        flags: of `train_distill.py`, for all runs alike.
        output: folder of the runs, `tune.md`, `tune.json` and `best.yaml`.
        budget: of the search, in whole runs: `6x`.
        shared: what to search beside the criteria's knobs: `lr`.
        holdout: share of the training split to choose by.
        launcher: a command in place of `python`.
        log: prints a line.

    Returns:
        What tune.json holds.

    Raises:
        UsageError: for settings that contradict each other, and a budget too small for two rungs.
        UserError: where there is nothing to hold out from, the teacher's training or most candidates failed, or the
            folder holds another search, is in use, or cannot be written.
        Stopped: after SIGTERM or SIGINT.
    """
    output = Path(output).expanduser()
    given = _check(criteria, seeds, list(flags), shared, holdout)
    flags = [*flags, *same_held_out(given)]
    config = resolve(given).changed(teacher_cache_views=given.teacher_cache_views)
    assert config.epochs is not None  # filled in by resolve()
    whole = given.changed(epochs=config.epochs)
    always = defaults(criteria, whole)
    for candidate in always:
        variant = Variant(candidate.text(config.epochs), tuple(candidate.flags(config.epochs)))
        check_variant(variant, flags, check_settings)
    rungs = plan(parse_budget(budget), config.epochs, len(always))
    seed = next(n for n in range(42, 2**31) if n not in seeds)
    candidates = choose(always, rungs[0].candidates, seed, shared, whole)
    launch = launch_command(launcher)
    kept, held = _open(config, seed, holdout)
    claim(output, given, 'a search')
    _claim_search(
        output,
        {'--criteria': list(criteria), '--budget': budget, '--tune': list(shared), '--tune-holdout': holdout,
         'the seed of the candidates': seed, 'candidates': [c.text(config.epochs) for c in candidates]},
    )  # fmt: skip
    cache, why = _cache(output, given, config, kept)
    with_teacher = bool(config.teacher_epochs)
    search = Search(
        output, whole, flags, launch, seed, holdout, cache, given.teacher_cache,
        (len(kept) + len(held), len(kept), len(held)), log,
    )  # fmt: skip
    _print_plan(search, rungs, candidates, len(seeds), with_teacher, why)
    if with_teacher:
        extra = ('--seed', str(seed), '--tune-holdout', str(holdout), '--train-on-holdout')
        wait_until_free(output / 'teacher', 'the teacher', log)
        search.flags = train_teacher(search.launch, flags, output, log, *extra)
    tables = _race(search, rungs, candidates, len(seeds))
    return _finish(search, tables, always[1] if len(always) > 1 else always[0], seeds, budget)


def _check(
    criteria: Sequence[str], seeds: Sequence[int], flags: list[str], shared: Sequence[str], holdout: float
) -> Config:
    """Return the settings that all runs share."""
    check_unique('--criteria', criteria)
    check_unique('--seeds', seeds)
    check_unique('--tune', shared or ['nothing'])
    check_shared(shared)
    parse_args(['--tune-holdout', str(holdout)])
    named = {f.partition('=')[0] for f in flags}
    for name in ('standardize', 'no_standardize', *completing('distill')):
        if flag_of(name) in named:
            raise UsageError(f"{flag_of(name)}: is searched; what is to stay fixed follows a colon: 'rld:beta=2'")
    config = check_flags(seeds, flags, 'tune')
    if config.feature_distill != 'none':
        raise UsageError(
            f'--feature-distill {config.feature_distill}: tune searches criteria alone; give --feature-distill none'
        )
    if config.poison != 'none':
        raise UsageError(
            f'--poison {config.poison}: a search is for settings of clean runs; --poison none leaves it out'
        )
    if resolve(config).epochs == 0:
        raise UsageError('--epochs 0: trains the teacher alone; tune needs epochs for the students')
    return config


def _open(config: Config, seed: int, holdout: float) -> tuple[Source, Source]:
    """Return what candidates will train on, and be compared on. The validation split is not opened."""
    val_seed = config.seed if config.val_seed is None else config.val_seed
    config = dataclasses.replace(config, seed=seed, tune_holdout=holdout, val_seed=val_seed)
    return open_splits(**config.arguments_of('open_splits'))


def _claim_search(output: Path, facts: dict[str, Any]) -> None:
    """Write what makes a search this one, so that another is never mixed with it.

    Raises:
        UserError: where the folder holds another one.
    """
    file = output / 'search.json'
    try:
        if not file.exists():
            if other := sorted(p.name for p in output.iterdir() if p.name not in ('settings.yaml', '.lock')):
                raise UserError(f'--output {output}: holds {other[0]}, which is not of a search; name another folder')
            write_atomic(file, json.dumps(facts, indent=1, ensure_ascii=False))
        there = json.loads(file.read_text(encoding='utf-8'))
    except OSError as e:
        raise UserError(f'--output {output}: cannot be written ({e.strerror})') from e
    except ValueError as e:
        raise UserError(f'{file}: is damaged; name another folder') from e
    for name, value in facts.items():
        if there.get(name) != value:
            shown = '' if isinstance(value, list) and len(value) > 9 else f' {there.get(name)}, not {value}'
            raise UserError(f'--output {output}: holds a search with {name}{shown or " of its own"}; '
                            'name another folder')  # fmt: skip


def _cache(output: Path, given: Config, config: Config, kept: Source) -> tuple[Path | None, str]:
    """Return the folder for the teacher's logits on the candidates' images, or None and why there is none."""
    folder = Path(given.teacher_cache).expanduser() / 'search' if given.teacher_cache else output / 'cache'
    try:
        resolve(given.changed(teacher_cache=str(folder)))
    except UsageError as e:
        return None, str(e).partition(' with ')[0]
    assert config.epochs is not None
    width = 4 if config.teacher_cache_dtype == 'float32' else 2
    views = config.teacher_cache_views or min(10, config.epochs)
    there = next(p for p in (folder, *folder.absolute().parents) if p.exists())
    needed, free = len(kept) * kept.num_classes * width * views, shutil.disk_usage(there).free
    if needed > free / 2 and not folder.exists():
        why = f'it would take {needed / 1e9:.1f} GB of the {free / 1e9:.1f} GB that are left'
        if given.teacher_cache:
            raise UserError(f'--teacher-cache {given.teacher_cache}: {why}; name a folder on a larger disk')
        return None, why
    return folder, ''


def _print_plan(
    search: Search, rungs: list[Rung], candidates: list[Candidate], seeds: int, with_teacher: bool, no_cache: str
) -> None:
    """Print what the search and the final runs will cost."""
    config, log = search.config, search.log
    assert config.epochs
    counts = [min(r.candidates, len(candidates)) for r in rungs]
    epochs = sum(n * r.epochs for n, r in zip(counts, rungs))
    first, *more = (f'{n} candidates of {r.epochs} epoch(s)' for n, r in zip(counts, rungs))
    total, kept, held = search.images
    log(f'search: {", then ".join([first, *(text.replace(" candidates", "") for text in more)])}: {epochs} epochs, '
        f'{epochs / config.epochs:.1f} whole runs of {config.epochs}')  # fmt: skip
    log(f'  they train on {kept:,} of {total:,} training images and are compared on the other {held:,}; '
        'the validation split is opened for the final runs alone')  # fmt: skip
    log(f'final: winner, default and none, {seeds} seed(s) each: up to {3 * seeds} whole runs, '
        f'{3 * seeds * config.epochs} epochs more')  # fmt: skip
    if with_teacher:
        log(f'teacher: {config.teacher}, trained once on all {total:,} training images')
    log(f"the teacher's logits are cached in {search.cache}" if search.cache else
        f"the teacher's logits are not cached ({no_cache}), so that it runs with every candidate")  # fmt: skip
    log('how long that takes is measured in the first two candidates, and then printed')


def _race(search: Search, rungs: list[Rung], candidates: list[Candidate], seeds: int) -> list[dict[str, Any]]:
    """Run the rungs. Returns a table each: its epochs, and a row a candidate, the best first."""
    tables: list[dict[str, Any]] = []
    racing = dict(enumerate(candidates, 1))
    started = time.perf_counter()
    for number, rung in enumerate(rungs, 1):
        file = search.output / f'rung-{number}.json'
        if file.exists():
            table = _read(file)
            search.log(f'rung {number} of {len(rungs)}: already there')
            _clock(search, table)
        else:
            search.log(f'rung {number} of {len(rungs)}: {len(racing)} candidates, {rung.epochs} epoch(s) each')
            table = {'epochs': rung.epochs, 'rows': _run_rung(search, number, rungs, racing, seeds)}
            room = rungs[number].candidates if number < len(rungs) else 1
            _promote(table['rows'], room, always='none' if number < len(rungs) else '')
            with writing(f'--output: {search.output}'):
                write_atomic(file, json.dumps(table, indent=1, ensure_ascii=False))
        tables.append(table)
        going_on = sorted(row['number'] for row in table['rows'] if row['promoted'])
        racing = {n: candidates[n - 1] for n in going_on}
    search.log(f'search: done in {duration(time.perf_counter() - started)}')
    return tables


def _promote(rows: list[dict[str, Any]], room: int, always: str) -> None:
    """Sort a rung's rows, the best first (of equals the one that was there first, published before sampled), and mark
    those that go on: the best ones, and the best of the criterion ``always``."""
    rows.sort(key=lambda r: (r['top1'] is None, -(r['top1'] or 0), r['number']))
    complete = [r for r in rows if r['top1'] is not None]
    first = next((r for r in complete if r['criterion'] == always), None)
    others = [r for r in complete if r is not first]
    chosen = [*([first] if first else []), *others][:room]
    for row in rows:
        row['promoted'] = any(row is r for r in chosen)


def _run_rung(
    search: Search, number: int, rungs: list[Rung], racing: dict[int, Candidate], seeds: int
) -> list[dict[str, Any]]:
    """Run the candidates of a rung. Returns their rows.

    Raises:
        UserError: where the first one of all, `none`, fails, or more than half: then it is not the candidates that are
            at fault, and the same command runs them again.
    """
    whole, rung = search.config.epochs or 0, rungs[number - 1]
    rows: list[dict[str, Any]] = []
    for place, (index, candidate) in enumerate(racing.items(), 1):
        text = candidate.text(whole)
        title = f'[{number}.{place}/{len(racing)}] {text}'
        row: dict[str, Any] = {
            'number': index, 'candidate': text, 'criterion': candidate.criterion, 'origin': candidate.origin,
            'top1': None, 'reason': None, 'run': f'rung-{number}/{index:02}-{candidate.criterion}', 'seconds': None,
        }  # fmt: skip
        cached = search.cache is not None and not CRITERIA[candidate.criterion].generated
        cache = ['--teacher-cache', str(search.cache)] if cached else []
        command = [
            *search.launch, *search.flags, *shorter(search.config, rung.epochs), *candidate.flags(rung.epochs),
            '--seed', str(search.seed), '--tune-holdout', str(search.holdout), *cache, '--checkpoint-hist', '1',
        ]  # fmt: skip
        try:
            results, row['seconds'], said = _run(search, command, row['run'], title)
            row['top1'] = results['student_top1']
        except UserError as e:
            row['reason'], said = str(e), f'{title}: {e}'
        rows.append(row)
        best = max((r['top1'] for r in rows if r['top1'] is not None), default=None)
        left = _left(search, number, place, rungs, racing, seeds)
        search.log(said + (f'; best {best:.2f}' if best is not None else '') + left)
        failed = [r for r in rows if r['reason']]
        if failed and (index == number == 1 or 2 * len(failed) > len(racing)):
            raise UserError(f'{len(failed)} of {place} candidates failed, so that nothing can be learned from the '
                            f'others; the same command runs them again. {row["reason"]}')  # fmt: skip
    return rows


def _run(search: Search, command: list[str], where: str, title: str) -> tuple[dict[str, Any], float | None, str]:
    """Run a training, or read one that is complete, and free its folder of checkpoints. Returns its results, its
    seconds (None where it was there), and the line to print."""
    folder, said = search.output / where, ['']
    folder.parent.mkdir(parents=True, exist_ok=True)
    wait_until_free(folder, title, search.log)
    there, started = (folder / 'results.json').exists(), time.perf_counter()
    results = run_training(command, folder, title, said.append)
    seconds = None if there else time.perf_counter() - started
    search.clock.add(folder, seconds)
    if where.startswith('rung-'):
        shutil.rmtree(folder / 'checkpoints', ignore_errors=True)
    return results, seconds, said[-1]


def _clock(search: Search, table: dict[str, Any]) -> None:
    """Read the times of a rung that an earlier process has run."""
    for row in table['rows']:
        if row['reason'] is None:
            search.clock.add(search.output / row['run'], row['seconds'])


def _left(search: Search, number: int, place: int, rungs: list[Rung], racing: dict[int, Candidate], seeds: int) -> str:
    """Return how long the search and the final runs still take; from the second run on, which asks the teacher."""
    if number == 1 and place < 2 and len(racing) > 1:
        return ''
    clock, whole, asks = search.clock, search.config.epochs or 0, search.cache is None
    search_left = (len(racing) - place) * clock.seconds(rungs[number - 1].epochs, asks)
    search_left += sum(r.candidates * clock.seconds(r.epochs, asks) for r in rungs[number:])
    scale = search.images[0] / search.images[1]
    final = seeds * (2 * clock.seconds(whole, True, scale) + clock.seconds(whole, False, scale))
    if number == 1 and place == 2:
        so_far = sum(clock.seconds(rungs[0].epochs, asks) for _ in range(place))
        search.log(f'estimate: the search takes about {duration(so_far + search_left)}, the final runs '
                   f'{duration(final)} more ({(so_far + search_left + final) / 3600:.1f} hours together)')  # fmt: skip
    return f'; left: search {duration(search_left)}, final {duration(final)}'


def _finish(
    search: Search, tables: list[dict[str, Any]], default: Candidate, seeds: Sequence[int], budget: str
) -> dict[str, Any]:
    """Run winner, default and `none` in full with fresh seeds on the validation split, and write what was found."""
    whole = search.config.epochs or 0
    winner = next(row for row in tables[-1]['rows'] if row['promoted'])
    texts = {'none': 'none', 'default': default.text(whole), 'winner': winner['candidate']}
    search.log(f'winner of the search: {winner["candidate"]} (top-1 {winner["top1"]:.2f} on the share held out)')
    roles: dict[str, str] = {}  # of the same settings, the first one
    for role, text in texts.items():
        roles.setdefault(text, role)
    jobs = [(seed, role, text) for seed in seeds for text, role in roles.items()]
    search.log(f'final: {len(jobs)} run(s) of {whole} epochs on all training images, compared on the validation split')
    runs, failed = [], []
    for place, (seed, role, text) in enumerate(jobs, 1):
        variant = flags_of(text)
        cache = (
            [] if search.final_cache is None else ['--teacher-cache', str(Path(search.final_cache) / f'seed-{seed}')]
        )
        command = [*search.launch, *search.flags, '--epochs', str(whole), *variant, '--seed', str(seed), *cache]
        entry: dict[str, Any] = {'role': role, 'settings': text, 'seed': seed, 'run': f'final/{role}-seed{seed}'}
        title = f'[{place}/{len(jobs)}] {role} ({text}) seed {seed}'
        try:
            results, _, said = _run(search, command, entry['run'], title)
        except UserError as e:
            search.log(f'{title}: {e}')
            failed.append({**entry, 'reason': str(e)})
            continue
        clock, scale = search.clock, search.images[0] / search.images[1]
        to_do = [r for n, r, _ in jobs[place:] if not (search.output / f'final/{r}-seed{n}/results.json').exists()]
        rest = sum(clock.seconds(whole, role != 'none', scale) for role in to_do)
        search.log(f'{said}; left: {duration(rest)}')
        runs.append({**entry, 'top1': results['student_top1'], 'teacher_top1': results['teacher_top1'],
                     'versions': results['versions']})  # fmt: skip
    config = search.config
    found = {
        'teacher': config.teacher_name, 'student': config.student, 'epochs': whole, 'flags': shlex.join(search.flags),
        'budget': budget, 'holdout': search.holdout, 'images': list(search.images), 'seed': search.seed,
        'seeds': list(seeds), 'rungs': [_without_seconds(t) for t in tables], 'texts': texts, 'roles': roles,
        'versions': runs[-1]['versions'] if runs else {},
        'runs': [{k: v for k, v in r.items() if k != 'versions'} for r in runs], 'failed': failed,
    }  # fmt: skip
    found |= summarize(found)
    with writing(f'--output: {search.output}'):
        write_atomic(search.output / 'tune.json', json.dumps(found, indent=2, ensure_ascii=False))
        write_atomic(search.output / 'tune.md', markdown(found))
        write_atomic(search.output / 'best.yaml', best_yaml(found, [*search.flags, *flags_of(texts['winner'])]))
    return found


def _without_seconds(table: dict[str, Any]) -> dict[str, Any]:
    return {**table, 'rows': [{k: v for k, v in row.items() if k != 'seconds'} for row in table['rows']]}


def _read(file: Path) -> dict[str, Any]:
    try:
        return json.loads(file.read_text(encoding='utf-8'))
    except (OSError, ValueError) as e:
        raise UserError(f'{file}: is damaged; delete it to have the rung decided again') from e
