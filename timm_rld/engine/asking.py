"""Asking a closed teacher: about the next batches while this one trains, and no more than the budget allows."""

from __future__ import annotations

import contextlib
import queue
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent import futures
from concurrent.futures import Future
from typing import TYPE_CHECKING, Any

import torch
from accelerate import Accelerator
from accelerate.utils import gather_object
from torch import Tensor

from ..data import Loader, Mixup, Source
from ..data.loader import Batch
from ..data.replay import ReplayDataset
from ..errors import UserError
from ..pairing import ClosedTeacher, QueryTeacher, asked_about
from .state import TrainState

if TYPE_CHECKING:
    from .fit import Pauses

Numbered = tuple[int, Batch]
_SHOWN = 8  # images that a message names


@contextlib.contextmanager
def asking(state: TrainState, loader: Loader, mixup: Mixup, pauses: Pauses) -> Iterator[Iterable[Numbered]]:
    """Give the rest of an epoch's batches, with their numbers. A teacher behind a function (:class:`QueryTeacher`) is
    asked about each before it is given, and about those that follow while it trains (as many as its ``workers``): in
    the same order and with the same answers, however many there are at once.

    Args:
        pauses: where the budget is spent or no answer comes, it writes a checkpoint and ends the run.

    Raises:
        Stopped: where `--max-queries` does not allow the next step.
        UserError: on every process, where no answer comes to one.
    """
    teacher = state.task.teacher
    if not isinstance(teacher, ClosedTeacher) or not (teacher.waits or teacher.queries.limit):
        yield enumerate(loader, state.batch)
        return
    budget = Budget(teacher, state)
    groups = _groups(loader, state.batch)
    if not isinstance(teacher, QueryTeacher):
        yield _within(budget, groups, pauses)
        return
    ahead = Ahead(teacher, state, loader.source, mixup)
    state.task.cache = ahead
    try:
        yield _answered(ahead, budget, groups, pauses)
    finally:
        state.task.cache = ahead.cache
        ahead.close()


def _groups(loader: Loader, start: int) -> Iterator[list[Numbered]]:
    """The batches of an epoch by accumulation group: between two groups a checkpoint can be written."""
    group: list[Numbered] = []
    for number, batch in enumerate(loader, start):
        group.append((number, batch))
        if loader.step(number).last:
            yield group
            group = []


class Budget:
    """Allows an accumulation group where all processes together stay within `--max-queries`; called on every process,
    for each group in turn.

    Attributes:
        used: images that have been asked about, on all processes, those of the groups that were allowed included.
        needed: by the last group that was asked for.
        spent: whether that one was not allowed.
    """

    def __init__(self, teacher: ClosedTeacher, state: TrainState) -> None:
        self.limit, self.state = teacher.queries.limit, state
        self.used = total_queries(teacher, state.accelerator) if self.limit is not None else 0
        self.needed, self.spent = 0, False

    def allows(self, group: list[Numbered]) -> bool:
        """Return whether a group can be asked about. What a cache has an answer for needs no query."""
        if self.limit is None:
            return True
        cache, epoch = self.state.task.cache, self.state.epoch
        cache = cache.cache if isinstance(cache, Ahead) else cache
        mine = sum(len(b[2]) if cache is None else cache.missing(epoch, b[2]) for _, b in group)
        self.needed = sum_over_processes(mine, self.state.accelerator)
        self.spent = self.used + self.needed > self.limit
        self.used += 0 if self.spent else self.needed
        return not self.spent


def _within(budget: Budget, groups: Iterator[list[Numbered]], pauses: Pauses) -> Iterator[Numbered]:
    for group in groups:
        if not budget.allows(group):
            pauses.out_of_queries(budget.used, budget.needed)
        yield from group


def _answered(ahead: Ahead, budget: Budget, groups: Iterator[list[Numbered]], pauses: Pauses) -> Iterator[Numbered]:
    """Give the batches of each group once all its answers are there; those of the next are asked for by then."""
    asked: deque[list[Numbered]] = deque()

    def ask_next() -> bool:
        group = None if budget.spent else next(groups, None)
        if group is None or not budget.allows(group):
            return False
        for number, batch in group:
            ahead.ask(number, batch)
        asked.append(group)
        return True

    while asked or ask_next():
        group = asked.popleft()
        ahead.state.timer.lap('data')
        ahead.wait(group, pauses)
        ahead.state.timer.lap('teacher')
        while sum(map(len, asked)) < ahead.teacher.workers and ask_next():
            pass
        yield from group
    if budget.spent:
        pauses.out_of_queries(budget.used, budget.needed)


