"""Settings from the command line and from YAML, and back. Both are strict, and convert values alike: an unknown flag or
key, or a value of the wrong type, is an error that offers the nearest name. The command line wins over the file."""

from __future__ import annotations

import argparse
import ast
import dataclasses
import functools
import math
import os
import sys
import types
import typing
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal, NoReturn

import yaml

from ..errors import UsageError, did_you_mean
from .settings import FIELDS, Config, flag_of, marked

# ------------------------------------------------------------------------------------------------ types and values


@functools.cache  # mypy takes a class for as little hashable as its instances, where this is called
def _type_of(name: str, settings: type[Config]) -> tuple[Any, bool, tuple[str, ...]]:
    """Return the type of a setting without its `| None`, whether None is allowed, and the words that it takes beside
    the values of its type: 'auto' of `int | Literal['auto']`."""
    hint = typing.get_type_hints(settings)[name]
    if typing.get_origin(hint) not in (types.UnionType, typing.Union):
        return hint, False, ()
    parts = typing.get_args(hint)
    literals = [a for a in parts if typing.get_origin(a) is Literal]
    (inner,) = (a for a in parts if a is not type(None) and a not in literals)
    return inner, type(None) in parts, tuple(word for a in literals for word in typing.get_args(a))


_TYPE_NAMES = {int: 'a whole number', float: 'a number', str: 'a text', bool: 'true or false', dict: 'a mapping'}


def _convert(value: Any, want: Any) -> Any:
    """``value`` (from YAML, or a string of the command line) as type ``want``; ValueError with what was expected."""
    if typing.get_origin(want) is tuple:
        item = typing.get_args(want)[0]
        if isinstance(value, str) or not isinstance(value, (list, tuple)):
            value = [value]
        return tuple(_convert(v, item) for v in value)
    if want is float and isinstance(value, (int, float, str)) and not isinstance(value, bool):
        try:  # YAML reads 1e-3 as a text
            return float(value)
        except (ValueError, OverflowError):
            pass
    elif want is dict and isinstance(value, list) and all(isinstance(item, str) for item in value):
        return _convert(dict(map(_name_and_value, value)), want)  # name=value …, the form of timm's ParseKwargs
    elif want is dict and isinstance(value, dict):
        if odd := [k for k in value if not isinstance(k, str)]:
            raise ValueError(f'expected names as keys, got {odd[0]!r}')
        return {k: _literal(v) if isinstance(v, str) else v for k, v in value.items()}
    elif want is int and isinstance(value, str):
        try:
            return int(value)
        except ValueError:
            pass
    elif want is int and isinstance(value, float) and value.is_integer():
        return int(value)
    elif want is int and isinstance(value, bool):
        pass
    elif isinstance(value, want):
        return value
    raise ValueError(f'expected {_TYPE_NAMES[want]}, got {value!r}')


def _name_and_value(item: str) -> tuple[str, str]:
    name, sep, value = item.partition('=')
    if not sep or not name:
        raise ValueError(f"expected name=value, got '{item}'")
    return name, value


def _literal(text: str) -> Any:
    """A text as the Python or YAML scalar that it spells, else the text itself."""
    words = {'true': True, 'false': False, 'null': None, 'none': None}
    if text.lower() in words:
        return words[text.lower()]
    try:
        return ast.literal_eval(text)
    except (ValueError, SyntaxError):
        return text


def _check_value(name: str, value: Any, settings: type[Config] = Config) -> Any:
    """Return a value, from YAML or of the command line, converted to the setting's type and within its bounds;
    ValueError says what is wrong."""
    want, optional, words = _type_of(name, settings)  # type: ignore[arg-type]
    if value is None:
        if optional:
            return None
        raise ValueError('a value is needed')
    meta = settings.__dataclass_fields__[name].metadata
    if name == 'checkpoint_interval':
        value = str(value)  # YAML reads a number
        if value != 'epoch' and not (value.isdecimal() and int(value) > 0):
            raise ValueError(f"expected 'epoch' or a number of optimizer steps, got '{value}'")
    if value is False and 'no' in meta['choices']:
        value = 'no'  # as YAML reads it without quotes
    if value in words:
        return value
    try:
        value = _convert(value, want)
    except ValueError as e:
        raise ValueError(f"{e}; or '{words[0]}'" if words else str(e)) from None
    if meta['choices'] and str(value) not in meta['choices']:
        hint = did_you_mean(str(value), meta['choices'], 1)
        raise ValueError(f"'{value}' is not one of {', '.join(meta['choices'])}{hint}")
    values = value if isinstance(value, tuple) else (value,)
    if meta['lengths'] and len(values) not in meta['lengths']:
        raise ValueError(f'expected {" or ".join(map(str, meta["lengths"]))} values, got {len(values)}')
    for v in values:
        if isinstance(v, float) and not math.isfinite(v):
            raise ValueError(f'must be a finite number, got {v}')
        if meta['gt'] is not None and not v > meta['gt']:
            raise ValueError(f'must be greater than {meta["gt"]:g}, got {v}')
        if meta['ge'] is not None and not v >= meta['ge']:
            raise ValueError(f'must be at least {meta["ge"]:g}, got {v}')
        if meta['le'] is not None and not v <= meta['le']:
            raise ValueError(f'must be at most {meta["le"]:g}, got {v}')
    return value


