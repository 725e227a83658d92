"""What can stop a training early: signals, and losses or gradients that are not finite."""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import gather_object
from torch import Tensor, nn

from ..errors import UserError


class StopSignals:
    """SIGTERM and SIGINT are noted, so that a step can end, for as long as this context lasts.

    The same signal again within two seconds counts as the first (launchers repeat what the whole group has got); a
    later one ends the process at once.

    Attributes:
        received: the signal's number, or 0.
    """

    def __init__(self) -> None:
        self.received, self.at = 0, 0.0
        self.before: dict[int, Any] = {}

    def __enter__(self) -> StopSignals:
        if threading.current_thread() is threading.main_thread():
            self.before = {s: signal.signal(s, self._receive) for s in (signal.SIGTERM, signal.SIGINT)}
        return self

    def __exit__(self, *_: object) -> None:
        if self.received:
            return  # the process is about to end; a repeated signal must not end it sooner
        for number, handler in self.before.items():
            signal.signal(number, handler)

    def _receive(self, number: int, _: object) -> None:
        if self.received and time.monotonic() - self.at > 2:
            signal.signal(number, signal.SIG_DFL)
            os.kill(os.getpid(), number)
        if not self.received:
            self.received, self.at = number, time.monotonic()


@dataclass
class _Pending:
    """The result of a step's check, which may not have arrived from the device yet, and what it is about."""

    flags: Tensor
    event: torch.cuda.Event | None
    epoch: int
    batch: int
    losses: list[Tensor]
    indices: list[Tensor]


def keep_buffers(module: nn.Module) -> Callable[[], None]:
    """Keep a copy of a module's buffers, which a forward pass of batch norm changes. Returns what puts it back."""
    kept = [(buffer, buffer.clone()) for buffer in module.buffers()]

    def restore() -> None:
        for buffer, before in kept:
            buffer.copy_(before)

    return restore


class FiniteCheck:
    """Checks that each step's losses and gradients are finite, on all processes; the same message carries whether a
    process is asked to stop, and whether a checkpoint is overdue.

    Where no step may be skipped, the result is read a step later, so that no step waits for the device: the run ends
    anyway, and nothing of it is saved. Else it is waited for before the optimizer steps.

    Args:
        allowed: how many steps in a row may be skipped.
        phase: `teacher` or `student`, for messages.

    Attributes:
        skipped: steps that were skipped so far.
        stop: the highest signal that any process has received, as far as it is known, or 0.
        overdue: whether a checkpoint is overdue on some process.
    """

    def __init__(self, accelerator: Accelerator, allowed: int, phase: str) -> None:
        self.accelerator, self.allowed, self.phase = accelerator, allowed, phase
        self.skipped = self.in_a_row = 0
        self.stop, self.overdue = 0, False
        self.pending: _Pending | None = None
        self.restore: Callable[[], None] | None = None

    def start_group(self, module: nn.Module) -> None:
        """Before the forward passes of a step: if it is skipped, they shall have left no trace in batch norm."""
        if self.allowed:
            self.restore = keep_buffers(module)

    def allows_step(
        self,
        module: nn.Module,
        epoch: int,
        batch: int,
        losses: list[Tensor],
        indices: list[Tensor],
        stop: int = 0,
        overdue: bool = False,
    ) -> bool:
        """Called between the backward pass and the optimizer's step, on every process.

        Args:
            module: with gradients.
            epoch: 1-based.
            batch: 0-based number of the group's last batch.
            losses: of the group's batches on this process.
            indices: of their samples.
            stop, overdue: of this process.

        Returns:
            Whether to take the step.

        Raises:
            UserError: on every process, where a step cannot be skipped; it names the samples.
        """
        finite = torch.isfinite(torch.stack(losses)).all()
        if self.accelerator.scaler is None:  # under fp16 the scaler checks the gradients, in search of a scale
            gradients = [p.grad for p in module.parameters() if p.grad is not None]
            finite = finite & torch.isfinite(nn.utils.get_total_norm(gradients))
        own = [torch.full_like(losses[0], float(value), dtype=torch.float32) for value in (stop, overdue)]
        flags, event = torch.stack([(~finite).float(), *own]), None
        if self.accelerator.num_processes > 1:
            torch.distributed.all_reduce(flags, torch.distributed.ReduceOp.MAX)
        if flags.device.type == 'cuda':
            flags = torch.empty(3, pin_memory=True).copy_(flags, non_blocking=True)
            event = torch.cuda.Event()
            event.record()
        pending = _Pending(flags, event, epoch, batch, losses, indices)
        if self.allowed:
            return self._read(pending)
        earlier, self.pending = self.pending, pending
        return earlier is None or self._read(earlier)

    def wait(self) -> None:
        """Wait for the result of the last step's check: before anything is saved or evaluated."""
        pending, self.pending = self.pending, None
        if pending is not None:
            self._read(pending)

    def _read(self, pending: _Pending) -> bool:
        if pending.event is not None:
            pending.event.synchronize()
        bad, stop, overdue = pending.flags.cpu().numpy()
        self.stop, self.overdue = max(self.stop, int(stop)), bool(overdue)
        if not bad:
            self.in_a_row = 0
            return True
        self.skipped += 1
        self.in_a_row += 1
        if self.in_a_row <= self.allowed:
            if self.restore is not None:
                self.restore()
            return False
        values = [loss.item() for loss in pending.losses]
        bad = [i for i, v in enumerate(values) if v - v != 0] or list(range(len(values)))
        first = pending.batch - len(values) + 1
        shown = [(first + i, values[i], pending.indices[i].tolist()) for i in bad]
        found = gather_object([(any(v - v != 0 for v in values), shown)])
        some_loss = any(in_loss for in_loss, _ in found)
        parts = [part for in_loss, parts in found if in_loss or not some_loss for part in parts]
        number, value, samples = parts[0]
        samples = sorted({s for n, _, ss in parts if n == number for s in ss})
        what = f'the loss is {value}' if some_loss else f'a gradient is not finite (loss {value:.4g})'
        some = ', '.join(map(str, samples[:16])) + (', …' if len(samples) > 16 else '')
        raise UserError(
            f'{what} in epoch {pending.epoch} of the {self.phase}, batch {number + 1}, samples {some}; '
            'try a lower --lr.\nNothing of that step was saved. --skip-nonfinite N skips up to N such steps in a row'
        )
