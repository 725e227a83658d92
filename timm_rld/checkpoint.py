"""Checkpoints: written whole or not at all, verified when they are read, and nothing in them is ever executed.

A checkpoint is a folder: `model.safetensors`, `ema.safetensors`, `state.pt` (read with weights_only) and
`checkpoint.json` with the position, the log so far and a SHA-256 of each file.
"""

from __future__ import annotations

import hashlib
import io
import json
import os
import random
import re
import shutil
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import safetensors.torch
import torch
from accelerate import Accelerator
from accelerate.utils import gather_object
from torch import Tensor, nn

from .errors import UserError, is_not_plain, writing
from .runs import Clock, Means, best_epoch, outcome, raise_on_all

FORMAT = 2
_NAME = re.compile(r'(teacher|student)-epoch(\d+)-(?:batch(\d+)|end)')


@dataclass(frozen=True)
class Position:
    """Where in a fit a checkpoint stands.

    Attributes:
        phase: `teacher` or `student`.
        epoch: 1-based.
        batch: batches of the epoch that are done, always at the end of an accumulation group. As many as the epoch
            has: trained, and not yet evaluated. None: the epoch is over.
        updates: optimizer steps since the fit began.
    """

    phase: str
    epoch: int
    batch: int | None
    updates: int

    @property
    def name(self) -> str:
        end = 'end' if self.batch is None else f'batch{self.batch:06}'
        return f'{self.phase}-epoch{self.epoch:04}-{end}'


def _order(name: str) -> tuple[bool, int, float]:
    phase, epoch, batch = _NAME.fullmatch(name).groups()
    return phase == 'student', int(epoch), float('inf') if batch is None else int(batch)


@dataclass
class Checkpoint:
    """What was read: the position, rows of the log, tensors by file, the rest.

    Attributes:
        position: where it stands.
        history: rows of the finished epochs.
        lr: the rate at which the epoch began.
        weights: state dicts by name: `model`, and `ema` if there is one.
        state: optimizer, scheduler, scaler, criterion, and for each process its generators, buffers and sums.
    """

    position: Position
    history: list[dict[str, float]]
    lr: float
    weights: dict[str, dict[str, Tensor]]
    state: dict[str, Any]


class Damaged(Exception):
    """A checkpoint that is not what was written."""


class Checkpoints:
    """The checkpoints of a run: the newest few, and the best.

    Args:
        folder: where they lie.
        keep: how many of the newest.
        say: prints a line.

    Attributes:
        on_epoch_end: told of each checkpoint of the student that ends an epoch: its folder, the log, the outcome so
            far (:func:`timm_rld.runs.outcome`).
    """

    def __init__(self, folder: Path, keep: int = 2, say: Callable[[str], None] = print) -> None:
        self.folder, self.keep, self.say = Path(folder), keep, say
        self.on_epoch_end: Callable[[Path, list[dict[str, float]], dict[str, Any]], None] | None = None

    def names(self) -> list[str]:
        """Names of the checkpoints that are there, oldest first."""
        if not self.folder.is_dir():
            return []
        return sorted((p.name for p in self.folder.iterdir() if _NAME.fullmatch(p.name)), key=_order)

    def save(self, checkpoint: Checkpoint, best_epoch: int | None = None) -> Path:
        """Write a checkpoint, then drop those that are neither among the newest nor the best epoch's end.

        Raises:
            UserError: where it cannot be written; what was there before is untouched.
        """
        final = self.folder / checkpoint.position.name
        part = self.folder / f'.part-{final.name}'
        then = f'train_distill.py --resume {self.folder.parent} '
        then += 'goes on: the one before is whole' if self.names() else 'begins anew: there is none before it'
        files = _as_files(checkpoint)
        try:
            with writing(f'{self.folder}: a checkpoint', then):
                part.mkdir(parents=True, exist_ok=True)
                for name, data in files.items():
                    _write(part / name, data)
                _sync(part)
                if final.exists():  # written again after going on from an older one
                    shutil.rmtree(self.folder / f'.old-{final.name}', ignore_errors=True)
                    final.rename(self.folder / f'.old-{final.name}')
                part.rename(final)
                _sync(self.folder)
        finally:
            shutil.rmtree(part, ignore_errors=True)
        at = checkpoint.position
        if self.on_epoch_end is not None and at.phase == 'student' and at.batch is None:
            self.on_epoch_end(final, checkpoint.history, outcome(checkpoint.history))
        self._prune(best_epoch)
        return final

    def _prune(self, best_epoch: int | None) -> None:
        names = self.names()
        phase = names[-1].partition('-')[0]
        kept = {*names[-self.keep :], f'{phase}-epoch{best_epoch or 0:04}-end'}
        for name in names:
            if name not in kept or not name.startswith(phase):
                shutil.rmtree(self.folder / name, ignore_errors=True)
        shutil.rmtree(self.folder / f'.old-{names[-1]}', ignore_errors=True)

    def prepare(self, resume: str | None, accelerator: Accelerator) -> Checkpoints:
        """Called on every process before a run: finish or undo what a killed one left half done, and drop what is newer
        than the checkpoint that ``resume`` names, if it names one."""
        if accelerator.is_main_process:
            self._tidy()
            if resume is not None and _NAME.fullmatch(Path(resume).name):
                for name in self.names():
                    if _order(name) > _order(Path(resume).name):
                        shutil.rmtree(self.folder / name)
        accelerator.wait_for_everyone()
        return self

    def _tidy(self) -> None:
        for path in self.folder.glob('.*-*') if self.folder.is_dir() else ():
            if path.name.startswith('.old-') and not (self.folder / path.name[5:]).exists():
                path.rename(self.folder / path.name[5:])
            elif path.name.startswith(('.old-', '.part-')):
                shutil.rmtree(path, ignore_errors=True)

    def newest(self, phase: str) -> Checkpoint | None:
        """Read the newest whole checkpoint of a phase; damaged ones are named and passed over.

        Raises:
            UserError: where there are some, and none is whole.
        """
        names = [n for n in self.names() if n.startswith(phase)]
        for name in reversed(names):
            try:
                return read_checkpoint(self.folder / name)
            except Damaged as e:
                self.say(f'checkpoint {self.folder / name} is damaged ({e}): taking the one before')
        if names:
            raise UserError(
                f'{self.folder}: no checkpoint of the {phase} is whole; start anew under another --experiment'
            )
        return None


