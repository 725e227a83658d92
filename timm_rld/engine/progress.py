"""How far a training is, on the terminal."""

from __future__ import annotations

import math
import sys
import time
from typing import TYPE_CHECKING

from tqdm import tqdm

if TYPE_CHECKING:
    from .state import TrainState


class Progress:
    """A bar on a terminal, plain lines elsewhere; on the main process alone."""

    def __init__(self, state: TrainState, epochs: int, batches: int, interval: int) -> None:
        self.state, self.epochs, self.batches, self.interval = state, epochs, batches, interval
        self.active = state.accelerator.is_main_process
        self.first = (state.epoch - 1) * batches + state.batch  # batches that an earlier process has done
        self.started = self.epoch_started = time.perf_counter()
        on_terminal = self.active and sys.stderr.isatty()
        total = epochs * batches
        self.bar = tqdm(total=total, initial=self.first, desc=state.phase, leave=False) if on_terminal else None
        self.unshown = 0

    def start_epoch(self, images: int) -> None:
        """Start the clock of an epoch, of which so many images are done."""
        self.epoch_started, self.images = time.perf_counter(), images

    def due(self, batch: int) -> bool:
        """Count a batch (0-based); return whether to show it."""
        self.unshown += 1
        return self.active and (batch + 1) % self.interval == 0

    def show(self, batch: int) -> None:
        """Show the means of the epoch so far, after a batch (0-based). Waits for the device."""
        state, means = self.state, self.state.means.local()
        done = (state.epoch - 1) * self.batches + batch + 1
        elapsed = time.perf_counter() - self.started
        images = state.means.count * state.accelerator.num_processes
        rate = (images - self.images) / (time.perf_counter() - self.epoch_started)
        losses = ' '.join(f'{k} {means[k]:.4f}' for k in ('loss', 'task_loss', 'kd_loss', 'feature_loss') if k in means)
        lr = state.optimizer.param_groups[0]['lr']
        if self.bar is not None:
            self.bar.update(self.unshown)
            self.bar.set_postfix_str(f'{losses} lr {lr:.3g} {rate:.0f} img/s')
        else:
            eta = elapsed / max(done - self.first, 1) * (self.epochs * self.batches - done)
            print(
                f'{state.phase} epoch {state.epoch}/{self.epochs} [{batch + 1}/{self.batches}] {losses} lr {lr:.3g} '
                f'{rate:.0f} img/s eta {duration(eta)}',
                flush=True,
            )
        self.unshown = 0

    def end_epoch(self, row: dict[str, float]) -> None:
        """Show an epoch's row of the log."""
        if not self.active:
            return
        terms = {name: row.get(f'train_{name}_loss', math.nan) for name in ('task', 'kd', 'feature')}
        shown = ' '.join(f'{name} {value:.4g}' for name, value in terms.items() if not math.isnan(value))
        kd = '' if math.isnan(terms['kd']) and math.isnan(terms['feature']) else f' ({shown})'
        ema = f' ema {row["eval_top1_ema"]:.2f}' if 'eval_top1_ema' in row else ''
        done = row['epoch'] * self.batches - self.first
        left = (self.epochs - row['epoch']) * self.batches
        eta = (time.perf_counter() - self.started) / max(done, 1) * left
        line = (
            f'{self.state.phase} epoch {row["epoch"]:.0f}/{self.epochs}  loss {row["train_loss"]:.4f}{kd}  '
            f'top-1 {row["eval_top1"]:.2f}{ema}  lr {row["lr"]:.3g}  {row["images_per_second"]:.0f} img/s  '
            f'eta {duration(eta)}'
        )
        if self.bar is not None:
            self.bar.update(self.unshown)
            self.unshown = 0
            self.bar.write(line)
            if row['epoch'] == self.epochs:
                self.bar.close()
        else:
            print(line, flush=True)


def duration(seconds: float) -> str:
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f'{hours}:{minutes:02}:{seconds:02}' if hours else f'{minutes}:{seconds:02}'
