"""Phase 1 of MEKD: a generator learns to make images like some real ones, whose labels are not read.

"Aligning Logits Generatively for Principled Black-Box Knowledge Distillation", Ma et al., CVPR 2024: a GAN, and a term
by which the teacher is to be sure of what is generated.

Several processes do the same work, each on whole batches, but for the teacher's, which they share out: both networks
are so small that exchanging their gradients would take longer. So the result does not depend on how many there are.
"""

from __future__ import annotations

import math
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NoReturn

import torch
from accelerate import Accelerator
from accelerate.utils import gather_object
from torch import Tensor
from tqdm import tqdm

from ..data import Loader, ReplaySampler, Source, eval_transform
from ..distributed import all_reduce_max, main_writes, raise_on_all
from ..errors import Stopped, UserError
from ..loss import adversarial_loss, discriminator_loss, information_loss, to_pixels, top_probability
from ..models import Discriminator, Generator
from ..pairing import ClosedTeacher, asked_about
from ..seeds import GENERATOR, derive_seed
from .asking import total_queries
from .checkpoint import Checkpoint, Checkpoints, Position
from .faults import StopSignals, keep_buffers
from .log import Means, write_rows
from .mekd_settings import GeneratorSettings
from .progress import duration
from .state import reset_scaler

PHASE = 'generator'
LARGEST_IMAGES = 8 << 30  # bytes of images that are kept in memory
SHOW_SECONDS = 10.0


class GeneratorState:
    """Both networks with their optimizers, and how far the training is: all that a checkpoint holds.

    Attributes:
        epoch, batch, updates: as of :class:`timm_rld.engine.state.TrainState`.
        history: rows of the epochs that are done.
        means: of the epoch's figures so far.
        counts: images that the teacher has put into each class in this epoch, `[C]`.
        seconds: of this epoch so far.
    """

    def __init__(
        self, num_classes: int, in_chans: int, settings: GeneratorSettings, seed: int, accelerator: Accelerator
    ) -> None:
        self.accelerator, device = accelerator, accelerator.device
        torch.manual_seed(derive_seed(GENERATOR, seed) & 0x7FFFFFFFFFFFFFFF)
        self.generator = Generator(num_classes, settings.img_size, in_chans).to(device).train()
        self.discriminator = Discriminator(settings.img_size, in_chans).to(device).train()
        self.of_generator, self.of_discriminator = (
            accelerator.prepare(torch.optim.Adam(network.parameters(), settings.lr, (0.5, 0.999)))
            for network in (self.generator, self.discriminator)
        )
        reset_scaler(accelerator)
        self.epoch, self.batch, self.updates = 1, 0, 0
        self.history: list[dict[str, float]] = []
        self.start_epoch()

    def start_epoch(self) -> None:
        """Empty the epoch's figures."""
        self.means, self.seconds = Means(self.accelerator.device), 0.0
        self.counts = torch.zeros(self.generator.num_classes, dtype=torch.int64, device=self.accelerator.device)

    def save(self, checkpoints: Checkpoints, batch: int | None) -> None:
        """Write a checkpoint; called on every process, as :meth:`timm_rld.engine.state.TrainState.save`."""
        error = None
        if self.accelerator.is_main_process:
            scaler = self.accelerator.scaler
            state = {
                'scaler': scaler.state_dict() if scaler is not None else None,
                'optimizers': [self.of_generator.state_dict(), self.of_discriminator.state_dict()],
                'means': self.means.state(), 'counts': self.counts.cpu(), 'seconds': self.seconds,
            }  # fmt: skip
            weights = {'model': self.generator.state_dict(), 'discriminator': self.discriminator.state_dict()}
            position = Position(PHASE, self.epoch, batch, self.updates)
            try:
                checkpoints.save(Checkpoint(position, self.history, 0.0, weights, state))
            except UserError as e:
                error = e
        raise_on_all(error)

    def load(self, checkpoint: Checkpoint) -> None:
        """Continue from a checkpoint; called on every process."""
        at, state = checkpoint.position, checkpoint.state
        self.generator.load_state_dict(checkpoint.weights['model'])
        self.discriminator.load_state_dict(checkpoint.weights['discriminator'])
        for optimizer, saved in zip((self.of_generator, self.of_discriminator), state['optimizers']):
            optimizer.load_state_dict(saved)
        if self.accelerator.scaler is not None:
            self.accelerator.scaler.load_state_dict(state['scaler'])
        self.history, self.updates = checkpoint.history, at.updates
        self.epoch, self.batch = (at.epoch + 1, 0) if at.batch is None else (at.epoch, at.batch)
        if at.batch is not None:
            self.means.load_state(state['means'])
            self.counts.copy_(state['counts'])
            self.seconds = state['seconds']

    def summary_row(self) -> dict[str, float]:
        """Return the epoch's row of generator.csv. Waits for the device."""
        row = {'epoch': self.epoch, **self.means.local()}
        if (counts := self.counts.tolist()) and sum(counts):
            row |= spread(counts)
        return {**row, 'images_per_second': self.means.count / max(self.seconds, 1e-9), 'seconds': self.seconds}


