"""What a training reports: means of its figures, where its time goes, summary.csv."""

from __future__ import annotations

import csv
import io
import math
import time
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor

from ..files import write_atomic


class Means:
    """Sample-weighted means of a step's 0-d results, summed on the device so that no step waits for it."""

    def __init__(self, device: torch.device) -> None:
        self.device, self.count = device, 0
        self.sums: dict[str, Tensor] = {}

    def add(self, result: dict[str, Tensor], count: int) -> None:
        """Add a batch's 0-d results, weighted by its number of images."""
        for name, value in result.items():
            if value.ndim == 0:
                value = value.detach().float() * count if count else torch.zeros((), device=self.device)
                self.sums[name] = self.sums[name] + value if name in self.sums else value
        self.count += count

    def state(self) -> dict[str, Any]:
        """Return the sums, for a checkpoint."""
        return {'sums': {k: v.cpu() for k, v in self.sums.items()}, 'count': self.count}

    def load_state(self, state: dict[str, Any]) -> None:
        """Undo of :meth:`state`."""
        self.sums, self.count = {k: v.to(self.device) for k, v in state['sums'].items()}, state['count']

    def local(self) -> dict[str, float]:
        """Return this process's means. Waits for the device."""
        return {k: v / max(self.count, 1) for k, v in zip(self.sums, torch.stack(list(self.sums.values())).tolist())}

    def over_processes(self, accelerator: Accelerator) -> dict[str, float]:
        """Return the means over all processes, and the `count` of samples. Waits for the device."""
        values = torch.stack([*self.sums.values(), torch.tensor(float(self.count), device=self.device)])
        *sums, count = accelerator.reduce(values, 'sum').tolist()
        return {**{k: v / max(count, 1) for k, v in zip(self.sums, sums)}, 'count': count}


PARTS = ('data', 'teacher', 'student', 'other')


class Timer:
    """Where an epoch's time goes, by part. On a GPU it is the GPU's time, of events that no step waits for: `data` is
    then what the GPU waits for a batch.

    Attributes:
        seconds: by part, so far.
    """

    def __init__(self, device: torch.device) -> None:
        self.on_gpu = device.type == 'cuda'
        self.seconds = dict.fromkeys(PARTS, 0.0)
        self.laps: list[tuple[str, Any, Any]] = []
        self.start()

    def _now(self) -> Any:
        if not self.on_gpu:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def start(self) -> None:
        """Start: what has passed since the last lap belongs to no part."""
        self.read()
        self.last = self._now()

    def lap(self, part: str) -> None:
        """Add what has passed since the last lap to a part."""
        now = self._now()
        if self.on_gpu:
            self.laps.append((part, self.last, now))
            if len(self.laps) > 1000 and self.laps[499][2].query():
                self._add(500)
        else:
            self.seconds[part] += now - self.last
        self.last = now

    def _add(self, count: int) -> None:
        for part, begin, end in self.laps[:count]:
            self.seconds[part] += begin.elapsed_time(end) / 1000
        del self.laps[:count]

    def read(self) -> dict[str, float]:
        """Return the seconds by part. Waits for the device."""
        if self.laps:
            self.laps[-1][2].synchronize()
            self._add(len(self.laps))
        return dict(self.seconds)


def write_rows(path: Path, rows: list[dict[str, float]]) -> None:
    """Write a CSV. NaN, which stands for "not there", is left empty."""
    table = io.StringIO()
    writer = csv.DictWriter(table, list(dict.fromkeys(k for row in rows for k in row)), lineterminator='\n')
    writer.writeheader()
    for row in rows:
        writer.writerow({k: '' if isinstance(v, float) and math.isnan(v) else f'{v:.6g}' for k, v in row.items()})
    write_atomic(path, table.getvalue())
