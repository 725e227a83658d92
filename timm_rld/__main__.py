"""`timm-rld VERB` = `python -m timm_rld VERB`: what is not training. Each verb's work is done in its own room."""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path
from typing import Any

from .bench import BENCHMARKS, benchmark
from .config import FIELDS, Config, Parser, add_settings, given_settings, list_recipes, resolve
from .errors import UsageError, UserError, run_main, writing
from .files import write_atomic

# prefixes of the names that --dataset takes; anything else is a folder
DATASETS = ('hfds', 'hfids', 'wds', 'torch', 'tfds')


def list_things(what: str, pattern: str) -> None:
    """Print criteria, models or recipes, a line each."""
    if what == 'criteria':
        from .loss import describe_criteria

        print(describe_criteria())
    elif what == 'models':
        from timm import list_models

        print('\n'.join(list_models(f'*{pattern}*' if pattern and '*' not in pattern else pattern)))
    else:
        for path, first_line in list_recipes():
            print(f'{path}  {first_line}')


def compare(args: argparse.Namespace) -> None:
    """Run a comparison, print its table, and raise what failed."""
    from .compare import compare, markdown

    found = compare(args.criteria, args.seeds, args.flags, args.output, launcher=args.launcher)
    print(markdown(found), end='')
    if failed := found['failed']:
        reasons = '\n'.join(run['reason'] for run in failed)
        of_all = f'{len(failed)} of {len(failed) + len(found["runs"])} runs'
        raise UserError(f'{of_all} failed; the same command repeats them, and no others:\n{reasons}')


def verify_cache(args: argparse.Namespace) -> None:
    """Recompute some rows of a teacher cache."""
    from .cache import verify

    if args.rows < 1:
        raise UsageError(f'--rows {args.rows}: must be at least 1')
    if args.seed < 0:
        raise UsageError(f'--seed {args.seed}: must be at least 0')
    print(verify(args.folder, rows=args.rows, seed=args.seed, data_dir=args.data_dir,
                 teacher_checkpoint=args.teacher_checkpoint, device=args.device))  # fmt: skip


def push(args: argparse.Namespace) -> None:
    """Push a finished run."""
    from .hub import push_run
    from .run_folder import read_run

    there = read_run(args.folder).settings
    settings = Config(**{k: v for k, v in there.items() if k in FIELDS}).arguments_of('push_run')  # the run's
    push_run(args.folder, **{name: getattr(args, name) or value for name, value in settings.items()})


def check_data(args: argparse.Namespace) -> None:
    """Look at a dataset, print what is found, and raise what would hurt a training."""
    from .data import check_data, describe, open_splits
    from .report import data_page

    if args.write_skip_list:
        writable('--write-skip-list', args.write_skip_list)
    if args.report:
        writable('--report', args.report)
        data_page.check_installed()
    config = resolve(Config(**given_settings(args), **dataset_of(args)))
    splits = open_splits(log=print, **config.arguments_of('open_splits'))
    findings = check_data(*splits, progress=True, **config.arguments_of('check_data'))
    print(describe(findings))
    if args.write_skip_list:
        with writing(args.write_skip_list):
            write_atomic(Path(args.write_skip_list), os.fsencode(''.join(f'{line}\n' for line in findings.broken)))
        print(f'\n{args.write_skip_list}: {len(findings.broken):,} images to leave out, for --skip-list')
    if args.report:
        with writing(args.report):
            write_atomic(Path(args.report), data_page.findings_page(findings, splits, args.target))
        print(f'\n{args.report}: the same with pictures')
    if hurting := findings.hurting:
        raise UserError(f'this would hurt a training: {", ".join(f.name for f in hurting)}')


def dataset_of(args: argparse.Namespace) -> dict[str, Any]:
    """The setting that DIR_OR_DATASET stands for."""
    kind, sep, rest = args.target.partition('/')
    if sep and rest and kind.lower() in DATASETS:
        return {'dataset': args.target}
    if 'data_dir' in args:
        raise UsageError(f'--data-dir {args.data_dir}: the folder is named already, {args.target}; give one of the two')
    return {'data_dir': args.target}


def writable(flag: str, path: str) -> None:
    """Raise UserError where a file could not be written, before the work that it is to hold."""
    folder = os.path.dirname(path) or '.'
    if os.path.isdir(path):
        raise UserError(f'{flag} {path}: a folder; name a file in it')
    if not os.path.isdir(folder):
        raise UserError(f'{flag} {path}: {folder} is no folder')
    if not os.access(folder, os.W_OK):
        raise UserError(f'{flag} {path}: {folder} cannot be written to (no permission)')


def _add_data(verbs: Any) -> None:
    verb = verbs.add_parser(
        'data', help='look at a dataset before training on it', allow_abbrev=False,
        usage='timm-rld data DIR_OR_DATASET [--report FILE] [--write-skip-list FILE] [flags of train_distill.py]',
        description='Decodes and compares all images. The exit code is 1 if something would hurt a training.',
    )  # fmt: skip
    verb.add_argument('target', metavar='DIR_OR_DATASET', help='a folder as for --data-dir, or a name as for --dataset')
    verb.add_argument('--report', metavar='FILE', default='', help='write a page with pictures of each class (HTML)')
    verb.add_argument('--write-skip-list', metavar='FILE', default='',
                      help='write the images that cannot be read, for --skip-list')  # fmt: skip
    add_settings(verb.add_argument_group('as for train_distill.py'), 'open_splits', 'check_data', but=['dataset'])
    verb.set_defaults(run=check_data)


