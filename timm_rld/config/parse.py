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
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, Literal, NoReturn

import yaml

from ..errors import UsageError, did_you_mean
from .settings import FIELDS, Config, Origin, completing, flag_of

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
    if name == 'feature_stages' and isinstance(value, (list, tuple)):
        value = [str(v) if type(v) is int else v for v in value]  # as above
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
    return _load_yaml(path, flag, settings)[0]


def _load_yaml(path: str, flag: str, settings: type[Config]) -> tuple[dict[str, Any], Origin]:
    """Return what :func:`load_yaml` does, and which of the values were derived."""
    try:
        data = yaml.load(find_recipe(path).read_text(encoding='utf-8'), Loader=_Loader)
    except (OSError, UnicodeDecodeError) as e:
        raise UsageError(f'{flag} {path}: cannot be read ({getattr(e, "strerror", None) or "not a text file"})') from e
    except yaml.YAMLError as e:
        raise UsageError(f'{flag} {path}: not valid YAML ({" ".join(str(e).split())})') from e
    if not isinstance(data, dict):
        kind = 'empty' if data is None else f'a {type(data).__name__}'
        raise UsageError(f'{flag} {path}: expected a mapping of settings (name: value), the file is {kind}')
    values: dict[str, Any] = {}
    try:
        origin = _read_origin(data, settings)
    except ValueError as e:
        raise UsageError(f'{flag} {path}: {e}') from None
    for key, value in data.items():
        if key not in settings.__dataclass_fields__:
            known = did_you_mean(str(key), settings.__dataclass_fields__, 1)
            raise UsageError(f"{flag} {path}: unknown key '{key}'{known}")
        try:
            values[key] = _check_value(key, value, settings)
        except ValueError as e:
            raise UsageError(f'{flag} {path}: {key}: {e}') from None
    return values, dataclasses.replace(origin, derived=tuple(name for name in origin.derived if name in values))


def _read_origin(data: dict[str, Any], settings: type[Config] = Config) -> Origin:
    """Take what :func:`to_yaml` wrote of the origin of derived values out of a file's mapping, and return it;
    ValueError says what is wrong."""
    derived, known = data.pop('derived', None) or [], data.pop('derived_from', None) or {}
    names = settings.__dataclass_fields__
    if not isinstance(derived, list) or not all(isinstance(name, str) for name in derived):
        raise ValueError(f'derived: expected a list of settings, got {derived!r}')
    if unknown := [name for name in derived if name not in names]:
        raise ValueError(f"derived: unknown setting '{unknown[0]}'{did_you_mean(unknown[0], names, 1)}")
    counts = isinstance(known, dict) and set(known) <= {'processes', 'images'}
    if not counts or not all(type(n) is int and n > 0 for n in known.values()):
        raise ValueError(f'derived_from: expected numbers of processes and images, got {known!r}')
    return Origin(tuple(derived), **known)


def load_yaml_text(text: str) -> dict[str, Any]:
    """Return the settings in :func:`to_yaml`'s text, converted as :func:`load_yaml` does."""
    data = yaml.load(text, Loader=_Loader)
    _read_origin(data)
    return {key: _check_value(key, value) for key, value in data.items()}


def to_yaml(config: Config) -> str:
    """Return the settings as YAML, which :func:`load_yaml` reads back to an equal Config. After them comes which of
    them were derived, and with how many processes and training images, so that `--config` can derive them again."""
    data = {k: list(v) if isinstance(v, tuple) else v for k, v in dataclasses.asdict(config).items()}
    origin = config.origin
    if origin.derived:
        counts = {'processes': origin.processes, 'images': origin.images}
        data['derived_from'] = {name: n for name, n in counts.items() if n is not None}
        data['derived'] = list(origin.derived)
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
        description='Distil a timm teacher into a timm student. Default data: a sample of handwritten digits.',
        epilog=epilog,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
        argument_default=argparse.SUPPRESS,
    )
    parser.add_argument('--config', metavar='FILE', help='YAML, or one of `timm-rld list recipes`; flags win over it')
    fields = dataclasses.fields(settings)
    groups = {title: parser.add_argument_group(title) for title in dict.fromkeys(f.metadata['group'] for f in fields)}
    for f in fields:
        _add_setting(groups[f.metadata['group']], f.name, settings)
    return parser