def _as_files(checkpoint: Checkpoint) -> dict[str, bytes]:
    """What its files hold, by name."""
    files = {
        f'{name}.safetensors': safetensors.torch.save({k: v.contiguous().clone() for k, v in tensors.items()})
        for name, tensors in checkpoint.weights.items()
    }
    buffer = io.BytesIO()
    torch.save(checkpoint.state, buffer)
    files['state.pt'] = buffer.getvalue()
    body = {
        'format': FORMAT,
        'position': asdict(checkpoint.position),
        'lr': checkpoint.lr,
        'history': checkpoint.history,
        'sha256': {name: hashlib.sha256(data).hexdigest() for name, data in files.items()},
    }
    files['checkpoint.json'] = json.dumps({**body, 'own_sha256': _digest(body)}, indent=1).encode()
    return files


def read_checkpoint(folder: Path) -> Checkpoint:
    """Read and verify a checkpoint.

    Raises:
        Damaged: where a file is missing, is not what was written, or is of another format.
    """
    try:
        body = json.loads((folder / 'checkpoint.json').read_text(encoding='utf-8'))
        if _digest({k: v for k, v in body.items() if k != 'own_sha256'}) != body['own_sha256']:
            raise Damaged('checkpoint.json is not what was written')
        if body['format'] != FORMAT:
            raise Damaged(f'its format is {body["format"]}, this version reads {FORMAT}')
        data = {}
        for name, digest in body['sha256'].items():
            data[name] = (folder / name).read_bytes()
            if hashlib.sha256(data[name]).hexdigest() != digest:
                raise Damaged(f'{name} is not what was written')
        state = torch.load(io.BytesIO(data.pop('state.pt')), map_location='cpu', weights_only=True)
        weights = {name.removesuffix('.safetensors'): safetensors.torch.load(d) for name, d in data.items()}
    except OSError as e:
        raise Damaged(f'{os.path.basename(e.filename or "")}: {e.strerror}') from e
    except Damaged:
        raise
    except Exception as e:
        if is_not_plain(e):
            raise Damaged('state.pt holds more than tensors and plain values, so it was not loaded') from e
        raise Damaged(str(e).splitlines()[0][:200] if str(e) else type(e).__name__) from e
    return Checkpoint(Position(**body['position']), body['history'], body['lr'], weights, state)


def _digest(body: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(body, sort_keys=True).encode()).hexdigest()