def parse(argv: list[str]) -> None:
    """Read the command line, and run its verb."""
    parser = Parser(prog='timm-rld', description='Tools around train_distill.py.', allow_abbrev=False)
    verbs = parser.add_subparsers(dest='verb', required=True, metavar='VERB')
    verb = verbs.add_parser('list', help='list criteria, models or recipes')
    verb.add_argument('what', choices=('criteria', 'models', 'recipes'))
    verb.add_argument('pattern', nargs='?', default='', help="of models, e.g. '*resnet*'")
    verb.set_defaults(run=lambda a: list_things(a.what, a.pattern))

    verb = verbs.add_parser('bench', help='measure a training step, or the criteria')
    whats = verb.add_subparsers(dest='what', required=True, metavar='WHAT')
    for name, help in BENCHMARKS.items():
        what = whats.add_parser(name, help=help, description=f'Measures: {help}.', allow_abbrev=False)
        if argv[:2] == ['bench', name]:
            benchmark(name).add_arguments(what)
            what.set_defaults(run=lambda a, name=name: print(benchmark(name).run(a)))

    verb = verbs.add_parser(
        'compare', help='one pair under several criteria and seeds', allow_abbrev=False,
        usage='timm-rld compare --criteria NAME … --seeds N … --output DIR --teacher NAME --student NAME '
        '[flags of train_distill.py]',
        description='The teacher is trained once and shared. After an interruption the same command continues.',
    )  # fmt: skip
    verb.add_argument('--criteria', nargs='+', metavar='NAME', default=['none', 'kd', 'dkd', 'rld'],
                      help="default: none kd dkd rld; options after a colon: 'rld:beta=2,temperature=1'")  # fmt: skip
    verb.add_argument('--seeds', nargs='+', type=int, metavar='N', default=[0, 1, 2], help='default: 0 1 2')
    verb.add_argument('--output', metavar='DIR', default='output/compare', help='default: output/compare')
    verb.add_argument('--launcher', metavar='COMMAND', default='',
                      help="in place of python, e.g. 'accelerate launch --num_processes 2'")  # fmt: skip
    verb.set_defaults(run=compare)

    verb = verbs.add_parser('cache', help="check a cache of a teacher's logits")
    whats = verb.add_subparsers(dest='what', required=True, metavar='WHAT')
    about = 'recompute a random sample of rows from images and teacher, and compare'
    what = whats.add_parser('verify', help=about, description=f'{about.capitalize()}.', allow_abbrev=False)
    what.add_argument('folder', metavar='DIR', help='that of --teacher-cache')
    what.add_argument('--rows', type=int, default=256, help='default: 256')
    what.add_argument('--seed', type=int, default=0, help='of the sample')
    what.add_argument('--data-dir', metavar='DIR', help='where the data lie now, if they have been moved')
    what.add_argument('--teacher-checkpoint', metavar='FILE', help="where the teacher's weights lie now")
    what.add_argument('--device', choices=('cpu', 'cuda'), help='default: a GPU where there is one')
    what.set_defaults(run=verify_cache)

    verb = verbs.add_parser('push', help='push a finished run to the Hugging Face Hub', allow_abbrev=False,
                             description='The token comes from HF_TOKEN or `hf auth login`.')  # fmt: skip
    verb.add_argument('folder', metavar='RUN', help='a run folder')
    verb.add_argument('--hub-model-id', metavar='USER/NAME', help="default: <student>-<distill> of the token's user")
    verb.add_argument('--hub-private-repo', action='store_true', help='make a new repository private')
    verb.add_argument('--hub-license', metavar='NAME', help="default: the run's")
    which = "of the last epoch, the best on the validation split, or the moving average (default: the run's)"
    verb.add_argument('--hub-weights', choices=('last', 'best', 'ema'), help=which)
    verb.set_defaults(run=push)

    _add_data(verbs)
    if not argv:
        parser.print_help()
        return
    args, rest = parser.parse_known_args(argv)
    args.flags = rest
    if rest and args.verb != 'compare':
        parser.error(f'unrecognized arguments: {" ".join(rest)}')
    if args.verb != 'list' or args.what == 'models':
        from . import models  # noqa: F401  (in timm's registry; the other lists need neither timm nor torch)
    args.run(args)


def main(argv: list[str] | None = None) -> int:
    """Run a verb. Returns the exit code."""
    argv = sys.argv[1:] if argv is None else argv
    debug = '--debug' in argv
    return run_main(lambda: parse([a for a in argv if a != '--debug']), 'timm-rld', debug)


def cli() -> None:
    """The program `timm-rld`."""
    sys.exit(main())


if __name__ == '__main__':
    cli()
