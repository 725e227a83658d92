"""Replay: every random number of the data comes from (seed, epoch, index) or (seed, epoch).

From this follow exact resume at any batch, the same run whatever the number of workers, and the same global batches
whatever the number of processes. The epoch travels with each index, from the sampler through the loader's queue, so it
reaches persistent workers too.
"""

from __future__ import annotations

import contextlib
import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset, IterableDataset, Sampler, get_worker_info

from ..errors import SampleError
from .sources import Source
from .transforms import DraftTransform

# What a derived seed is for, so that no two uses share a stream.
SAMPLE, ORDER, MIX, STREAM, STREAM_SAMPLE, REPLACEMENT = range(6)


def derive_seed(*key: int) -> int:
    """A 64-bit seed from a key of non-negative integers; any change of the key gives an unrelated seed."""
    return int(np.random.SeedSequence(key).generate_state(1, np.uint64)[0])


def seed_generators(*key: int) -> None:
    """From here on Python's, NumPy's and torch's CPU generators follow from ``key``; timm's transforms draw from all
    three."""
    seed = derive_seed(*key)
    random.seed(seed)
    np.random.seed(seed & 0xFFFFFFFF)
    torch.random.default_generator.manual_seed(seed & 0x7FFFFFFFFFFFFFFF)


@contextlib.contextmanager
def keep_generators() -> Iterator[None]:
    """After the block the three generators go on as before it (without workers dropout shares torch's)."""
    python, numpy, torch_ = random.getstate(), np.random.get_state(), torch.random.get_rng_state()
    try:
        yield
    finally:
        random.setstate(python)
        np.random.set_state(numpy)
        torch.random.set_rng_state(torch_)


@contextlib.contextmanager
def seeded(*key: int) -> Iterator[None]:
    """Within the block the generators follow from ``key``; afterwards they go on as before."""
    with keep_generators():
        seed_generators(*key)
        yield


class ReplayDataset(Dataset):
    """An indexable split: key (epoch, index) → (uint8 pixels `[C, H, W]`, target, index).

    Args:
        source: the split.
        transform: PIL image → uint8 tensor. A :class:`DraftTransform` also decodes.
        seed: of the run; None if the transform is not random.

    Attributes:
        bad_images: a list to add images to that cannot be read, while another takes their place; None: they are errors.
    """

    def __init__(self, source: Source, transform: Callable[[Any], Tensor], seed: int | None) -> None:
        self.source, self.transform, self.seed = source, transform, seed
        self.draft = transform if isinstance(transform, DraftTransform) else None
        self.bad_images: Path | None = None

    def __getitem__(self, key: tuple[int, int]) -> tuple[Tensor, int, int]:
        with keep_generators():
            return self._sample(*key)

    def __getitems__(self, keys: list[tuple[int, int]]) -> list[tuple[Tensor, int, int]]:
        # A batch, as torch's loader asks for it: setting the generators back costs more than augmenting a small image.
        with keep_generators():
            return [self._sample(*key) for key in keys]

    def _sample(self, epoch: int, index: int) -> tuple[Tensor, int, int]:
        key = (epoch, index)
        try:
            image, target = self._read(index, key)
        except SampleError as e:
            if self.bad_images is None:
                raise
            image, target = self._replacement(epoch, index, e)
        if self.draft is not None:
            return self.draft.rest(image), target, index
        self._seed(key)
        return self.transform(image), target, index

    def _read(self, index: int, key: tuple[int, int]) -> tuple[Any, int]:
        """Image ``index``; a draft cuts it by the random numbers of ``key``, of which the rest follow in the rest."""
        if self.draft is None:
            return self.source.read(index)

        def decode(image: Any) -> Any:
            self._seed(key)
            return self.draft.decode(image)

        return self.source.read(index, decode)

    def _seed(self, key: tuple[int, int]) -> None:
        if self.seed is not None:
            seed_generators(SAMPLE, self.seed, *key)

    def _replacement(self, epoch: int, index: int, error: SampleError) -> tuple[Any, int]:
        """Another image, drawn by (seed, epoch, index); a line in the list says so."""
        line = f'epoch {epoch}: {" ".join(str(error).split())}\n'
        try:
            with self.bad_images.open('a', encoding='utf-8', errors='backslashreplace') as f:
                f.write(line)  # short lines at the end of a file stay whole
        except OSError as e:
            raise SampleError(f'{self.bad_images} cannot be written ({e.strerror}); {error}') from e
        generator = np.random.default_rng(derive_seed(REPLACEMENT, self.seed or 0, epoch, index))
        for other in generator.integers(len(self), size=100).tolist():
            with contextlib.suppress(SampleError):
                return self._read(other, (epoch, index))
        raise SampleError(f'{error}; and a hundred others in its place neither')

    def __len__(self) -> int:
        return len(self.source)


