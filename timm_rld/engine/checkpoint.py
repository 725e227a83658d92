"""Checkpoints on disk: written whole or not at all, verified when they are read, and nothing in them is ever executed.

A checkpoint is a folder: `model.safetensors`, `ema.safetensors`, `state.pt` (read with weights_only) and
`checkpoint.json` with the position, the log so far and the SHA-256 of each of these files. (Accelerate's `save_state`
pickles generators and schedulers, and a kill while it writes leaves half a checkpoint.)
"""

from __future__ import annotations

import hashlib
import io
import json
import os
import re
import shutil
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from accelerate import Accelerator
from torch import Tensor

from ..errors import UserError, is_not_plain, writing
from ..files import sync_folder, write_synced
from ..run_folder import best_epoch, outcome

FORMAT = 3
PHASES = ('teacher', 'generator', 'student')  # in their order
_NAME = re.compile(rf'({"|".join(PHASES)})-epoch(\d+)-(?:batch(\d+)|end)')


@dataclass(frozen=True)
class Position:
    """Where in a training a checkpoint stands.

    Attributes:
        phase: `teacher`, `generator` or `student`.
        epoch: 1-based.
        batch: batches of the epoch that are done, always at the end of an accumulation group. As many as the epoch
            has: trained, and not yet evaluated. None: the epoch is over.
        updates: optimizer steps since the training began.
    """

    phase: str
    epoch: int
    batch: int | None
    updates: int

    @property
    def name(self) -> str:
        """Of the checkpoint's folder."""
        end = 'end' if self.batch is None else f'batch{self.batch:06}'
        return f'{self.phase}-epoch{self.epoch:04}-{end}'


def _order(name: str) -> tuple[int, int, float]:
    match = _NAME.fullmatch(name)
    assert match is not None, name
    phase, epoch, batch = match.groups()
    return PHASES.index(phase), int(epoch), float('inf') if batch is None else int(batch)


@dataclass
class Checkpoint:
    """What was read: the position, rows of the log, tensors by file, the rest.

    Attributes:
        position: where it stands.
        history: rows of the finished epochs.
        lr: the learning rate at which the epoch began.
        weights: state dicts by name: `model`, and `ema` or `discriminator` if there is one.
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
        log: prints a line.
        best_by: what makes an epoch the best, as :func:`timm_rld.run_folder.best_epoch`.

    Attributes:
        on_epoch_end: called with each checkpoint of the student that ends an epoch: its folder, the log, the results so
            far (:func:`timm_rld.run_folder.outcome`).
    """

    def __init__(self, folder: Path, keep: int = 2, log: Callable[[str], None] = print, best_by: str = 'top1') -> None:
        self.folder, self.keep, self.log, self.best_by = Path(folder), keep, log, best_by
        self.on_epoch_end: Callable[[Path, list[dict[str, float]], dict[str, Any]], None] | None = None

    def names(self) -> list[str]:
        """Return the names of the checkpoints that are there, oldest first."""
        if not self.folder.is_dir():
            return []
        return sorted((p.name for p in self.folder.iterdir() if _NAME.fullmatch(p.name)), key=_order)

    def save(self, checkpoint: Checkpoint) -> Path:
        """Write a checkpoint, then delete those that are neither among the newest nor of the best epoch.

        Returns:
            Its folder.

        Raises:
            UserError: where it cannot be written; what was there before is untouched.
        """
        final = self.folder / checkpoint.position.name
        part = self.folder / f'.part-{final.name}'
        then = f'accelerate launch train_distill.py --resume {self.folder.parent} '
        then += 'continues from the one before' if self.names() else 'starts again: there is none before it'
        files = _as_files(checkpoint)
        try:
            with writing(f'{self.folder}: a checkpoint', then):
                part.mkdir(parents=True, exist_ok=True)
                for name, data in files.items():
                    write_synced(part / name, data)
                sync_folder(part)
                if final.exists():  # written again after resuming from an older one
                    shutil.rmtree(self.folder / f'.old-{final.name}', ignore_errors=True)
                    final.rename(self.folder / f'.old-{final.name}')
                part.rename(final)
                sync_folder(self.folder)
        finally:
            shutil.rmtree(part, ignore_errors=True)
        at = checkpoint.position
        if self.on_epoch_end is not None and at.phase == 'student' and at.batch is None:
            self.on_epoch_end(final, checkpoint.history, outcome(checkpoint.history, self.best_by))
        evaluated = bool(checkpoint.history) and at.phase != 'generator'
        self._prune(best_epoch(checkpoint.history, self.best_by) if evaluated else 0)
        return final

    def _prune(self, best: int) -> None:
        names = self.names()
        phase = names[-1].partition('-')[0]
        kept = {*names[-self.keep :], f'{phase}-epoch{best:04}-end'}
        for name in names:
            if name not in kept or not name.startswith(phase):
                shutil.rmtree(self.folder / name, ignore_errors=True)
        shutil.rmtree(self.folder / f'.old-{names[-1]}', ignore_errors=True)

    def prepare(self, resume: str | None, accelerator: Accelerator) -> Checkpoints:
        """Called on every process before a run: finish or undo what a killed one left half done, and delete what is
        newer than the checkpoint that ``resume`` names, if it names one. Returns itself."""
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
        """Return the newest whole checkpoint of a phase; damaged ones are named and skipped.

        Raises:
            UserError: where there are some, and none is whole.
        """
        names = [n for n in self.names() if n.startswith(phase)]
        for name in reversed(names):
            try:
                return read_checkpoint(self.folder / name)
            except Damaged as e:
                self.log(f'checkpoint {self.folder / name} is damaged ({e}): using the one before')
        if names:
            raise UserError(
                f'{self.folder}: no checkpoint of the {phase} is whole; start again under another --experiment'
            )
        return None


def _as_files(checkpoint: Checkpoint) -> dict[str, bytes]:
    """Return what its files hold, by name."""
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
    files['checkpoint.json'] = json.dumps(body, indent=1).encode()
    return files


def read_checkpoint(folder: Path) -> Checkpoint:
    """Return a checkpoint, read and verified.

    Raises:
        Damaged: where a file is missing, is not what was written, or is of another format.
    """
    try:
        body = json.loads((folder / 'checkpoint.json').read_text(encoding='utf-8'))
        if body['format'] != FORMAT:
            raise Damaged(f'its format is {body["format"]}, this version reads {FORMAT}')
        data = {}
        for name, digest in body['sha256'].items():
            data[name] = (folder / name).read_bytes()
            if hashlib.sha256(data[name]).hexdigest() != digest:
                raise Damaged(f'{name} is not what was written')
        state = torch.load(io.BytesIO(data.pop('state.pt')), map_location='cpu', weights_only=True)
        weights = {name.removesuffix('.safetensors'): safetensors.torch.load(d) for name, d in data.items()}
        return Checkpoint(Position(**body['position']), body['history'], body['lr'], weights, state)
    except OSError as e:
        raise Damaged(f'{os.path.basename(e.filename or "")}: {e.strerror}') from e
    except Damaged:
        raise
    except Exception as e:
        if is_not_plain(e):
            raise Damaged('state.pt holds more than tensors and plain values, so it was not loaded') from e
        raise Damaged(str(e).splitlines()[0][:200] if str(e) else type(e).__name__) from e
