"""How a search spends its budget, and how long that takes."""

from __future__ import annotations

import csv
import math
import statistics
from dataclasses import dataclass, field
from pathlib import Path

from ..errors import UsageError

# Epochs of the rungs, as shares of a whole run. The first ladder whose rungs differ, and have room, is taken.
LADDERS = ((1 / 8, 1 / 4, 1 / 2), (1 / 4, 1 / 2), (1 / 2, 1))


@dataclass(frozen=True)
class Rung:
    """A round of the search.

    Attributes:
        epochs: of each run, a whole schedule.
        candidates: how many run.
    """

    epochs: int
    candidates: int


def parse_budget(text: str) -> float:
    """Return how many whole runs a search may cost: `6x` is 6.

    Raises:
        UsageError: for anything else.
    """
    try:
        value = float(text.removesuffix('x'))
        if not text.endswith('x') or not 0 < value < math.inf:
            raise ValueError
    except ValueError:
        raise UsageError(f'--budget {text}: expected a number of whole runs, e.g. 6x') from None
    return value


def plan(budget: float, epochs: int, least: int) -> list[Rung]:
    """Return the rungs of a search: each costs an equal share of the budget, so that fewer candidates run longer.

    Args:
        budget: in whole runs.
        epochs: of a whole run.
        least: candidates that the first rung must have.

    Raises:
        UsageError: where there is no room for two rungs, naming the smallest budget that has it.
    """
    if rungs := _rungs(budget, epochs, least):
        return rungs
    if epochs < 2:
        raise UsageError(f'--epochs {epochs}: has no shorter schedule to search with; give at least 2')
    enough = next(b / 2 for b in range(1, 10**6) if _rungs(b / 2, epochs, least))
    raise UsageError(
        f'--budget {budget:g}x: too small for two rungs, the first with {least} published settings; '
        f'the smallest that works is {enough:g}x'
    )


def _rungs(budget: float, epochs: int, least: int) -> list[Rung]:
    for ladder in LADDERS:
        lengths = [max(1, round(share * epochs)) for share in ladder]
        if lengths != sorted(set(lengths)):
            continue
        counts = [int(budget * epochs / len(lengths) / e + 1e-9) for e in lengths]
        if counts[0] >= least and counts[-1] >= 2 and counts == sorted(set(counts), reverse=True):
            return [Rung(e, n) for e, n in zip(lengths, counts)]
    return []


@dataclass
class Clock:
    """What runs have cost so far, from which the rest is estimated.

    Attributes:
        student: seconds of an epoch without the teacher's, of each run.
        teacher: seconds that the teacher takes of an epoch whose logits are not cached: the most so far.
        rest: seconds of a run beside its training steps: its start, and evaluations.
    """

    student: list[float] = field(default_factory=list)
    teacher: float = 0.0
    rest: list[float] = field(default_factory=list)

    def add(self, run: Path, seconds: float | None) -> None:
        """Read the times of a finished run.

        Args:
            run: its folder.
            seconds: from its start to its end; None where an earlier process has run it.
        """
        try:
            with (run / 'summary.csv').open(encoding='utf-8') as f:
                rows = list(csv.DictReader(f))
            parts = {k: sum(float(r[k]) for r in rows) for k in rows[0] if k.startswith('seconds_')}
        except (OSError, LookupError, ValueError):
            return
        asked = parts.pop('seconds_teacher', 0.0)
        own = sum(parts.values())
        self.student.append(own / len(rows))
        self.teacher = max(self.teacher, asked / len(rows))
        if seconds is not None:
            self.rest.append(max(0.0, seconds - own - asked))

    def seconds(self, epochs: int, asks: bool, scale: float = 1.0) -> float:
        """Return about how long a run takes.

        Args:
            epochs: of the run.
            asks: whether its teacher computes logits in each epoch.
            scale: images of an epoch, over those of the runs so far.
        """
        epoch = statistics.median(self.student or [0.0]) + (self.teacher if asks else 0.0)
        return statistics.median(self.rest or [0.0]) + epochs * scale * epoch


def duration(seconds: float) -> str:
    """Return a time as text: `0:42` (minutes and seconds) or `3:05 h`."""
    minutes, rest = divmod(round(seconds), 60)
    return f'{minutes // 60}:{minutes % 60:02} h' if minutes >= 60 else f'{minutes}:{rest:02}'