class ReplayStream(IterableDataset):
    """A streamed split. Its order is that of timm's reader; the "index" is a sample's place in its worker's stream, so
    replay holds for the same number of processes and workers, from the start of an epoch."""

    def __init__(self, source: Source, transform: Callable[[Any], Tensor], seed: int | None, rank: int = 0) -> None:
        self.source, self.transform, self.seed, self.rank = source, transform, seed, rank
        self.epoch = 0

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch
        self.source.dataset.set_epoch(epoch)

    def __iter__(self) -> Iterator[tuple[Tensor, int, int]]:
        worker = get_worker_info()
        worker_id = worker.id if worker else 0
        for place, (image, target) in enumerate(self.source.dataset):
            image = image.convert(self.source.image_mode)
            if self.seed is None:
                yield self.transform(image), int(target), place
                continue
            with seeded(STREAM_SAMPLE, self.seed, self.epoch, self.rank, worker_id, place):
                view = self.transform(image)
            yield view, int(target), place

    def __len__(self) -> int:
        return len(self.source)


@dataclass(frozen=True)
class Step:
    """One batch as this process sees it.

    Attributes:
        count: samples of this process that count in the batch (0 where it only takes part).
        group: samples of the whole accumulation group, over all processes and batches.
        last: whether it ends its accumulation group.
    """

    count: int
    group: int
    last: bool


class ReplaySampler(Sampler[list[tuple[int, int]]]):
    """Batches of keys (view, index), the view being the epoch unless said otherwise: a permutation of (seed, epoch),
    cut into global batches, then into processes.

    A global batch is ``batch_size × world`` samples; ``accum`` of them make one optimizer step. The last global batch
    of an epoch may be smaller: it is split evenly, and a process that gets none of it repeats one sample, which counts
    nothing. Without ``shuffle`` the order is that of the dataset, and nothing is repeated.

    Args:
        length: of the dataset.
        batch_size: per process.
        min_batch: a last global batch with fewer samples than this for some process is left out (2 for a network with
            batch norm, which cannot train on a single sample).
    """

    def __init__(
        self,
        length: int,
        batch_size: int,
        *,
        seed: int = 0,
        shuffle: bool = True,
        rank: int = 0,
        world: int = 1,
        accum: int = 1,
        min_batch: int = 0,
    ) -> None:
        self.length = self.dataset_length = length
        self.batch_size, self.seed, self.shuffle = batch_size, seed, shuffle
        self.rank, self.world, self.accum = rank, world, accum
        self.epoch = self.view = self.start = 0
        self.global_batch = batch_size * world
        rest = length % self.global_batch
        if rest and rest // world < min_batch and length > self.global_batch:
            self.length -= rest

    def set_epoch(self, epoch: int, start: int = 0, view: int | None = None) -> None:
        """The next iteration gives epoch ``epoch`` (1-based), from its batch ``start`` (0-based) on.

        Args:
            view: the epoch whose images are seen (in the order of this one); None for its own.
        """
        self.epoch, self.start, self.view = epoch, start, epoch if view is None else view

    def __len__(self) -> int:
        return -(-self.length // self.global_batch)

    def _part(self, batch: int) -> tuple[int, int]:
        """Start and end, in the epoch's order, of this process's part of a global batch."""
        first = batch * self.global_batch
        n = min(self.global_batch, self.length - first)
        each, more = divmod(n, self.world)
        begin = first + self.rank * each + min(self.rank, more)
        return begin, begin + each + (self.rank < more)

    def step(self, batch: int) -> Step:
        """What batch number ``batch`` (0-based) of the epoch counts, without reading it."""
        begin, end = self._part(batch)
        group_first = batch // self.accum * self.accum * self.global_batch
        group_last = min(group_first + self.accum * self.global_batch, self.length)
        return Step(end - begin, group_last - group_first, (batch + 1) % self.accum == 0 or batch + 1 == len(self))

    def _order(self) -> Sequence[int]:
        if not self.shuffle:
            return range(self.dataset_length)
        generator = torch.Generator().manual_seed(derive_seed(ORDER, self.seed, self.epoch) & 0x7FFFFFFFFFFFFFFF)
        return torch.randperm(self.dataset_length, generator=generator).tolist()

    def left_out(self) -> Sequence[int]:
        """Images that the epoch leaves out (see ``min_batch``)."""
        return self._order()[self.length :] if self.length < self.dataset_length else ()

    def indices(self) -> list[int]:
        """Images of this process, in order."""
        order = self._order()
        parts = (self._part(batch) for batch in range(self.start, len(self)))
        return [order[i] for begin, end in parts for i in range(begin, end)]

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        order = self._order()
        for batch in range(self.start, len(self)):
            begin, end = self._part(batch)
            if begin == end and self.shuffle:
                begin, end = batch * self.global_batch, batch * self.global_batch + 1
            if begin < end:
                yield [(self.view, i) for i in order[begin:end]]
