"""The cache of a run's teacher."""

from __future__ import annotations

import json
import os
import shutil
import threading
import weakref
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from torch import Tensor

from ..data import Source
from ..data.replay import ReplayDataset
from ..distributed import all_reduce_max, main_first, main_only
from ..errors import SampleError, UserError, writing
from ..files import write_atomic
from ..pairing import ClosedTeacher, Teacher, weights_digest, weights_file
from .key import FORMAT, CacheKey, difference, short_digest, teacher_digest
from .rows import DTYPES, Rows, rounded

try:
    import fcntl
except ImportError:  # Windows has none
    fcntl = None  # type: ignore[assignment]


class TeacherCache:
    """A teacher's logits on the images of a run's first K epochs, in a folder. Epoch e sees the images of epoch
    (e - 1) mod K + 1 again (its augmentation epoch), in an order of its own, so that the teacher has seen them already.

    What is read is what was written: logits are rounded to the file's dtype before they are used for the first time, so
    that a run's result does not depend on what the folder held when it started.

    Args:
        folder: is made if it does not exist.
        accelerator: of the run.
        train, val: the splits.
        data_config: the student's preprocessing.
        arguments: of :func:`create_teacher` (with its `name`), :func:`open_splits` and :func:`create_loaders`, by
            function: what the rows depend on, and what `timm-rld cache verify` builds again.
        depends_on: further settings that a training row depends on, by flag (:class:`CacheKey`).
        augmentation_epochs: K.
        dtype: `float16`, `bfloat16` or `float32`.
        epochs: of the run.
        train_teacher: whether the teacher is trained first, so that its weights are not known yet.

    Attributes:
        complete: whether nothing is left to be computed, so that the teacher need not be built.
        by_image: whether the teacher is a function that answers for each image alone (`--teacher-query`): of a batch it
            is asked about those images that there is no row of.
        validated: whether the validation rows are there.
        body: what cache.json holds; None until the teacher's weights are known.

    Raises:
        UserError: as :meth:`open`; for a streamed dataset.
    """

    def __init__(
        self,
        folder: str | Path,
        accelerator: Accelerator,
        train: Source,
        val: Source,
        data_config: dict[str, Any],
        *,
        arguments: dict[str, dict[str, Any]],
        depends_on: dict[str, Any],
        augmentation_epochs: int,
        dtype: str = 'float16',
        epochs: int = 0,
        train_teacher: bool = False,
    ) -> None:
        if train.streamed:
            raise UserError(
                f'--teacher-cache {folder}: {arguments["open_splits"]["dataset"]} is read as a stream, whose images '
                'have no index to keep a row by; use hfds/… or a folder, or leave the cache out'
            )
        self.accelerator, self.train, self.val = accelerator, train, val
        self.folder = Path(folder).expanduser()
        self.arguments, self.epochs, self.train_teacher = arguments, epochs, train_teacher
        self.augmentation_epochs, self.dtype = augmentation_epochs, DTYPES[dtype]
        self.key = CacheKey(arguments, depends_on, dtype, train, val, data_config, accelerator.mixed_precision)
        self.by_image = depends_on.get('--teacher-query') is not None
        self.complete = self.validated = False
        self.body: dict[str, Any] | None = None
        self._open: dict[str, Rows] = {}
        self._held: int | None = None
        self._pending: list[tuple[torch.cuda.Event, Rows, np.ndarray, Tensor]] = []
        self._threads = threading.RLock()  # a closed teacher's answers are written by the threads that ask
        self._check_folder()
        weights = None if train_teacher else self._weights_file()
        # together: where one process does not have the file, all wait until the teacher is built
        if self.by_image or not any(all_reduce_max(accelerator, weights is None)):
            self.open(weights)
            if self.complete:
                accelerator.print('  the teacher is not asked' if self.by_image else '  the teacher is not loaded')

    # ------------------------------------------------------------------------------------------------------- opening

    def _check_folder(self) -> None:
        """Check it before a teacher is trained."""
        try:
            there = (
                [p.name for p in self.folder.iterdir() if not p.name.startswith('.')] if self.folder.exists() else []
            )
        except OSError as e:
            raise UserError(f'--teacher-cache {self.folder}: cannot be written ({e.strerror})') from e
        if there and 'cache.json' not in there:
            raise UserError(f'--teacher-cache {self.folder}: is not empty and not a cache; name another folder')

    def _weights_file(self) -> Path | None:
        a = self.arguments['create_teacher']
        return None if self.by_image else weights_file(a['name'], a['checkpoint'])

    def open(self, weights: Path | None = None, teacher: Teacher | ClosedTeacher | None = None) -> None:
        """Find out what the folder holds, unless that is done; called on every process.

        Args:
            weights: the file of the teacher's weights, where it is not the published one.
            teacher: where it has been built: the digest of its weights is used if there is no file.

        Raises:
            UserError: where it holds logits of something else, cannot be written, or the disk has no room.
        """
        if self.body is not None:
            return
        weights = weights or self._weights_file()
        digest = '' if self.by_image else teacher_digest(weights, weights_digest(teacher))
        self.facts, self.validation_facts = self.key.training(digest), self.key.validation(digest)
        self.body = {
            'facts': self.facts, 'data_config': self.key.data_config, 'arguments': self.arguments,
            'depends_on': self.key.depends_on, 'train_teacher': self.train_teacher,
            'weights_file': weights and os.path.abspath(weights), 'validation': {},
        }  # fmt: skip
        self.validation_name = f'validation-{short_digest(self.validation_facts)}'
        main_first(self.accelerator, self._claim)
        epochs, filled = self.augmentation_epochs, 0
        for epoch in range(1, epochs + 1):
            filled += self._filled(self._name(epoch), len(self.train))
        validated = self.validation_name in self.body['validation']
        validated = validated and self._filled(self.validation_name, len(self.val))
        not_complete, not_validated = all_reduce_max(self.accelerator, filled < epochs, not validated)
        self.validated, self.complete = not not_validated, not (not_validated or not_complete)
        self._print_state(filled, weights)

    def _print_state(self, filled: int, weights: Path | None) -> None:
        size, epochs = sum(self._size(name) for name in self._names()), self.augmentation_epochs
        lines = [
            f'teacher cache {self.folder}: {epochs} augmentation epoch(s) of {len(self.train):,} images, '
            f'{self.train.num_classes} classes, {self.key.dtype}: {_bytes(size)}; '
            + ('complete' if self.complete else f'{filled} of {epochs} cached')
        ]
        if self.complete and self.train_teacher and weights:
            lines.append(f'  --teacher local-dir:{weights.parent} --teacher-epochs 0 would save training it')
        if filled == epochs and not self.complete and not self.validated:
            lines.append('  the teacher is loaded to be evaluated on the validation images as this student sees them')
        if epochs == self.epochs and not filled:
            lines.append(
                f'  as many augmentation epochs as epochs ({epochs}): this run computes the logits of every image '
                'anyway; the next with this teacher, data and seed does not'
            )
        self.accelerator.print('\n'.join(lines))

    def _claim(self) -> None:
        """Make the folder, or compare what it holds with what is wanted. Of runs that begin at once one makes it, the
        others compare. What a run left behind that never wrote a row does not bind the next."""
        file = self.folder / 'cache.json'
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            alone = self._lock()
            there = read_body(self.folder) if file.exists() else None
            found = difference(there['facts'], self.facts) if there else ''
            if found and not (alone and not any(self.folder.glob('epoch-*'))):
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
        """Share the folder with other runs for as long as this one lasts. Returns whether there is no other yet:
        then it is this one's alone until it shares it."""
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
        write_atomic(self.folder / 'cache.json', json.dumps(self.body, indent=1, ensure_ascii=False))

    # ---------------------------------------------------------------------------------------------------------- files

    @staticmethod
    def _name(augmentation_epoch: int) -> str:
        return f'epoch-{augmentation_epoch:04}'

    def _names(self) -> list[str]:
        return [*map(self._name, range(1, self.augmentation_epochs + 1)), self.validation_name]

    def _path(self, name: str) -> Path:
        return self.folder / f'{name}.safetensors'

    def _shape(self, name: str) -> tuple[int, int, torch.dtype]:
        """Return rows, classes and dtype of a file. Validation logits are not rounded: they are few, and their order is
        the teacher's prediction."""
        validation = name == self.validation_name
        length = len(self.val if validation else self.train)
        return length, self.train.num_classes, torch.float32 if validation else self.dtype

    def _size(self, name: str) -> int:
        length, width, dtype = self._shape(name)
        return length * (width * dtype.itemsize + 4)

    def _rows(self, name: str) -> Rows:
        if name not in self._open:
            length, width, dtype = self._shape(name)
            path = self._path(name)
            rows = Rows.create(path, length, width, dtype)
            if (rows.length, rows.width, rows.dtype) != (length, width, dtype):
                raise UserError(f'{path}: has another shape than cache.json says; delete it to have it computed again')
            self._open[name] = rows
        return self._open[name]

    def _filled(self, name: str, length: int) -> bool:
        there = name in self._open or self._path(name).exists()
        return there and bool(self._rows(name).filled()[:length].all())

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

    def augmentation_epoch(self, epoch: int) -> int:
        """Return the epoch whose images an epoch sees: (e - 1) mod K + 1."""
        return (epoch - 1) % self.augmentation_epochs + 1

    def logits(
        self, epoch: int, indices: Tensor, target: Tensor, compute: Callable[..., Tensor] | None = None
    ) -> Tensor:
        """Return the logits of a batch, from the disk or of the teacher; those of the teacher are cached.

        Args:
            epoch: 1-based.
            indices: of the images in the dataset, `[B]`, on the CPU.
            target: their classes, `[B]`.
            compute: returns the teacher's logits `[B, C]`, or, where each image is asked about alone (``by_image``),
                given the places of some images in the batch, theirs; None where there is no teacher.

        Returns:
            `[B, C]`, float32, on the target's device.

        Raises:
            SampleError: where a row is damaged and there is no teacher.
            UserError: where rows cannot be written.
        """
        name, where = self._name(self.augmentation_epoch(epoch)), indices.numpy()
        if self.by_image and compute is not None:
            of = target.cpu()
            asked = self._asked(name, indices, compute, lambda rows, i: rounded(rows, of[i], self.dtype))
            return asked.to(target.device).float()
        rows = self._rows(name)
        found = rows.read(where)
        if found is not None:
            if target.device.type == 'cuda':
                found = found.pin_memory()
            return found.to(target.device, non_blocking=True).float()
        if compute is None:
            raise SampleError(
                f'{rows.path}: a row is missing or damaged, and the teacher was not loaded, as the cache seemed '
                'complete; delete this file to have it computed again '
                f'(`timm-rld cache verify {self.folder}` lists what is damaged)'
            )
        there = rows.present(where)
        stored = rounded(compute().float(), target, self.dtype)
        if there.any():  # a row that was there stays, whatever batch it came from
            known = rows.read(where[there])
            assert known is not None, 'rows that were read can be read again'
            stored[torch.from_numpy(there).to(stored.device)] = known.to(stored.device)
        self._write(rows, where, stored)
        return stored.float()

    def _asked(
        self,
        name: str,
        indices: Tensor,
        compute: Callable[[Tensor], Tensor],
        stored: Callable[[Tensor, Tensor], Tensor],
    ) -> Tensor:
        """Return the rows of a batch, after asking about those images that there is none of. Several threads may.

        Args:
            name: of the file.
            compute: places of images in the batch → their answers.
            stored: (answers, places) → what is kept of them.
        """
        where = indices.numpy()
        with self._threads:
            rows = self._rows(name)
            absent = torch.from_numpy(np.flatnonzero(~rows.present(where)))
        if len(absent):
            answers = stored(compute(absent).cpu(), absent)
            with self._threads:
                rows.write(where[absent.numpy()], answers)
        with self._threads:
            found = rows.read(where)
        assert found is not None, 'rows that were written can be read'
        return found

    def missing(self, epoch: int, indices: Tensor) -> int:
        """Return about how many images of a batch the teacher would be asked."""
        where = indices.numpy()
        with self._threads:
            rows = self._rows(self._name(self.augmentation_epoch(epoch)))
            absent = sum(rows.read(where[i : i + 1]) is None for i in range(len(where)))
        return absent if self.by_image or not absent else len(where)

    def end_epoch(
        self, epoch: int, left_out: Sequence[int], dataset: ReplayDataset, compute: Callable[[Tensor], Tensor] | None
    ) -> None:
        """Write what has been put off, and the images that the epoch left out (an incomplete last batch that batch norm
        cannot take), since a later epoch that sees the same images will not leave out the same ones.

        Args:
            left_out: their indices.
            dataset: key (augmentation epoch, index) → (pixels, target, index).
            compute: pixels → the teacher's logits. A closed teacher with a budget is not asked.
        """
        self.flush()
        seen = self.augmentation_epoch(epoch)
        if not left_out or compute is None or epoch != seen or not self.accelerator.is_main_process:
            return
        if isinstance(compute, ClosedTeacher) and compute.queries.limit is not None:
            return  # no step needs them
        pixels, classes, indices = zip(*(dataset[seen, index] for index in left_out))
        target = torch.tensor(classes, device=self.accelerator.device)
        batch = torch.stack([torch.as_tensor(p) for p in pixels]).to(self.accelerator.device)

        def compute_some(chosen: Tensor | None = None) -> Tensor:
            return compute(batch if chosen is None else batch[chosen.to(batch.device)])

        self.logits(epoch, torch.tensor(indices), target, compute_some)
        self.flush()

    def first_answers(self) -> Tensor | None:
        """Return what :meth:`keep_first_answers` kept."""
        assert self.body is not None  # open() was called
        return None if self.body.get('answers') is None else torch.tensor(self.body['answers'])

    def keep_first_answers(self, rows: Tensor) -> None:
        """Keep a closed teacher's answers for a few images, by which it is known again."""
        assert self.body is not None  # open() was called
        self.body['answers'] = rows.tolist()
        with writing(f'--teacher-cache: {self.folder}'):
            self._write_body()

    def ask_validation(self, indices: Tensor, compute: Callable[[Tensor], Tensor]) -> Tensor:
        """Return a closed teacher's answers for a batch of validation images, after asking about those that there is no
        row of.

        Args:
            indices: `[B]`.
            compute: places of images in the batch → their answers.
        """
        return self._asked(self.validation_name, indices, compute, lambda rows, _: rows.float())

    def missing_validation(self) -> int:
        """Return how many validation images there is no row of, on this host."""
        return int((~self._rows(self.validation_name).filled()[: len(self.val)]).sum())

    def write_validation(self, indices: Tensor, target: Tensor, logits: Tensor) -> None:
        """Write the validation logits of a batch."""
        self._write(self._rows(self.validation_name), indices.numpy(), logits.detach().float())

    def end_validation(self, top1: float, macro: float, digest: str | None, folded: int) -> None:
        """Note that all validation logits have been written; called on every process.

        Args:
            top1, macro: of the teacher, percent.
            digest: of its weights, for results.json.
            folded: how many of its batch norms are folded.
        """
        self.flush()
        self.accelerator.wait_for_everyone()
        found = dict(
            facts=self.validation_facts, teacher_top1=top1, teacher_macro=macro, teacher_sha256=digest,
            folded_batch_norms=folded,
        )  # fmt: skip

        def add() -> None:
            self.body = read_body(self.folder)  # another run may have added to it
            self.body['validation'][self.validation_name] = found
            with writing(f'--teacher-cache: {self.folder}'):
                self._write_body()

        main_only(self.accelerator, add)
        assert self.body is not None  # open() was called
        self.body['validation'][self.validation_name] = found
        self.validated = True

    def validation(self, indices: Sequence[int]) -> tuple[float, float | None, Tensor, str | None]:
        """Return the teacher's top-1 and macro accuracy on the validation split (percent), its logits `[n, C]` on the
        given images, and the SHA-256 of its weights. Older caches hold no macro accuracy.

        Raises:
            UserError: where a row is damaged.
        """
        logits = self.validation_logits(indices)
        assert self.body is not None  # open() was called
        found = self.body['validation'][self.validation_name]
        return found['teacher_top1'], found.get('teacher_macro'), logits, found['teacher_sha256']

    def validation_logits(self, indices: Sequence[int]) -> Tensor:
        """Return the teacher's logits `[n, C]` on the given images of the validation split, float32, on the CPU.

        Raises:
            UserError: where a row is damaged.
        """
        rows = self._rows(self.validation_name)
        logits = rows.read(np.asarray(indices, dtype=np.int64))
        if logits is None:
            raise UserError(f'{rows.path}: a row is damaged; delete this file to have it computed again')
        return logits


