"""timm's optimizers and schedulers, with the settings of a run."""

from __future__ import annotations

from typing import Any

import torch
from timm.optim import create_optimizer_v2, list_optimizers, param_groups_weight_decay
from timm.scheduler import create_scheduler_v2
from timm.scheduler.scheduler import Scheduler
from torch import nn

from ..cache import answers_kind
from ..config import Config, warmup_epochs
from ..errors import UsageError, UserError, did_you_mean
from ..loss.features import check_features
from ..pairing import load_query
from ..poison import check_poison
from ..task import DistillationTask
from .mekd_settings import check_generated

_SECOND_ORDER = ('adahessian',)  # of timm's optimizers

_FUSED = ('sgd', 'nesterov', 'momentum', 'adam', 'adamw')  # those of torch that have it on CPUs and GPUs


def create_optimizer(module: nn.Module, config: Config) -> torch.optim.Optimizer:
    """Return timm's optimizer of the name `--opt`, with the settings of a run.

    Raises:
        UserError: for options that the optimizer does not take.
    """
    kwargs = dict(config.opt_kwargs)
    if not {'fused', 'foreach', 'differentiable'} & set(kwargs) and config.opt.lower() in _FUSED:
        kwargs['fused'] = True  # one pass over the weights, five times as fast even on a CPU
    if config.opt_eps is not None:
        kwargs['eps'] = config.opt_eps
    if config.opt_betas is not None:
        kwargs['betas'] = config.opt_betas
    try:
        return create_optimizer_v2(
            module, opt=config.opt, lr=config.lr, weight_decay=config.weight_decay, momentum=config.momentum,
            filter_bias_and_bn=not config.weight_decay_all, **kwargs,
        )  # fmt: skip
    except (TypeError, ValueError, AssertionError, ImportError, LookupError) as e:
        raise UserError(f'--opt {config.opt}: {str(e).splitlines()[0] if str(e) else type(e).__name__}') from e


def add_criteria(optimizer: torch.optim.Optimizer, task: DistillationTask, config: Config) -> None:
    """Give an optimizer what a task's criteria learn: the layers of a method on features with the student's weight
    decay, anything else without."""
    if learned := task.criterion_parameters():
        optimizer.add_param_group({'params': learned, 'weight_decay': 0.0})
    if task.feature_criterion is None or not (layers := task.feature_parameters()):
        return
    groups = [{'params': layers, 'weight_decay': config.weight_decay}]
    if not config.weight_decay_all:
        groups = param_groups_weight_decay(task.feature_criterion, config.weight_decay)
    for group in groups:
        optimizer.add_param_group(group)


def check_settings(config: Config) -> None:
    """Raise an error, before anything is built, where a network is not named, the function or file of a closed teacher
    is not there, for a method on features, or for an attack, optimizer or schedule that cannot be had with these
    settings. Fills in what a file of answers holds (`--black-box`)."""
    distils = config.distill != 'none' or config.feature_distill != 'none'
    if config.student is None or (config.teacher_name is None and distils):
        raise UsageError('--teacher and --student are needed, e.g. --teacher resnet34 --student resnet18')
    check_features(config.feature_distill, config.feature_kwargs, config.distill)
    check_generated(config)
    if config.teacher_query is not None:
        load_query(config.teacher_query)
    if config.teacher_answers is not None:
        asked = None if 'black_box' in config.origin.derived else config.black_box
        kind = answers_kind(config.teacher_answers, asked)
        if asked is None:
            config.give(black_box=kind)
        elif kind == 'hard' and asked == 'soft':
            raise UsageError(f'--teacher-answers {config.teacher_answers}: holds classes; --black-box hard takes them')
    check_poison(**config.arguments_of('check_poison'))
    known = [str(name) for name in list_optimizers() if name not in _SECOND_ORDER]
    if config.opt.lower() in _SECOND_ORDER:
        raise UsageError(f'--opt {config.opt}: needs second derivatives, which are not computed here; use adamw')
    if config.opt.lower() not in known:
        raise UsageError(f'--opt {config.opt}: unknown optimizer{did_you_mean(config.opt, known)}')
    optimizer = create_optimizer(nn.Linear(2, 2), config)
    for c in (config, config.of_teacher()):
        if c.epochs:
            create_scheduler(optimizer, c, 1)


def create_scheduler(
    optimizer: torch.optim.Optimizer, config: Config, updates_per_epoch: int
) -> Scheduler | _NoScheduler:
    """Return timm's scheduler of the name `--sched`. It stays out of `accelerator.prepare`, which would step it once a
    process."""
    assert config.epochs is not None  # resolve() fills it in
    milestones: list[Any] = list(config.decay_milestones)
    if config.sched_on_updates:  # where timm would lower the learning rate an epoch later than by epochs
        milestones = [m - 1 + 1 / updates_per_epoch for m in milestones]
    try:
        scheduler, _ = create_scheduler_v2(
            optimizer,
            sched=config.sched,
            num_epochs=config.epochs - config.cooldown_epochs,
            decay_epochs=config.decay_epochs,
            decay_milestones=milestones,
            cooldown_epochs=config.cooldown_epochs,
            decay_rate=config.decay_rate,
            min_lr=config.min_lr,
            warmup_lr=config.warmup_lr,
            warmup_epochs=warmup_epochs(config),
            step_on_epochs=not config.sched_on_updates,
            updates_per_epoch=updates_per_epoch,
        )
    except (ValueError, AssertionError, OverflowError, LookupError) as e:
        raise UserError(f'--sched {config.sched}: {str(e).splitlines()[0]}') from e
    if scheduler is None:
        return _NoScheduler()
    if config.sched_on_updates:
        scheduler.step_update(0)
    else:
        scheduler.step(0)
    return scheduler


class _NoScheduler:
    """`--sched none`: the learning rate stays as it is."""

    def step(self, *args: Any) -> None: ...

    def step_update(self, *args: Any) -> None: ...

    def state_dict(self) -> dict[str, Any]:
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None: ...
