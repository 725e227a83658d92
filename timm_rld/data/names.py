"""Names that people give their splits."""

from __future__ import annotations

from collections.abc import Sequence

TRAIN_NAMES = ('train', 'training')
# tried in this order where no validation split is named
VALIDATION_NAMES = ('validation', 'val', 'valid', 'eval', 'evaluation', 'dev', 'test')
_SYNONYMS = (TRAIN_NAMES, ('val', 'valid', 'validation', 'eval', 'evaluation'))  # timm's


def first_named(there: Sequence[str], names: Sequence[str]) -> str | None:
    """Return the first of some names that is there, as it is written there; capitals do not matter."""
    for name in names:
        found = [x for x in there if x.lower() == name.lower()]
        if found:
            return name if name in found else found[0]
    return None


def find_named(there: Sequence[str], split: str) -> str | None:
    """Return what is there under the name of a split, or under one of timm's synonyms of it."""
    return first_named(there, (split, *next((names for names in _SYNONYMS if split.lower() in names), ())))


def printable(text: str) -> str:
    """Return text without what would move a terminal's cursor: such characters are escaped."""
    return ''.join(c if c.isprintable() else c.encode('unicode_escape', 'surrogatepass').decode() for c in text)


def some(names: Sequence[str], at_most: int = 8) -> str:
    """Return the first of some names as a text."""
    return ', '.join(names[:at_most]) + (', …' if len(names) > at_most else '')
