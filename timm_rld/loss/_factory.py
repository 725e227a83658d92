"""The table of criteria, and the one function that makes them.

A criterion is added by writing its file and one row here. The row pins the published defaults.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any

from ..errors import did_you_mean
from ._base import DistillLoss
from .kd import KD
from .rld import RLD


@dataclass(frozen=True)
class Criterion:
    """A row of the table.

    Attributes:
        name: what `--distill` takes.
        cls: the module, or None where nothing is distilled.
        summary: half a line for `--help`.
        paper: title, authors, venue.
        year: of publication.
        options: published options, the arguments of ``cls``.
        task_weight: published weight of the cross-entropy.
        distill_weight: published weight of the distillation term.
        warmup_epochs: N of the published ramp min(epoch / N, 1) of the distillation term, 0 for none.
    """

    name: str
    cls: Callable[..., DistillLoss] | None
    summary: str
    paper: str
    year: int | None
    options: MappingProxyType[str, Any] = field(default_factory=lambda: MappingProxyType({}))
    task_weight: float = 1.0
    distill_weight: float = 1.0
    warmup_epochs: int = 0


def _row(*args: Any, options: dict[str, Any] | None = None, **kwargs: Any) -> Criterion:
    return Criterion(*args, options=MappingProxyType(options or {}), **kwargs)


CRITERIA: dict[str, Criterion] = {
    row.name: row
    for row in (
        _row('none', None, 'no distillation: cross-entropy alone', '', None, distill_weight=0.0),
        _row(
            'kd', KD, 'τ²·KL of the softened probabilities',
            'Distilling the Knowledge in a Neural Network, Hinton, Vinyals, Dean', 2015,
            options={'temperature': 4.0}, task_weight=0.1, distill_weight=0.9,
        ),
        _row(
            'rld', RLD, 'refined logits: sample confidence + masked correlation',
            'Knowledge Distillation with Refined Logits, Sun et al., ICCV', 2025,
            options={'alpha': 1.0, 'beta': 8.0, 'temperature': 4.0, 'alpha_temperature': None}, warmup_epochs=20,
        ),
    )
}  # fmt: skip


def get_criterion(name: str) -> Criterion:
    """Return the table's row for ``name``.

    Raises:
        ValueError: for a name that is not in the table; the message offers the nearest ones.
    """
    if name not in CRITERIA:
        raise ValueError(f"unknown criterion '{name}'{did_you_mean(name, CRITERIA)}; known: {', '.join(CRITERIA)}")
    return CRITERIA[name]


def describe_criteria() -> str:
    """The table as text: name, summary, published weights and options, paper."""
    width = max(map(len, CRITERIA))
    lines = []
    for row in CRITERIA.values():
        lines.append(f'{row.name:<{width}}  {row.summary}')
        if row.cls is not None:
            options = ' '.join(f'{k}={v}' for k, v in row.options.items())
            ramp = f', ramp {row.warmup_epochs} epochs' if row.warmup_epochs else ''
            lines.append(
                f'{"":<{width}}  weights: task {row.task_weight:g}, distillation {row.distill_weight:g}{ramp}; '
                f'options: {options}'
            )
            lines.append(f'{"":<{width}}  {row.paper}, {row.year}')
    return '\n'.join(lines)


def create_distill_loss(name: str, **options: Any) -> DistillLoss:
    """Create a distillation criterion by name, with its published options unless given here.

    Args:
        name: a name of the table, e.g. `rld` or `kd` (`timm-rld list criteria` shows all).
        **options: the criterion's own options, e.g. ``temperature=2``; ``standardize=True`` standardises the logits.

    Returns:
        A module: ``criterion(student_logits, teacher_logits, target)`` gives the unweighted distillation term, a 0-d
        tensor in float32 or higher. Figures about the last batch are in ``criterion.diagnostics``.

    Raises:
        ValueError: for an unknown name, an option that the criterion does not have, or a value out of its range.
    """
    row = get_criterion(name)
    if row.cls is None:
        raise ValueError(f"'{name}' distils nothing, so there is no criterion to create")
    known = inspect.signature(row.cls).parameters
    for option in options:
        if option not in known:
            raise ValueError(
                f"criterion '{name}' has no option '{option}'{did_you_mean(option, known)}; it has: {', '.join(known)}"
            )
    if not isinstance(options.get('standardize', False), bool):
        raise ValueError(f"criterion '{name}': standardize must be true or false, got {options['standardize']!r}")
    try:
        criterion = row.cls(**{**row.options, **options})
    except (TypeError, ValueError) as e:
        raise ValueError(f"criterion '{name}': {e}") from e
    criterion.name = name
    return criterion
