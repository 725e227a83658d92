"""A comparison under attack: which runs `timm-rld compare --poison` makes, and top-1 against the poisoned fraction."""

from __future__ import annotations

import math
import re
import statistics
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from .config import Config, completing, parse_args
from .errors import UsageError
from .metrics import t_quantile
from .poison import ATTACKS, check_poison, check_strength
from .runs import Variant, check_unique, paired_difference, slug

COLUMNS = ('poison', 'fraction', 'train_top1_poisoned', 'train_top1_clean', 'second_class')


@dataclass(frozen=True)
class Poisoning:
    """What the runs of a comparison may be poisoned with.

    Attributes:
        attack: its name, with the strength where that is not the default: `pcfdla:strength=4`; '' for a clean run.
        fraction: of the training images; 0 for a clean run.
        flags: for `train_distill.py`.
    """

    attack: str
    fraction: float
    flags: tuple[str, ...]

    @property
    def suffix(self) -> str:
        """What a run's folder has after the criterion; nothing for a clean run."""
        return f'-{slug(self.attack)}-{self.fraction:g}' if self.attack else ''

    @property
    def title(self) -> str:
        """What a run's title has after the criterion; nothing for a clean run."""
        return f', {self.attack} {self.fraction:g}' if self.attack else ''

    def columns(self, results: dict[str, Any]) -> dict[str, Any]:
        """Return the last columns of a run's row (``COLUMNS``).

        Args:
            results: its results.json.
        """
        return {
            'poison': self.attack,
            'fraction': self.fraction,
            **{name: results.get(name) for name in COLUMNS[2:]},
        }


@dataclass(frozen=True)
class Study:
    """The attacks of a comparison, empty for one without.

    Attributes:
        poisonings: each attack with each of its fractions.
        clean: a run without attack.
        all_clean: whether each criterion also has clean runs.
        flags: of `timm-rld compare`.
    """

    poisonings: tuple[Poisoning, ...]
    clean: Poisoning
    all_clean: bool
    flags: tuple[str, ...]

    def of(self, variant: Variant) -> list[Poisoning]:
        """Return what the runs of a criterion are poisoned with; a run without distillation is clean, and there is one
        for each seed."""
        if not self.poisonings or distil_nothing(variant):
            return [self.clean]
        return [*([self.clean] if self.all_clean else []), *self.poisonings]

    def has_clean(self, variant: Variant) -> bool:
        """Return whether a criterion has runs without attack."""
        return self.clean in self.of(variant)

    def found(self, rows: Sequence[dict[str, Any]]) -> dict[str, Any]:
        """Return what compare.json holds of the attacks: :func:`summarize` of the rows, and the flags; nothing where
        there are none."""
        return {'poison': summarize(rows), 'poison_flags': list(self.flags)} if self.poisonings else {}


def distil_nothing(variant: Variant) -> bool:
    """Return whether a variant is a run without distillation."""
    return variant.flags[:2] == ('--distill', 'none')


def plan_study(
    attacks: Sequence[str], fractions: Sequence[float], config: Config, variants: Iterable[Variant]
) -> Study:
    """Return what a comparison poisons its runs with.

    Args:
        attacks: of `--poison`: names, or with options `pcfdla:strength=4,fraction=[0.1,0.5]`. None: those of a
            `--config` file, if it has one.
        fractions: of `--poison-fraction`, for attacks without their own; 0 for clean runs.
        config: the settings that all runs share.
        variants: the criteria.

    Raises:
        UsageError: for an unknown attack or option, a value that does not fit, or a criterion that cannot be poisoned.
    """
    clear = ('--poison', 'none') if config.poison != 'none' else ()
    if not attacks and config.poison != 'none':
        strength = f':strength={config.poison_strength:g}' if config.poison_strength is not None else ''
        attacks, fractions = [f'{config.poison}{strength}'], fractions or [config.poison_fraction or 0.0]
    elif config.poison_strength is not None and config.poison == 'none':
        s = f'{config.poison_strength:g}'
        raise UsageError(f'--poison-strength {s}: in a comparison it follows the attack: --poison pcfdla:strength={s}')
    if fractions and not attacks:
        raise UsageError(f'--poison-fraction {fractions[0]:g}: needs --poison {"|".join(ATTACKS)}')
    check_unique('--poison', attacks or ['nothing'])
    check_unique('--poison-fraction', fractions or ['nothing'])
    poisonings: list[Poisoning] = []
    with_clean = False
    for text in attacks:
        name, label, height, own = _parse_attack(text)
        chosen = own or list(fractions)
        if not chosen:
            raise UsageError(f'--poison {text}: needs --poison-fraction P …, parts of the training images; 0 is clean')
        with_clean |= 0 in chosen
        for fraction in sorted(set(chosen) - {0}):
            flags = ['--poison', name, '--poison-fraction', str(fraction)]
            flags += [] if height is None else ['--poison-strength', str(height)]
            given = parse_args(flags)
            for variant in variants:
                if not distil_nothing(variant):
                    check_poison(name, given.poison_fraction, given.poison_strength, variant.flags[1], config.black_box)
            poisonings.append(Poisoning(label, fraction, tuple(flags)))
    check_unique('--poison', [f'{p.attack} {p.fraction:g}' for p in poisonings] or ['nothing'])  # as folders have it
    words = ['--poison', *attacks] if attacks else []
    words += ['--poison-fraction', *(f'{p:g}' for p in fractions)] if fractions else []
    return Study(tuple(poisonings), Poisoning('', 0.0, clear), with_clean or not poisonings, tuple(words))


