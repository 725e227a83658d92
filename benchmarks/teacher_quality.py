"""Where refining pays: the gain of each criterion over no distillation, against the accuracy of the teacher.

python benchmarks/teacher_quality.py --output DIR [-- flags of train_distill.py]

For each seed a student is trained without distillation, and under each criterion from teachers that were trained for
fewer epochs on purpose. Each seed has teachers of its own, so that the intervals are over teachers and students. All
else is equal: recipe, order and augmented images of a seed, the logits of a teacher (they are cached).

After an interruption the same command continues; seeds, criteria and epochs of the teacher may be added. DIR gets
teacher_quality.json, teacher_quality.md and teacher_quality.svg, which are written anew after each seed.
"""

from __future__ import annotations

import argparse
import json
import shlex
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from timm_rld.bench.measure import run_script
from timm_rld.config import Config, resolve
from timm_rld.errors import UsageError, UserError
from timm_rld.files import write_atomic
from timm_rld.runs import (
    check_flags,
    check_unique,
    claim,
    launch_command,
    mean_std,
    paired_difference,
    parse_variant,
    reference_of,
    run_training,
    same_held_out,
    slug,
    train_teacher,
)

NAME = 'teacher_quality'
COLOURS = ('#4269d0', '#efb118', '#3ca951', '#ff725c', '#a463f2', '#9c6b4e')
Row = dict[str, Any]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument('--output', type=Path, required=True, metavar='DIR', help='for the runs and the results')
    parser.add_argument('--teacher', default='cifar_resnet20', metavar='NAME', help='default: cifar_resnet20')
    parser.add_argument('--student', default='cifar_resnet8', metavar='NAME', help='default: cifar_resnet8')
    epochs = [1, 2, 7]
    parser.add_argument('--teacher-epochs', type=int, nargs='+', default=epochs, metavar='N', help='default: 1 2 7')
    criteria = ['kd', 'dkd', 'la', 'rld']
    parser.add_argument(
        '--criteria', nargs='+', default=criteria, metavar='NAME',
        help=f"beside none, with options after a colon: 'rld:standardize=true' (default: {' '.join(criteria)})",
    )  # fmt: skip
    parser.add_argument('--seeds', type=int, nargs='+', default=list(range(10)), metavar='N', help='default: 0 to 9')
    parser.add_argument('--launcher', default='', metavar='COMMAND', help="in place of python, as timm-rld compare's")
    parser.add_argument('flags', nargs='*', help='after --: of train_distill.py, for all runs alike')


def run(args: argparse.Namespace) -> str:
    """Run the study, or what is missing of it. Returns its table as Markdown."""
    config = _check(args)
    output = args.output.expanduser()
    claim(output, config, 'a study')
    rows: list[Row] = []
    failed: list[Row] = []
    for seed in args.seeds:
        rows += run_seed(args, output, config, seed, failed, lambda text: print(text, file=sys.stderr, flush=True))
        found = {
            'teacher': args.teacher, 'student': args.student, 'flags': shlex.join(args.flags),
            'epochs': resolve(config).epochs, 'teacher_epochs': sorted(args.teacher_epochs),
            'seeds': args.seeds[: args.seeds.index(seed) + 1], 'versions': rows[-1]['versions'] if rows else {},
            'runs': [{k: v for k, v in row.items() if k != 'versions'} for row in rows], 'failed': failed,
            **summarize(rows),
        }  # fmt: skip
        write_atomic(output / f'{NAME}.json', json.dumps(found, indent=1, ensure_ascii=False) + '\n')
        write_atomic(output / f'{NAME}.md', markdown(found))
        draw(found, output / f'{NAME}.svg')
    if failed:
        reasons = '\n'.join(f'{f["run"]}: {f["reason"]}' for f in failed)
        raise UserError(f'{len(failed)} runs failed; the same command repeats them, and no others:\n{reasons}')
    return markdown(found)


