"""Puts the table of settings where a page says `<!-- settings -->`. It is read from the source of
`timm_rld/config/settings.py`, since importing that takes torch, which the site is built without."""

from __future__ import annotations

import ast
from pathlib import Path
from typing import Any

MARK = '<!-- settings -->'
SOURCE = Path(__file__).parent.parent / 'timm_rld' / 'config' / 'settings.py'


def on_page_markdown(markdown: str, **kwargs: Any) -> str:
    """Called by mkdocs for each page."""
    return markdown.replace(MARK, settings_table()) if MARK in markdown else markdown


def settings_table() -> str:
    """Return a Markdown table for each group of settings."""
    body = ast.parse(SOURCE.read_text(encoding='utf-8')).body
    groups = next(node for node in body if isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Tuple))
    titles = {name.id: title.value for name, title in zip(groups.targets[0].elts, groups.value.elts)}
    rows: dict[str, list[str]] = {title: [] for title in titles.values()}
    (config,) = (node for node in body if isinstance(node, ast.ClassDef) and node.name == 'Config')
    for node in config.body:
        if isinstance(node, ast.AnnAssign):
            rows[titles[node.value.args[1].id]].append(_row(node))
    head = '| flag | default | what it is |\n| --- | --- | --- |\n'
    return '\n\n'.join(f'### {title.capitalize()}\n\n{head}' + '\n'.join(lines) for title, lines in rows.items())


def _row(node: ast.AnnAssign) -> str:
    default, help = ast.literal_eval(node.value.args[0]), node.value.args[2].value.replace('%%', '%')
    marks = {k.arg: k.value for k in node.value.keywords}
    name = node.target.id.replace('_', '-')
    flags = [f'`--{name}`']
    if 'alias' in marks:
        flags.append(f'`-{marks["alias"].value}`')
    if ast.unparse(node.annotation).startswith('bool') and 'flag' not in marks:
        flags.append(f'`--no-{name}`')
    if 'choices' in marks and (unnamed := [c for c in ast.literal_eval(marks['choices']) if c not in help]):
        help += ': ' + ', '.join(f'`{c}`' for c in unnamed)
    if isinstance(default, bool):
        default = 'yes' if default else 'no'
    elif isinstance(default, tuple):
        default = ' '.join(map(str, default))
    return f'| {", ".join(flags)} | {"" if default in (None, "", {}) else default} | {help} |'