def spread(counts: list[int]) -> dict[str, float]:
    """Return how images are spread over the classes: `classes` (that occur), and `entropy` as a share of the highest
    possible one, log C, in 0..1."""
    total = sum(counts)
    shares = [n / total for n in counts if n]
    return {'classes': len(shares), 'entropy': -sum(p * math.log(p) for p in shares) / math.log(len(counts)) + 0.0}


def read_images(
    source: Source, img_size: int, in_chans: int, data_config: dict[str, Any], workers: int, bad_images: Path | None
) -> Tensor:
    """Return all images of a split as the networks see them in validation, but for their size: uint8 `[N, in_chans, n,
    n]`. Their labels are not looked at.

    Args:
        source: the split; not a stream.
        data_config: of the student: interpolation, crop_pct, crop_mode.
        workers: loader processes.
        bad_images: as of :meth:`Loader.skip_bad_images`; None: an image that cannot be read is an error.
    """
    c = data_config
    view = eval_transform(
        (in_chans, img_size, img_size), interpolation=c['interpolation'], crop_pct=c['crop_pct'],
        crop_mode=c['crop_mode'],
    )  # fmt: skip
    loader = Loader(source, view, 256, training=False, workers=workers)
    if bad_images is not None:
        loader.skip_bad_images(bad_images)
    loader.set_epoch(0)
    return torch.cat([pixels for pixels, _, _ in loader])


def train_generator(
    images: Tensor,
    teacher: Callable[[Tensor], Tensor],
    answers: str,
    settings: GeneratorSettings,
    accelerator: Accelerator,
    *,
    num_classes: int,
    image_size: tuple[int, int],
    seed: int,
    folder: Path,
    checkpoints: Checkpoints | None = None,
) -> tuple[Generator, list[dict[str, float]]]:
    """Train a generator on images, from the newest checkpoint of this phase where there is one.

    Each epoch ends with a checkpoint and a row of FOLDER/generator.csv. The order of the images follows from
    (seed, epoch); noise and dropout follow from (seed, epoch, step).

    Args:
        images: uint8 `[N, channels, n, n]`.
        teacher: pixels `[B, channels, H, W]` in 0..255 → rows `[B, C]`; asked where the information term needs it.
        answers: what its rows are (:func:`timm_rld.loss.information_loss`).
        num_classes: C.
        image_size: (H, W) of the pixels that the teacher sees.
        folder: of the run.

    Returns:
        The generator, in eval mode, and the rows of the log.

    Raises:
        Stopped: after SIGTERM or SIGINT, with a checkpoint written.
        UserError: where a loss is not finite, or a checkpoint cannot be written.
    """
    state = GeneratorState(num_classes, images.shape[1], settings, seed, accelerator)
    if checkpoints and (newest := checkpoints.newest(PHASE)):
        state.load(newest)
        accelerator.print(f'{PHASE}: resuming in epoch {state.epoch}, batch {state.batch + 1}')
    order = ReplaySampler(len(images), settings.batch_size, seed=seed, min_batch=2)
    ask = Asked(teacher, answers, settings, accelerator, image_size)
    progress = _Progress(state, settings.epochs, len(order))
    if accelerator.device.type == 'cuda':
        images = images.to(accelerator.device)
    with StopSignals() as signals:
        ends = _Ends(state, folder, checkpoints, signals)
        while state.epoch <= settings.epochs:
            order.set_epoch(state.epoch, state.batch)
            for keys in order:
                if not ask.allows(len(keys)):
                    ends.out_of_queries()
                started = time.perf_counter()
                real = images[[index for _, index in keys]].to(accelerator.device).float() / 127.5 - 1
                step_seed = derive_seed(GENERATOR, seed, state.epoch, state.batch) & 0x7FFFFFFFFFFFFFFF
                try:
                    generator_step(state, real, ask, settings, step_seed)
                except UserError as e:
                    ends.no_answer(str(e))
                state.batch, state.updates = state.batch + 1, state.updates + 1
                state.seconds += time.perf_counter() - started
                progress.step()
                if state.batch < len(order):
                    ends.where_asked_to(state.batch)
            row = state.summary_row()
            _check_finite(row)
            state.history.append(row)
            progress.end_epoch(row)
            accelerator.log({f'{PHASE}/{k}': v for k, v in row.items()}, step=state.epoch)
            main_writes(accelerator, folder, write_rows, folder / f'{PHASE}.csv', state.history)
            if checkpoints is not None:
                state.save(checkpoints, None)
            ends.where_asked_to(None)
            state.epoch, state.batch = state.epoch + 1, 0
            state.start_epoch()
    if accelerator.num_processes > 1:  # on GPUs the last bits may differ
        for tensor in state.generator.state_dict().values():
            torch.distributed.broadcast(tensor, 0)
    accelerator.free_memory()
    return state.generator.eval(), state.history