def run_seed(
    args: argparse.Namespace, output: Path, config: Config, seed: int, failed: list[Row], log: Callable[[str], None]
) -> list[Row]:
    """Run what is missing of a seed.

    Args:
        config: of all runs.
        failed: gets the runs that failed; the others continue.

    Returns:
        A row for each run: `criterion`, `seed`, `teacher_epochs`, `teacher_top1`, `top1`, `top1_best`, `agreement`,
        `versions`; without a teacher three of them are None.
    """
    launch, rows = launch_command(args.launcher), []
    common = ['--student', args.student, *args.flags, *same_held_out(config), '--seed', str(seed)]

    def train(flags: Sequence[str], label: str, folder: Path, epochs: int | None) -> None:
        name = folder.relative_to(output).as_posix()
        try:
            results = run_training([*launch, *flags], folder, name, log)
        except UserError as e:
            log(str(e))
            failed.append({'run': name, 'reason': str(e)})
            return
        rows.append({
            'criterion': label, 'seed': seed, 'teacher_epochs': epochs, 'teacher_top1': results['teacher_top1'],
            'top1': results['student_top1'], 'top1_best': results['student_top1_best'],
            'agreement': results['agreement'], 'versions': results['versions'],
        })  # fmt: skip

    train([*common, '--distill', 'none'], 'none', output / f'none-seed{seed}', None)
    for epochs in args.teacher_epochs:
        folder = output / f'teacher{epochs}-seed{seed}'
        folder.mkdir(exist_ok=True)
        flags = [*common, '--teacher', args.teacher, '--teacher-epochs', str(epochs), '--min-teacher-acc', '0']
        try:
            flags = train_teacher(launch, [*flags, '--no-teacher-pretrained'], folder, log)
        except UserError as e:
            failed.append({'run': folder.name, 'reason': str(e)})
            continue
        flags += ['--teacher-cache', str(folder / 'cache'), '--teacher-cache-views', str(resolve(config).epochs)]
        for variant in map(parse_variant, args.criteria):
            train([*flags, *variant.flags], variant.label, folder / slug(variant.label), epochs)
    return rows


def _check(args: argparse.Namespace) -> Config:
    """Return the settings of all runs but for criterion, seed and epochs of the teacher."""
    for flag, values in (('criteria', args.criteria), ('seeds', args.seeds), ('teacher-epochs', args.teacher_epochs)):
        check_unique(f'--{flag}', values)
    if min(args.teacher_epochs) < 1:
        raise UsageError(f'--teacher-epochs {min(args.teacher_epochs)}: must be at least 1')
    if 'none' in args.criteria:
        raise UsageError('--criteria none: is what the others are compared with; leave it out')
    for criterion in args.criteria:
        parse_variant(criterion)
    for flag in ('--teacher', '--teacher-epochs', '--student', '--teacher-cache'):
        if flag in {f.partition('=')[0] for f in args.flags}:
            raise UsageError(f'{flag}: is chosen by this program; give it before the --, if it takes it')
    try:
        import matplotlib  # noqa: F401
    except ImportError as e:
        raise UserError('the picture needs the package matplotlib; pip install "timm-rld[plot]"') from e
    return check_flags(
        args.seeds, ['--teacher', args.teacher, '--student', args.student, *args.flags], 'teacher_quality.py'
    )


def summarize(rows: Sequence[Row]) -> dict[str, list[Row]]:
    """Return the figures over seeds. Differences are paired by seed, and over the seeds that both have; intervals are
    half the width of the 95% interval (Student's t), None for one seed.

    Args:
        rows: of :func:`run_seed`.

    Returns:
        `teachers`: of each number of epochs, `top1` and its deviation; `points`: of each number of epochs and
        criterion, top-1, gain over `none`, and how much better the first criterion that is RLD is; `changes`: of each
        other criterion, by how much that lead is larger under the teacher of the fewest epochs than under that of the
        most.
    """
    epochs = sorted({r['teacher_epochs'] for r in rows if r['teacher_epochs'] is not None})
    names = list(dict.fromkeys(r['criterion'] for r in rows if r['criterion'] != 'none'))
    top1 = {(r['teacher_epochs'], r['criterion'], r['seed']): r['top1'] for r in rows}
    seeds = list(dict.fromkeys(r['seed'] for r in rows))
    rld = reference_of(names)

    def difference(n: int, a: str, m: int | None, b: str) -> list[tuple[int, float]]:
        keys = ((s, (n, a, s), (m, b, s)) for s in seeds)
        return [(s, top1[one] - top1[other]) for s, one, other in keys if one in top1 and other in top1]

    def mean(differences: Sequence[tuple[int, float]]) -> list[float | None]:
        return list(paired_difference([d for _, d in differences]))

    teachers, points, changes = [], [], []
    for n in epochs:
        of_teacher = {r['seed']: r['teacher_top1'] for r in rows if r['teacher_epochs'] == n}
        teachers.append({'epochs': n, 'top1': mean_std(list(of_teacher.values())), 'by_seed': of_teacher})
        for name in names:
            runs = [r for r in rows if (r['teacher_epochs'], r['criterion']) == (n, name)]
            points.append({
                'teacher_epochs': n, 'criterion': name, 'seeds': len(runs), 'top1': mean_std([r['top1'] for r in runs]),
                'gain': mean(gains := difference(n, name, None, 'none')), 'gain_by_seed': dict(gains),
                'rld_minus_this': mean(difference(n, rld, n, name)) if rld not in (None, name) else [None, None],
                'agreement': mean_std([r['agreement'] for r in runs if r['agreement'] is not None])[0],
            })  # fmt: skip
    if rld is not None and len(epochs) > 1:
        for name in names:
            if name != rld:
                few, many = (dict(difference(n, rld, n, name)) for n in (epochs[0], epochs[-1]))
                changes.append({'criterion': name, 'change': mean([(s, few[s] - many[s]) for s in few if s in many])})
    return {'teachers': teachers, 'points': points, 'changes': changes}