# ------------------------------------------------------------------------------------------------------------- YAML


class _Loader(yaml.SafeLoader):
    """SafeLoader that refuses a key written twice, of which YAML would silently keep the last."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        keys = [k.value for k, _ in node.value]
        twice = {k for k in keys if keys.count(k) > 1}
        if twice:
            raise yaml.YAMLError(f'key written twice: {", ".join(sorted(twice))}')
        return super().construct_mapping(node, deep)


def recipes_folder() -> Path:
    """Where the recipes lie: in the installed package, or in the checkout beside it."""
    package = Path(__file__).parent.parent
    return package / 'configs' if (package / 'configs').is_dir() else package.parent / 'configs'


def list_recipes() -> list[tuple[str, str]]:
    """Recipes that ship with the package: (name for `--config`, the first line of its comment)."""
    folder = recipes_folder()
    found = []
    for path in sorted(folder.rglob('*.yaml')):
        if path.parent.name != 'accelerate':
            first = path.read_text(encoding='utf-8').partition('\n')[0]
            found.append((path.relative_to(folder).as_posix(), first.lstrip('# ')))
    return found


def find_recipe(path: str) -> Path:
    """A file's path, or that of a recipe of this name that ships with the package."""
    if not os.path.exists(path):
        name = path.removeprefix('configs/').removesuffix('.yaml')
        if (recipes_folder() / f'{name}.yaml').is_file():
            return recipes_folder() / f'{name}.yaml'
    return Path(path)


def load_yaml(path: str, flag: str = '--config', settings: type[Config] = Config) -> dict[str, Any]:
    """Read a configuration file; ``flag`` is named in messages.

    Returns:
        Checked and converted values by field name.

    Raises:
        UsageError: for a missing file, a file that is not a mapping, an unknown key, a wrong type or value.
    """
    try:
        data = yaml.load(find_recipe(path).read_text(encoding='utf-8'), Loader=_Loader)
    except (OSError, UnicodeDecodeError) as e:
        raise UsageError(f'{flag} {path}: cannot be read ({getattr(e, "strerror", None) or "not a text file"})') from e
    except yaml.YAMLError as e:
        raise UsageError(f'{flag} {path}: not valid YAML ({" ".join(str(e).split())})') from e
    if not isinstance(data, dict):
        kind = 'empty' if data is None else f'a {type(data).__name__}'
        raise UsageError(f'{flag} {path}: expected a mapping of settings (name: value), the file is {kind}')
    values = {}
    for key, value in data.items():
        if key not in settings.__dataclass_fields__:
            known = did_you_mean(str(key), settings.__dataclass_fields__, 1)
            raise UsageError(f"{flag} {path}: unknown key '{key}'{known}")
        try:
            values[key] = _check_value(key, value, settings)
        except ValueError as e:
            raise UsageError(f'{flag} {path}: {key}: {e}') from None
    return values


def load_yaml_text(text: str) -> dict[str, Any]:
    """Return the settings in :func:`to_yaml`'s text, converted as :func:`load_yaml` does."""
    return {key: _check_value(key, value) for key, value in yaml.load(text, Loader=_Loader).items()}


def to_yaml(config: Config) -> str:
    """Return the settings as YAML, which :func:`load_yaml` reads back to an equal Config."""
    data = {k: list(v) if isinstance(v, tuple) else v for k, v in dataclasses.asdict(config).items()}
    return yaml.safe_dump(data, sort_keys=False, allow_unicode=True)


# ----------------------------------------------------------------------------------------------------- command line


class Parser(argparse.ArgumentParser):
    """argparse that raises UsageError where argparse would print its usage and exit."""

    def error(self, message: str) -> NoReturn:
        raise UsageError(message.removeprefix('argument '))


