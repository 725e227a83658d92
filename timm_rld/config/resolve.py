"""Defaults that depend on other settings, and settings that contradict each other."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Callable, Mapping
from typing import Any

from ..errors import UsageError
from ..files import cores
from .learning_rate import LARGEST_BATCH, SGD, family_of, scaled_rate
from .settings import FIELDS, Config, completing, flag_of, taken_by


def auto_workers() -> int:
    """Return the number of loader processes for `--workers auto`: this process's share of the cores, but one."""
    local = os.environ.get('LOCAL_WORLD_SIZE', '')  # the processes of this machine, as torch's launchers give them
    return max(1, cores() // (int(local) if local.isdigit() and int(local) else 1) - 1)


def uses_sample(config: Config) -> bool:
    """Return whether no dataset is named, so that the run uses the sample that ships with the package."""
    return data_named(vars(config)) is None


def data_named(settings: Mapping[str, Any]) -> str | None:
    """Return what names the data of a run: `--dataset`, else `--data-dir`, else `--labels`; None if nothing does."""
    names = ('dataset', 'data_dir', 'labels')
    return next((settings[name] for name in names if settings.get(name) is not None), None)


def resolve(
    config: Config,
    num_processes: int = 1,
    images: int | None = None,
    published: Callable[..., dict[str, Any]] | None = None,
) -> Config:
    """Fill in every default that does not depend on the networks: timm's own, or the sample's.

    The result may be resolved again, once more is known: what was filled in is then derived anew. Of settings that were
    read from an earlier run's args.yaml (`--config`) a derived value is kept, unless this function now gives another
    one than for that run's own settings, processes and images; where the run is continued (`--resume`), it is kept.

    Args:
        num_processes: training processes, for the global batch that the learning rate scales with.
        images: of the training split, where they are known: no batch holds more.
        published: returns defaults of the criterion by setting (:func:`timm_rld.loss.published_defaults`).

    Returns:
        A copy; its ``origin`` says what was filled in.

    Raises:
        UsageError: for settings that contradict each other.
    """
    given, origin = _given(config), config.origin
    c = _fill_in(given, num_processes, images, published)
    derived = [name for name in FIELDS if getattr(given, name) is None and getattr(c, name) is not None]
    if (earlier := origin.earlier) is not None:
        then = earlier.origin
        if origin.resumed:
            again = c
        else:
            its_images = then.images if images is not None else None
            again = _fill_in(_given(earlier), then.processes or num_processes, its_images, published)
        for name in derived:
            if name in then.derived and getattr(again, name) == getattr(c, name):
                setattr(c, name, getattr(earlier, name))
    c.origin = dataclasses.replace(origin, derived=tuple(derived), processes=num_processes, images=images)
    _check(c)
    return c


def _given(config: Config) -> Config:
    """Return settings without the values that were derived."""
    return config.changed(**dict.fromkeys(config.origin.derived))


def _fill_in(
    given: Config, num_processes: int, images: int | None, published: Callable[..., dict[str, Any]] | None
) -> Config:
    c = given.changed()
    if c.teacher_query is not None or c.teacher_answers is not None:
        _default(c, black_box='soft', teacher_epochs=0)
    if uses_sample(c):
        _resolve_sample(c)
    accum_env = os.environ.get('ACCELERATE_GRADIENT_ACCUMULATION_STEPS', '1')
    _default(
        c,
        teacher_pretrained=True,
        teacher_epochs=0,
        sched_on_updates=False,
        smoothing=0.1,
        train_crop_mode='rrc',
        hflip=0.5,
        color_jitter=0.4,
        batch_size=128,
        epochs=300,
        workers=min(4, cores()),  # on two cores two load faster than auto's one
        # `accelerate launch --gradient_accumulation_steps N` is passed on through the environment
        grad_accum_steps=int(accum_env) if accum_env.isdigit() and int(accum_env) > 0 else 1,
    )
    if published is not None:
        _default(c, **published(**c.arguments_of('published_defaults')))
    if c.workers == 'auto':
        c.workers = auto_workers()
    if c.train_crop_mode == 'pad':
        _default(c, crop_pct=1.0)  # it keeps the scale of the whole image
    _default(c, validation_batch_size=c.batch_size, hub_model_id=_default_repository(c))
    family = family_of(c.opt)
    _default(c, lr_base=family.lr_base, lr_base_scale=family.lr_base_scale)
    assert c.lr_base is not None and c.lr_base_scale is not None
    _default(c, lr=scaled_rate(c.lr_base, real_batch(c, num_processes, images), c.lr_base_size, c.lr_base_scale))
    _default(c, teacher_lr=c.lr)
    if c.val_fraction is not None:
        _default(c, val_seed=c.seed)
    _resolve_cache(c)
    return c


def real_batch(config: Config, num_processes: int, images: int | None) -> int:
    """Return the images of an optimizer step that the learning rate scales with: no more than an epoch has, and than
    scaling is known to hold for."""
    assert config.batch_size is not None and config.grad_accum_steps is not None  # filled in before
    batch = config.batch_size * num_processes * config.grad_accum_steps
    return min(batch, LARGEST_BATCH, batch if images is None else images)


def describe_derived(config: Config) -> list[str]:
    """Return a line for each derived value that decides how a run goes: learning rate, ramp of the distillation; and
    for a switch without effect."""
    origin, lines = config.origin, []
    if 'lr' in origin.derived:
        batch = real_batch(config, origin.processes or 1, origin.images)
        lines.append(f'learning rate {config.lr:.3g} ({config.opt}, batch {batch}; --lr changes it)')
    for name, what in (('distill_warmup_epochs', 'distillation'), ('feature_warmup_epochs', 'the term on features')):
        if name in origin.derived and (ramp := getattr(config, name)) and config.epochs:
            lines.append(f'{what} ramps up over {ramp} of {config.epochs} epoch(s) ({flag_of(name)} changes it)')
    if config.distill_token and config.distill == 'none':
        lines.append('--distill-token: without a criterion (--distill none) the labels train the mean of both heads')
    return lines


def _default(c: Config, **values: Any) -> None:
    for name, value in values.items():
        if getattr(c, name) is None:
            setattr(c, name, value)


def _resolve_sample(c: Config) -> None:
    """Fill in the sample's defaults (8×8 digits shown at 32×32), which reach 97% within three minutes on two cores."""
    defaults = {name: f.metadata['sample'] for name, f in FIELDS.items() if f.metadata['sample'] is not None}
    for name in ('train_split', 'val_split', 'class_map', 'input_key', 'target_key'):
        if getattr(c, name) not in (None, defaults.get(name)):
            raise UsageError(f'{flag_of(name)} {getattr(c, name)}: needs a --dataset or --data-dir to apply to')
    if c.val_fraction is not None:
        del defaults['val_split']
    if family_of(c.opt) is not SGD:
        del defaults['lr_base']
    epochs = defaults['epochs'] if c.epochs is None else c.epochs
    defaults['distill_warmup_epochs'] = min(defaults['distill_warmup_epochs'], epochs)
    own_weights = c.teacher_checkpoint is not None or ':' in (c.teacher or '')  # else it is trained
    _default(c, teacher_pretrained=own_weights, teacher_epochs=0 if own_weights else None)
    _default(c, **defaults)
    _default(c, warmup_epochs=1 if min(filter(None, (c.epochs, c.teacher_epochs)), default=0) > 1 else 0)


def _check(c: Config) -> None:
    """Raise UsageError for resolved settings that contradict each other."""
    if c.resume is not None and c.experiment is None:
        raise UsageError(f'--resume {c.resume}: which run? Give its --experiment (and --output), or --resume FOLDER')
    _check_closed(c)
    _check_features(c)
    if c.hub_weights == 'ema' and not c.model_ema:
        raise UsageError('--hub-weights ema: needs --model-ema')
    if c.train_on_holdout and c.tune_holdout is None:
        raise UsageError('--train-on-holdout: needs --tune-holdout')
    if c.tune_holdout is not None and c.push_to_hub:
        raise UsageError('--push-to-hub with --tune-holdout: no validation accuracy to report; remove one of the two')
    for name in ('scale', 'ratio') if c.train_crop_mode == 'pad' and not c.no_aug else ():
        if (value := getattr(c, name)) is not None:
            raise UsageError(
                f'{flag_of(name)} {" ".join(f"{v:g}" for v in value)}: --train-crop-mode pad cuts images at their own '
                'scale; remove it, or give --train-crop-mode rrc'
            )
    if c.val_fraction is None and c.val_seed is not None:
        raise UsageError(f'--val-seed {c.val_seed}: needs --val-fraction')
    if c.val_fraction is not None and c.val_split is not None:
        raise UsageError(
            f'--val-fraction {c.val_fraction:g} with --val-split {c.val_split}: the validation images are a part of '
            'the training split, or a split of their own; remove one of the two'
        )
    if c.labels is not None and c.dataset is not None:
        raise UsageError(f'--labels {c.labels} with --dataset {c.dataset}: name one of the two')
    if c.class_weights is not None and c.task_loss_weight == 0:
        raise UsageError(
            f'--class-weights {c.class_weights}: weighs the cross-entropy, whose own weight is 0 '
            f'(--task-loss-weight; the default of some criteria, here --distill {c.distill})'
        )
    for name, head in (('task_loss_weight', 'main'), ('distill_loss_weight', 'distillation')):
        if c.distill_token and c.distill != 'none' and getattr(c, name) == 0:
            raise UsageError(
                f'{flag_of(name)} 0 with --distill-token: the {head} head would learn nothing, and the result is the '
                'mean of both heads; give a weight above 0'
            )
    if not c.epochs and not c.teacher_epochs:
        raise UsageError('--epochs 0: trains the teacher alone, so --teacher-epochs N is needed')
    for name in ('cutmix_minmax', 'scale', 'ratio'):
        value = getattr(c, name)
        # a range of one value is a fixed scale or ratio; cutmix draws its box between the two
        if value is not None and (value[0] > value[1] or (name == 'cutmix_minmax' and value[0] == value[1])):
            raise UsageError(f'{flag_of(name)} {value[0]:g} {value[1]:g}: the first value must be below the second')
    for name in ('mean', 'std', 'teacher_mean', 'teacher_std'):
        value = getattr(c, name)
        if value is not None and len(value) not in (1, c.in_chans):
            raise UsageError(f'{flag_of(name)}: expected 1 or {c.in_chans} values (--in-chans), got {len(value)}')
    for epochs, flag in ((c.epochs, '--epochs'), (c.teacher_epochs, '--teacher-epochs')):
        if c.cooldown_epochs and epochs and c.cooldown_epochs >= epochs:
            raise UsageError(f'--cooldown-epochs {c.cooldown_epochs}: must be below {flag} {epochs}')
        if c.warmup_epochs and epochs and c.warmup_epochs >= epochs:
            raise UsageError(f'--warmup-epochs {c.warmup_epochs}: must be below {flag} {epochs}')


def _check_features(c: Config) -> None:
    """Refuse features of a teacher that shows none, and settings of a method where there is none."""
    if c.feature_distill == 'none':
        for name in completing('feature_distill'):
            if getattr(c, name) not in (None, {}, ()):
                raise UsageError(f'{flag_of(name)}: needs --feature-distill NAME')
        return
    for name in ('black_box', 'teacher_query', 'teacher_answers'):
        if (value := getattr(c, name)) is not None:
            raise UsageError(
                f'--feature-distill {c.feature_distill} with {flag_of(name)} {value}: a closed teacher answers, and '
                'shows no features to learn from; remove one of the two'
            )


def _check_closed(c: Config) -> None:
    """Refuse what a closed teacher cannot be combined with, and settings of one where there is none."""
    closed = {flag_of(n): getattr(c, n) for n in ('teacher', 'teacher_query', 'teacher_answers') if getattr(c, n)}
    if len(closed) > 1:
        (one, name), (other, value) = list(closed.items())[:2]
        raise UsageError(f'{one} {name} with {other} {value}: there is one teacher; remove one of the two')
    of_function = ('query_retries', 'query_timeout', 'query_workers')
    for names, needed, there in (
        (of_function, '--teacher-query', c.teacher_query),
        (('max_queries',), '--black-box or --teacher-query', c.black_box if c.teacher_answers is None else None),
        (('black_box',), '--teacher or --teacher-query', c.teacher_name),
    ):
        for name in names:
            if there is None and getattr(c, name) != FIELDS[name].default:
                raise UsageError(f'{flag_of(name)} {getattr(c, name)}: needs {needed}')
    if c.black_box == 'hard' and c.teacher_class_map is not None:
        raise UsageError(
            f'--teacher-class-map {c.teacher_class_map} with --black-box hard: the class that the teacher names may '
            'have no counterpart here; use --black-box soft'
        )
    if c.teacher is not None or c.black_box is None:
        return
    flag, name = next(iter(closed.items()))
    if c.teacher_epochs:
        raise UsageError(f'--teacher-epochs {c.teacher_epochs}: {flag} {name} cannot be trained; remove it')
    for setting in set(taken_by('create_teacher')) - {'teacher', 'in_chans', 'teacher_pretrained'}:
        if getattr(c, setting) is not None:
            raise UsageError(f'{flag_of(setting)} {getattr(c, setting)}: {flag} {name} has no network; remove it')
    if c.teacher_answers is not None:
        _check_no_replacements(c, f'{flag} {name}', 'answer')
    for setting in ('mixup', 'cutmix', 'cutmix_minmax') if c.teacher_answers is not None else ():
        if getattr(c, setting):
            raise UsageError(
                f'{flag_of(setting)} with {flag} {name}: the teacher has answered for the images, and not for mixed '
                'ones; remove one of the two'
            )


def _check_no_replacements(c: Config, kept: str, row: str) -> None:
    """Refuse that another image takes the place of a broken one where the teacher's rows are kept by image."""
    if c.on_bad_image == 'skip':
        raise UsageError(
            f'--on-bad-image skip with {kept}: the image that replaces a broken one is not the one that the {row} '
            'belongs to; remove one of the two, or leave the images out with --skip-list FILE'
        )


def _resolve_cache(c: Config) -> None:
    """Fill in the number of augmentation epochs, and refuse what a teacher cache cannot be combined with."""
    if c.teacher_cache is None:
        for name in ('teacher_cache_views', 'teacher_cache_dtype'):
            if getattr(c, name) != FIELDS[name].default:
                raise UsageError(f'{flag_of(name)} {getattr(c, name)}: needs --teacher-cache DIR')
        return
    if not c.teacher_cache.strip():
        raise UsageError('--teacher-cache: expected a folder')
    _check_no_replacements(c, '--teacher-cache', 'cached logit')
    if c.teacher_answers is not None:
        raise UsageError(f'--teacher-cache {c.teacher_cache}: the answers of --teacher-answers are on the disk already')
    if c.teacher_name is None:
        raise UsageError(f'--teacher-cache {c.teacher_cache}: there is no --teacher')
    for name in ('mixup', 'cutmix', 'cutmix_minmax'):
        if getattr(c, name):
            raise UsageError(
                f'{flag_of(name)} with --teacher-cache: images are mixed differently in each epoch, and the teacher '
                'must see the mixed image, which no cached logit belongs to; remove one of the two'
            )
    assert c.epochs is not None  # filled in before
    if c.teacher_cache_views is None:
        c.teacher_cache_views = max(1, min(10, c.epochs))
    if c.epochs and c.teacher_cache_views > c.epochs:
        raise UsageError(
            f'--teacher-cache-views {c.teacher_cache_views}: more than the epochs ({c.epochs}), so that some would '
            f'never be seen; give at most {c.epochs}'
        )


def _default_repository(config: Config) -> str:
    """Return a name for the Hub: the student's, without what stands before it (`hf-hub:user/`, a folder's path)."""
    return f'{os.path.basename((config.student or "student").rstrip("/")).rpartition(":")[2]}-{config.method}'


def warmup_epochs(config: Config) -> int:
    """Return the epochs of learning rate warm-up: as given, else timm's 5, but at most a tenth of the training."""
    if config.warmup_epochs is not None:
        return config.warmup_epochs
    assert config.epochs is not None  # resolve() fills it in
    return min(5, config.epochs // 10)
