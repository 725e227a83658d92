"""The settings that a search tries: the published ones, and others around them."""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

from ..config import FIELDS, Config, completing, flag_of, parse_args, resolve, uses_sample
from ..errors import UsageError, did_you_mean
from ..loss import CRITERIA, Knob, get_criterion
from ..runs import parse_variant

RAMP = 'distill_warmup_epochs'
# What `--tune` adds to the knobs of each criterion, also of `none`.
SHARED = {'lr': Knob('lr', (0.25, 4))}


@dataclass(frozen=True)
class Candidate:
    """Settings to try.

    Attributes:
        criterion: of `--distill`.
        values: what differs from the criterion's published settings, by name. The ramp is a share of the run's epochs,
            since each rung has other epochs.
        origin: where they come from: `published`, `ImageNet` (published for it) or `sampled`.
    """

    criterion: str
    values: tuple[tuple[str, Any], ...]
    origin: str

    def settings(self, epochs: int) -> dict[str, Any]:
        """Return the values for a run of so many epochs."""
        values = dict(self.values)
        if RAMP in values:
            values[RAMP] = ramp_epochs(values[RAMP], epochs)
        return values

    def text(self, epochs: int) -> str:
        """Return it as `--criteria` takes it, and a learning rate as a flag."""
        values = self.settings(epochs)
        rate = ''.join(f' {flag_of(k)} {_word(values.pop(k))}' for k in ('lr', 'lr_base') if k in values)
        listed = ','.join(f'{k}={_word(v)}' for k, v in values.items())
        return self.criterion + (f':{listed}' if listed else '') + rate

    def flags(self, epochs: int) -> list[str]:
        """Return the flags of `train_distill.py` that choose it."""
        return flags_of(self.text(epochs))


def flags_of(text: str) -> list[str]:
    """Return the flags that choose a candidate, from its text (:meth:`Candidate.text`)."""
    criterion, _, rate = text.partition(' ')
    standardize = () if 'standardize=' in criterion else ('--no-standardize',)  # whatever a file says
    return [*parse_variant(criterion).flags, *standardize, *rate.split()]


def ramp_epochs(share: float, epochs: int) -> int:
    """Return the epochs of a ramp that is a share of a run."""
    return max(1, round(share * epochs)) if share else 0


def _word(value: Any) -> str:
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, dict):
        return f'[{",".join(f"{k}={_word(v)}" for k, v in value.items())}]'
    return f'{value:g}' if isinstance(value, float) else str(value).replace(' ', '')


def published(text: str, config: Config) -> Candidate:
    """Return a criterion at its published settings, as `--criteria` names it: what a text gives after the colon, and
    what a file of settings says of this criterion, is kept.

    Args:
        text: `rld`, or with options `rld:beta=2`.
        config: of all runs, with the epochs of a whole one.

    Raises:
        UsageError: for an unknown criterion or option.
    """
    variant = parse_variant(text, config.black_box)
    if '--feature-distill' in variant.flags:
        raise UsageError(f'--criteria {text}: tune searches criteria alone; compare takes a method on features')
    given, row = parse_args(list(variant.flags)), get_criterion(text.partition(':')[0])
    assert config.epochs
    own, default = [n for n in completing('distill') if n != 'distill_kwargs'], Config()
    sources = [given] if config.distill != given.distill else [config, given]
    values: dict[str, Any] = {}
    for source in sources:
        if source.standardize and (source is given or not row.not_standardized):
            values['standardize'] = True
        values |= source.distill_kwargs
        chosen = {n: getattr(source, n) for n in own if n not in source.origin.derived}
        values |= {n: value for n, value in chosen.items() if value != getattr(default, n)}
    if RAMP in values:
        values[RAMP] = values[RAMP] / config.epochs
    return Candidate(given.distill, tuple(values.items()), 'published')


def of_imagenet(default: Candidate) -> Candidate | None:
    """Return a criterion at the settings published for ImageNet, or None where there are none (or others are given)."""
    row = CRITERIA[default.criterion]
    if not row.imagenet or default.values:
        return None
    given = parse_args(row.imagenet.split())
    values = {k: getattr(given, k) for k in row.defaults(1) if getattr(given, k) is not None}
    if values.get(RAMP) == 1:  # the first of some hundred epochs
        values[RAMP] = 0
    return Candidate(row.name, tuple({**given.distill_kwargs, **values}.items()), 'ImageNet')


def knobs_of(default: Candidate, shared: Sequence[str]) -> list[Knob]:
    """Return what there is to search of a criterion, beside what is given."""
    given = dict(default.values)
    return [k for k in (*CRITERIA[default.criterion].knobs, *(SHARED[name] for name in shared)) if k.name not in given]


def _allowed(knob: Knob, config: Config) -> Knob:
    """Return a knob without what a run would refuse: no weight of the cross-entropy."""
    if knob.name == 'task_loss_weight' and (config.distill_token or config.class_weights is not None):
        return replace(knob, choices=tuple(filter(None, knob.choices)))
    return knob