def _parse_attack(text: str) -> tuple[str, str, float | None, list[float]]:
    """Return name, label, strength (None: it takes none) and own fractions of an attack."""
    name, _, rest = text.partition(':')
    strength, fractions = None, []
    for item in filter(None, re.split(r',(?![^\[]*\])', rest)):  # not within a list
        key, _, value = item.partition('=')
        try:
            numbers = [float(v) for v in value.strip('[]').split(',')]
        except ValueError:
            numbers = []
        if key == 'strength' and len(numbers) == 1:
            strength = numbers[0]
        elif key == 'fraction' and numbers:
            fractions = numbers
        else:
            raise UsageError(f"--poison {text}: expected strength=S or fraction=[P,Q] after the colon, got '{item}'")
    try:
        found = check_strength(name, strength)
    except ValueError as e:
        raise UsageError(f'--poison {text}: {e}') from e
    label = name if found == ATTACKS[name].strength else f'{name}:strength={found:g}'
    return name, label, found, fractions


def without_attack(config: Config) -> Config:
    """Return the settings that all runs of a comparison share, whatever its attacks, so that others can be added."""
    return config.changed(poison='none', **dict.fromkeys(completing('poison')))


def is_clean(row: dict[str, Any]) -> bool:
    """Return whether a row of a comparison is that of a run without attack."""
    return not row.get('poison')


def summarize(rows: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return for each criterion, attack and fraction the mean top-1 with half the width of its 95% interval, and its
    differences from the clean run of the criterion and from the run without distillation, paired by seed.

    Few seeds tell little of their spread, so the deviation is pooled over all cells of a criterion:
    s² = Σ (n_i - 1) s_i² / Σ (n_i - 1), and the half width is t(Σ (n_i - 1)) · s / √n_i (Student's t).

    Args:
        rows: a dict a run, with `criterion`, `seed`, `top1`, `agreement` and ``COLUMNS``.

    Returns:
        A dict a cell, in the order of the rows: `criterion`, `poison`, `fraction`, `seeds`, `top1`, `half`,
        `minus_clean`, `minus_none`, and means of the other figures. What is not known is None.
    """
    cells: dict[tuple[str, str, float], dict[int, dict[str, Any]]] = {}
    for row in rows:
        cells.setdefault((row['criterion'], row['poison'], row['fraction']), {})[row['seed']] = row
    squares: dict[str, list[tuple[int, float]]] = {}
    for (criterion, *_), runs in cells.items():
        values = [r['top1'] for r in runs.values()]
        if len(values) > 1:
            squares.setdefault(criterion, []).append((len(values) - 1, statistics.variance(values)))
    found = []
    for (criterion, attack, fraction), runs in cells.items():
        degrees = sum(n for n, _ in squares.get(criterion, []))
        half = None
        if degrees:
            pooled = math.sqrt(sum(n * v for n, v in squares[criterion]) / degrees)
            half = t_quantile(degrees) * pooled / math.sqrt(len(runs))
        entry: dict[str, Any] = {'criterion': criterion, 'poison': attack, 'fraction': fraction, 'seeds': len(runs)}
        entry |= {'top1': statistics.fmean(r['top1'] for r in runs.values()), 'half': half}
        for name, other in (('minus_clean', (criterion, '', 0.0)), ('minus_none', ('none', '', 0.0))):
            base = cells.get(other, {}) if other != (criterion, attack, fraction) else {}
            entry[name] = paired_difference([runs[s]['top1'] - base[s]['top1'] for s in runs if s in base])[0]
        for name in ('agreement', *COLUMNS[2:]):
            values = [r[name] for r in runs.values() if r.get(name) is not None]
            entry[name] = statistics.fmean(values) if values else None
        found.append(entry)
    return found


def curve(cells: Sequence[dict[str, Any]], criterion: str, attack: str) -> list[dict[str, Any]]:
    """Return the cells of a criterion under an attack by rising fraction, its clean one among them."""
    mine = (c for c in cells if c['criterion'] == criterion and c['poison'] in ('', attack))
    return sorted(mine, key=lambda c: c['fraction'])


def names_of(cells: Sequence[dict[str, Any]], what: str) -> list[str]:
    """Return the criteria (`criterion`) or attacks (`poison`) of some cells, in their order."""
    return list(dict.fromkeys(c[what] for c in cells if c[what]))


def markdown(cells: Sequence[dict[str, Any]]) -> list[str]:
    """Return tables of :func:`summarize`, as lines of Markdown: for each attack the criteria, and a column for each
    fraction."""
    lines: list[str] = []
    for attack in names_of(cells, 'poison'):
        fractions = sorted({c['fraction'] for c in cells if c['poison'] in ('', attack)})
        lines += [
            '',
            f'Poisoned by `{attack}`: top-1 at the poisoned fraction of the training images (and how often the student '
            "names the clean teacher's second class):",
            '',
            f'| criterion | {" | ".join(f"{p:g}" for p in fractions)} |',
            '| --- ' * (len(fractions) + 1) + '|',
        ]
        for criterion in names_of(cells, 'criterion'):
            by_fraction = {c['fraction']: c for c in curve(cells, criterion, attack)}
            shown = [_shown(by_fraction[p]) if p in by_fraction else '' for p in fractions]
            lines.append(f'| {criterion} | {" | ".join(shown)} |')
    note = (
        '± is half the 95% interval of the mean, from the deviation over seeds, pooled over all cells of a criterion. '
        '`none` is not poisoned. Training top-1 on poisoned and on other images: compare.csv.'
    )
    return [*lines, '', note] if lines else []


def _shown(cell: dict[str, Any]) -> str:
    half = '' if cell['half'] is None else f' ± {cell["half"]:.2f}'
    second = '' if cell['second_class'] is None else f' ({cell["second_class"]:.1f})'
    return f'{cell["top1"]:.2f}{half}{second}'
