"""One HTML file that asks no host for anything: style, script, pictures and plots are in it.

Each template extends `base.html` and uses the macros of `macros.html`. Names of classes, files and datasets are
untrusted text: all that a template shows is escaped, and the page's own policy lets no other script run.
"""

from __future__ import annotations

import base64
import csv
import functools
import hashlib
import io
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from PIL import Image

from ..errors import UserError

TEMPLATES = Path(__file__).parent / 'templates'
INSTALL = "pip install 'timm-rld[report]'"


@dataclass(frozen=True)
class Cell:
    """A cell of a table that is sorted by something else than its text, or shows more than text.

    Attributes:
        text: what it shows.
        value: what it is sorted by; None: its text.
        pictures: shown below the text.
        bar: a number in -1 … 1 drawn as a bar behind the text; None: no bar.
    """

    text: str
    value: float | str | None = None
    pictures: Sequence[Picture] = ()
    bar: float | None = None


@dataclass(frozen=True)
class Picture:
    """A small picture that can be enlarged.

    Attributes:
        source: data URI, of :func:`thumbnail`; empty where the picture is not at hand.
        caption: lines below it; (colour, text) puts a dot of a colour of the style sheet before a line.
        alt: what it shows, for those who do not see it.
        tone: 'good', 'bad' or '': colour of its frame.
    """

    source: str
    caption: Sequence[str | tuple[str, str]] = ()
    alt: str = ''
    tone: str = ''


@dataclass(frozen=True)
class Table:
    """A table that can be sorted by its columns.

    Attributes:
        columns: titles; one that ends in '#' is a column of numbers, aligned to the right.
        rows: texts, numbers or :class:`Cell`.
        caption: a line above it.
    """

    columns: Sequence[str]
    rows: Sequence[Sequence[Any]] = field(default_factory=list)
    caption: str = ''


@functools.cache
def _environment() -> Any:
    try:
        import jinja2
    except ImportError as e:
        raise UserError(f'a report needs the package jinja2; {INSTALL}') from e
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(TEMPLATES), autoescape=True, undefined=jinja2.StrictUndefined,
        trim_blocks=True, lstrip_blocks=True,
    )  # fmt: skip
    environment.tests['cell'] = lambda value: isinstance(value, Cell)
    script = (TEMPLATES / 'page.js').read_text(encoding='utf-8')
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    safe = environment.globals
    safe['style'] = raw((TEMPLATES / 'page.css').read_text(encoding='utf-8'))
    safe['script'] = raw(script)
    safe['policy'] = (
        f"default-src 'none'; img-src data:; style-src 'unsafe-inline'; script-src 'sha256-{digest}'; "
        "base-uri 'none'; form-action 'none'"
    )
    return environment


def require() -> None:
    """Raise UserError where jinja2 is not installed."""
    _environment()


def raw(html: str) -> Any:
    """Return HTML or SVG of ours as text that a template does not escape."""
    from markupsafe import Markup

    return Markup(html)


def render(template: str, **context: Any) -> str:
    """Return the page that a template makes; all text of ``context`` is escaped in it.

    Args:
        template: file in `report/templates`.

    Raises:
        UserError: where jinja2 is not installed.
    """
    return _environment().get_template(template).render(**context)


def thumbnail(image: Image.Image, size: int = 64) -> str:
    """Return a picture as a data URI: PNG if it has no more than 64 pixels a side (such pictures are enlarged by whole
    pixels), else JPEG.

    Args:
        size: pixels of the longer side; a smaller picture stays as it is.
    """
    image = image if image.mode in ('L', 'RGB') else image.convert('RGB')
    if max(image.size) > size:
        image = image.copy()
        image.thumbnail((size, size), Image.Resampling.LANCZOS)
    kind, file = 'png' if max(image.size) <= 64 else 'jpeg', io.BytesIO()
    image.save(file, kind, quality=80, optimize=True)
    return f'data:image/{kind};base64,{base64.b64encode(file.getvalue()).decode()}'


def as_csv(header: Sequence[str], rows: Sequence[Sequence[Any]]) -> str:
    """Return a table as CSV; a text that a spreadsheet would take for a formula gets an apostrophe before it."""

    def safe(value: Any) -> Any:
        if re.fullmatch(r'[+-]\d+(\.\d+)?', str(value)):
            return str(value).removeprefix('+')
        return f"'{value}" if isinstance(value, str) and value[:1] in ('=', '+', '-', '@', '\t', '\r') else value

    text = io.StringIO()
    writer = csv.writer(text, lineterminator='\n')
    writer.writerow(header)
    writer.writerows([safe(value) for value in row] for row in rows)
    return text.getvalue()
