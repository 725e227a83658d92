"""The training loop."""

from __future__ import annotations

import contextlib
import signal
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NoReturn

from accelerate import Accelerator
from accelerate.utils import set_seed
from timm.utils import dispatch_clip_grad, distribute_bn
from torch import Tensor

from ..config import Config
from ..data import Loader, Mixup
from ..data.loader import Batch
from ..data.sampler import Step
from ..distributed import all_reduce_max, main_writes
from ..errors import Stopped, UserError
from ..run_folder import best_epoch
from ..task import DistillationTask
from .asking import asking
from .checkpoint import Checkpoints
from .evaluate import Interrupted, evaluate
from .faults import FiniteCheck, StopSignals
from .log import write_rows
from .predictions import Recorder
from .progress import Progress
from .state import TrainState

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
    recorder: Recorder | None = None,
    phase: str = 'student',
) -> list[dict[str, float]]:
    """Train a task's module for the number of epochs in the settings, evaluating after each.

    Each optimizer step averages its gradient over the samples that it really has, over all processes and batches of its
    accumulation group, the last incomplete one included.

    Args:
        task: its ``trainable_module`` is trained in place, and is left on the device, unwrapped and contiguous.
        train_loader, val_loader: sharded already.
        config: epochs, optimizer, schedule, mixup, EMA, clipping, checkpoint and logging settings.
        log_file: a CSV with a row an epoch.
        checkpoints: where to write them, and to resume from: the newest one of this phase is read. None: neither.
        reference: the teacher's predictions on ``val_loader``, to compare the student's with (:func:`evaluate`).
        recorder: of the evaluation after the last epoch; it stays empty where an earlier process has made that one.
        phase: `teacher` or `student`.

    Returns:
        The rows of the log, those of earlier processes included.

    Raises:
        UserError: where a loss or gradient is not finite, or a checkpoint cannot be written.
        Stopped: after SIGTERM or SIGINT, or where no query is left for the next step, with a checkpoint written.
    """
    assert config.epochs is not None  # resolve() fills it in
    if task.criterion is not None and task.warmup_epochs > config.epochs:
        accelerator.print(
            f'note: distillation ramps up over {task.warmup_epochs} epochs, more than the run has: it never counts in '
            'full; give fewer --distill-warmup-epochs, or remove it'
        )
    set_seed(config.seed, device_specific=True)
    state = TrainState(task, config, accelerator, train_loader.updates_per_epoch, phase)
    if checkpoints and (newest := checkpoints.newest(phase)):
        state.load(newest)
        what = f'batch {state.batch + 1}' if state.batch < len(train_loader) else 'its evaluation'
        accelerator.print(f'{phase}: resuming in epoch {state.epoch}, {what}')
    progress = Progress(state, config.epochs, len(train_loader), config.log_interval)
    mixup = Mixup(**config.arguments_of('Mixup'))
    with StopSignals() as signals:
        pauses = Pauses(state, config, checkpoints, train_loader, signals)
        while state.epoch <= config.epochs:
            task.train()
            task.set_epoch(state.epoch)
            if not state.batch:
                state.start_epoch()
            trained_here = state.batch < len(train_loader)  # else by an earlier process
            progress.start_epoch(state.means.count)
            if trained_here:
                train_epoch(state, train_loader, mixup, config, pauses, progress)
                average_batch_norm(state)
            train = state.means.over_processes(accelerator)
            recording = recorder if state.epoch == config.epochs else None
            metrics, averaged = assess(state, val_loader, reference, pauses, recording)
            row = state.summary_row(train, metrics, averaged)
            if config.skip_nonfinite:
                row['skipped_steps'] = pauses.check.skipped
            state.history.append(row)
            state.scheduler.step(state.epoch, metrics['top1'])
            progress.end_epoch(row)
            accelerator.log({f'{phase}/{k}': v for k, v in row.items()}, step=state.epoch)
            main_writes(accelerator, log_file.parent, write_rows, log_file, state.history)
            pauses.after_epoch()
            state.end_epoch()
    state.release()
    return state.history


def train_epoch(
    state: TrainState, loader: Loader, mixup: Mixup, config: Config, pauses: Pauses, progress: Progress
) -> None:
    """Train for the rest of an epoch."""
    assert config.epochs is not None  # resolve() fills it in
    task, epoch, timer, batches = state.task, state.epoch, state.timer, len(loader)
    group = Group()
    augmentation_epoch = (epoch - 1) % (config.teacher_cache_views or config.epochs) + 1
    loader.set_epoch(epoch, state.batch, augmentation_epoch)
    timer.start()
    with asking(state, loader, mixup, pauses) as numbered:
        for number, batch in numbered:
            timer.lap('data')
            step = loader.step(number)
            if not group.losses:
                pauses.check.start_group(state.module)
            result = train_step(state, batch, number, step, mixup)
            group.add(result, batch[2], step.count)
            timer.lap('student')
            if not step.last:
                continue
            optimizer_step(state, group, number, config, pauses)
            group = Group()
            state.batch = number + 1
            if progress.due(number) and state.means.count:
                progress.show(number)
            timer.lap('other')
            if state.batch < batches:  # at the end of the epoch there is more to be done before a checkpoint
                pauses.after_step()
    pauses.check.wait()
    if task.cache is not None:
        with state.accelerator.autocast():
            task.cache.end_epoch(epoch, loader.left_out(), loader.dataset, task.teacher)