class _Ends:
    """Where phase 1 stops before its end."""

    def __init__(
        self, state: GeneratorState, folder: Path, checkpoints: Checkpoints | None, signals: StopSignals
    ) -> None:
        self.state, self.folder, self.checkpoints, self.signals = state, folder, checkpoints, signals

    def where_asked_to(self, batch: int | None) -> None:
        """End the run where a process has received a signal; ``batch`` as of :meth:`GeneratorState.save`, None: a
        checkpoint is there."""
        if number := all_reduce_max(self.state.accelerator, self.signals.received)[0]:
            self._end(f'stopped by {signal.Signals(number).name}', 128 + number, batch)

    def out_of_queries(self) -> NoReturn:
        """Before a step that a closed teacher may not be asked about any more."""
        why = '--max-queries: too few are left for the next step; stopped'
        self._end(why, 1, self.state.batch, ' --max-queries N')

    def no_answer(self, reason: str) -> NoReturn:
        """After a step that could not be done since a closed teacher does not answer; called on every process."""
        self._save(self.state.batch)
        raise UserError(f'{reason}; {self._continues()}')

    def _save(self, batch: int | None) -> None:
        if batch is not None and self.checkpoints is not None:
            self.state.save(self.checkpoints, batch)

    def _continues(self, more: str = '') -> str:
        return f'accelerate launch train_distill.py --resume {self.folder}{more} continues'

    def _end(self, why: str, code: int, batch: int | None, more: str = '') -> NoReturn:
        self._save(batch)
        raise Stopped(f'{why} in epoch {self.state.epoch} of the {PHASE}; {self._continues(more)}', code)


def _check_finite(row: dict[str, float]) -> None:
    if not math.isfinite(row['d_loss'] + row['g_loss']):
        raise UserError(
            f'the losses of the {PHASE} in epoch {row["epoch"]} are {row["d_loss"]:.4g} and {row["g_loss"]:.4g}; try a '
            'lower --generator-kwargs lr'
        )


def generator_step(
    state: GeneratorState, real: Tensor, ask: Asked, settings: GeneratorSettings, step_seed: int
) -> None:
    """One step of the discriminator, then one of the generator, and their figures. The teacher is asked before both.

    Args:
        real: images `[m, channels, n, n]` in -1..1.
        ask: the teacher.
        step_seed: of noise and dropout.

    Raises:
        UserError: on every process, where no answer comes to one; the networks are then as they were.
    """
    accelerator, generator, discriminator, m = state.accelerator, state.generator, state.discriminator, len(real)
    torch.manual_seed(step_seed)
    of_fake, of_step = (torch.randn(m, generator.num_classes).to(real.device) for _ in range(2))

    restore = keep_buffers(generator) if ask.needed else None
    with accelerator.autocast():
        with torch.no_grad():
            fake = generator(of_fake)
        images = generator(of_step)
    try:
        answer = ask(images, f'{m} generated images (phase 1, epoch {state.epoch}, batch {state.batch + 1})')
    except UserError:
        if restore is not None:
            restore()
        raise

    discriminator.requires_grad_(True)
    with accelerator.autocast():
        real_scores, fake_scores = discriminator(real).float(), discriminator(fake).float()
    d_loss = discriminator_loss(real_scores, fake_scores)
    state.of_discriminator.zero_grad()
    accelerator.backward(d_loss)
    state.of_discriminator.step()

    discriminator.requires_grad_(False)
    with accelerator.autocast():
        scores = discriminator(images).float()
    g_loss = adversarial = adversarial_loss(scores)
    figures = {'d_loss': d_loss, 'adversarial_loss': adversarial}
    if settings.info_weight:
        if settings.info == 'coded':  # the published program looks at the images anew, with other dropout
            state.counts += torch.bincount(answer.argmax(dim=1), minlength=len(state.counts))
            with accelerator.autocast():
                seen = discriminator(images).float()
            information = information_loss(seen, answer, info='coded')
        elif ask.answers == 'hard':
            information = information_loss(scores, torch.ones_like(scores))
        else:
            state.counts += torch.bincount(answer.argmax(dim=1), minlength=len(state.counts))
            figures['teacher_confidence'] = top_probability(answer, ask.answers).mean()
            information = information_loss(scores, answer, ask.answers)
        g_loss = g_loss + settings.info_weight * information
        figures['information_loss'] = information
    state.of_generator.zero_grad()
    accelerator.backward(g_loss)
    state.of_generator.step()
    figures |= {'g_loss': g_loss, 'd_real': real_scores.sigmoid().mean(), 'd_fake': fake_scores.sigmoid().mean()}
    state.means.add(figures, m)


