"""`timm-rld VERB` = `python -m timm_rld VERB`: what is not training. Each verb's work is done in its own room."""

from __future__ import annotations

import argparse
import functools
import sys
from typing import Any

from .bench import BENCHMARKS, benchmark
from .config import FIELDS, Config, Parser, list_recipes
from .errors import UsageError, UserError, run_main


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


def tune(args: argparse.Namespace) -> None:
    """Run a search, print what it has found, and raise what failed of the final runs."""
    from .tune import markdown, tune

    found = tune(
        args.criteria, args.seeds, args.flags, args.output, budget=args.budget, shared=args.tune,
        holdout=args.tune_holdout, launcher=args.launcher, log=functools.partial(print, flush=True),
    )  # fmt: skip
    print(markdown(found), end='')
    if failed := found['failed']:
        reasons = '\n'.join(run['reason'] for run in failed)
        raise UserError(f'{len(failed)} final runs failed; the same command repeats them, and no others:\n{reasons}')


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


def _add_several(verbs: Any) -> None:
    """Add the verbs that hold several runs together; their other flags are those of train_distill.py."""
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

    verb = verbs.add_parser(
        'tune', help='search the settings of distillation for a pair and its data', allow_abbrev=False,
        usage='timm-rld tune --teacher NAME --student NAME --output DIR [--criteria NAME …] [--budget 6x] '
        '[flags of train_distill.py]',
        description='Candidates are compared on a share of the training split; winner, default and none are then run '
        'in full. After an interruption the same command continues.',
    )  # fmt: skip
    verb.add_argument('--criteria', nargs='+', metavar='NAME', default=['rld', 'kd', 'dkd'],
                      help='default: rld kd dkd; the first is the default to beat; options after a colon stay fixed: '
                      "'rld:beta=2'")  # fmt: skip
    verb.add_argument('--budget', metavar='Nx', default='6x', help='of the search, in whole runs (default: 6x)')
    verb.add_argument('--seeds', nargs='+', type=int, metavar='N', default=[0, 1, 2],
                      help='of the final runs (default: 0 1 2)')  # fmt: skip
    verb.add_argument('--tune', nargs='+', metavar='NAME', default=[], help="search this too: 'lr'")
    verb.add_argument('--tune-holdout', type=float, metavar='X', default=0.1,
                      help='share of the training split to choose by (default: 0.1)')  # fmt: skip
    verb.add_argument('--output', metavar='DIR', default='output/tune', help='default: output/tune')
    verb.add_argument('--launcher', metavar='COMMAND', default='',
                      help="in place of python, e.g. 'accelerate launch --num_processes 2'")  # fmt: skip
    verb.set_defaults(run=tune)


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

    _add_several(verbs)

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

    if not argv:
        parser.print_help()
        return
    args, rest = parser.parse_known_args(argv)
    args.flags = rest
    if rest and args.verb not in ('compare', 'tune'):
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