def read_body(folder: Path) -> dict[str, Any]:
    """Return what cache.json holds.

    Raises:
        UserError: where there is none, it is damaged, or of another version.
    """
    file = folder / 'cache.json'
    try:
        body = json.loads(file.read_text(encoding='utf-8'))
        if (version := body['facts'].get('format')) != FORMAT:
            raise UserError(f'{folder}: is of another version (format {version}, not {FORMAT}); name another folder')
        kinds = dict.fromkeys(('facts', 'arguments', 'depends_on', 'data_config', 'validation'), dict)
        if not all(isinstance(body.get(name), kind) for name, kind in kinds.items()):
            raise ValueError
        if not {'open_splits', 'create_loaders', 'create_teacher'} <= set(body['arguments']):
            raise ValueError
    except FileNotFoundError as e:
        raise UserError(f'{folder}: not a teacher cache (no cache.json)') from e
    except OSError as e:
        raise UserError(f'{file}: cannot be read ({e.strerror})') from e
    except UserError:
        raise
    except (KeyError, ValueError, TypeError, AttributeError) as e:
        raise UserError(f'{file}: is damaged; delete {folder} to have it computed again') from e
    return body


def _bytes(count: float) -> str:
    for unit in ('B', 'kB', 'MB', 'GB', 'TB'):
        if count < 1000 or unit == 'TB':
            break
        count /= 1000
    return f'{count:.3g} {unit}'
