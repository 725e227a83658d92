"""What may end a run before its end: signals, and losses or gradients that are not finite."""

from __future__ import annotations

import os
import signal
import threading
import time

import torch
from accelerate import Accelerator
from accelerate.utils import gather_object
from torch import Tensor, nn

from .errors import UserError


class StopSignals:
    """SIGTERM and SIGINT are kept, so that a step can end, for as long as this context lasts.

    The same signal again within two seconds counts as the first (launchers repeat what the whole group has got); a
    later one ends the process at once.

    Attributes:
        received: the signal's number, or 0.
    """

    def __init__(self) -> None:
        self.received, self.at, self.before = 0, 0.0, {}

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


def highest(accelerator: Accelerator, *values: float) -> list[int]:
    """The highest of each value over the processes. Waits for all of them."""
    if accelerator.num_processes == 1:
        return [int(v) for v in values]
    tensor = torch.tensor([float(v) for v in values], device=accelerator.device)
    torch.distributed.all_reduce(tensor, torch.distributed.ReduceOp.MAX)
    return [int(v) for v in tensor.tolist()]


class NonFiniteGuard:
    """Looks at each step's losses and gradients before the optimizer does.

    Args:
        allowed: how many steps in a row may be left out.
        title: of the phase, for messages.

    Attributes:
        skipped: steps that were left out so far.
    """

    def __init__(self, accelerator: Accelerator, allowed: int, title: str) -> None:
        self.accelerator, self.allowed, self.title = accelerator, allowed, title
        self.skipped = self.in_a_row = 0

    def is_bad(self, losses: list[Tensor], module: nn.Module) -> bool:
        """Whether a loss or a gradient of this process is not finite. Under fp16 Accelerate's scaler looks after the
        gradients: an overflow is part of its search for a scale."""
        finite = torch.isfinite(torch.stack(losses)).all()
        if self.accelerator.scaler is None:
            gradients = [p.grad for p in module.parameters() if p.grad is not None]
            finite = finite & torch.isfinite(nn.utils.get_total_norm(gradients))
        return not finite.item()

    def leave_out(self, epoch: int, batch: int, losses: list[Tensor], indices: list[Tensor]) -> None:
        """Count a step that is left out.

        Args:
            epoch: 1-based.
            batch: 0-based number of the group's last batch.
            losses: of the group's batches on this process.
            indices: of their samples.

        Raises:
            UserError: on every process, where it is one too many; it names the samples.
        """
        self.skipped += 1
        self.in_a_row += 1
        if self.in_a_row <= self.allowed:
            return
        values = [loss.item() for loss in losses]
        bad = [i for i, v in enumerate(values) if v - v != 0] or list(range(len(values)))
        first = batch - len(values) + 1
        shown = [(first + i, values[i], indices[i].tolist()) for i in bad]
        found = gather_object([(any(v - v != 0 for v in values), shown)])
        some_loss = any(in_loss for in_loss, _ in found)
        parts = [part for in_loss, parts in found if in_loss or not some_loss for part in parts]
        number, value, samples = parts[0]
        samples = sorted({s for n, _, ss in parts if n == number for s in ss})
        what = f'the loss is {value}' if some_loss else f'a gradient is not finite (loss {value:.4g})'
        some = ', '.join(map(str, samples[:16])) + (', …' if len(samples) > 16 else '')
        raise UserError(
            f'{what} in epoch {epoch} of the {self.title}, batch {number + 1}, samples {some}; try a lower --lr.\n'
            'The step was not taken. --skip-nonfinite N leaves out up to N such steps in a row'
        )

    def taken(self) -> None:
        """Count a step that was taken."""
        self.in_a_row = 0
