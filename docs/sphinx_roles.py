"""Docstrings say :func:`name`; on the site that is a link, or code where the site has no such entry."""

from __future__ import annotations

import re
from typing import Any

import griffe

_ROLE = re.compile(r':(?:attr|class|data|func|meth|mod):`([\w.]+)`')


class SphinxRoles(griffe.Extension):
    """Called by griffe for each object that it reads."""

    def on_object(self, *, obj: griffe.Object, **kwargs: Any) -> None:
        if obj.docstring:
            obj.docstring.value = _ROLE.sub(lambda role: _link(obj, role[1]), obj.docstring.value)


def _link(obj: griffe.Object, name: str) -> str:
    first, _, rest = name.partition('.')
    path = name
    if first != obj.package.name:  # else it is a whole path
        try:
            path = f'{obj.resolve(first)}.{rest}'.rstrip('.')
        except griffe.NameResolutionError:  # a public name of another module
            modules = (module for module in obj.package.modules.values() if first in (module.exports or ()))
            path = next((f'{module.path}.{name}' for module in modules), name)
    return f'<autoref identifier="{path}" optional><code>{name}</code></autoref>'