@dataclass
class Group:
    """What the batches of an accumulation group gave on this process: results and number of images, losses, indices."""

    results: list[tuple[dict[str, Tensor], int]] = field(default_factory=list)
    losses: list[Tensor] = field(default_factory=list)
    indices: list[Tensor] = field(default_factory=list)

    def add(self, result: dict[str, Tensor], indices: Tensor, count: int) -> None:
        """Add what :func:`train_step` returned for a batch, of which ``count`` images count."""
        self.results.append(({k: v.detach() for k, v in result.items() if v.ndim == 0}, count))
        self.losses.append(result['loss'].detach())
        self.indices.append(indices)


def train_step(state: TrainState, batch: Batch, number: int, step: Step, mixup: Mixup) -> dict[str, Tensor]:
    """Forward and backward pass of a batch.

    Args:
        batch: uint8 pixels `[B, C, H, W]`, targets `[B]`, indices `[B]`.
        number: of the batch in the epoch, 0-based.
        step: what the batch counts in its accumulation group.

    Returns:
        What :meth:`DistillationTask.forward` returns.
    """
    task, accelerator, timer = state.task, state.accelerator, state.timer
    pixels, target, indices = batch
    pixels = pixels.to(accelerator.device, non_blocking=True, memory_format=state.memory_format)
    target = target.to(accelerator.device, non_blocking=True)
    pixels, mixed = mixup(pixels, target, state.epoch, number)
    timer.lap('other')
    with accelerator.autocast():
        teacher = task.ask_teacher(pixels, target, indices, state.epoch)
    timer.lap('teacher')
    with contextlib.nullcontext() if step.last else accelerator.no_sync(task.trainable_module):
        with accelerator.autocast():
            result = task(pixels, mixed, *teacher, indices)
        # DDP averages over processes: times their number, it is a sum
        accelerator.backward(result['loss'] * (step.count * accelerator.num_processes / step.group))
    return result


def optimizer_step(state: TrainState, group: Group, number: int, config: Config, pauses: Pauses) -> None:
    """Update the weights, unless the step is to be skipped."""
    task, accelerator, optimizer = state.task, state.accelerator, state.optimizer
    learned = [*task.criterion_parameters(), *task.feature_parameters()]
    for p in learned if accelerator.num_processes > 1 else ():  # they are not in DDP
        p.grad = accelerator.reduce(p.grad, 'mean')
    if config.clip_grad is not None:
        accelerator.unscale_gradients(optimizer)
    if pauses.allows_step(group, number):
        if config.clip_grad is not None:
            clipped = task.get_clip_parameters(config.clip_mode == 'agc')
            dispatch_clip_grad(clipped, config.clip_grad, config.clip_mode)
        optimizer.step()
        task.update_ema(step=state.updates + 1)
        for values, count in group.results:
            state.means.add(values, count)
    elif config.clip_grad is not None and accelerator.scaler is not None:
        accelerator.scaler.update()  # the gradients were unscaled, which it takes once between two updates
    state.updates += 1
    optimizer.zero_grad()
    state.scheduler.step_update(state.updates)


def average_batch_norm(state: TrainState) -> None:
    """Give all processes the mean of their batch statistics, of which each has its own in an epoch."""
    world = state.accelerator.num_processes
    if world > 1:
        for network in filter(None, (state.module, state.task.get_trainable_module(ema=True))):
            distribute_bn(network, world, reduce=True)


def assess(
    state: TrainState, loader: Loader, reference: Tensor | None, pauses: Pauses, recorder: Recorder | None = None
) -> tuple[dict[str, float], dict[str, float] | None]:
    """Evaluate the network, which a recorder records, and its averaged weights if there are any.

    Returns:
        The figures of :func:`evaluate` of both.
    """
    task = state.task
    task.eval()
    found: list[Any] = []
    for ema in (False, True):
        if ema and not task.has_ema():
            found.append(None)
            continue
        model = task.get_eval_model(ema=ema)

        def predict(x: Tensor, model: Any = model) -> Tensor:
            return model(task.normalize(x))

        try:
            metrics, _ = evaluate(
                predict, loader, state.accelerator, reference,
                title=state.phase, interrupted=lambda: bool(pauses.signals.received),
                on_batch=None if ema else recorder,
            )  # fmt: skip
        except Interrupted:
            pauses.in_evaluation()
        found.append(metrics)
    return found[0], found[1]


