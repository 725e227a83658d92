"""Closed teachers: an image goes in, probabilities or a class come out, and nothing else can be had of them.

:class:`TeacherQuery` is what answers. :class:`ClosedTeacher` puts it in the place of a :class:`Teacher`: what it
returns for probabilities are log-probabilities, which are the logits up to a constant of each row, and for classes
one-hot rows. It counts the images that it was asked about.
"""

from __future__ import annotations

import contextlib
import contextvars
import functools
import importlib
import inspect
import operator
import os
import queue
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from ..errors import SampleError, UsageError, UserError
from .teacher import Teacher
from .weights import weights_digest

FLOOR = torch.finfo(torch.float32).tiny  # the least probability that log() is taken of, 1.18e-38
_SUM_IS_OFF_BY = 1e-3
_LONGEST_WAIT = 60.0  # seconds between two attempts
_about: contextvars.ContextVar[str] = contextvars.ContextVar('about', default='')


class TeacherQuery(Protocol):
    """What answers for a closed teacher: any function of this form, or an object with such a `__call__`.

    It is called from threads, by several at once where `--query-workers` says so, and may raise any exception: then it
    is asked again. The answer for an image must not depend on the images beside it.
    """

    def __call__(self, images: NDArray[np.uint8], /) -> NDArray[Any]:
        """Answer for some images.

        Args:
            images: uint8 `[B, H, W, 3]`, RGB (grey: `[B, H, W, 1]`), as the student sees them, not normalised.

        Returns:
            Probabilities `[B, C]` (floating, each row sums to 1), or classes `[B]` (integers from 0 to C - 1).
        """
        ...


class QueryError(SampleError):
    """A closed teacher that does not answer, or not with what was asked for."""


@contextlib.contextmanager
def asked_about(images: str) -> Iterator[None]:
    """Within the block, messages of a :class:`ClosedTeacher` say what it was asked about: `epoch 1, batch 2: a.png`."""
    token = _about.set(images)
    try:
        yield
    finally:
        _about.reset(token)


def soft_rows(probabilities: Tensor) -> Tensor:
    """log(max(p, 1.18e-38)) `[B, C]` of probabilities: logits up to a constant of each row, which no criterion but
    `lr` sees. Classes whose probability is below that floor tie."""
    return probabilities.clamp_min(FLOOR).log()


def hard_rows(classes: Tensor, num_classes: int) -> Tensor:
    """One-hot rows, float32 `[B, C]`, of classes int64 `[B]`."""
    rows = torch.zeros(len(classes), num_classes, device=classes.device)
    return rows.scatter_(1, classes.unsqueeze(1), 1.0)


class Queries:
    """Counts the images that a closed teacher has answered for, and keeps to a budget.

    Args:
        limit: of all processes of the run together; None: no limit.

    Attributes:
        count: of this process, those of earlier processes of the run included (:meth:`keep_in`).
    """

    def __init__(self, limit: int | None = None) -> None:
        self.limit, self.count = limit, 0
        self._lock = threading.Lock()
        self._file = -1

    def add(self, images: int) -> None:
        """Count some images."""
        with self._lock:
            self.count += images
            if self._file >= 0:
                os.pwrite(self._file, f'{self.count:20}\n'.encode(), 0)

    def check(self, images: int) -> None:
        """Raise QueryError where this process alone would pass the limit with so many images more. What all processes
        ask together is checked before they do so, by whoever asks."""
        if self.limit is not None and self.count + images > self.limit:
            raise QueryError(f'--max-queries {self.limit}: {self.count} used, {images} more needed; raise it')

    def keep_in(self, file: Path) -> None:
        """From now on keep the number in a file, and go on from the one that is in it.

        Raises:
            UserError: where it cannot be written, or holds no number.
        """
        try:
            self._file = os.open(file, os.O_RDWR | os.O_CREAT, 0o666)
            before = int(os.pread(self._file, 64, 0) or b'0')
        except (OSError, ValueError) as e:
            raise UserError(f'{file}: cannot be used to count queries in ({e})') from e
        self.add(before)

    def __del__(self) -> None:
        if self._file >= 0:
            os.close(self._file)