def sample(default: Candidate, count: int, seed: int, shared: Sequence[str], config: Config) -> Iterator[Candidate]:
    """Give candidates around a criterion's published settings, the same ones for the same arguments: a Latin hypercube,
    in which each of ``count`` equal parts of a knob's range has one.

    Args:
        shared: further knobs, names of :data:`SHARED`.
        config: of all runs.
    """
    rng = random.Random(f'{seed} {default.text(config.epochs or 1)}')
    knobs = [_allowed(k, config) for k in knobs_of(default, shared)]
    columns = {knob.name: rng.sample(range(count), count) for knob in knobs}
    rate = learning_rate(config)
    for i in range(count):
        places = {knob: (columns[knob.name][i] + rng.random()) / count for knob in knobs}
        values = dict(default.values)
        choices = {k.name: k.choices[int(u * len(k.choices))] for k, u in places.items() if k.choices}
        standardize = choices.pop('standardize', values.get('standardize', False))
        row = get_criterion(default.criterion, standardize)
        base = {**row.defaults(config.epochs or 1), **row.options, **values, **dict([rate])}
        for knob, place in places.items():
            if knob.factors is not None:
                low, high = knob.factors
                name = rate[0] if knob.name == 'lr' else knob.name
                values[name] = float(f'{base[name] * low * (high / low) ** place:.2g}')
        values |= choices
        if standardize:
            values['standardize'] = True
        yield Candidate(default.criterion, tuple(values.items()), 'sampled')


def learning_rate(config: Config) -> tuple[str, float]:
    """Return the setting that the learning rate of a run follows, and its value: `lr`, or `lr_base` where it is scaled
    by a batch size, which depends on the number of processes too."""
    resolved = resolve(config)
    name = 'lr_base' if 'lr' in resolved.origin.derived else 'lr'
    return name, float(getattr(resolved, name))


def defaults(criteria: Sequence[str], config: Config) -> list[Candidate]:
    """Return what is always tried: `none`, then each criterion at its published settings."""
    found = [published(text, config) for text in dict.fromkeys(('none', *criteria))]
    names = [c.criterion for c in found]
    if twice := [n for i, n in enumerate(names) if n in names[:i]]:
        raise UsageError(f'--criteria: {twice[0]} is there twice; its options are searched')
    return found


def choose(
    always: Sequence[Candidate], count: int, seed: int, shared: Sequence[str], config: Config
) -> list[Candidate]:
    """Return the candidates of the first rung.

    Args:
        always: :func:`defaults`.
        count: how many there is room for; fewer are returned where there is nothing to search.
        seed: of the sample.
    """
    also = [c for c in map(of_imagenet, always) if c is not None]
    searched = [c for c in always if knobs_of(c, shared)]
    room = count - len(always)
    chosen = [*always, *also[: room // 2]]  # at least half of the room is for others
    left = count - len(chosen)
    for i, default in enumerate(searched):
        chosen += sample(default, left // len(searched) + (i < left % len(searched)), seed, shared, config)
    return list({c.text(10**6): c for c in chosen}.values())


def check_shared(names: Sequence[str]) -> None:
    """Raise UsageError for a knob that `--tune` does not know."""
    for name in names:
        if name not in SHARED:
            of_criteria = {k.name for row in CRITERIA.values() for k in row.knobs}
            why = '; those of the criteria are searched anyway' if name in of_criteria else did_you_mean(name, SHARED)
            raise UsageError(f'--tune {name}: unknown name{why} (known: {", ".join(SHARED)})')


def shorter(config: Config, epochs: int) -> list[str]:
    """Return the flags that make of a whole run one of fewer epochs under the same schedule: what counts epochs is
    shortened alike."""
    whole = config.epochs
    assert whole
    flags = ['--epochs', str(epochs)]
    if uses_sample(config) and (ramp := resolve(config).distill_warmup_epochs):  # whatever the criterion
        flags += [flag_of(RAMP), str(ramp_epochs(ramp / whole, epochs))]
    if config.teacher_cache_views is not None:
        flags += ['--teacher-cache-views', str(min(config.teacher_cache_views, epochs))]
    for name, row in FIELDS.items():
        value = getattr(config, name)
        if not row.metadata['in_epochs'] or not value or epochs == whole:
            continue
        if isinstance(value, tuple):
            short = sorted({max(1, round(v * epochs / whole)) for v in value})
            flags += [flag_of(name), *map(str, short)]
        elif isinstance(value, float):
            flags += [flag_of(name), f'{value * epochs / whole:g}']
        else:
            least = 1 if name == 'mixup_off_epoch' else 0  # of which 0 means never
            flags += [flag_of(name), str(min(max(least, round(value * epochs / whole)), epochs - 1))]
    return flags