def _add_setting(to: Any, name: str, settings: type[Config]) -> None:
    """Add a setting's flag to a parser or a group of one; nothing is filled in where the flag is not given."""
    f = settings.__dataclass_fields__[name]
    meta = f.metadata
    flags = [flag_of(name)] + ([f'-{meta["alias"]}'] if meta['alias'] else [])
    want, _, _ = _type_of(name, settings)  # type: ignore[arg-type]
    help = meta['help']
    if f.default not in (None, dataclasses.MISSING, ()) and want is not bool:
        shown = ' '.join(map(str, f.default)) if isinstance(f.default, tuple) else f.default
        help += f' (default: {shown})'
    common = dict(help=help, default=argparse.SUPPRESS)
    if want is bool:
        to.add_argument(*flags, action='store_true' if meta['flag'] else argparse.BooleanOptionalAction, **common)
    elif want is dict:
        to.add_argument(*flags, nargs='*', metavar='NAME=VALUE', **common)
    elif typing.get_origin(want) is tuple:
        to.add_argument(*flags, nargs='*' if f.default == () else '+', metavar='X', **common)
    else:
        text = 'PATH' if meta['path'] is True else 'NAME'
        value = {int: 'N', float: 'X'}.get(want, text)
        to.add_argument(*flags, metavar='{' + ','.join(meta['choices']) + '}' if meta['choices'] else value, **common)


def add_settings(to: Any, names: Iterable[str]) -> None:
    """Add the flags of some settings to the parser of another program, or to a group of one."""
    for name in names:
        _add_setting(to, name, Config)


def given_settings(args: argparse.Namespace, names: Iterable[str]) -> dict[str, Any]:
    """Return those of some settings (:func:`add_settings`) that the parsed arguments of a program give, converted.

    Raises:
        UsageError: naming the flag.
    """
    return _checked({name: getattr(args, name) for name in names if hasattr(args, name)}, Config)


def _checked(given: dict[str, Any], settings: type[Config]) -> dict[str, Any]:
    values = {}
    for name, value in given.items():
        try:
            values[name] = _check_value(name, value, settings)
        except ValueError as e:
            raise UsageError(f'{flag_of(name)}: {e}') from None
    return values


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
    from_file: dict[str, Any] = {}
    origin = Origin()
    if 'config' in given:
        from_file, origin = _load_yaml(given.pop('config'), '--config', settings)
    if unknown:
        first = unknown[0].split('=')[0]
        flags = [s for a in parser._actions for s in a.option_strings]
        if first.startswith('-'):
            raise UsageError(f'unknown flag {first}{did_you_mean(first, flags, 1)}; --help lists them')
        raise UsageError(f"unexpected '{first}'; every value needs a flag before it, --help lists them")
    values = _checked(given, settings)
    if (resume := values.get('resume', from_file.get('resume'))) not in (None, 'auto'):
        if from_file:
            raise UsageError(f'--resume {resume}: a run is resumed with its own settings; leave --config out')
        run = run_of(resume)
        from_file, origin = _load_yaml(str(run / 'args.yaml'), '--resume', settings)
        from_file.update(output=str(run.parent), experiment=run.name)
    kept = _still_meant(from_file, values)
    config = settings(**{**kept, **values})
    derived = tuple(name for name in origin.derived if name in kept and name not in values)
    if resume == 'auto':
        from_file, origin = _settings_of_run(config)
    config.origin = Origin(flags=tuple(values))
    if origin.derived:
        earlier = settings(**from_file)
        earlier.origin = origin
        config.origin = Origin(derived, earlier=earlier, resumed=resume is not None, flags=tuple(values))
    return config


def _settings_of_run(config: Config) -> tuple[dict[str, Any], Origin]:
    """Return the settings of the run that `--resume auto` continues, if there is one."""
    file = Path(config.output or 'output').expanduser() / (config.experiment or '') / 'args.yaml'
    if config.experiment is None or not file.is_file():
        return {}, Origin()
    return _load_yaml(str(file), '--resume', type(config))


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
    another criterion or attack, the training of a generator where `--generator` names one, the columns of a Hub dataset
    where `--data-dir` or `--labels` names files, the validation split where `--val-fraction` makes one."""
    dropped: list[str] = []
    for choice in ('distill', 'feature_distill', 'poison', 'generator'):
        before = from_file.get(choice, FIELDS[choice].default)
        if given.get(choice, before) != before:
            dropped += completing(choice)
    of_hub = str(from_file.get('dataset')).startswith(('hfds/', 'hfids/'))
    if of_hub and 'dataset' not in given and ('data_dir' in given or 'labels' in given):
        dropped += ['dataset', *completing('dataset')]
    if 'val_fraction' in given and 'val_split' not in given:
        dropped += completing('val_fraction')
    return {k: v for k, v in from_file.items() if k not in dropped}
