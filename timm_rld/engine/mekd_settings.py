"""The settings of a run with MEKD: those of phase 1, and what such a run may not ask for."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

from ..config import FIELDS, Config, completing, flag_of, marked
from ..config.settings import GENERATED
from ..errors import UsageError, did_you_mean
from ..loss import CRITERIA
from ..models.generator import check_size


@dataclasses.dataclass(frozen=True)
class GeneratorSettings:
    """Settings of phase 1; `--generator-kwargs` takes all but the epochs.

    Attributes:
        epochs: over the images.
        batch_size: images of a step, over all processes.
        lr: of both networks' Adam, β (0.5, 0.999).
        info_weight: weight of the information term.
        info: `paper` or `coded` (:func:`timm_rld.loss.information_loss`).
        img_size: height and width of the images, a multiple of 16.
    """

    epochs: int = 200
    batch_size: int = 64
    lr: float = 2e-4
    info_weight: float = 0.5
    info: str = 'paper'
    img_size: int = 32


def generator_settings(epochs: int | None, options: dict[str, Any]) -> GeneratorSettings:
    """Return the settings that `--generator-epochs` and `--generator-kwargs` give.

    Raises:
        UsageError: for an unknown one, and a value out of its range.
    """
    flag = '--generator-kwargs'
    known = [f.name for f in dataclasses.fields(GeneratorSettings) if f.name != 'epochs']
    for name, value in options.items():
        if name not in known:
            raise UsageError(f"{flag}: unknown '{name}'{did_you_mean(name, known)}; it has: {', '.join(known)}")
        number = isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)
        if name == 'info':
            if value not in ('paper', 'coded'):
                raise UsageError(f'{flag} info={value}: must be paper or coded')
        elif name in ('batch_size', 'img_size'):
            if not isinstance(value, int) or isinstance(value, bool) or value < 2:
                raise UsageError(f'{flag} {name}={value}: must be a whole number of at least 2')
        elif not number or value < 0 or (name == 'lr' and not value):
            raise UsageError(f'{flag} {name}={value}: must be a number {"above" if name == "lr" else "of at least"} 0')
    return GeneratorSettings(**options) if epochs is None else GeneratorSettings(epochs=epochs, **options)


def check_generated(config: Config) -> None:
    """Raise UsageError for settings that a run on generated images cannot have, or that only such a run has."""
    if config.distill not in CRITERIA:  # choose_criterion refuses it
        return
    row, derived = CRITERIA[config.distill], config.origin.derived
    own = [n for n in marked('group', GENERATED) if getattr(config, n) not in (None, {}) and n not in derived]
    if not row.generated:
        for name in own:
            raise UsageError(
                f'{flag_of(name)} {_shown(getattr(config, name))}: belongs to --distill mekd, not {config.distill}'
            )
        return
    flag = f'--distill {config.distill}'
    if config.task_loss_weight:
        raise UsageError(
            f'--task-loss-weight {config.task_loss_weight:g} with {flag}: the student sees generated images alone, '
            'which have no labels; remove it'
        )
    if config.class_weights is not None:
        raise UsageError(f'--class-weights with {flag}: weighs the cross-entropy of labels, and there are none')
    if config.teacher_cache is not None:
        raise UsageError(f'--teacher-cache with {flag}: generated images never come again; remove one of the two')
    if config.teacher_answers is not None:
        raise UsageError(
            f'--teacher-answers with {flag}: a file has no answers for generated images; --teacher-query asks for them'
        )
    if config.feature_distill != 'none' or config.distill_token:
        other = '--distill-token' if config.distill_token else f'--feature-distill {config.feature_distill}'
        raise UsageError(f'{other} with {flag}: MEKD compares the logits of one head; remove one of the two')
    for name in ('mixup', 'cutmix', 'cutmix_minmax'):
        if getattr(config, name):
            raise UsageError(f'{flag_of(name)} with {flag}: the student sees generated images alone; remove it')
    if not config.teacher_epochs:
        for name in marked('group', FIELDS['mixup'].metadata['group']):
            if name in config.origin.flags:
                raise UsageError(
                    f'{flag_of(name)} with {flag}: no image of the dataset is augmented, neither for the generator '
                    'nor for the student; remove it'
                )
    if config.generator is not None:
        for name in own:
            if name in completing('generator'):
                raise UsageError(f'{flag_of(name)} with --generator {config.generator}: which is trained already')
        return
    settings = generator_settings(**config.arguments_of('generator_settings'))
    if settings.img_size == 16:
        raise UsageError(
            '--generator-kwargs img_size=16: at that size the discriminator ends in a batch norm of single pixels, '
            'which gives real and generated batches the same mean score, so that it learns nothing; take 32'
        )
    if why := check_size(2, settings.img_size, int(config.in_chans)):
        raise UsageError(f'--generator-kwargs {why}')


def _shown(value: Any) -> str:
    return ' '.join(f'{k}={v}' for k, v in value.items()) if isinstance(value, dict) else str(value)
