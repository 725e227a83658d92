"""The settings of a run: the table (settings), defaults (resolve), command line and YAML (parse)."""

from .parse import (
    Parser,
    add_settings,
    find_recipe,
    given_settings,
    list_recipes,
    load_yaml,
    load_yaml_text,
    parse_args,
    recipes_folder,
    run_of,
    to_yaml,
)
from .resolve import auto_workers, data_named, describe_derived, resolve, uses_sample, warmup_epochs
from .settings import FIELDS, Config, Origin, absolute, completing, flag_of, marked, setting, taken_by

__all__ = [
    'absolute', 'add_settings', 'auto_workers', 'completing', 'Config', 'data_named', 'describe_derived', 'FIELDS',
    'find_recipe', 'flag_of', 'given_settings', 'list_recipes', 'load_yaml', 'load_yaml_text', 'marked', 'Origin',
    'parse_args', 'Parser', 'recipes_folder', 'resolve', 'run_of', 'setting', 'taken_by', 'to_yaml', 'uses_sample',
    'warmup_epochs',
]  # fmt: skip
