"""`timm-rld COMMAND` = `python -m timm_rld COMMAND`: what is not training. The work is done in other modules."""

from __future__ import annotations

import argparse
import functools
import os
import sys
from pathlib import Path
from typing import Any

from . import __version__
from .bench import BENCHMARKS, benchmark
from .config import (
    FIELDS,
    Config,
    Parser,
    add_settings,
    given_settings,
    list_recipes,
    marked,
    resolve,
    taken_by,
)
from .errors import UsageError, UserError, check_file, run_main, writing
from .files import write_atomic

# prefixes of the names that --dataset takes; anything else is a folder
DATASETS = ('hfds', 'hfids', 'wds', 'torch', 'tfds')
MODEL = 'a run folder, a model folder, hf-hub:user/model, or a timm name (its published weights)'
LAUNCHER = "in place of python, e.g. 'accelerate launch --num_processes 2'"


def list_things(what: str, pattern: str) -> None:
    """Print criteria, methods on features, models or recipes, a line each."""
    if what in ('criteria', 'features'):
        from .loss import describe_criteria, describe_features

        print(describe_criteria() if what == 'criteria' else describe_features())
    elif what == 'models':
        from timm import list_models

        print('\n'.join(list_models(f'*{pattern}*' if pattern and '*' not in pattern else pattern)))
    else:
        for path, first_line in list_recipes():
            print(f'{path}  {first_line}')


def check_data(args: argparse.Namespace) -> None:
    """Look at a dataset, print what is found, and raise what would hurt a training."""
    from .data import check_data, describe, note_unlisted, open_splits
    from .report import data_page

    if args.write_skip_list:
        check_file('--write-skip-list', args.write_skip_list)
    if args.report:
        check_file('--report', args.report)
        data_page.check_installed()
    config = resolve(Config(**given_settings(args, data_settings()), **dataset_of(args)))
    splits = open_splits(log=print, **config.arguments_of('open_splits'))
    if note := note_unlisted(*splits):
        print(note)
    findings = check_data(*splits, progress=True, **config.arguments_of('check_data'))
    print(describe(findings))
    if args.write_skip_list:
        with writing(args.write_skip_list):
            write_atomic(Path(args.write_skip_list), os.fsencode(''.join(f'{line}\n' for line in findings.broken)))
        count = len(findings.broken)
        print(f'\n{args.write_skip_list}: {count:,} image{"" if count == 1 else "s"} to leave out, for --skip-list')
    if args.report:
        with writing(args.report):
            write_atomic(Path(args.report), data_page.findings_page(findings, splits, args.target))
        print(f'\n{args.report}: the same with pictures')
    if hurting := findings.hurting:
        raise UserError(f'fix before training: {", ".join(f.name for f in hurting)}')


def data_settings() -> list[str]:
    """The settings that a look at a dataset takes as flags: all of the data but `--dataset`, which is its argument."""
    return [name for name in taken_by('open_splits', 'check_data') if name != 'dataset']


def export_settings() -> list[str]:
    """The settings that an export takes as flags: those of an evaluation, but for what concerns GPUs, and for
    `--jpeg-draft`, which no program that uses the file will have."""
    return [name for name in marked('evaluation') if name not in ('mixed_precision', 'channels_last', 'jpeg_draft')]


def dataset_of(args: argparse.Namespace) -> dict[str, Any]:
    """The setting that DIR_OR_DATASET stands for."""
    kind, sep, rest = args.target.partition('/')
    if sep and rest and kind.lower() in DATASETS:
        return {'dataset': args.target}
    if 'data_dir' in args:
        raise UsageError(f'--data-dir {args.data_dir}: the folder is named already, {args.target}; give one of the two')
    return {'data_dir': args.target}


def compare(args: argparse.Namespace) -> None:
    """Run a comparison, print its table, and raise what failed."""
    from .compare import compare, markdown

    found = compare(
        args.criteria, args.seeds, args.flags, args.output, poison=args.poison, poison_fractions=args.poison_fraction,
        launcher=args.launcher,
    )  # fmt: skip
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


def evaluate(args: argparse.Namespace) -> None:
    """Evaluate a model on a dataset."""
    from .inference import evaluate_model

    if args.batch_size is not None and args.batch_size < 1:
        raise UsageError(f'--batch-size {args.batch_size}: must be at least 1')
    given = given_settings(args, marked('evaluation'))
    evaluate_model(args.model, given=given, weights=args.weights, teacher=args.teacher, batch_size=args.batch_size,
                   device=args.device, output=args.output)  # fmt: skip