def markdown(found: dict[str, Any]) -> str:
    """Return the table of a study, and how the lead of RLD changes with the teacher."""
    rld = reference_of([p['criterion'] for p in found['points']]) or 'RLD'
    none = mean_std([r['top1'] for r in found['runs'] if r['criterion'] == 'none'])
    lines = [
        f'{found["teacher"]} → {found["student"]}, {found["epochs"]} epochs, seeds {" ".join(map(str, found["seeds"]))}'
        f'; without distillation top-1 {_with(none, plus=False)}.',
        '',
        f'| teacher, epochs | its top-1 | criterion | top-1, last epoch | gain over none | {rld} minus this '
        '| agreement |',
        '| --- | --- | --- | --- | --- | --- | --- |',
    ]
    for t in found['teachers']:
        for p in (p for p in found['points'] if p['teacher_epochs'] == t['epochs']):
            cells = [
                t['epochs'], _with(t['top1'], plus=False), f'`{p["criterion"]}`', _with(p['top1'], plus=False),
                _with(p['gain']), _with(p['rld_minus_this']),
                '' if p['agreement'] is None else f'{p["agreement"]:.1f}',
            ]  # fmt: skip
            lines.append(f'| {" | ".join(map(str, cells))} |')
    lines += [
        '',
        'Top-1 in percent. ± is the standard deviation over seeds; of differences, half the 95% interval (Student\'s '
        't, paired by seed, not corrected for their number).',
    ]  # fmt: skip
    if found['changes']:
        few, many = found['teacher_epochs'][0], found['teacher_epochs'][-1]
        shown = ', '.join(f'`{c["criterion"]}` {_with(c["change"])}' for c in found['changes'])
        lines += [f'The lead of {rld} with {few} epoch(s) of the teacher minus that with {many}: {shown}.']
    return '\n'.join(lines) + '\n'


def _with(pair: Sequence[float | None], plus: bool = True) -> str:
    """Return a figure and what stands after ±."""
    value, spread = pair
    if value is None:
        return ''
    return f'{value:{"+" if plus else ""}.2f}' + ('' if spread is None else f' ± {spread:.2f}')


def draw(found: dict[str, Any], file: Path) -> None:
    """Draw the gains over `none` against the accuracy of the teacher: a faint point a seed, means with intervals."""
    import matplotlib
    from matplotlib.figure import Figure

    with matplotlib.rc_context({'svg.hashsalt': NAME, 'svg.fonttype': 'none'}):
        figure = Figure(figsize=(7.2, 4.2), layout='constrained')
        axes = figure.subplots()
        axes.axhline(0, color='#888888', linewidth=1)
        names = list(dict.fromkeys(p['criterion'] for p in found['points']))
        span = max((t['top1'][0] for t in found['teachers']), default=0) - min(
            (t['top1'][0] for t in found['teachers']), default=0
        )
        for i, name in enumerate(names):
            colour, aside = COLOURS[i % len(COLOURS)], (i - (len(names) - 1) / 2) * max(span, 1) / 80
            means = []
            for t in found['teachers']:
                p = next(p for p in found['points'] if (p['teacher_epochs'], p['criterion']) == (t['epochs'], name))
                seeds = list(p['gain_by_seed'])
                x, y = [t['by_seed'][s] for s in seeds], [p['gain_by_seed'][s] for s in seeds]
                axes.plot(x, y, '.', color=colour, alpha=0.25, markersize=5)
                if p['gain'][0] is not None:
                    means.append((t['top1'][0] + aside, p['gain'][0], p['gain'][1] or 0.0))
            if means:
                x, y, half = zip(*means)
                axes.errorbar(x, y, half, color=colour, marker='o', markersize=5, capsize=3, linewidth=1.4, label=name)
        axes.set_xlabel('top-1 of the teacher, percent')
        axes.set_ylabel('gain over none, points of top-1')
        axes.spines[['top', 'right']].set_visible(False)
        axes.grid(alpha=0.25)
        if axes.get_legend_handles_labels()[0]:
            axes.legend(frameon=False, ncols=len(names), loc='lower right')
        figure.savefig(file, format='svg', metadata={'Date': None, 'Creator': None})


def main(argv: list[str] | None = None) -> int:
    """Run the study and print its table. Returns the exit code."""
    return run_script(sys.modules[__name__], argv)


if __name__ == '__main__':
    sys.exit(main())