def _write(path: Path, data: bytes) -> None:
    with path.open('wb') as f:
        f.write(data)
        f.flush()
        os.fsync(f.fileno())


def _sync(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


class Training:
    """Everything of a fit that changes from step to step: what a checkpoint holds beside its position.

    Args:
        task: with `get_task_state`, `load_task_state` and perhaps an EMA.
        module: the network, without wrappers.
        optimizer, scheduler: of the fit.
        accelerator: for the scaler, and the other processes.

    Attributes:
        means: sums of the epoch's figures so far.
        lr: the rate at which the epoch began.
        clock: where the epoch's time went so far.
    """

    def __init__(self, task: Any, module: nn.Module, optimizer: Any, scheduler: Any, accelerator: Accelerator) -> None:
        self.task, self.module, self.optimizer, self.scheduler = task, module, optimizer, scheduler
        self.accelerator = accelerator
        self.start_epoch()

    def start_epoch(self) -> None:
        self.means, self.clock = Means(self.accelerator.device), Clock(self.accelerator.device)
        self.lr = self.optimizer.param_groups[0]['lr']

    def _networks(self) -> dict[str, nn.Module]:
        found = {'model': self.module}
        if self.task.has_ema():
            found['ema'] = self.task.trainable_module_ema.module
        return found

    def save(self, checkpoints: Checkpoints, position: Position, history: list[dict[str, float]]) -> None:
        """Write a checkpoint; called on every process.

        Raises:
            UserError: on every process, where it cannot be written.
        """
        networks = self._networks()
        mine = {
            'generators': generators_state(self.accelerator.device),
            # of batch norm: each process has its own until the epoch ends
            'buffers': {k: {n: b.cpu().clone() for n, b in net.named_buffers()} for k, net in networks.items()},
            'means': self.means.state(),
        }
        processes = gather_object([mine])
        problem = None
        if self.accelerator.is_main_process:
            scaler = self.accelerator.scaler
            state = {
                'optimizer': self.optimizer.state_dict(),
                'scheduler': self.scheduler.state_dict(),
                'scaler': scaler.state_dict() if scaler is not None else None,
                'task': self.task.get_task_state(),
                'seconds': self.clock.read(),
                'processes': processes,
            }
            weights = {name: network.state_dict() for name, network in networks.items()}
            try:
                best = best_epoch(history) if history else None
                checkpoints.save(Checkpoint(position, history, self.lr, weights, state), best)
            except UserError as e:
                problem = e
        raise_on_all(problem)

    def load(self, checkpoint: Checkpoint) -> None:
        """Go on from a checkpoint; called on every process."""
        state, device = checkpoint.state, self.accelerator.device
        mine = state['processes'][self.accelerator.process_index]
        for name, network in self._networks().items():
            network.load_state_dict(checkpoint.weights[name])
            for key, buffer in network.named_buffers():
                buffer.copy_(mine['buffers'][name][key])
        self.optimizer.load_state_dict(state['optimizer'])
        self.scheduler.load_state_dict(state['scheduler'])
        if self.accelerator.scaler is not None:
            self.accelerator.scaler.load_state_dict(state['scaler'])
        self.task.load_task_state(state['task'])
        self.start_epoch()
        if checkpoint.position.batch is not None:
            self.lr = checkpoint.lr
            self.clock.seconds.update(state['seconds'])
            self.means.load_state(mine['means'])
        set_generators_state(mine['generators'], device)


def generators_state(device: torch.device) -> dict[str, Any]:
    """The state of Python's, NumPy's and torch's generators, in types that weights_only reads."""
    _, keys, *rest = np.random.get_state()
    version, internal, gauss = random.getstate()
    return {
        'python': [version, list(internal), gauss],
        'numpy': [torch.from_numpy(keys.astype(np.int64)), *rest],
        'torch': torch.random.get_rng_state(),
        'cuda': torch.cuda.get_rng_state(device) if device.type == 'cuda' else None,
    }


def set_generators_state(state: dict[str, Any], device: torch.device) -> None:
    """Undo of :func:`generators_state`."""
    version, internal, gauss = state['python']
    random.setstate((version, tuple(internal), gauss))
    keys, *rest = state['numpy']
    np.random.set_state(('MT19937', keys.numpy().astype(np.uint32), *rest))
    torch.random.set_rng_state(state['torch'])
    if state['cuda'] is not None and device.type == 'cuda':
        torch.cuda.set_rng_state(state['cuda'], device)
