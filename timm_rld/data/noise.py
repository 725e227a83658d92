"""Noise in the place of images, for a student that is trained on what a generator makes of it."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from .replay import NOISE, derive_seed
from .sampler import Step
from .sources import Source


class NoiseLoader:
    """Batches (noise `[B, C, 1, 1]`, targets `[B]`, indices `[B]`) for one process, in the place of a
    :class:`timm_rld.data.Loader`.

    The noise is N(0, I). That of a global batch follows from (seed, epoch, batch) and is cut by process. There are no
    labels: every target is -1.

    Args:
        num_classes: C, the size of a row.
        batch_size: per process.
        steps: optimizer steps in an epoch.
        seed: of the run.
        rank, world: of this process.
        accum: batches per optimizer step.
    """

    can_start_within = True
    dataset = declared = None

    def __init__(
        self,
        num_classes: int,
        batch_size: int,
        steps: int,
        *,
        seed: int = 0,
        rank: int = 0,
        world: int = 1,
        accum: int = 1,
    ) -> None:
        self.num_classes, self.batch_size, self.updates_per_epoch, self.seed = num_classes, batch_size, steps, seed
        self.rank, self.world, self.accum = rank, world, accum
        self.source = Source(range(0), 'generated images', num_classes, None, True, 'RGB')  # for messages
        self.epoch, self.start = 1, 0

    def set_epoch(self, epoch: int, start: int = 0, augmentation_epoch: int | None = None) -> None:
        """The next iteration gives epoch ``epoch`` (1-based), from batch ``start`` (0-based) on."""
        self.epoch, self.start = epoch, start

    def step(self, batch: int) -> Step:
        """Return what batch number ``batch`` (0-based) of the epoch counts."""
        return Step(self.batch_size, self.batch_size * self.world * self.accum, (batch + 1) % self.accum == 0)

    def __len__(self) -> int:
        """Batches in an epoch."""
        return self.updates_per_epoch * self.accum

    def left_out(self) -> Sequence[int]:
        """Images that the epoch leaves out: none."""
        return ()

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
        whole = self.batch_size * self.world
        mine = slice(self.rank * self.batch_size, (self.rank + 1) * self.batch_size)
        for batch in range(self.start, len(self)):
            z = noise(whole, self.num_classes, NOISE, self.seed, self.epoch, batch)[mine]
            indices = torch.arange(batch * whole, (batch + 1) * whole)[mine]
            yield z[:, :, None, None], torch.full((len(z),), -1), indices


def noise(rows: int, num_classes: int, *key: int) -> Tensor:
    """Return N(0, I) `[rows, C]`, float32 on the CPU, that follows from a key of non-negative integers."""
    generator = torch.Generator().manual_seed(derive_seed(*key) & 0x7FFFFFFFFFFFFFFF)
    return torch.randn(rows, num_classes, generator=generator)