class Pauses:
    """When a training writes a checkpoint, and when it stops before its end: :meth:`_pause` alone decides.

    Args:
        state: of the training.
        config: `checkpoint_interval`, `skip_nonfinite`, `epochs`, `best_by`.
        checkpoints: None: no checkpoint is written.
        loader: of the training images; a stream can be resumed at the start of an epoch alone.
        signals: of this process.
    """

    def __init__(
        self, state: TrainState, config: Config, checkpoints: Checkpoints | None, loader: Loader, signals: StopSignals
    ) -> None:
        self.state, self.checkpoints, self.loader, self.signals = state, checkpoints, loader, signals
        self.epochs, self.each_epoch = config.epochs, config.checkpoint_interval == 'epoch'
        self.best_by = config.best_by
        self.every = sys.maxsize if self.each_epoch else int(config.checkpoint_interval)
        self.check = FiniteCheck(state.accelerator, config.skip_nonfinite, state.phase)
        self.saved_at, self.saved_updates = time.monotonic(), state.updates

    def allows_step(self, group: Group, number: int) -> bool:
        """Return whether losses and gradients of a group are finite (:class:`FiniteCheck`)."""
        overdue = time.monotonic() - self.saved_at > CHECKPOINT_SECONDS
        return self.check.allows_step(
            self.state.module, self.state.epoch, number, group.losses, group.indices, self.signals.received, overdue
        )

    def after_step(self) -> None:
        """After an optimizer step within an epoch."""
        self._pause(self.state.batch, self._is_time(), self.check.stop)

    def in_evaluation(self) -> None:
        """After an evaluation that was interrupted."""
        self._pause(len(self.loader), False, self._received())

    def after_epoch(self) -> None:
        """After the evaluation of an epoch."""
        epoch, stop = self.state.epoch, self._received()
        last = epoch == self.epochs
        best = best_epoch(self.state.history, self.best_by) == epoch
        due = self.each_epoch or last or best or self._is_time()
        if last and self.state.phase == 'student':
            self._pause(None, due, 0)  # what is left takes seconds
        else:
            self._pause(None, due, stop)
            self._pause(None, False, self._received(), saved=due)  # a signal while the checkpoint was written

    def while_waiting(self) -> None:
        """Before a step, while its answers are not there. With several processes none can stop alone."""
        if self.state.accelerator.num_processes == 1:
            self._pause(self.state.batch, False, self.signals.received)

    def out_of_queries(self, used: int, needed: int) -> NoReturn:
        """Before a step that a closed teacher may not be asked about any more (`--max-queries`).

        Args:
            used, needed: images, of the whole run so far, and of the step.
        """
        self._pause(self.state.batch, True, 0)
        raise Stopped(
            f'--max-queries: {used:,} are used, and the next step needs {needed:,} more; stopped {self._where()}'
            f'{self._continues(" --max-queries N")}',
            1,
        )

    def no_answer(self, reason: str) -> NoReturn:
        """Before a step that a closed teacher does not answer for; called on every process."""
        self._pause(self.state.batch, True, 0)
        raise UserError(f'{reason}{self._continues()}')

    def _is_time(self) -> bool:
        """Whether a multiple of the interval, or a quarter of an hour, has passed since the last checkpoint."""
        return self.check.overdue or self.state.updates // self.every > self.saved_updates // self.every

    def _received(self) -> int:
        return all_reduce_max(self.state.accelerator, self.signals.received)[0]

    def _pause(self, batch: int | None, due: bool, stop: int, saved: bool = False) -> None:
        """Write a checkpoint where one is due or a signal asks the run to stop, and then stop it.

        Args:
            batch: batches of the epoch that are done; None: it has been evaluated too.
            stop: a signal, or 0.
            saved: it has just been written.
        """
        resumable = batch is None or self.loader.can_start_within
        if self.checkpoints is not None and resumable and (due or stop) and not saved:
            self.check.wait()
            self.state.save(self.checkpoints, batch)
            self.saved_at, self.saved_updates, self.check.overdue = time.monotonic(), self.state.updates, False
            self.state.timer.start()
        if stop:
            raise Stopped(f'stopped by {signal.Signals(stop).name} {self._where()}{self._continues()}', 128 + stop)

    def _where(self) -> str:
        return f'in epoch {self.state.epoch} of the {self.state.phase}'

    def _continues(self, more: str = '') -> str:
        if self.checkpoints is None:
            return ''
        text = f'; accelerate launch train_distill.py --resume {self.checkpoints.folder.parent}{more} continues'
        if not self.loader.can_start_within:
            text += ' from the end of the epoch before, since a stream cannot be entered in the middle'
        return text
