"""The table of criteria, and the one function that makes them.

A criterion is added by writing its file and one row here. The row pins the published defaults.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from types import MappingProxyType
from typing import Any

from ..errors import UsageError, did_you_mean
from ._base import DistillLoss
from .abkd import ABKD
from .atkd import ATKD
from .bild import BiLD
from .ce_teacher import CETeacher
from .ctkd import CTKD
from .dist import DIST
from .dkd import DKD
from .features import describe_features, get_feature_method
from .gdkd import GDKD
from .kd import KD
from .la import LA
from .ldrld import LDRLD
from .lr import LR
from .mekd import MEKD
from .mlkd import MLKD
from .nkd import NKD
from .normkd import NormKD
from .pld import PLD
from .rc import RC
from .rld import RLD
from .ttm import TTM
from .wttm import WTTM


@dataclass(frozen=True)
class Knob:
    """What `timm-rld tune` tries of one setting of a criterion.

    Attributes:
        name: an option of the criterion, or a setting that completes `--distill`.
        factors: the lowest and the highest, of the published value (of that for standardised logits, where they are).
        choices: in place of factors, the values themselves; of `distill_warmup_epochs`, shares of the run's epochs.
    """

    name: str
    factors: tuple[float, float] | None = None
    choices: tuple[Any, ...] = ()


@dataclass(frozen=True)
class CriterionInfo:
    """A row of the table.

    Attributes:
        name: what `--distill` takes.
        cls: the module, or None where nothing is distilled.
        summary: half a line for `--help`.
        paper: title, authors, venue.
        year: of publication.
        options: published options, the arguments of ``cls``.
        fitted: names of options that are left to ``cls`` unless given: it takes the published value, or the nearest
            one that fits the number of classes.
        task_weight: published weight of the cross-entropy.
        distill_weight: published weight of the distillation term.
        warmup_epochs: N of the published ramp min(epoch / N, 1) of the distillation term, 0 for none.
        epochs: of the published run, of which the ramp is a share.
        imagenet: flags that turn these values, which are those of CIFAR-100, into the published ones of ImageNet.
        not_standardized: why logit standardisation makes no sense with it; empty where it does.
        generated: whether the student is trained on images of a generator alone, with neither images nor labels of the
            dataset (:class:`timm_rld.mekd_task.MEKDTask`); ``cls`` then takes the generator beside its options.
        settings: further settings of a run that have a default of their own with it, by name.
        answers: what it can be computed from: the teacher's `logits`; log-probabilities, which are the logits up to a
            constant of each row (`soft`); one-hot rows of the teacher's class (`hard`).
        knobs: what `timm-rld tune` searches.
    """

    name: str
    cls: Callable[..., DistillLoss] | None
    summary: str
    paper: str
    year: int | None
    options: MappingProxyType[str, Any] = field(default_factory=lambda: MappingProxyType({}))
    fitted: tuple[str, ...] = ()
    task_weight: float = 1.0
    distill_weight: float = 1.0
    warmup_epochs: int = 0
    epochs: int = 240
    imagenet: str = ''
    not_standardized: str = ''
    generated: bool = False
    settings: MappingProxyType[str, Any] = field(default_factory=lambda: MappingProxyType({}))
    answers: tuple[str, ...] = ('logits', 'soft')
    knobs: tuple[Knob, ...] = ()

    @property
    def plain(self) -> bool:
        """Whether the loss is a function of student's and teacher's logits (and the target) alone."""
        return self.cls is not None and not self.generated

    @property
    def cited(self) -> str:
        """Paper and year; empty where there is none."""
        return f'{self.paper}, {self.year}' if self.paper else ''

    def defaults(self, epochs: int | None = None, distill_token: bool = False) -> dict[str, Any]:
        """Return the published defaults of the settings of a run, by name.

        Args:
            epochs: of a run, whose ramp is the same share of it, at least one epoch and no more than published.
            distill_token: the cross-entropy has a head to itself, which must learn: its weight is 1 where 0 is
                published.
        """
        share = self.warmup_epochs if epochs is None else max(1, round(self.warmup_epochs / self.epochs * epochs))
        return dict(
            task_loss_weight=self.task_weight or float(distill_token),
            distill_loss_weight=self.distill_weight,
            distill_warmup_epochs=min(share, self.warmup_epochs),
            **self.settings,
        )

    def standardized(self) -> CriterionInfo:
        """Return the row for standardised logits, as `--standardize` has it: temperature 2, 9 times the distillation
        weight.

        Raises:
            ValueError: where standardisation makes no sense.
        """
        if self.not_standardized:
            raise ValueError(f"criterion '{self.name}' is not combined with standardize: {self.not_standardized}")
        options = {**self.options, 'standardize': True}
        if 'temperature' in options:
            options['temperature'] = 2.0
        return replace(self, options=MappingProxyType(options), distill_weight=9 * self.distill_weight)


def _row(*args: Any, options: dict[str, Any] | None = None, **kwargs: Any) -> CriterionInfo:
    return CriterionInfo(*args, **{**kwargs, 'options': MappingProxyType(options or {})})


_ANY = ('logits', 'soft', 'hard')
_SCALED = 'it scales the logits already'

_TEMPERATURE = Knob('temperature', (0.25, 2))
_WEIGHT = Knob('distill_loss_weight', (0.1, 3))
_TASK_WEIGHT = Knob('task_loss_weight', choices=(0.0, 0.3, 1.0))
_RAMP = Knob('distill_warmup_epochs', choices=(0, 1 / 12, 1 / 4))
_STANDARDIZE = Knob('standardize', choices=(False, True))

CRITERIA: dict[str, CriterionInfo] = {
    row.name: row
    for row in (
        _row(
            'none', None, 'no distillation: cross-entropy alone', '', None, distill_weight=0.0,
            not_standardized='it distils nothing', answers=_ANY,
        ),
        _row(
            'rld', RLD, 'refined logits: sample confidence + masked correlation',
            'Knowledge Distillation with Refined Logits, Sun et al., ICCV', 2025,
            options={'alpha': 1.0, 'beta': 8.0, 'temperature': 4.0, 'alpha_temperature': None}, warmup_epochs=20,
            imagenet='--distill-kwargs beta=0.5 temperature=1 --distill-warmup-epochs 1',
            knobs=(Knob('alpha', (0.25, 4)), Knob('beta', (0.0625, 2)), _TEMPERATURE, _RAMP, _STANDARDIZE),
        ),
        _row(
            'kd', KD, 'τ²·KL of the softened probabilities',
            'Distilling the Knowledge in a Neural Network, Hinton, Vinyals, Dean', 2015,
            options={'temperature': 4.0}, task_weight=0.1, distill_weight=0.9,
            imagenet='--distill-kwargs temperature=1 --task-loss-weight 0.5 --distill-loss-weight 0.5',
            knobs=(_TEMPERATURE, _WEIGHT, _STANDARDIZE),
        ),
        _row(
            'dkd', DKD, 'decoupled: target class + other classes',
            'Decoupled Knowledge Distillation, Zhao et al., CVPR', 2022,
            options={'alpha': 1.0, 'beta': 8.0, 'temperature': 4.0}, warmup_epochs=20,
            imagenet='--distill-kwargs beta=0.5 temperature=1 --distill-warmup-epochs 1',
            knobs=(Knob('alpha', (0.25, 4)), Knob('beta', (0.0625, 2)), _TEMPERATURE, _RAMP, _STANDARDIZE),
        ),
        _row(
            'la', LA, "label augment: KD after exchanging the teacher's top and true logit",
            'as compared in Knowledge Distillation with Refined Logits, Sun et al., ICCV', 2025,
            options={'temperature': 4.0}, task_weight=0.0,
            knobs=(_TEMPERATURE, _TASK_WEIGHT, _STANDARDIZE),
        ),
        _row(
            'rc', RC, "review and correction: KD + the student's own corrected logits",
            'as compared in Knowledge Distillation with Refined Logits, Sun et al., ICCV', 2025,
            options={'temperature': 4.0, 'kd_weight': 1.0, 'rc_weight': 0.1},
            knobs=(_TEMPERATURE, Knob('kd_weight', (0.1, 3)), Knob('rc_weight', (0.1, 10)), _STANDARDIZE),
        ),
        _row(
            'lr', LR, 'label revision: logits where the teacher is right, revised labels where it is wrong',
            'Improve Knowledge Distillation via Label Revision and Data Selection, Lan et al.', 2024,
            options={'lambda1': 4.0, 'lambda2': 1.0, 'eta': 0.8}, task_weight=0.0,
            not_standardized='it compares raw logits', answers=('logits',),
            knobs=(Knob('lambda1', (0.1, 3)), Knob('lambda2', (0.1, 10))),
        ),
        _row(
            'mlkd', MLKD, 'multi-level: probabilities, sample and class correlations, at five temperatures',
            'Multi-Level Logit Distillation, Jin, Wang, Lin, CVPR', 2023,
            options={'temperatures': [4.0, 3.0, 5.0, 2.0, 6.0]}, task_weight=0.1, distill_weight=0.9,
            knobs=(_WEIGHT, _STANDARDIZE),
        ),
        _row(
            'ctkd', CTKD, 'KD at a temperature learned against the student',
            'Curriculum Temperature for Knowledge Distillation, Li et al., AAAI', 2023,
            options={'t_start': 1.0, 't_end': 20.0, 'decay_epochs': 10}, task_weight=0.1, distill_weight=0.9,
            imagenet='--distill-kwargs decay_epochs=5 --task-loss-weight 1 --distill-loss-weight 1',
            knobs=(Knob('t_end', (0.2, 1)), _WEIGHT, _STANDARDIZE),
        ),
        _row(
            'normkd', NormKD, "KD at a temperature from each row's deviation",
            'NormKD: Normalized Logits for Knowledge Distillation, Chi et al.', 2023,
            options={'t_norm': 2.0}, task_weight=0.1, distill_weight=0.9, not_standardized=_SCALED,
            imagenet='--distill-kwargs t_norm=1 --task-loss-weight 0.5 --distill-loss-weight 0.5',
            knobs=(Knob('t_norm', (0.25, 2)), _WEIGHT),
        ),
        _row(
            'atkd', ATKD, "KD of standardised logits at a temperature from each sample's maximum",
            'Adaptive Temperature Based on Logits Correlation in Knowledge Distillation, Matsuyama et al.', 2025,
            task_weight=0.1, distill_weight=9.0, not_standardized=_SCALED,
            knobs=(_WEIGHT,),
        ),
        _row(
            'wttm', WTTM, "the teacher's probabilities to a power, samples weighted by uncertainty",
            'Knowledge Distillation Based on Transformed Teacher Matching, Zheng, Yang, ICLR', 2024,
            options={'gamma': 0.1, 'beta': 3.0}, not_standardized='its power transform is a temperature of its own',
            imagenet='--distill-kwargs gamma=0.8 beta=1.6',
            knobs=(Knob('gamma', (1, 10)), Knob('beta', (0.25, 2))),
        ),
        _row(
            'ttm', TTM, "the teacher's probabilities to a power, all samples alike",
            'Knowledge Distillation Based on Transformed Teacher Matching, Zheng, Yang, ICLR', 2024,
            options={'gamma': 0.1, 'beta': 1.0}, distill_weight=45.0,
            not_standardized='its power transform is a temperature of its own',
            knobs=(Knob('gamma', (1, 10)), _WEIGHT),
        ),
        _row(
            'bild', BiLD, 'differences of the highest logits, led by teacher and by student',
            'BiLD: Bi-directional Logits Difference Loss for Large Language Model Distillation, Li et al., COLING',
            2025,
            options={'top_k': 8, 'temperature': 3.0}, distill_weight=9.0,
            not_standardized='it compares differences of logits',
            knobs=(Knob('top_k', choices=(4, 8, 16)), _TEMPERATURE, _WEIGHT),
        ),
        _row(
            'dist', DIST, 'correlation of probabilities, along classes and along samples',
            'Knowledge Distillation from A Stronger Teacher, Huang et al., NeurIPS', 2022,
            options={'beta': 1.0, 'gamma': 1.0, 'temperature': 4.0}, distill_weight=2.0,
            not_standardized='it standardises the probabilities',
            imagenet='--distill-kwargs temperature=1',
            knobs=(_TEMPERATURE, _WEIGHT),
        ),
        _row(
            'nkd', NKD, 'normalised: soft target + other classes among themselves',
            'From Knowledge Distillation to Self-Knowledge Distillation: A Unified Approach with Normalized Loss and '
            'Customized Soft Labels, Yang et al., ICCV', 2023,
            options={'gamma': 3.5, 'temperature': 3.0}, not_standardized='its first term is at temperature 1',
            imagenet='--distill-kwargs gamma=1.5 temperature=1',
            knobs=(Knob('gamma', (0.25, 2)), _TEMPERATURE, _WEIGHT),
        ),
        _row(
            'gdkd', GDKD, "decoupled at the teacher's highest classes: between the groups and inside each",
            'Rethinking Decoupled Knowledge Distillation: A Predictive Distribution Perspective, Zheng, Cheng', 2025,
            options={
                'w0': 1.0, 'w1': 1.0, 'w2': 8.0, 'top_k': 5, 'temperature': 4.0,
                'kl_type': 'forward', 'strategy': 'best', 'groups': 2,
            }, fitted=('top_k',), warmup_epochs=20,
            imagenet='--distill-kwargs w0=0.5 w1=1 w2=1 temperature=1 --distill-warmup-epochs 1',
            knobs=(Knob('w1', (0.25, 4)), Knob('w2', (0.0625, 2)), _TEMPERATURE, _RAMP, _STANDARDIZE),
        ),
        _row(
            'ldrld', LDRLD, "relations of the student's highest classes in pairs + the other classes",
            'Local Dense Logit Relations for Enhanced Knowledge Distillation, Xu et al., ICCV', 2025,
            options={'alpha': 10.5, 'beta': 7.0, 'top_k': 7, 'temperature': 4.0}, fitted=('top_k',),
            knobs=(_TEMPERATURE, _WEIGHT, _STANDARDIZE),
        ),
        _row(
            'abkd', ABKD, 'α-β-divergence of the softened probabilities',
            'ABKD: Pursuing a Proper Allocation of the Probability Mass in Knowledge Distillation via α-β-Divergence, '
            'Wang et al., ICML', 2025,
            options={'alpha': 0.8, 'beta': 0.3, 'temperature': 4.0}, distill_weight=32.0,
            not_standardized='without τ² its weight has another scale',
            knobs=(Knob('alpha', (0.5, 1.5)), _WEIGHT),
        ),
        _row(
            'pld', PLD, "the teacher's ranking as a series of choices, the true class first",
            'PLD: A Choice-Theoretic List-Wise Knowledge Distillation, Bassam, Zhu, Bian, NeurIPS', 2025,
            options={'temperature': 4.0}, task_weight=0.0, not_standardized='the student is at temperature 1',
            imagenet='--distill-kwargs temperature=1',
            knobs=(_TEMPERATURE, _TASK_WEIGHT),
        ),
        _row(
            'mekd', MEKD, 'images generated from both logits are compared; no labels, no real images',
            'Aligning Logits Generatively for Principled Black-Box Knowledge Distillation, Ma et al., CVPR', 2024,
            options={
                'temperature': 5.0, 'gen_temperature': 5.0, 'image_weight': 1.0, 'kl_weight': 1.0, 'norm': 'l1',
            }, task_weight=0.0, not_standardized='its generator takes logits as they are',
            answers=_ANY, generated=True, settings=MappingProxyType({'steps_per_epoch': 500, 'generator_epochs': 200}),
            knobs=(_TEMPERATURE, Knob('image_weight', (0.1, 10)), Knob('kl_weight', (0.1, 10))),
        ),
        _row(
            'ce_teacher', CETeacher, "cross-entropy with the teacher's class, without labels",
            'hard distillation in Training data-efficient image transformers & distillation through attention, '
            'Touvron et al., ICML', 2021,
            task_weight=0.0, not_standardized='of the teacher it takes the class alone', answers=_ANY,
            knobs=(_TASK_WEIGHT, _WEIGHT),
        ),
    )
}  # fmt: skip


def get_criterion(name: str, standardize: bool = False) -> CriterionInfo:
    """Return the table's row for ``name``, on request for standardised logits (:meth:`CriterionInfo.standardized`).

    Raises:
        ValueError: for a name that is not in the table; the message offers the nearest ones. Also where
            standardisation makes no sense.
    """
    if name not in CRITERIA:
        raise ValueError(f"unknown criterion '{name}'{did_you_mean(name, CRITERIA)}; known: {', '.join(CRITERIA)}")
    return CRITERIA[name].standardized() if standardize else CRITERIA[name]


def published_defaults(
    name: str, standardize: bool, epochs: int, distill_token: bool = False, features: str = 'none'
) -> dict[str, Any]:
    """Return :meth:`CriterionInfo.defaults` of a criterion, as `--distill`, `--standardize`, `--epochs` and
    `--distill-token` choose it, and those of a method on features.

    Raises:
        ValueError: as :func:`get_criterion` and :func:`timm_rld.loss.features.get_feature_method`.
    """
    of_features = get_feature_method(features).defaults(epochs) if features != 'none' else {}
    return get_criterion(name, standardize).defaults(epochs, distill_token) | of_features


def choose_criterion(
    name: str, standardize: bool, options: dict[str, Any], answers: str | None = None
) -> tuple[CriterionInfo, DistillLoss | None]:
    """Return the row of a run with the options that it will have, and its criterion; None where nothing is distilled.

    Args:
        name, standardize, options, answers: as `--distill`, `--standardize`, `--distill-kwargs` and `--black-box` have
            them.

    Raises:
        UsageError: as :func:`get_criterion` and :func:`create_distill_loss`; where the criterion cannot be computed
            from what the teacher answers.
    """
    try:
        row = get_criterion(name, standardize)
        if answers and answers not in row.answers:
            raise ValueError(f'with --black-box {answers}: {_why_not(answers)}')
        row = replace(row, options=MappingProxyType({**row.options, **options}))
        left = {k for k in row.fitted if k not in options}
        given = {k: v for k, v in row.options.items() if k not in left}
        return row, create_distill_loss(name, **given) if row.cls or options else None
    except ValueError as e:
        raise UsageError(f'--distill {name}: {e}') from e


def _why_not(answers: str) -> str:
    if answers == 'soft':
        return 'it compares raw logits, which probabilities give only up to a constant of each row'
    others = ' or '.join(name for name, row in CRITERIA.items() if answers in row.answers and row.cls)
    return (
        'of a class alone nothing is left of what it compares (doubt, the order of the other classes); '
        f'--distill {others} takes classes'
    )


def describe_criteria() -> str:
    """The table as text: name, summary, published weights and options, paper."""
    width = max(map(len, CRITERIA))
    lines = []
    for row in CRITERIA.values():
        lines.append(f'{row.name:<{width}}  {row.summary}')
        if row.cls is not None:
            options = ' '.join(f'{k}={v}' for k, v in row.options.items()) or 'none'
            ramp = f', ramp {row.warmup_epochs} of {row.epochs} epochs' if row.warmup_epochs else ''
            lines.append(
                f'{"":<{width}}  weights: task {row.task_weight:g}, distillation {row.distill_weight:g}{ramp}; '
                f'options: {options}'
            )
            if row.settings:
                lines.append(f'{"":<{width}}  settings: ' + ', '.join(f'{k} {v}' for k, v in row.settings.items()))
            lines.append(f'{"":<{width}}  {row.cited}')
            if row.imagenet:
                lines.append(f'{"":<{width}}  ImageNet: {row.imagenet}')
    return '\n'.join(lines)


def describe_methods() -> str:
    """The table of criteria and that of methods on features, as text under `--help`."""
    return (
        f'criteria (--distill):\n{describe_criteria()}\n\n'
        f'methods on features (--feature-distill):\n{describe_features()}'
    )


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
    if options.get('standardize'):
        row.standardized()
    if row.cls is None:
        raise ValueError(f"'{name}' distils nothing, so there is no criterion to create")
    known = inspect.signature(row.cls).parameters
    if row.not_standardized:
        options.pop('standardize', None)
    for option in options:
        if option not in known:
            raise ValueError(
                f"criterion '{name}' has no option '{option}'{did_you_mean(option, known)}; it has: {', '.join(known)}"
            )
    if not isinstance(options.get('standardize', False), bool):
        raise ValueError(f"criterion '{name}': standardize must be true or false, got {options['standardize']!r}")
    try:
        published = {k: v for k, v in row.options.items() if k not in row.fitted}
        criterion = row.cls(**{**published, **options})
    except (TypeError, ValueError) as e:
        raise ValueError(f"criterion '{name}': {e}") from e
    criterion.name = name
    return criterion