def predict(args: argparse.Namespace) -> None:
    """Write the classes of image files."""
    from .inference import predict_files

    predict_files(args.model, args.paths, top_k=args.top_k, format=args.format, output=args.output,
                  weights=args.weights, device=args.device, batch_size=args.batch_size,
                  workers=args.workers)  # fmt: skip


def export(args: argparse.Namespace) -> None:
    """Write a model as a file for another runtime."""
    from .export import export_file

    export_file(args.model, format=args.format, output=args.output, with_preprocessing=args.with_preprocessing,
                precision=args.precision, weights=args.weights, given=given_settings(args, export_settings()),
                check=not args.no_check, min_agreement=args.min_agreement)  # fmt: skip


def report(args: argparse.Namespace) -> None:
    """Write the report of a run or a comparison."""
    from .report import write_report

    write_report(args.folder, args.output, baseline=args.baseline, data_dir=args.data_dir)


def push(args: argparse.Namespace) -> None:
    """Push a finished run."""
    from .hub import push_run
    from .run_folder import read_run

    there = read_run(args.folder).settings
    settings = Config(**{k: v for k, v in there.items() if k in FIELDS}).arguments_of('push_run')  # the run's
    push_run(args.folder, **{name: getattr(args, name) or value for name, value in settings.items()})


def verify_cache(args: argparse.Namespace) -> None:
    """Recompute some rows of a teacher cache."""
    from .cache import verify

    if args.rows < 1:
        raise UsageError(f'--rows {args.rows}: must be at least 1')
    if args.seed < 0:
        raise UsageError(f'--seed {args.seed}: must be at least 0')
    print(verify(args.folder, rows=args.rows, seed=args.seed, data_dir=args.data_dir,
                 teacher_checkpoint=args.teacher_checkpoint, device=args.device))  # fmt: skip


def _add_data(verbs: Any) -> None:
    verb = verbs.add_parser(
        'data', help='check a dataset before training', allow_abbrev=False,
        usage='timm-rld data DIR_OR_DATASET [--report FILE] [--write-skip-list FILE] [flags of train_distill.py]',
        description='Decodes and compares all images. Exit code 1: something must be fixed before training.',
    )  # fmt: skip
    verb.add_argument('target', metavar='DIR_OR_DATASET', help='a folder as for --data-dir, or a name as for --dataset')
    verb.add_argument('--report', metavar='FILE', default='', help='write a page with pictures of each class (HTML)')
    verb.add_argument('--write-skip-list', metavar='FILE', default='',
                      help='write the images that cannot be read, for --skip-list')  # fmt: skip
    add_settings(verb.add_argument_group('as for train_distill.py'), data_settings())
    verb.set_defaults(run=check_data)


def _add_compare(verbs: Any) -> None:
    verb = verbs.add_parser(
        'compare', help='compare criteria for one pair, over seeds', allow_abbrev=False,
        usage='timm-rld compare --criteria NAME … --seeds N … --output DIR --teacher NAME --student NAME '
        '[flags of train_distill.py]',
        description='The teacher is trained once and shared. After an interruption the same command continues.',
    )  # fmt: skip
    verb.add_argument('--criteria', nargs='+', metavar='NAME', default=['none', 'kd', 'dkd', 'rld'],
                      help='default: none kd dkd rld; options after a colon, features after a plus: '
                      "'rld:beta=2,temperature=1', 'none+fitnet:stage=3'")  # fmt: skip
    verb.add_argument('--seeds', nargs='+', type=int, metavar='N', default=[0, 1, 2], help='default: 0 1 2')
    verb.add_argument('--poison', nargs='+', metavar='ATTACK', default=[],
                      help="attacks on the teacher's logits (fdla, pcfdla, fdpla, zero, random) to run each criterion "
                      "under; options after a colon: 'pcfdla:strength=4,fraction=[0.1,0.5]'")  # fmt: skip
    verb.add_argument('--poison-fraction', nargs='+', type=float, metavar='P', default=[],
                      help='fractions of the training images to attack; 0: a run without attack')  # fmt: skip
    verb.add_argument('--output', metavar='DIR', default='output/compare', help='default: output/compare')
    verb.add_argument('--launcher', metavar='COMMAND', default='', help=LAUNCHER)
    verb.set_defaults(run=compare)


