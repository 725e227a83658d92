"""The folder that a run leaves, and what it prints on the way."""

from __future__ import annotations

import csv
import json
import math
import os
import platform
import sys
import time
from collections.abc import Callable
from importlib import metadata
from pathlib import Path
from typing import Any, TypeVar

import torch
from accelerate import Accelerator
from accelerate.utils import broadcast_object_list
from torch import Tensor
from tqdm import tqdm

from .config import Config, to_yaml
from .errors import UserError

T = TypeVar('T')


def main_first(accelerator: Accelerator, function: Callable[[], T]) -> T:
    """Call a function on the main process, then on the others; what goes wrong on the first is raised on all."""
    result = problem = None
    if accelerator.is_main_process:
        try:
            result = function()
        except UserError as e:
            problem = e
    _raise_on_all(problem)
    return result if accelerator.is_main_process else function()


def _raise_on_all(problem: UserError | None) -> None:
    """Raise on every process what is wrong on the main one; the others' argument does not matter."""
    said = [(type(problem), str(problem)) if problem is not None else None]
    broadcast_object_list(said)
    if said[0]:
        kind, message = said[0]
        raise kind(message)


def open_run(config: Config, accelerator: Accelerator) -> Path:
    """Make the run folder: `OUTPUT/EXPERIMENT`, by default `output/<time>-<student>-<distill>`, the same on all ranks,
    and write args.yaml into it.

    Raises:
        UserError: where it holds files already, or cannot be written.
    """
    from timm.models import safe_model_name

    name = config.experiment or '-'.join(
        [time.strftime('%Y%m%d-%H%M%S'), safe_model_name(config.student), config.distill]
    )
    (name,) = broadcast_object_list([name])  # another rank may be a second later
    run = Path(config.output or 'output').expanduser() / name
    problem = None
    if accelerator.is_main_process:
        try:
            run.mkdir(parents=True, exist_ok=True)
            if any(run.iterdir()):
                problem = UserError(f'--output/--experiment: {run} is not empty; name another --experiment')
            else:
                (run / 'args.yaml').write_text(to_yaml(config), encoding='utf-8')
        except OSError as e:
            problem = UserError(f'--output: {run} cannot be written ({e.strerror})')
    _raise_on_all(problem)
    accelerator.project_configuration.set_directories(str(run))
    accelerator.project_configuration.logging_dir = str(run)
    return run


def write_results(run: Path, results: dict[str, Any]) -> None:
    """Write results.json, whole or not at all, with the versions of what it rests on."""
    packages = ('timm_rld', 'timm', 'torch', 'accelerate', 'datasets')
    versions = {'python': platform.python_version(), **{p: metadata.version(p) for p in packages}}
    part = run / '.results.json.tmp'
    part.write_text(json.dumps({**results, 'versions': versions}, indent=2, ensure_ascii=False), encoding='utf-8')
    os.replace(part, run / 'results.json')


class Means:
    """Sample-weighted sums of a step's 0-d results, kept on the device so that no step waits for it."""

    def __init__(self, device: torch.device) -> None:
        self.device, self.sums, self.count = device, {}, 0

    def add(self, result: dict[str, Tensor], count: int) -> None:
        for name, value in result.items():
            if value.ndim == 0:
                value = value.detach().float() * count if count else torch.zeros((), device=self.device)
                self.sums[name] = self.sums[name] + value if name in self.sums else value
        self.count += count

    def local(self) -> dict[str, float]:
        """This process's means. Waits for the device."""
        return {k: v / max(self.count, 1) for k, v in zip(self.sums, torch.stack(list(self.sums.values())).tolist())}

    def over_processes(self, accelerator: Accelerator) -> dict[str, float]:
        """Means over all processes, and the `count` of samples. Waits for the device."""
        values = torch.stack([*self.sums.values(), torch.tensor(float(self.count), device=self.device)])
        *sums, count = accelerator.reduce(values, 'sum').tolist()
        return {**{k: v / max(count, 1) for k, v in zip(self.sums, sums)}, 'count': count}


class Progress:
    """A bar on a terminal, plain lines elsewhere; on the main process alone."""

    def __init__(self, active: bool, title: str, epochs: int, batches: int, interval: int) -> None:
        self.active, self.title, self.epochs, self.batches, self.interval = active, title, epochs, batches, interval
        self.started = self.epoch_started = time.perf_counter()
        self.bar = tqdm(total=epochs * batches, desc=title, leave=False) if active and sys.stderr.isatty() else None
        self.unshown = 0

    def due(self, batch: int) -> bool:
        if batch == 0:
            self.epoch_started = time.perf_counter()
        self.unshown += 1
        return self.active and (batch + 1) % self.interval == 0

    def show(self, epoch: int, batch: int, means: dict[str, float], lr: float, images: int) -> None:
        done = (epoch - 1) * self.batches + batch + 1
        elapsed = time.perf_counter() - self.started
        rate = images / (time.perf_counter() - self.epoch_started)
        losses = ' '.join(f'{k} {means[k]:.4f}' for k in ('loss', 'task_loss', 'kd_loss') if k in means)
        if self.bar is not None:
            self.bar.update(self.unshown)
            self.bar.set_postfix_str(f'{losses} lr {lr:.3g} {rate:.0f} img/s')
        else:
            eta = elapsed / done * (self.epochs * self.batches - done)
            print(
                f'{self.title} epoch {epoch}/{self.epochs} [{batch + 1}/{self.batches}] {losses} lr {lr:.3g} '
                f'{rate:.0f} img/s eta {_duration(eta)}',
                flush=True,
            )
        self.unshown = 0

    def end_epoch(self, row: dict[str, float]) -> None:
        if not self.active:
            return
        parts = f' (task {row["train_task_loss"]:.4f} kd {row["train_kd_loss"]:.4f})'
        kd = '' if math.isnan(row['train_kd_loss']) else parts
        ema = f' ema {row["eval_top1_ema"]:.2f}' if 'eval_top1_ema' in row else ''
        eta = (time.perf_counter() - self.started) / row['epoch'] * (self.epochs - row['epoch'])
        line = (
            f'{self.title} epoch {row["epoch"]:.0f}/{self.epochs}  loss {row["train_loss"]:.4f}{kd}  '
            f'top-1 {row["eval_top1"]:.2f}{ema}  lr {row["lr"]:.3g}  {row["images_per_second"]:.0f} img/s  '
            f'eta {_duration(eta)}'
        )
        if self.bar is not None:
            self.bar.update(self.unshown)
            self.unshown = 0
            self.bar.write(line)
            if row['epoch'] == self.epochs:
                self.bar.close()
        else:
            print(line, flush=True)


def _duration(seconds: float) -> str:
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f'{hours}:{minutes:02}:{seconds:02}' if hours else f'{minutes}:{seconds:02}'


def append_row(path: Path, row: dict[str, float]) -> None:
    """Add a row to a CSV, with a header if it is the first. NaN, which stands for "not there", is left empty."""
    with path.open('a', newline='', encoding='utf-8') as f:
        writer = csv.DictWriter(f, fieldnames=list(row))
        if f.tell() == 0:
            writer.writeheader()
        writer.writerow({k: '' if isinstance(v, float) and math.isnan(v) else f'{v:.6g}' for k, v in row.items()})