def _parser(prog: str, epilog: str, settings: type[Config]) -> Parser:
    parser = Parser(
        prog=prog,
        usage=f'{prog} --teacher NAME --student NAME [--distill rld] [--config FILE] [flags]',
        description='Distil a timm student from a timm teacher. Without --dataset or --data-dir it runs on a sample.',
        epilog=epilog,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
        argument_default=argparse.SUPPRESS,
    )
    parser.add_argument('--config', metavar='FILE', help='YAML with any of these settings; flags win over it')
    fields = dataclasses.fields(settings)
    groups = {title: parser.add_argument_group(title) for title in dict.fromkeys(f.metadata['group'] for f in fields)}
    for f in fields:
        name, meta = f.name, f.metadata
        group = groups[meta['group']]
        flags = [flag_of(name)] + ([f'-{meta["alias"]}'] if meta['alias'] else [])
        want, _, _ = _type_of(name, settings)  # type: ignore[arg-type]
        help = meta['help']
        if f.default not in (None, dataclasses.MISSING, ()) and want is not bool:
            shown = ' '.join(map(str, f.default)) if isinstance(f.default, tuple) else f.default
            help += f' (default: {shown})'
        if want is bool:
            action = 'store_true' if meta['flag'] else argparse.BooleanOptionalAction
            group.add_argument(*flags, action=action, help=help)
        elif want is dict:
            group.add_argument(*flags, nargs='*', metavar='NAME=VALUE', help=help)
        elif typing.get_origin(want) is tuple:
            group.add_argument(*flags, nargs='*' if f.default == () else '+', metavar='X', help=help)
        else:
            metavar = (
                '{' + ','.join(meta['choices']) + '}' if meta['choices'] else {int: 'N', float: 'X'}.get(want, 'S')
            )
            group.add_argument(*flags, metavar=metavar, help=help)
    return parser


def parse_args(
    argv: list[str] | None = None,
    *,
    prog: str = 'train_distill.py',
    epilog: Callable[[], str] = str,
    settings: type[Config] = Config,
) -> Config:
    """Read the command line (and the file that its `--config` names).

    Args:
        epilog: returns the text under `--help`; called for that alone.
        settings: the table.

    Raises:
        UsageError: for anything that is not a valid setting. The file's keys are checked before required flags.
        SystemExit: after `--help`.
    """
    argv = sys.argv[1:] if argv is None else list(argv)
    parser = _parser(prog, epilog() if {'-h', '--help'} & {*argv} else '', settings)
    namespace, unknown = parser.parse_known_args(argv)
    given = vars(namespace)
    from_file = load_yaml(given.pop('config'), settings=settings) if 'config' in given else {}
    if unknown:
        first = unknown[0].split('=')[0]
        flags = [s for a in parser._actions for s in a.option_strings]
        if first.startswith('-'):
            raise UsageError(f'unknown flag {first}{did_you_mean(first, flags, 1)}; --help lists them')
        raise UsageError(f"unexpected '{first}'; every value needs a flag before it, --help lists them")
    values = {}
    for name, value in given.items():
        try:
            values[name] = _check_value(name, value, settings)
        except ValueError as e:
            raise UsageError(f'{flag_of(name)}: {e}') from None
    if (resume := values.get('resume', from_file.get('resume'))) not in (None, 'auto'):
        if from_file:
            raise UsageError(f'--resume {resume}: a run is resumed with its own settings; leave --config out')
        run = run_of(resume)
        from_file = {
            **load_yaml(str(run / 'args.yaml'), '--resume', settings),
            'output': str(run.parent),
            'experiment': run.name,
        }
    return settings(**{**_still_meant(from_file, values), **values})


def run_of(path: str) -> Path:
    """The run folder that `--resume PATH` means: PATH itself, or that of the checkpoint PATH.

    Raises:
        UsageError: where it is neither.
    """
    folder = Path(os.path.abspath(os.path.expanduser(path)))
    run = folder.parent.parent if (folder / 'checkpoint.json').exists() else folder
    if not (run / 'args.yaml').is_file():
        raise UsageError(f'--resume {path}: expected auto, a run folder (with args.yaml), or a checkpoint in one')
    return run


def _still_meant(from_file: dict[str, Any], given: dict[str, Any]) -> dict[str, Any]:
    """Return the file's settings without those that complete a choice that the command line has changed: the options of
    another criterion, the columns of a Hub dataset where `--data-dir` or `--labels` names files, the validation split
    where `--val-fraction` makes one."""
    dropped: list[str] = []
    criterion = from_file.get('distill', FIELDS['distill'].default)
    if given.get('distill', criterion) != criterion:
        dropped += marked('belongs_to', 'distill')
    of_hub = str(from_file.get('dataset')).startswith(('hfds/', 'hfids/'))
    if of_hub and 'dataset' not in given and ('data_dir' in given or 'labels' in given):
        dropped += ['dataset', *marked('belongs_to', 'dataset')]
    if 'val_fraction' in given and 'val_split' not in given:
        dropped += marked('belongs_to', 'val_fraction')
    return {k: v for k, v in from_file.items() if k not in dropped}
