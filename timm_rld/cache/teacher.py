"""The cache of a run's teacher."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import shutil
import weakref
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from torch import Tensor

from ..config import Config, to_yaml, write_whole
from ..data import Source
from ..data.replay import ReplayDataset
from ..errors import SampleError, UserError, writing
from ..guard import highest
from ..pairing import Teacher, weights_digest
from ..runs import main_first, main_only
from ._rows import DTYPES, Rows, rounded
from .facts import Purpose, _sha256, difference, weights_file

try:
    import fcntl
except ImportError:  # Windows has none
    fcntl = None


class TeacherCache:
    """A teacher's logits on the first K epochs' images of a run, kept in a folder; epoch e sees the images of epoch
    (e - 1) mod K + 1 again, in an order of its own, so that the teacher has been asked about them already.

    What is read is what was written: logits are rounded to the file's dtype before they are used for the first time, so
    that a run's result does not depend on what the folder held when it began.

    Args:
        config: resolved; `teacher_cache`, `teacher_cache_views`, `teacher_cache_dtype`.
        accelerator: of the run.
        train, val: the splits.

    Attributes:
        complete: whether nothing is left to be asked of the teacher. Only once it is open.
        body: what cache.json holds.
    """

    def __init__(self, config: Config, accelerator: Accelerator, train: Source, val: Source) -> None:
        if train.streamed:
            raise UserError(
                f'--teacher-cache {config.teacher_cache}: {config.dataset} is read as a stream, whose images have no '
                'index to keep a row by; take hfds/… or a folder, or leave the cache out'
            )
        self.config, self.accelerator, self.train, self.val = config, accelerator, train, val
        self.folder = Path(config.teacher_cache).expanduser()
        self.views, self.dtype = config.teacher_cache_views, DTYPES[config.teacher_cache_dtype]
        self._check_folder()
        self.complete = self.validated = False
        self.body: dict[str, Any] | None = None
        self._open: dict[str, Rows] = {}
        self._held: int | None = None
        self._pending: list[tuple[torch.cuda.Event, Rows, np.ndarray, Tensor]] = []

    # ------------------------------------------------------------------------------------------------------- opening

    def _check_folder(self) -> None:
        """Before a teacher is fitted."""
        try:
            there = (
                [p.name for p in self.folder.iterdir() if not p.name.startswith('.')] if self.folder.exists() else []
            )
        except OSError as e:
            raise UserError(f'--teacher-cache {self.folder}: cannot be written ({e.strerror})') from e
        if there and 'cache.json' not in there:
            raise UserError(f'--teacher-cache {self.folder}: is not empty and not a cache; name another folder')

    def needs_teacher(self, data_config: dict[str, Any]) -> bool:
        """Open the folder, where the weights are at hand to be compared, and say whether the teacher must be built.

        Args:
            data_config: the student's preprocessing.

        Raises:
            UserError: as :meth:`open`.
        """
        weights = weights_file(self.config.teacher, self.config.teacher_checkpoint)
        if weights is not None and not self.config.teacher_epochs:
            self.open(data_config, weights)
        if self.complete:
            self.accelerator.print('  the teacher is not loaded')
        return not self.complete

    def open(self, data_config: dict[str, Any], weights: Path | None = None, teacher: Teacher | None = None) -> None:
        """Find out what the folder holds, unless that is done; called on every process.

        Args:
            data_config: the student's preprocessing.
            weights: the file of the teacher's weights, where it is not the published one.
            teacher: where it has been built: its weights stand for themselves if there is no file.

        Raises:
            UserError: where it holds logits of something else, cannot be written, or the disk has no room.
        """
        if self.body is not None:
            return
        weights = weights or weights_file(self.config.teacher, self.config.teacher_checkpoint)
        digest = f'sha256 {_sha256(weights)}' if weights else f'weights {weights_digest(teacher)}'
        purpose = Purpose(self.config, self.train, self.val, data_config, self.accelerator.mixed_precision)
        self.facts, self.validation_facts = purpose.facts(digest), purpose.validation_facts(digest)
        self.body = {
            'facts': self.facts, 'data_config': data_config, 'settings': to_yaml(_from_anywhere(self.config)),
            'weights_file': weights and os.path.abspath(weights), 'validation': {},
        }  # fmt: skip
        self.validation_name = f'validation-{digest_of(self.validation_facts)}'
        main_first(self.accelerator, self._claim)
        views = sum(self._filled(self._view(v), len(self.train)) for v in range(1, self.views + 1))
        validated = self.validation_name in self.body['validation']
        validated = validated and self._filled(self.validation_name, len(self.val))
        not_complete, not_validated = highest(self.accelerator, views < self.views, not validated)
        self.validated, self.complete = not not_validated, not (not_validated or not_complete)
        size = sum(self._size(name) for name in self._names())
        self.accelerator.print(
            f'teacher cache {self.folder}: {self.views} view(s) of {len(self.train):,} images, '
            f'{self.train.num_classes} classes, {self.config.teacher_cache_dtype}: {_bytes(size)}; '
            + ('complete' if self.complete else f'{views} view(s) are there')
        )
        if self.complete and self.config.teacher_epochs and weights:
            self.accelerator.print(f'  --teacher local-dir:{weights.parent} --teacher-epochs 0 would spare fitting it')
        if views and not self.complete and not self.validated and views == self.views:
            self.accelerator.print(
                '  the teacher is loaded to be judged on the validation images as this student sees them'
            )
        if self.views == self.config.epochs and not views:
            self.accelerator.print(
                f'  as many views as epochs ({self.views}): this run asks the teacher about every image anyway; '
                'the next with this teacher, data and seed does not'
            )

    def _claim(self) -> None:
        """Make the folder, or compare what it holds with what is wanted. Of runs that begin at once one makes it, the
        others compare. What a run left that never wrote a row does not bind the next."""
        file = self.folder / 'cache.json'
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            alone = self._lock()
            there = read_body(self.folder) if file.exists() else None
            found = difference(there['facts'], self.facts) if there else ''
            if found and not (alone and not any(self.folder.glob('view-*'))):
                raise UserError(
                    f'--teacher-cache {self.folder}: holds logits of something else: {found}; name another folder'
                )
            if there and not found:
                self.body = there
            missing = [name for name in self._names() if not self._path(name).exists()]
            if missing and not os.access(self.folder, os.W_OK):
                raise UserError(f'--teacher-cache {self.folder}: cannot be written (Permission denied)')
            needed, free = sum(map(self._size, missing)), shutil.disk_usage(self.folder).free
            if needed > free:
                raise UserError(
                    f'--teacher-cache {self.folder}: needs {_bytes(needed)}, the disk has {_bytes(free)} left; give '
                    'fewer --teacher-cache-views, or another folder'
                )
            if self.body is not there:
                self._write_body()
            if self._held is not None and alone:
                fcntl.flock(self._held, fcntl.LOCK_SH)
        except OSError as e:
            raise UserError(f'--teacher-cache {self.folder}: cannot be written ({e.strerror})') from e

    def _lock(self) -> bool:
        """Share the folder with other runs for as long as this one lasts, and say whether there is none yet: then it is
        this one's alone until it shares it."""
        if fcntl is None:
            return True
        try:
            self._held = os.open(self.folder / '.lock', os.O_WRONLY | os.O_CREAT, 0o666)
        except OSError:  # a folder to read from
            return False
        weakref.finalize(self, os.close, self._held)
        try:
            fcntl.flock(self._held, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return True
        except OSError:
            fcntl.flock(self._held, fcntl.LOCK_SH)
            return False

    def _write_body(self) -> None:
        write_whole(self.folder / 'cache.json', json.dumps(self.body, indent=1, ensure_ascii=False))

    # ---------------------------------------------------------------------------------------------------------- files

    @staticmethod
    def _view(view: int) -> str:
        return f'view-{view:04}'

    def _names(self) -> list[str]:
        return [*map(self._view, range(1, self.views + 1)), self.validation_name]

    def _path(self, name: str) -> Path:
        return self.folder / f'{name}.safetensors'

    def _shape(self, name: str) -> tuple[int, int, torch.dtype]:
        """Of validation logits nothing is rounded: they are few, and their order is the teacher's prediction."""
        validation = name == self.validation_name
        length = len(self.val if validation else self.train)
        return length, self.train.num_classes, torch.float32 if validation else self.dtype

    def _size(self, name: str) -> int:
        length, width, dtype = self._shape(name)
        return length * (width * dtype.itemsize + 4)

    def _rows(self, name: str, create: bool = True) -> Rows | None:
        if name not in self._open:
            length, width, dtype = self._shape(name)
            path = self._path(name)
            if not create and not path.exists():
                return None
            rows = Rows.create(path, length, width, dtype)
            if (rows.length, rows.width, rows.dtype) != (length, width, dtype):
                raise UserError(f'{path}: has another shape than cache.json says; delete it to have it filled anew')
            self._open[name] = rows
        return self._open[name]

    def _filled(self, name: str, length: int) -> bool:
        rows = self._rows(name, create=False)
        return rows is not None and bool(rows.filled()[:length].all())

    def _write(self, rows: Rows, indices: np.ndarray, values: Tensor) -> None:
        """Write, from a GPU once its copy is there, which no step waits for."""
        self.flush(1)
        if values.device.type != 'cuda':
            rows.write(indices, values)
            return
        host = torch.empty(values.shape, dtype=values.dtype, pin_memory=True).copy_(values, non_blocking=True)
        event = torch.cuda.Event()
        event.record()
        self._pending.append((event, rows, indices, host))

    def flush(self, keep: int = 0) -> None:
        """Write what has been put off, but for the newest ``keep`` batches."""
        while len(self._pending) > keep:
            event, rows, indices, host = self._pending.pop(0)
            event.synchronize()
            rows.write(indices, host)

    # ----------------------------------------------------------------------------------------------------- what it is

    def view_of(self, epoch: int) -> int:
        """Whose images an epoch sees: epoch (e - 1) mod K + 1."""
        return (epoch - 1) % self.views + 1

    def logits(self, epoch: int, indices: Tensor, target: Tensor, ask: Callable[[], Tensor] | None = None) -> Tensor:
        """Logits of a batch, from the disk or of the teacher; what it says is kept.

        Args:
            epoch: 1-based.
            indices: of the images in the dataset, `[B]`, on the CPU.
            target: their classes, `[B]`.
            ask: gives the teacher's logits `[B, C]`; None where there is no teacher.

        Returns:
            `[B, C]`, float32, on the target's device.

        Raises:
            SampleError: where a row is damaged and there is no teacher to ask.
            UserError: where rows cannot be written.
        """
        rows, where = self._rows(self._view(self.view_of(epoch))), indices.numpy()
        found = rows.read(where)
        if found is not None:
            if target.device.type == 'cuda':
                found = found.pin_memory()
            return found.to(target.device, non_blocking=True).float()
        if ask is None:
            raise SampleError(
                f'{rows.path}: a row is missing or damaged, and the teacher was not loaded, as the cache seemed '
                'complete; delete this file to have it filled anew '
                f'(`timm-rld cache verify {self.folder}` lists what is damaged)'
            )
        stored = rounded(ask().float(), target, self.dtype)
        self._write(rows, where, stored)
        if stored.device.type == 'cpu' and (found := rows.read(where)) is not None:
            stored = found  # a row that was there stays, whatever batch it came from
        return stored.float()

    def end_epoch(
        self, epoch: int, left_out: Sequence[int], dataset: ReplayDataset, ask: Callable[[Tensor], Tensor] | None
    ) -> None:
        """Write what has been put off; and ask about the images that the epoch left out (an incomplete last batch that
        batch norm cannot take), since a later one with the same view will not.

        Args:
            left_out: their indices.
            dataset: key (view, index) → (pixels, target, index).
            ask: pixels → the teacher's logits.
        """
        self.flush()
        view = self.view_of(epoch)
        if not left_out or ask is None or epoch != view or not self.accelerator.is_main_process:
            return
        pixels, target, indices = zip(*(dataset[view, index] for index in left_out))
        target = torch.tensor(target, device=self.accelerator.device)
        batch = torch.stack([torch.as_tensor(p) for p in pixels]).to(self.accelerator.device)
        self.logits(epoch, torch.tensor(indices), target, lambda: ask(batch))
        self.flush()

    def keep_validation(self, indices: Tensor, target: Tensor, logits: Tensor) -> None:
        """Write the validation logits of a batch."""
        self._write(self._rows(self.validation_name), indices.numpy(), logits.detach().float())

    def end_validation(self, top1: float, digest: str | None, folded: int) -> None:
        """All validation logits have been kept; called on every process.

        Args:
            top1: of the teacher, percent.
            digest: of its weights, for results.json.
            folded: how many of its batch norms are folded.
        """
        self.flush()
        self.accelerator.wait_for_everyone()
        found = dict(facts=self.validation_facts, teacher_top1=top1, teacher_sha256=digest, folded_batch_norms=folded)

        def add() -> None:
            self.body = read_body(self.folder)  # another run may have added to it
            self.body['validation'][self.validation_name] = found
            with writing(f'--teacher-cache: {self.folder}'):
                self._write_body()

        main_only(self.accelerator, add)
        self.body['validation'][self.validation_name] = found
        self.validated = True

    def validation(self, indices: Sequence[int]) -> tuple[float, Tensor, str | None]:
        """What the teacher said of the validation split: its top-1 (percent), its predicted classes for the given
        images, the digest of its weights.

        Raises:
            UserError: where a row is damaged.
        """
        rows, found = self._rows(self.validation_name), self.body['validation'][self.validation_name]
        logits = rows.read(np.asarray(indices, dtype=np.int64))
        if logits is None:
            raise UserError(f'{rows.path}: a row is damaged; delete this file to have it filled anew')
        return found['teacher_top1'], logits.argmax(dim=1), found['teacher_sha256']


def read_body(folder: Path) -> dict[str, Any]:
    """What cache.json says.

    Raises:
        UserError: where there is none, or it is damaged.
    """
    file = folder / 'cache.json'
    try:
        body = json.loads(file.read_text(encoding='utf-8'))
        kinds = {'facts': dict, 'settings': str, 'data_config': dict, 'validation': dict}
        if not all(isinstance(body.get(name), kind) for name, kind in kinds.items()):
            raise ValueError
    except FileNotFoundError as e:
        raise UserError(f'{folder}: not a teacher cache (no cache.json)') from e
    except OSError as e:
        raise UserError(f'{file}: cannot be read ({e.strerror})') from e
    except (ValueError, TypeError, AttributeError) as e:
        raise UserError(f'{file}: is damaged; delete {folder} to have it filled anew') from e
    return body


def digest_of(facts: dict[str, Any]) -> str:
    """Short."""
    return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()[:8]


def _from_anywhere(config: Config) -> Config:
    """The settings with paths that do not depend on the folder a program is started in."""
    paths = {}
    for name in ('data_dir', 'teacher_checkpoint', 'teacher_class_map', 'class_map'):
        value = getattr(config, name)
        if value and os.path.exists(os.path.expanduser(value)):
            paths[name] = os.path.abspath(os.path.expanduser(value))
    for name in ('dataset', 'teacher', 'student'):
        scheme, separator, rest = (getattr(config, name) or '').partition('/' if name == 'dataset' else ':')
        if rest and os.path.exists(os.path.expanduser(rest)):
            paths[name] = scheme + separator + os.path.abspath(os.path.expanduser(rest))
    return dataclasses.replace(config, **paths)


def _bytes(count: float) -> str:
    for unit in ('B', 'kB', 'MB', 'GB', 'TB'):
        if count < 1000 or unit == 'TB':
            break
        count /= 1000
    return f'{count:.3g} {unit}'
