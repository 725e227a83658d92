"""The settings of a run: the table (settings), defaults (resolve), command line and YAML (parse)."""

from .parse import (
    Parser,
    add_setting,
    checked,
    find_recipe,
    list_recipes,
    load_yaml,
    load_yaml_text,
    parse_args,
    recipes_folder,
    run_of,
    to_yaml,
)
from .resolve import auto_workers, describe_derived, resolve, uses_sample, warmup_epochs
from .settings import FIELDS, Config, Origin, absolute, flag_of, marked, setting

__all__ = [
    'absolute', 'add_setting', 'auto_workers', 'checked', 'Config', 'describe_derived', 'FIELDS', 'find_recipe',
    'flag_of', 'list_recipes', 'load_yaml', 'load_yaml_text', 'marked', 'Origin', 'parse_args', 'Parser',
    'recipes_folder', 'resolve', 'run_of', 'setting', 'to_yaml', 'uses_sample', 'warmup_epochs',
]  # fmt: skip