class ClosedTeacher(nn.Module):
    """Stands in for a :class:`Teacher`: pixels in 0..255, uint8 or floating, `[B, C, H, W]` → rows `[B, C]`, float32.

    An image is uint8 here, as a service would get it: floating pixels are rounded.

    Args:
        ask: uint8 pixels `[B, C, H, W]` → rows `[B, C]`.
        answers: `soft`: the rows are log(max(p, 1.18e-38)); `hard`: they are one-hot, and argmax gives the class.
        name: for messages.
        limit: see :class:`Queries`.
        digest: what stands for the teacher's weights, where they are known.
        compile: compiles what answers.
        move: takes what answers to another device or dtype, as `nn.Module._apply` does.

    Attributes:
        queries: the images that it has answered for.
        waits: whether an answer comes after a while, from elsewhere, so that training may go on meanwhile.
    """

    waits = False

    def __init__(
        self,
        ask: Callable[[Tensor], Tensor],
        answers: str,
        name: str = 'teacher',
        limit: int | None = None,
        digest: str | None = None,
        compile: Callable[..., None] | None = None,
        move: Callable[[Callable[[Tensor], Tensor]], object] | None = None,
    ) -> None:
        super().__init__()
        if answers not in ('soft', 'hard'):
            raise ValueError(f"answers must be 'soft' or 'hard', got {answers!r}")
        self.answers, self.name, self.digest, self.queries = answers, name, digest, Queries(limit)
        self._ask, self._compile, self._move = ask, compile, move

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> ClosedTeacher:
        if self._move is not None:
            self._move(fn)
        return super()._apply(fn, recurse)

    def compile(self, **kwargs: Any) -> None:
        """Compile what answers, if that can be done."""
        if self._compile is not None:
            self._compile(**kwargs)

    def forward(self, pixels: Tensor) -> Tensor:
        """Ask about a batch.

        Raises:
            QueryError: where no answer comes, it is none, or the budget is spent.
        """
        self.queries.check(len(pixels))
        if pixels.is_floating_point():
            pixels = pixels.round().clamp(0, 255).to(torch.uint8)
        rows = self._ask(pixels)
        self.queries.add(len(pixels))
        return rows


def close_teacher(teacher: Teacher, answers: str, limit: int | None = None) -> ClosedTeacher:
    """Close an open teacher: from now on it gives probabilities (`soft`) or a class (`hard`) alone.

    Args:
        limit: see :class:`Queries`.
    """

    def ask(pixels: Tensor) -> Tensor:
        logits = teacher(pixels).float()
        if answers == 'soft':
            return soft_rows(logits.softmax(dim=1))
        return hard_rows(logits.argmax(dim=1), logits.shape[1])

    def compile(**kwargs: Any) -> None:
        teacher.compile(**kwargs)

    return ClosedTeacher(ask, answers, teacher.name, limit, weights_digest(teacher), compile, teacher._apply)


class QueryTeacher(ClosedTeacher):
    """A closed teacher behind a Python function. It needs neither weights nor timm.

    Args:
        query: see :class:`TeacherQuery`.
        num_classes: C of the dataset.
        answers: `soft` or `hard`; of probabilities, `hard` takes the highest.
        name: for messages.
        retries: how often a call that fails is repeated, after 1, 2, 4, … seconds.
        timeout: seconds that a call may take; 0: any time.
        limit: see :class:`Queries`.
        workers: batches that :func:`timm_rld.engine.fit` asks about while the steps before them train; 0: none.
        log: prints a line about each call that failed.

    Example:
        >>> teacher = QueryTeacher(my_service.ask, num_classes=10)
        >>> task = DistillationTask(student, teacher, 'rld')
    """

    waits = True
    first_wait = 1.0  # seconds

    def __init__(
        self,
        query: TeacherQuery,
        num_classes: int,
        answers: str = 'soft',
        name: str = 'teacher',
        *,
        retries: int = 3,
        timeout: float = 60.0,
        limit: int | None = None,
        workers: int = 1,
        log: Callable[[str], object] = print,
    ) -> None:
        super().__init__(self._answer, answers, name, limit)
        self.num_classes, self.retries, self.timeout, self.log = num_classes, retries, timeout, log
        self.workers = workers
        self._query = lambda images: query(images)  # a module would become a part of this one
        self.stopping = threading.Event()  # once it is set no call is repeated

    def _answer(self, pixels: Tensor) -> Tensor:
        images = pixels.permute(0, 2, 3, 1).contiguous().cpu().numpy()
        answer = check_answer(self._call(images), len(images), self.num_classes, self.answers, self._where(images))
        rows = torch.from_numpy(answer)
        rows = soft_rows(rows) if self.answers == 'soft' else hard_rows(rows, self.num_classes)
        return rows.to(pixels.device)

    def _where(self, images: NDArray[np.uint8]) -> str:
        about = _about.get() or f'{len(images)} image(s)'
        return f'{self.name}: asked about {about}: '

    def _call(self, images: NDArray[np.uint8]) -> Any:
        """Return what the function does, called until it answers."""
        wait = self.first_wait
        for attempt in range(self.retries + 1):
            found, error = _in_time(functools.partial(self._query, images), self.timeout)
            if error is None:
                return found
            failed = f'{self._where(images)}{error}'
            if attempt == self.retries or self.stopping.is_set():
                asked = f'; attempt {attempt + 1} of {self.retries + 1} (--query-retries)' if self.retries else ''
                raise QueryError(failed + asked)
            self.log(f'note: {failed}; asking again in {wait:g} s')
            self.stopping.wait(wait)
            wait = min(2 * wait, _LONGEST_WAIT)
        raise AssertionError


