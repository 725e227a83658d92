"""fit() and evaluate() on Accelerate, with timm's optimizers and schedulers."""

from __future__ import annotations

import contextlib
import math
import os
import signal
import sys
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import GradientAccumulationPlugin, ProjectConfiguration
from timm.layers import convert_sync_batchnorm
from timm.optim import create_optimizer_v2, list_optimizers
from timm.scheduler import create_scheduler_v2
from timm.scheduler.scheduler import Scheduler
from timm.task import ClassificationEvaluator
from timm.utils import dispatch_clip_grad, distribute_bn
from torch import Tensor, nn

from .cache import TeacherCache
from .checkpoint import Checkpoints, Position, Training
from .config import Config, cores, warmup_epochs
from .data import Loader, Mixing
from .errors import Stopped, UsageError, UserError, did_you_mean
from .guard import Guard, StopSignals, highest
from .pairing import Pair, audit, check_accuracy, lay_out, weights_digest
from .runs import Progress, best_epoch, main_saves, write_rows
from .task import DistillationTask

# ------------------------------------------------------------------------------------------------------------- devices


def create_accelerator(config: Config) -> Accelerator:
    """Start Accelerate as `accelerate launch` says, and set torch's threads on the CPU.

    Raises:
        UserError: where the launcher started several processes that do not know of each other, or a tracker is not
            installed.
        UsageError: for an unknown tracker.
    """
    _check_trackers(config.report_to)
    try:
        accelerator = Accelerator(
            mixed_precision=config.mixed_precision,
            # fit() divides by the group's true size itself: Accelerate divides the last, smaller group by the full one
            gradient_accumulation_plugin=GradientAccumulationPlugin(num_steps=1),
            log_with=list(config.report_to) or None,
            project_config=ProjectConfiguration('.', logging_dir='.'),  # open_run() says where
        )
    except ValueError as e:
        if 'precision' not in str(e):
            raise
        raise UserError(f'--mixed-precision {config.mixed_precision}: {str(e).splitlines()[0]}') from e
    if (kind := str(accelerator.distributed_type.value)) in ('FSDP', 'DEEPSPEED', 'MEGATRON_LM'):
        raise UserError(
            f'the launcher chose {kind}: it splits the weights among processes; checkpoints, averaged weights and '
            'the export need them whole: take MULTI_GPU'
        )
    if accelerator.mixed_precision == 'fp16' and accelerator.device.type == 'cpu':
        raise UserError('--mixed-precision fp16: has no effect on a CPU; take bf16, or no')
    if config.sync_bn and accelerator.device.type != 'cuda':
        raise UserError('--sync-bn: needs GPUs; without it the statistics are averaged after each epoch')
    world_size = int(os.environ.get('WORLD_SIZE', 1))
    if world_size != accelerator.num_processes:
        raise UserError(
            f'the launcher started {world_size} processes (WORLD_SIZE), Accelerate knows of '
            f'{accelerator.num_processes}: each would train alone and overwrite the others.\n'
            f'Without GPUs: ACCELERATE_USE_CPU=true accelerate launch --multi_gpu --num_processes {world_size} …'
        )
    if config.cpu_threads or accelerator.device.type == 'cpu':
        local = int(os.environ.get('LOCAL_WORLD_SIZE', 1))
        torch.set_num_threads(config.cpu_threads or max(1, cores() // local))
    return accelerator


def _check_trackers(names: Iterable[str]) -> None:
    from accelerate.tracking import LOGGER_TYPE_TO_CLASS, get_available_trackers

    known = [str(n) for n in LOGGER_TYPE_TO_CLASS]
    installed = [str(getattr(n, 'value', n)) for n in get_available_trackers()]
    for name in names:
        if name not in known:
            raise UsageError(
                f'--report-to {name}: unknown tracker{did_you_mean(name, known)}; known: {", ".join(known)}'
            )
        if name not in installed:
            raise UserError(f'--report-to {name}: not installed (pip install {name})')


# ------------------------------------------------------------------------------------------------------------ evaluate


def judge_teacher(
    pair: Pair,
    loader: Loader,
    accelerator: Accelerator,
    config: Config,
    num_classes: int,
    cache: TeacherCache | None = None,
    weights: Path | None = None,
) -> tuple[float, Tensor, str | None]:
    """Make a teacher fast, evaluate it, say what was found and where it differs from the student, and stop where it is
    near chance.

    Args:
        cache: what it keeps of an earlier evaluation is taken; else this one is kept.
        weights: the teacher's file, where it was fitted.

    Returns:
        Its top-1 (percent), this process's predicted classes, and the digest of its weights.

    Raises:
        UserError: below `--min-teacher-acc`.
    """
    if cache is not None:
        cache.open(pair.data_config, weights, pair.teacher)
    if pair.teacher is not None:
        quicken(pair, accelerator, config)
    if cache is not None and cache.validated:
        loader.set_epoch(0)
        top1, predictions, digest = cache.validation(loader.sampler.indices())
        predictions = predictions.to(accelerator.device)
    else:
        keep = cache.keep_validation if cache is not None else None
        metrics, predictions = evaluate(pair.teacher, loader, accelerator, keep=keep)
        top1, digest = metrics['top1'], weights_digest(pair.teacher)
        if cache is not None:
            cache.end_validation(top1, digest, pair.teacher.folded)
    found = f'teacher {config.teacher}: top-1 {top1:.2f} on {config.val_split}'
    accelerator.print('\n  '.join([found, *audit(pair)]))
    check_accuracy(config.teacher, top1, num_classes, config.min_teacher_acc)
    return top1, predictions, digest


def wants_channels_last(config: Config, accelerator: Accelerator) -> bool:
    """The memory layout: as the settings say, else channels-last but for float32 on a GPU. Measured on a CPU, networks
    for 32 pixels took 0.53 to 0.87 of the time with it, resnet18 the same at 32 and 0.8 at 224."""
    if config.channels_last is not None:
        return config.channels_last
    return accelerator.device.type != 'cuda' or accelerator.mixed_precision != 'no'


def quicken(pair: Pair, accelerator: Accelerator, config: Config) -> None:
    """Move a teacher to the device, and make it fast there."""
    layout = wants_channels_last(config, accelerator)
    # on the CPU, where float32 is float32: a GPU's convolutions round to TF32, which no fold would pass
    pair.teacher.cpu().quicken(pair.data_config['input_size'], layout)
    pair.teacher.to(accelerator.device)


class Interrupted(Exception):
    """An evaluation that was given up."""


@torch.inference_mode()
def evaluate(
    predict: Callable[[Tensor], Tensor],
    loader: Loader,
    accelerator: Accelerator,
    reference: Tensor | None = None,
    title: str = 'teacher',
    interrupted: Callable[[], bool] = lambda: False,
    keep: Callable[[Tensor, Tensor, Tensor], None] | None = None,
) -> tuple[dict[str, float], Tensor]:
    """Loss and accuracy over a validation split, each image counted once, whatever the number of processes.

    Args:
        predict: pixels `[B, C, H, W]` → logits `[B, C]`. Not a DDP module: its collectives would hang where processes
            have different numbers of batches.
        loader: of the split.
        reference: predictions of another network from an earlier call with this loader.
        title: for messages.
        interrupted: asked after each batch; once it is true on one process, the evaluation is given up on all.

        keep: given the indices, classes and logits of each batch.

    Returns:
        `loss` (cross-entropy), `top1`, `top5` (percent), with a reference also `agreement` (percentage of images where
        both predict the same class); and this process's predicted classes `[n]`.

    Raises:
        UserError: where the loss is not finite, or a stream held fewer images than its split declares.
        Interrupted: where it was given up.
    """
    device = accelerator.device
    evaluator = ClassificationEvaluator(device)
    predictions = []
    loader.set_epoch(0)
    for pixels, target, indices in loader:
        pixels, target = pixels.to(device, non_blocking=True), target.to(device, non_blocking=True)
        with accelerator.autocast():
            logits = predict(pixels)
        evaluator.update(logits, target)
        predictions.append(logits.argmax(dim=1))
        if keep is not None:
            keep(indices, target, logits)
        if interrupted():
            break
    if any(highest(accelerator, interrupted())):
        raise Interrupted
    predicted = torch.cat(predictions) if predictions else torch.empty(0, dtype=torch.int64, device=device)
    if loader.declared is not None:
        seen = int(accelerator.reduce(torch.tensor(len(predicted), device=device), 'sum'))
        if seen < loader.declared:
            raise UserError(
                f'--val-split {loader.source.split}: {seen} images were read, it declares {loader.declared}; '
                'are files missing or damaged? (--val-num-samples N declares another number)'
            )
    metrics = dict(evaluator.compute(distributed=accelerator.num_processes > 1))
    if not math.isfinite(metrics['loss']):
        raise UserError(
            f'the validation loss of the {title} is {metrics["loss"]}: its weights or normalisation are not finite, '
            'or it has diverged (try a lower --lr)'
        )
    if reference is not None:
        same = torch.stack([(predicted == reference).sum(), torch.tensor(len(predicted), device=device)])
        agreed, total = accelerator.reduce(same, 'sum').tolist()
        metrics['agreement'] = 100 * agreed / max(total, 1)
    return metrics, predicted


# ----------------------------------------------------------------------------------------------------------------- fit

CHECKPOINT_SECONDS = 15 * 60


def fit(
    task: DistillationTask,
    train_loader: Loader,
    val_loader: Loader,
    accelerator: Accelerator,
    config: Config,
    *,
    log_file: Path,
    checkpoints: Checkpoints | None = None,
    reference: Tensor | None = None,
    title: str = 'student',
) -> list[dict[str, float]]:
    """Train a task's module for the epochs that the settings say, evaluating after each.

    Each optimizer step averages its gradient over the samples that it really has, over all processes and batches of its
    accumulation group, the last incomplete one included.

    Args:
        task: its ``trainable_module`` is trained in place, and is left on the device, unwrapped and contiguous.
        train_loader, val_loader: sharded already.
        config: epochs, optimizer, schedule, mixing, EMA, clipping, checkpoint and logging settings.
        log_file: a CSV with a row an epoch.
        checkpoints: where to write them, and to go on from: the newest one of this phase is taken. None: neither.
        reference: the teacher's predictions on ``val_loader``, for the agreement.
        title: of the phase, `teacher` or `student`.

    Returns:
        The rows of the log, those of earlier processes included.

    Raises:
        UserError: where a loss or gradient is not finite, or a checkpoint cannot be written.
        Stopped: after SIGTERM or SIGINT, with a checkpoint written.
    """
    device, world, epochs = accelerator.device, accelerator.num_processes, config.epochs
    if task.criterion is not None and task.warmup_epochs > epochs:
        accelerator.print(
            f'note: distillation ramps up over {task.warmup_epochs} epochs, more than the run has '
            '(--distill-warmup-epochs)'
        )
    if config.sync_bn and world > 1:
        task.trainable_module = convert_sync_batchnorm(task.trainable_module)
    module = task.trainable_module
    task.to(device)
    memory_format = torch.channels_last if wants_channels_last(config, accelerator) else torch.contiguous_format
    lay_out(module, memory_format)  # the teacher has its own
    if config.model_ema:
        task.setup_ema(decay=config.model_ema_decay, use_warmup=config.model_ema_warmup)
    learned = task.criterion_parameters()
    optimizer = create_optimizer(module, config)
    if learned:
        optimizer.add_param_group({'params': learned, 'weight_decay': 0.0})
    scheduler = create_scheduler(optimizer, config, train_loader.updates_per_epoch)
    if config.torchcompile:
        task.compile()
    task.eval_model = task.trainable_module  # what evaluate() may call: not yet in DDP
    task.trainable_module, optimizer = accelerator.prepare(task.trainable_module, optimizer)
    each_epoch = config.checkpoint_interval == 'epoch'
    every = sys.maxsize if each_epoch else int(config.checkpoint_interval)
    mixing = Mixing(
        mixup=config.mixup, cutmix=config.cutmix, cutmix_minmax=config.cutmix_minmax, prob=config.mixup_prob,
        switch_prob=config.mixup_switch_prob, off_epoch=config.mixup_off_epoch, seed=config.seed,
    )  # fmt: skip
    training = Training(task, module, optimizer, scheduler, accelerator)
    guard = Guard(accelerator, config.skip_nonfinite, title)
    batches, history = len(train_loader), []
    epoch, first, updates = 1, 0, 0
    if checkpoints and (newest := checkpoints.newest(title)):
        training.load(newest)
        history, at = newest.history, newest.position
        epoch, first, updates = (at.epoch + 1, 0, at.updates) if at.batch is None else (at.epoch, at.batch, at.updates)
        accelerator.print(f'{title}: going on in epoch {epoch}, batch {first + 1}' if first < batches else
                          f'{title}: going on with the evaluation of epoch {epoch}')  # fmt: skip
    done = (epoch - 1) * batches + first
    progress = Progress(accelerator.is_main_process, title, epochs, batches, config.log_interval, done)
    saved_at = time.monotonic()

    def save(batch: int | None) -> None:
        nonlocal saved_at
        if task.cache is not None:
            task.cache.flush()
        training.save(checkpoints, Position(title, epoch, batch, updates), history)
        saved_at, guard.overdue = time.monotonic(), False

    def stopped(number: int) -> Stopped:
        message = f'stopped by {signal.Signals(number).name} in epoch {epoch} of the {title}'
        if checkpoints is not None:
            message += f'; train_distill.py --resume {checkpoints.folder.parent} goes on'
            if not train_loader.can_start_within:
                message += ' from the end of the epoch before, as a stream starts at its start'
        return Stopped(message, 128 + number)

    def assess(model: nn.Module, stop: Callable[[], bool]) -> dict[str, float]:
        return evaluate(lambda x: model(task.view(x)), val_loader, accelerator, reference, title, stop)[0]

    with StopSignals() as signals:
        while epoch <= epochs:
            task.train()
            task.set_epoch(epoch)
            if not first:
                training.start_epoch()
            means, clock = training.means, training.clock
            progress.start_epoch(means.count)
            clock.start()
            resumed_after = first == batches
            if not resumed_after:
                train_loader.set_epoch(epoch, first, (epoch - 1) % (config.teacher_cache_views or epochs) + 1)
            figures, losses, samples = [], [], []  # of the accumulation group
            for batch, (pixels, target, indices) in enumerate(() if resumed_after else train_loader, first):
                clock.lap('data')
                step = train_loader.step(batch)
                pixels = pixels.to(device, non_blocking=True, memory_format=memory_format)
                pixels, target = mixing(pixels, target.to(device, non_blocking=True), epoch, batch)
                clock.lap('other')
                with accelerator.autocast():
                    teacher_logits = task.teach(pixels, target, indices, epoch)
                clock.lap('teacher')
                with contextlib.nullcontext() if step.last else accelerator.no_sync(task.trainable_module):
                    with accelerator.autocast():
                        result = task(pixels, target, teacher_logits)
                    # DDP averages over processes: times their number, it is a sum
                    accelerator.backward(result['loss'] * (step.count * world / step.group))
                figures.append(({k: v.detach() for k, v in result.items() if v.ndim == 0}, step.count))
                losses.append(result['loss'].detach())
                samples.append(indices)
                clock.lap('student')
                if not step.last:
                    continue

                for p in learned if world > 1 else []:
                    p.grad = accelerator.reduce(p.grad, 'mean')
                if config.clip_grad is not None:
                    accelerator.unscale_gradients(optimizer)
                overdue = time.monotonic() - saved_at > CHECKPOINT_SECONDS
                if guard.may_step(module, epoch, batch, losses, samples, signals.received, overdue):
                    if config.clip_grad is not None:
                        clipped = task.get_clip_parameters(config.clip_mode == 'agc')
                        dispatch_clip_grad(clipped, config.clip_grad, config.clip_mode)
                    optimizer.step()
                    task.update_ema(step=updates + 1)
                    for values, count in figures:
                        means.add(values, count)
                updates += 1
                optimizer.zero_grad()
                scheduler.step_update(updates)
                figures, losses, samples = [], [], []
                if progress.due(batch) and means.count:
                    progress.show(epoch, batch, means.local(), optimizer.param_groups[0]['lr'], means.count * world)
                clock.lap('other')
                if batch + 1 < batches:  # at the end of the epoch there is more to be done before a checkpoint
                    due = guard.stop or guard.overdue or updates % every == 0
                    if checkpoints and train_loader.can_start_within and due:
                        guard.settle()
                        save(batch + 1)
                        clock.start()
                    if guard.stop:
                        raise stopped(guard.stop)

            guard.settle()
            seconds = clock.read()
            if task.cache is not None and not resumed_after:
                with accelerator.autocast():
                    task.cache.end_epoch(epoch, train_loader.left_out(), train_loader.dataset, task.teacher)
            task.eval()
            if world > 1 and not resumed_after:  # each process has batch statistics of its own: all take their mean
                for network in filter(None, (module, task.get_trainable_module(ema=True))):
                    distribute_bn(network, world, reduce=True)
            train = means.over_processes(accelerator)
            images = train.pop('count')
            try:
                metrics = assess(task.get_eval_model(), lambda: bool(signals.received))
                if task.has_ema():
                    averaged = assess(task.get_eval_model(ema=True), lambda: bool(signals.received))
            except Interrupted:
                (stop,) = highest(accelerator, signals.received)
                if checkpoints and train_loader.can_start_within:
                    save(batches)
                raise stopped(stop) from None
            row = {
                'epoch': epoch,
                'train_loss': train.pop('loss', math.nan),
                'train_task_loss': train.pop('task_loss', math.nan),
                'train_kd_loss': train.pop('kd_loss', math.nan),
                **{f'eval_{k}': metrics[k] for k in ('loss', 'top1', 'top5')},
                'lr': training.lr,
                'images_per_second': images / sum(seconds.values()),
                **{f'seconds_{part}': value for part, value in seconds.items()},
            }
            if 'agreement' in metrics:
                row['eval_agreement'] = metrics['agreement']
            if task.has_ema():
                row.update({f'eval_{k}_ema': v for k, v in averaged.items()})
            row.update({f'train_{k}': v for k, v in train.items()})
            if config.skip_nonfinite:
                row['skipped_steps'] = guard.skipped
            history.append(row)
            scheduler.step(epoch, metrics['top1'])
            progress.end_epoch(row)
            accelerator.log({f'{title}/{k}': v for k, v in row.items()}, step=epoch)
            main_saves(accelerator, log_file.parent, write_rows, log_file, history)
            (stop,) = highest(accelerator, signals.received)
            if checkpoints and (each_epoch or stop or epoch == epochs or best_epoch(history) == epoch):
                save(None)
            if stop and epoch < epochs:
                raise stopped(stop)
            epoch, first = epoch + 1, 0
        if title == 'teacher':  # there is more to come: the student
            epoch = epochs
            (stop,) = highest(accelerator, signals.received)
            if stop:
                raise stopped(stop)
    task.trainable_module = accelerator.unwrap_model(
        task.trainable_module, keep_fp32_wrapper=False, keep_torch_compile=False
    )
    task.to(memory_format=torch.contiguous_format)
    accelerator.free_memory()
    return history


_FUSED = ('sgd', 'nesterov', 'momentum', 'adam', 'adamw')  # those of torch that have it on CPUs and GPUs


def create_optimizer(module: nn.Module, config: Config) -> torch.optim.Optimizer:
    """timm's optimizer of that name, with the settings of a run.

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


def check_settings(config: Config) -> None:
    """Raise an error, before anything is built, where a network is not named, or for an optimizer or schedule that
    cannot be had with these settings."""
    if config.student is None or (config.teacher is None and config.distill != 'none'):
        raise UsageError('--teacher and --student are needed, e.g. --teacher resnet34 --student resnet18')
    known = list_optimizers()
    if config.opt.lower() not in known:
        raise UsageError(f'--opt {config.opt}: unknown optimizer{did_you_mean(config.opt, known)}')
    optimizer = create_optimizer(nn.Linear(2, 2), config)
    for c in (config, config.of_teacher()):
        if c.epochs:
            create_scheduler(optimizer, c, 1)


def create_scheduler(
    optimizer: torch.optim.Optimizer, config: Config, updates_per_epoch: int
) -> Scheduler | _NoScheduler:
    """timm's scheduler of that name. It stays out of `accelerator.prepare`, which would step it once a process."""
    milestones = list(config.decay_milestones)
    if config.sched_on_updates:  # where timm would lower the rate an epoch later than by epochs
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
    """`--sched none`: the rate stays as it is."""

    def step(self, *args: Any) -> None: ...

    def step_update(self, *args: Any) -> None: ...

    def state_dict(self) -> dict[str, Any]:
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None: ...
