"""The table of methods on features, and the one function that makes them.

A method is added by writing its file and one row here. The row pins the published weight and stages.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any

from ...errors import UsageError, did_you_mean
from ._base import FeatureLoss
from .at import AT
from .feature import Feature
from .fitnet import FitNet
from .pkt import PKT
from .reviewkd import ReviewKD
from .rkd import RKD
from .sp import SP


@dataclass(frozen=True)
class FeatureMethod:
    """A row of the table.

    Attributes:
        name: what `--feature-distill` takes.
        cls: the module.
        summary: half a line for `--help`.
        paper: title, authors, venue; empty where there is none.
        year: of publication.
        takes: which of the paired maps: `stages` (all but the stem), `last`, `one` (its option `stage` says which), or
            none of them.
        pooled: whether it takes the pooled features too.
        weight: published weight of the term.
        options: published options, the arguments of ``cls``.
        warmup_epochs: N of the published ramp min(epoch / N, 1), 0 for none.
        epochs: of the published run, of which the ramp is a share.
        imagenet: flags that turn these values, which are those of CIFAR-100, into the published ones of ImageNet.
    """

    name: str
    cls: Callable[..., FeatureLoss]
    summary: str
    paper: str
    year: int | None
    takes: str = ''
    pooled: bool = False
    weight: float = 1.0
    options: MappingProxyType[str, Any] = field(default_factory=lambda: MappingProxyType({}))
    warmup_epochs: int = 0
    epochs: int = 240
    imagenet: str = ''

    @property
    def cited(self) -> str:
        """Paper and year; empty where there is none."""
        return f'{self.paper}, {self.year}' if self.paper else ''

    @property
    def has_layers(self) -> bool:
        """Whether it brings layers of its own, so that it must know the shapes of the features."""
        return 'student_shapes' in inspect.signature(self.cls).parameters

    def defaults(self, epochs: int | None = None) -> dict[str, Any]:
        """Return the published defaults of the settings of a run, by name; for a run of so many epochs the same share
        of it as a ramp, at least one epoch and no more than published."""
        share = self.warmup_epochs if epochs is None else max(1, round(self.warmup_epochs / self.epochs * epochs))
        return dict(feature_loss_weight=self.weight, feature_warmup_epochs=min(share, self.warmup_epochs))


def _row(*args: Any, options: dict[str, Any] | None = None, **kwargs: Any) -> FeatureMethod:
    return FeatureMethod(*args, **{**kwargs, 'options': MappingProxyType(options or {})})


FEATURES: dict[str, FeatureMethod] = {
    row.name: row
    for row in (
        _row(
            'feature', Feature, "timm's: pooled features, through a linear layer where the widths differ", '', None,
            pooled=True,
        ),
        _row(
            'fitnet', FitNet, 'one map, through a convolution, batch norm and ReLU',
            'FitNets: Hints for Thin Deep Nets, Romero et al., ICLR', 2015,
            takes='one', weight=100.0, options={'stage': None, 'eps': 1e-5},
        ),
        _row(
            'at', AT, 'attention maps of each stage',
            'Paying More Attention to Attention, Zagoruyko, Komodakis, ICLR', 2017,
            takes='stages', weight=1000.0, options={'p': 2},
        ),
        _row(
            'sp', SP, 'similarity of the samples in a batch, by the last map',
            'Similarity-Preserving Knowledge Distillation, Tung, Mori, ICCV', 2019,
            takes='last', weight=3000.0,
        ),
        _row(
            'rkd', RKD, 'distances and angles between the samples of the batch, by pooled features',
            'Relational Knowledge Distillation, Park et al., CVPR', 2019, pooled=True,
            options={'distance_weight': 25.0, 'angle_weight': 50.0, 'squared': False, 'eps': 1e-12},
        ),
        _row(
            'pkt', PKT, 'similarity of the samples in a batch, as probabilities, by pooled features',
            'Learning Deep Representations with Probabilistic Knowledge Transfer, Passalis, Tefas, ECCV', 2018,
            pooled=True, weight=30000.0, options={'eps': 1e-7},
        ),
        _row(
            'reviewkd', ReviewKD, 'each stage fused with the deeper ones, and the pooled features',
            'Distilling Knowledge via Knowledge Review, Chen et al., CVPR', 2021,
            takes='stages', pooled=True, weight=5.0, options={'mid_channels': None}, warmup_epochs=20,
            imagenet='--feature-loss-weight 1 --feature-warmup-epochs 1',
        ),
    )
}  # fmt: skip


def get_feature_method(name: str) -> FeatureMethod:
    """Return the table's row for ``name``.

    Raises:
        ValueError: for a name that is not in the table; the message offers the nearest ones.
    """
    if name not in FEATURES:
        raise ValueError(f"unknown method '{name}'{did_you_mean(name, FEATURES)}; known: {', '.join(FEATURES)}")
    return FEATURES[name]


def create_feature_loss(name: str, **options: Any) -> FeatureLoss:
    """Create a method on features by name, with its published options unless given here.

    Args:
        name: a name of the table, e.g. `at` or `fitnet`.
        **options: the method's own options, e.g. ``p=4``; of a method with layers also ``student_shapes=`` and
            ``teacher_shapes=``, the shapes of the features that it will be given.

    Returns:
        A module: ``criterion(student_features, teacher_features)`` gives the unweighted term of two lists of
        `[B, C, H, W]` or `[B, D]`, a 0-d tensor in float32 or higher.

    Raises:
        ValueError: for an unknown name, an option that the method does not have, or a value out of its range.
    """
    row = get_feature_method(name)
    shapes = ('student_shapes', 'teacher_shapes')
    known = [n for n in inspect.signature(row.cls).parameters if n not in ('args', 'kwargs')]
    if not row.has_layers:
        options = {k: v for k, v in options.items() if k not in shapes}
    for option in options:
        if option not in known:
            own = [n for n in known if n not in shapes]
            has = f'it has: {", ".join(own)}' if own else 'it has none'
            raise ValueError(f"method '{name}' has no option '{option}'{did_you_mean(option, own)}; {has}")
    try:
        criterion = row.cls(**{**row.options, **options})
    except (TypeError, ValueError) as e:
        raise ValueError(f"method '{name}': {e}") from e
    criterion.name = name
    return criterion


# Criteria whose teacher answers questions alone.
WITHOUT_FEATURES = {'mekd': 'its teacher only answers queries, and has no features to learn from'}


def check_features(name: str, options: dict[str, Any], criterion: str = 'none') -> None:
    """Check `--feature-distill` and `--feature-kwargs` before anything is built.

    Args:
        name: of a method, or `none`.
        options: of it.
        criterion: of `--distill`.

    Raises:
        UsageError: for a method or options that there are not, and beside a criterion that has no features.
    """
    if name == 'none':
        return
    if criterion in WITHOUT_FEATURES:
        raise UsageError(f'--feature-distill {name} with --distill {criterion}: {WITHOUT_FEATURES[criterion]}')
    if taken := [k for k in options if k.endswith('_shapes')]:
        raise UsageError(f'--feature-kwargs {taken[0]}: the run sets it, from the two networks')
    try:
        shapes: Any = [[2, 1, 2, 2]] * 99
        create_feature_loss(name, student_shapes=shapes, teacher_shapes=shapes, **options)
    except ValueError as e:
        raise UsageError(f'--feature-distill {name}: {e}') from e


def describe_features() -> str:
    """The table as text: name, summary, published weight and options, paper."""
    width = max(map(len, FEATURES))
    lines = []
    for row in FEATURES.values():
        options = ' '.join(f'{k}={v}' for k, v in row.options.items()) or 'none'
        ramp = f', ramp {row.warmup_epochs} of {row.epochs} epochs' if row.warmup_epochs else ''
        lines.append(f'{row.name:<{width}}  {row.summary}')
        lines.append(f'{"":<{width}}  weight: {row.weight:g}{ramp}; options: {options}')
        if row.cited:
            lines.append(f'{"":<{width}}  {row.cited}')
        if row.imagenet:
            lines.append(f'{"":<{width}}  ImageNet: {row.imagenet}')
    return '\n'.join(lines)
