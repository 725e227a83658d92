"""`timm-rld VERB` = `python -m timm_rld VERB`: what is not training. Each verb's work is done in its own room."""

from __future__ import annotations

import sys

from .config import Parser, list_recipes
from .errors import run_main


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


def parse(argv: list[str]) -> None:
    parser = Parser(prog='timm-rld', description='Tools around train_distill.py.', allow_abbrev=False)
    verbs = parser.add_subparsers(dest='verb', required=True, metavar='VERB')
    verb = verbs.add_parser('list', help='list criteria, models or recipes')
    verb.add_argument('what', choices=('criteria', 'models', 'recipes'))
    verb.add_argument('pattern', nargs='?', default='', help="of models, e.g. '*resnet*'")
    args = parser.parse_args(argv)
    list_things(args.what, args.pattern)


def main(argv: list[str] | None = None) -> int:
    """Run a verb. Returns the exit code."""
    argv = sys.argv[1:] if argv is None else argv
    debug = '--debug' in argv
    return run_main(lambda: parse([a for a in argv if a != '--debug']), 'timm-rld', debug)


def cli() -> None:
    sys.exit(main())


if __name__ == '__main__':
    cli()