class Asked:
    """The teacher as phase 1 asks it: each process asks about its part of the images, and all get all answers.

    Args:
        teacher: pixels `[B, channels, H, W]` in 0..255 → rows `[B, C]`.
        answers: what the rows are.
        image_size: (H, W) of the pixels that it sees.
    """

    def __init__(
        self, teacher: Callable[[Tensor], Tensor], answers: str, settings: GeneratorSettings, accelerator: Accelerator,
        image_size: tuple[int, int],
    ) -> None:  # fmt: skip
        self.teacher, self.answers, self.accelerator, self.image_size = teacher, answers, accelerator, image_size
        self.needed = bool(settings.info_weight) and (settings.info == 'coded' or answers != 'hard')
        self.left: int | None = None
        if self.needed and isinstance(teacher, ClosedTeacher) and (limit := teacher.queries.limit) is not None:
            self.left = limit - total_queries(teacher, accelerator)

    def allows(self, images: int) -> bool:
        """Return whether `--max-queries` leaves enough to ask about so many images."""
        if self.left is None:
            return True
        self.left -= images
        return self.left >= 0

    @torch.no_grad()
    def __call__(self, images: Tensor, about: str = '') -> Tensor:
        """Return the rows `[m, C]` of generated images; where answers do not matter, an empty tensor.

        Raises:
            UserError: on every process, where no answer comes to one.
        """
        if not self.needed:
            return images.new_empty(0)
        pixels, rank = to_pixels(images.detach(), self.image_size), self.accelerator.process_index
        parts = pixels.tensor_split(self.accelerator.num_processes)
        mine, errors = pixels.new_empty(0, 0), []
        try:
            if len(parts[rank]):
                with self.accelerator.autocast(), asked_about(about):
                    mine = self.teacher(parts[rank]).float()
        except UserError as e:
            errors = [str(e)]
        if len(parts) == 1:
            if errors:
                raise UserError(errors[0])
            return mine
        found = gather_object([(errors, mine.shape[1])])
        if failed := [error for errors, _ in found for error in errors]:
            raise UserError(failed[0])
        rows = torch.zeros(len(images), max(width for _, width in found), device=images.device)
        first = sum(len(part) for part in parts[:rank])
        rows[first : first + len(mine)] = mine.reshape(-1, rows.shape[1])
        torch.distributed.all_reduce(rows)
        return rows


class _Progress:
    """A bar on a terminal, elsewhere a line an epoch, one in ten seconds at most; on the main process alone."""

    def __init__(self, state: GeneratorState, epochs: int, steps: int) -> None:
        self.state, self.epochs, self.first = state, epochs, state.epoch
        self.started, self.shown = time.perf_counter(), 0.0
        self.active = state.accelerator.is_main_process
        on_terminal = self.active and sys.stderr.isatty()
        done = (state.epoch - 1) * steps + state.batch
        self.bar = tqdm(total=epochs * steps, initial=done, desc=PHASE, leave=False) if on_terminal else None

    def step(self) -> None:
        """Count a step."""
        if self.bar is not None:
            self.bar.update()

    def end_epoch(self, row: dict[str, float]) -> None:
        """Show an epoch's row of the log."""
        now, epoch = time.perf_counter(), self.state.epoch
        if not self.active or (epoch not in (1, self.epochs) and now - self.shown < SHOW_SECONDS):
            return
        self.shown = now
        left = (now - self.started) / (epoch - self.first + 1) * (self.epochs - epoch)
        entropy = f'  entropy {row["entropy"]:.2f}' if 'entropy' in row else ''
        line = (
            f'{PHASE} epoch {epoch}/{self.epochs}  loss D {row["d_loss"]:.3f} G {row["g_loss"]:.3f}  '
            f'D(real) {row["d_real"]:.2f} D(fake) {row["d_fake"]:.2f}{entropy}  '
            f'{row["images_per_second"]:.0f} img/s  eta {duration(left)}'
        )
        if self.bar is None:
            print(line, flush=True)
        else:
            self.bar.write(line)
            if epoch == self.epochs:
                self.bar.close()
