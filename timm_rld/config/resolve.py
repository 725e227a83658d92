"""Defaults that depend on other settings, and settings that contradict each other."""

from __future__ import annotations

import dataclasses
import os
from typing import Any

from ..errors import UsageError
from ..files import cores
from .settings import FIELDS, Config, flag_of


def auto_workers() -> int:
    """Return the number of loader processes for `--workers auto`: this process's share of the cores, but one."""
    local = os.environ.get('LOCAL_WORLD_SIZE', '')  # the processes of this machine, as torch's launchers give them
    return max(1, cores() // (int(local) if local.isdigit() and int(local) else 1) - 1)


def uses_sample(config: Config) -> bool:
    """Return whether no dataset is named, so that the run uses the sample that ships with the package."""
    return config.dataset is None and config.data_dir is None and config.labels is None


def resolve(config: Config, num_processes: int = 1, **published: Any) -> Config:
    """Fill in every default that does not depend on the networks: timm's own, or the sample's.

    Args:
        num_processes: training processes, for the global batch that the learning rate scales with.
        **published: defaults of the criterion, by setting.

    Returns:
        A copy.

    Raises:
        UsageError: for settings that contradict each other.
    """
    c = dataclasses.replace(config)
    if c.resume is not None and c.experiment is None:
        raise UsageError(f'--resume {c.resume}: which run? Give its --experiment (and --output), or --resume FOLDER')
    if uses_sample(c):
        _resolve_sample(c)
    accum_env = os.environ.get('ACCELERATE_GRADIENT_ACCUMULATION_STEPS', '1')
    _default(
        c,
        **published,
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
    if c.workers == 'auto':
        c.workers = auto_workers()
    _default(c, validation_batch_size=c.batch_size, hub_model_id=_default_repository(c))
    if c.lr is None:
        assert c.batch_size is not None and c.grad_accum_steps is not None  # filled in above
        ratio = c.batch_size * num_processes * c.grad_accum_steps / c.lr_base_size
        by_root = c.lr_base_scale == 'sqrt' or (
            c.lr_base_scale is None and any(o in c.opt.lower() for o in ('ada', 'lamb'))
        )
        c.lr = c.lr_base * (ratio**0.5 if by_root else ratio)
    _default(c, teacher_lr=c.lr)
    if c.val_fraction is not None:
        _default(c, val_seed=c.seed)
    _resolve_cache(c)
    _check(c)
    return c


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
    own_weights = c.teacher_checkpoint is not None or ':' in (c.teacher or '')
    _default(c, teacher_pretrained=own_weights, teacher_epochs=0 if own_weights else None)
    _default(c, **defaults)
    _default(c, warmup_epochs=1 if min(filter(None, (c.epochs, c.teacher_epochs)), default=0) > 1 else 0)


def _check(c: Config) -> None:
    """Raise UsageError for resolved settings that contradict each other."""
    if c.hub_weights == 'ema' and not c.model_ema:
        raise UsageError('--hub-weights ema: needs --model-ema')
    if c.val_fraction is None and c.val_seed is not None:
        raise UsageError(f'--val-seed {c.val_seed}: needs --val-fraction')
    if c.val_fraction is not None and c.val_split is not None:
        raise UsageError(
            f'--val-fraction {c.val_fraction:g} with --val-split {c.val_split}: the validation images are a part of '
            'the training split, or a split of their own; leave one of the two out'
        )
    if c.labels is not None and c.dataset is not None:
        raise UsageError(f'--labels {c.labels} with --dataset {c.dataset}: name one of the two')
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
            raise UsageError(f'--cooldown-epochs {c.cooldown_epochs}: leaves nothing of {flag} {epochs}; give fewer')
        if c.warmup_epochs and epochs and c.warmup_epochs >= epochs:
            raise UsageError(
                f'--warmup-epochs {c.warmup_epochs}: leaves nothing of {flag} {epochs}; give a smaller one'
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
    if c.on_bad_image == 'skip':
        raise UsageError(
            '--on-bad-image skip with --teacher-cache: the image that replaces a broken one is not the one that the '
            'cached logit belongs to; leave one of the two out, or leave the images out with --skip-list FILE'
        )
    if c.teacher is None:
        raise UsageError(f'--teacher-cache {c.teacher_cache}: there is no --teacher')
    for name in ('mixup', 'cutmix', 'cutmix_minmax'):
        if getattr(c, name):
            raise UsageError(
                f'{flag_of(name)} with --teacher-cache: images are mixed differently in each epoch, and the teacher '
                'must see the mixed image, which no cached logit belongs to; leave one of the two out'
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
    return f'{os.path.basename((config.student or "student").rstrip("/")).rpartition(":")[2]}-{config.distill}'


def warmup_epochs(config: Config) -> int:
    """Return the epochs of learning rate warm-up: as given, else timm's 5, but at most a tenth of the training."""
    if config.warmup_epochs is not None:
        return config.warmup_epochs
    assert config.epochs is not None  # resolve() fills it in
    return min(5, config.epochs // 10)