def _in_time(function: Callable[[], Any], seconds: float) -> tuple[Any, str | None]:
    """Return what a function returns, and why it does not: it raised an exception, or took longer than so many seconds
    (then it is left to itself)."""
    done: queue.SimpleQueue[tuple[Any, str | None]] = queue.SimpleQueue()

    def run() -> None:
        try:
            done.put((function(), None))
        except Exception as e:
            text = ' '.join(str(e).split())[:200]
            done.put((None, f'{type(e).__name__}: {text}' if text else type(e).__name__))

    threading.Thread(target=run, daemon=True, name='query').start()
    try:
        return done.get(timeout=seconds or None)
    except queue.Empty:
        return None, f'no answer within {seconds:g} s (--query-timeout)'


def check_answer(answer: Any, images: int, num_classes: int, answers: str, where: str = '') -> NDArray[Any]:
    """Return the answer for some images as float32 `[B, C]` (`soft`) or int64 `[B]` (`hard`).

    Args:
        where: begins the message.

    Raises:
        QueryError: where it is neither probabilities nor classes, of other images or classes, or `soft` was asked for
            and classes came.
    """
    found = answer.detach().cpu().numpy() if isinstance(answer, Tensor) else np.asarray(answer)
    shape = f'{found.dtype} {list(found.shape)}'
    if found.ndim == 1 and found.dtype.kind in 'iu':
        if answers == 'soft':
            raise QueryError(f'{where}the answer is a class ({shape}), not probabilities; --black-box hard takes it')
        if found.shape != (images,):
            raise QueryError(f'{where}expected classes [{images}], got {shape}')
        if images and not 0 <= found.min() <= found.max() < num_classes:
            raise QueryError(f'{where}expected classes from 0 to {num_classes - 1}, got {found.min()} to {found.max()}')
        return found.astype(np.int64)
    if found.shape != (images, num_classes) or found.dtype.kind != 'f':
        either = '' if answers == 'soft' else f' or classes [{images}] of integers'
        raise QueryError(f'{where}expected floating-point probabilities [{images}, {num_classes}]{either}, got {shape}')
    if not np.isfinite(found).all():
        raise QueryError(f'{where}the probabilities hold NaN or infinity')
    if images and (found.min() < 0 or found.max() > 1 + _SUM_IS_OFF_BY):
        raise QueryError(f'{where}expected probabilities from 0 to 1, got {found.min():.4g} to {found.max():.4g}')
    sums = found.sum(axis=1, dtype=np.float64)
    if images and (off := np.abs(sums - 1)).max() > _SUM_IS_OFF_BY:
        raise QueryError(f'{where}expected rows that sum to 1, one sums to {sums[off.argmax()]:.4g}')
    return found.argmax(axis=1) if answers == 'hard' else found.astype(np.float32)


def load_query(path: str) -> TeacherQuery:
    """Return the function that `--teacher-query MODULE:FUNCTION` names. Modules are also sought in the working folder.

    Raises:
        UsageError: where there is none, or it does not take one argument.
    """
    flag = f'--teacher-query {path}'
    module, _, name = path.partition(':')
    if not module or not name:
        raise UsageError(f'{flag}: expected MODULE:FUNCTION, as in my_service:ask')
    if os.getcwd() not in sys.path:
        sys.path.append(os.getcwd())
    try:
        found = importlib.import_module(module)
    except Exception as e:
        text = ' '.join(str(e).split())[:200]
        raise UsageError(f'{flag}: {module} cannot be imported ({type(e).__name__}: {text})') from e
    try:
        function = operator.attrgetter(name)(found)
    except AttributeError as e:
        raise UsageError(f'{flag}: {module} has no {name}') from e
    if not callable(function):
        raise UsageError(f'{flag}: {name} is not a function but a {type(function).__name__}')
    try:
        signature = inspect.signature(function)
    except (TypeError, ValueError):  # of some built-in functions
        return function
    try:
        signature.bind(None)
    except TypeError as e:
        raise UsageError(f'{flag}: is called with the images alone, but takes {signature}') from e
    return function