class Ahead:
    """Answers that are asked for by threads, and handed to the task in the order of the batches: it stands before the
    cache of the task (:class:`timm_rld.task.CachedLogits`), which keeps them if there is one.

    The threads do not keep the program from ending, as those of :mod:`concurrent.futures` would.

    Args:
        source: of the images, whose names messages show.
    """

    def __init__(self, teacher: QueryTeacher, state: TrainState, source: Source, mixup: Mixup) -> None:
        self.teacher, self.state, self.source, self.mixup = teacher, state, source, mixup
        self.cache: Any = state.task.cache
        self.futures: dict[int, Future[Tensor]] = {}
        self.ready: deque[Tensor] = deque()
        self.jobs: queue.SimpleQueue[tuple[Future[Tensor], Callable[[], Tensor]] | None] = queue.SimpleQueue()
        self.threads = max(teacher.workers, 1)
        teacher.stopping.clear()
        for _ in range(self.threads):
            threading.Thread(target=self._work, daemon=True, name='ask').start()

    def _work(self) -> None:
        while (job := self.jobs.get()) is not None:
            future, function = job
            if not future.set_running_or_notify_cancel():
                continue
            try:
                future.set_result(function())
            except BaseException as e:
                future.set_exception(e)

    def ask(self, number: int, batch: Batch) -> None:
        """Ask about a batch; a thread does."""
        pixels, target, indices = batch
        epoch, device = self.state.epoch, self.state.accelerator.device
        if self.mixup.active:  # on the device, as the step does it
            pixels = self.mixup(pixels.to(device), target.to(device), epoch, number)[0].cpu()
        with self.state.accelerator.autocast():  # as the step makes them of noise
            pixels = self.state.task.images(pixels)

        def compute(chosen: Tensor | None = None) -> Tensor:
            with asked_about(self._named(epoch, number, indices if chosen is None else indices[chosen])):
                return self.teacher(pixels if chosen is None else pixels[chosen])

        def answer() -> Tensor:
            rows = compute() if self.cache is None else self.cache.logits(epoch, indices, target, compute)
            return rows.to(device)

        future: Future[Tensor] = Future()
        self.futures[number] = future
        self.jobs.put((future, answer))

    def _named(self, epoch: int, number: int, indices: Tensor) -> str:
        return f'{name_images(self.source, indices.tolist())} (epoch {epoch}, batch {number + 1})'

    def wait(self, group: list[Numbered], pauses: Pauses) -> None:
        """Wait for the answers for a group."""
        error: UserError | None = None
        for number, _ in group:
            future = self.futures[number]
            while not future.done():
                pauses.while_waiting()
                with contextlib.suppress(futures.TimeoutError):  # which is not Python's before 3.11
                    future.exception(timeout=0.5)
            if isinstance(future.exception(), UserError):
                error = error or future.exception()  # type: ignore[assignment]
            else:
                self.ready.append(future.result())
            del self.futures[number]
        errors = [str(error)] if error else []
        if self.state.accelerator.num_processes > 1:
            errors = gather_object(errors)
        if errors:
            pauses.no_answer(errors[0])

    def logits(
        self, epoch: int, indices: Tensor, target: Tensor, compute: Callable[..., Tensor] | None = None
    ) -> Tensor:
        """Return the answers for the next batch."""
        return self.ready.popleft()

    def flush(self) -> None:
        if self.cache is not None:
            self.cache.flush()

    def missing(self, epoch: int, indices: Tensor) -> int:
        return len(indices) if self.cache is None else self.cache.missing(epoch, indices)

    def end_epoch(
        self, epoch: int, left_out: Sequence[int], dataset: ReplayDataset, compute: Callable[[Tensor], Tensor] | None
    ) -> None:
        if self.cache is not None:
            self.cache.end_epoch(epoch, left_out, dataset, compute)

    def close(self) -> None:
        """End the threads. Answers that are on their way are waited for where a cache keeps them; no call is
        repeated."""
        self.teacher.stopping.set()
        for future in self.futures.values():
            future.cancel()
        for _ in range(self.threads):
            self.jobs.put(None)
        until = time.monotonic() + (self.teacher.timeout or 60.0)
        for future in self.futures.values() if self.cache is not None else ():
            if not future.cancelled():
                with contextlib.suppress(Exception):
                    future.exception(timeout=max(0.0, until - time.monotonic()))


def name_images(source: Source, indices: list[int]) -> str:
    """Return a few words that name some images of a split: their files, or their places in it."""
    shown = [f'{i}' if source.streamed or (key := source.key(i)) == str(i) else key for i in indices[:_SHOWN]]
    more = ', …' if len(indices) > _SHOWN else ''
    return f'{len(indices)} image(s) of {source.split}: {", ".join(shown)}{more}'


def total_queries(teacher: ClosedTeacher, accelerator: Accelerator) -> int:
    """Return the images that all processes have asked about."""
    return sum_over_processes(teacher.queries.count, accelerator)


def sum_over_processes(value: int, accelerator: Accelerator) -> int:
    """Return the sum of a number over the processes. Waits for all of them."""
    if accelerator.num_processes == 1:
        return value
    return int(accelerator.reduce(torch.tensor(value, device=accelerator.device), 'sum'))
