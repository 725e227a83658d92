"""The order of the images: a permutation of (seed, epoch), cut into batches and processes. torch's samplers would give
another order to another number of processes, and could not start in the middle of an epoch."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch.utils.data import Sampler

from ..seeds import ORDER, derive_seed


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
    """Batches of keys (augmentation epoch, index), the former being the epoch unless given otherwise: a permutation of
    (seed, epoch), cut into global batches, then into processes.

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
        self.epoch = self.augmentation_epoch = self.start = 0
        self.global_batch = batch_size * world
        rest = length % self.global_batch
        if rest and rest // world < min_batch and length > self.global_batch:
            self.length -= rest

    def set_epoch(self, epoch: int, start: int = 0, augmentation_epoch: int | None = None) -> None:
        """The next iteration gives epoch ``epoch`` (1-based), from its batch ``start`` (0-based) on.

        Args:
            augmentation_epoch: the epoch whose augmented images are seen (in the order of this one); None for its own.
        """
        self.epoch, self.start = epoch, start
        self.augmentation_epoch = epoch if augmentation_epoch is None else augmentation_epoch

    def __len__(self) -> int:
        return -(-self.length // self.global_batch)

    def _part(self, batch: int) -> tuple[int, int]:
        """Return start and end, in the epoch's order, of this process's part of a global batch."""
        first = batch * self.global_batch
        n = min(self.global_batch, self.length - first)
        each, more = divmod(n, self.world)
        begin = first + self.rank * each + min(self.rank, more)
        return begin, begin + each + (self.rank < more)

    def step(self, batch: int) -> Step:
        """Return what batch number ``batch`` (0-based) of the epoch counts, without reading it."""
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
        """Return the images that the epoch leaves out (see ``min_batch``)."""
        return self._order()[self.length :] if self.length < self.dataset_length else ()

    def indices(self) -> list[int]:
        """Return the images of this process, in order."""
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
                yield [(self.augmentation_epoch, i) for i in order[begin:end]]