def _add_tune(verbs: Any) -> None:
    verb = verbs.add_parser(
        'tune', help='search distillation settings for a pair on your data', allow_abbrev=False,
        usage='timm-rld tune --teacher NAME --student NAME --output DIR [--criteria NAME …] [--budget 6x] '
        '[flags of train_distill.py]',
        description='Candidates are compared on a fraction of the training split; winner, default and none are then '
        'run in full. After an interruption the same command continues.',
    )  # fmt: skip
    verb.add_argument('--criteria', nargs='+', metavar='NAME', default=['rld', 'kd', 'dkd'],
                      help='default: rld kd dkd; the first is the default to beat; options after a colon stay fixed: '
                      "'rld:beta=2'")  # fmt: skip
    verb.add_argument('--budget', metavar='Nx', default='6x', help='search cost, in full runs (default: 6x)')
    verb.add_argument('--seeds', nargs='+', type=int, metavar='N', default=[0, 1, 2],
                      help='of the final runs (default: 0 1 2)')  # fmt: skip
    verb.add_argument('--tune', nargs='+', metavar='NAME', default=[], help="also search: 'lr'")
    verb.add_argument('--tune-holdout', type=float, metavar='X', default=0.1,
                      help='fraction of the training split to select on (default: 0.1)')  # fmt: skip
    verb.add_argument('--output', metavar='DIR', default='output/tune', help='default: output/tune')
    verb.add_argument('--launcher', metavar='COMMAND', default='', help=LAUNCHER)
    verb.set_defaults(run=tune)


def _add_evaluate(verbs: Any) -> None:
    verb = verbs.add_parser(
        'evaluate', help='accuracy, calibration and speed of a model on a dataset', allow_abbrev=False,
        description='A run is evaluated on its own validation split, unless another is given. '
        '`accelerate launch -m timm_rld evaluate …` uses several GPUs.',
    )  # fmt: skip
    verb.add_argument('model', metavar='RUN_OR_MODEL', help=MODEL)
    verb.add_argument('--teacher', metavar='NAME', help="a model to compare with, or the run's teacher")
    verb.add_argument('--output', metavar='DIR', help='write predictions, per-class metrics and confusion matrix')
    verb.add_argument('--batch-size', '-b', type=int, metavar='N', help="per process (default: the run's, or 128)")
    verb.set_defaults(run=evaluate)
    add_settings(verb, marked('evaluation'))
    _add_model_choices(verb)


def _add_predict(verbs: Any) -> None:
    verb = verbs.add_parser(
        'predict', help='classify image files', allow_abbrev=False,
        description='One row per image, in the order of the arguments: file, class_1, prob_1, class_2, …',
    )  # fmt: skip
    verb.add_argument('model', metavar='RUN_OR_MODEL', help=MODEL)
    verb.add_argument('paths', nargs='+', metavar='PATH', help='image files, and folders of them')
    verb.add_argument('--top-k', type=int, default=5, metavar='N', help='classes of each image (default: 5)')
    verb.add_argument('--format', choices=('csv', 'json', 'parquet'), help="default: that of the output's name, or csv")
    verb.add_argument('--output', metavar='FILE', help='default: stdout')
    verb.add_argument('--batch-size', '-b', type=int, default=64, metavar='N', help='default: 64')
    verb.add_argument('--workers', '-j', type=int, metavar='N', help='default: 4, or the cores if fewer')
    verb.set_defaults(run=predict)
    _add_model_choices(verb)


def _add_export(verbs: Any) -> None:
    verb = verbs.add_parser(
        'export', help='export a model to ONNX or torch.export and check the file', allow_abbrev=False,
        description='Beside FILE lie FILE.json (labels, preprocessing, results of the check) and FILE.py, a program '
        'that uses it. A file that fails its check is left as FILE.failed, and the exit code is 1.',
    )  # fmt: skip
    verb.add_argument('model', metavar='RUN_OR_MODEL', help=MODEL)
    verb.add_argument('--format', choices=('onnx', 'pt2'), help="default: that of the output's name, or onnx")
    verb.add_argument('--output', metavar='FILE', help='default: student.onnx in the run, or NAME.onnx')
    verb.add_argument('--with-preprocessing', action='store_true',
                      help='take uint8 pixels [B, H, W, C]; else normalised floats [B, C, H, W]')  # fmt: skip
    verb.add_argument('--precision', choices=('fp32', 'int8'), default='fp32',
                      help='int8: ONNX, calibrated on 512 training images (default: fp32)')  # fmt: skip
    _add_weights(verb)
    verb.add_argument('--no-check', action='store_true', help='do not compare file and model')
    verb.add_argument('--min-agreement', type=float, metavar='X',
                      help='required share of images with the same top-1 (default: 0.999; for int8: top-1 may '
                      'drop by one point)')  # fmt: skip
    verb.set_defaults(run=export)
    add_settings(verb.add_argument_group('data to check with, as for train_distill.py'), export_settings())


def _add_weights(verb: Any) -> None:
    which = 'of a run: last epoch, best on the validation split, moving average (default: last)'
    verb.add_argument('--weights', choices=('last', 'best', 'ema'), default='last', help=which)


def _add_model_choices(verb: Any) -> None:
    _add_weights(verb)
    verb.add_argument('--device', choices=('cpu', 'cuda'), help='default: a GPU where there is one')


def _add_report(verbs: Any) -> None:
    verb = verbs.add_parser('report', help='write an HTML report of a run or a comparison',
                            description='One HTML file that opens offline: metrics, images, what to try next; and '
                            'tables as CSV beside it.',
                            allow_abbrev=False)  # fmt: skip
    verb.add_argument('folder', metavar='RUN', help='the folder of a run, or of a comparison')
    verb.add_argument('--baseline', metavar='RUN', help='a run with --distill none to compare with')
    verb.add_argument('--output', metavar='FILE', help='default: report.html in the folder')
    verb.add_argument('--data-dir', metavar='DIR', help='new location of the data, if moved')
    verb.set_defaults(run=report)


def _add_push(verbs: Any) -> None:
    verb = verbs.add_parser('push', help='push a finished run to the Hugging Face Hub', allow_abbrev=False,
                             description='The token comes from HF_TOKEN or `hf auth login`.')  # fmt: skip
    verb.add_argument('folder', metavar='RUN', help='a run folder')
    verb.add_argument('--hub-model-id', metavar='USER/NAME', help="default: <student>-<distill> of the token's user")
    verb.add_argument('--hub-private-repo', action='store_true', help='make a new repository private')
    verb.add_argument('--hub-license', metavar='NAME', help="default: the run's")
    which = "of the last epoch, the best on the validation split, or the moving average (default: the run's)"
    verb.add_argument('--hub-weights', choices=('last', 'best', 'ema'), help=which)
    verb.set_defaults(run=push)


def _add_cache(verbs: Any) -> None:
    verb = verbs.add_parser('cache', help="check a cache of a teacher's logits")
    whats = verb.add_subparsers(dest='what', required=True, metavar='COMMAND')
    about = 'recompute a random sample of rows from images and teacher, and compare'
    what = whats.add_parser('verify', help=about, description=f'{about.capitalize()}.', allow_abbrev=False)
    what.add_argument('folder', metavar='DIR', help='that of --teacher-cache')
    what.add_argument('--rows', type=int, default=256, help='default: 256')
    what.add_argument('--seed', type=int, default=0, help='of the sample')
    what.add_argument('--data-dir', metavar='DIR', help='new location of the data, if moved')
    what.add_argument('--teacher-checkpoint', metavar='FILE', help="where the teacher's weights lie now")
    what.add_argument('--device', choices=('cpu', 'cuda'), help='default: a GPU where there is one')
    what.set_defaults(run=verify_cache)


def _add_bench(verbs: Any, argv: list[str]) -> None:
    verb = verbs.add_parser('bench', help='measure a training step, or the criteria')
    whats = verb.add_subparsers(dest='what', required=True, metavar='COMMAND')
    for name, help in BENCHMARKS.items():
        what = whats.add_parser(name, help=help, description=f'Measures: {help}.', allow_abbrev=False)
        if argv[:2] == ['bench', name]:
            benchmark(name).add_arguments(what)
            what.set_defaults(run=lambda a, name=name: print(benchmark(name).run(a)))


def _add_list(verbs: Any) -> None:
    verb = verbs.add_parser('list', help='list criteria, methods on features, models or recipes')
    verb.add_argument('what', choices=('criteria', 'features', 'models', 'recipes'))
    verb.add_argument('pattern', nargs='?', default='', help="of models, e.g. '*resnet*'")
    verb.set_defaults(run=lambda a: list_things(a.what, a.pattern))


def parse(argv: list[str]) -> None:
    """Read the command line, and run its verb."""
    parser = Parser(prog='timm-rld', description='Tools around train_distill.py.', allow_abbrev=False)
    parser.add_argument('--version', action='version', version=f'%(prog)s {__version__}')
    verbs = parser.add_subparsers(dest='verb', required=True, metavar='COMMAND')
    _add_data(verbs)
    _add_compare(verbs)
    _add_tune(verbs)
    _add_evaluate(verbs)
    _add_predict(verbs)
    _add_export(verbs)
    _add_report(verbs)
    _add_push(verbs)
    _add_cache(verbs)
    _add_bench(verbs, argv)
    _add_list(verbs)
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
