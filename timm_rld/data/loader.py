"""Loaders of replayable uint8 batches."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader

from ..errors import SampleError, UserError
from ..seeds import STREAM, derive_seed
from .replay import ReplayDataset, ReplayStream
from .sampler import ReplaySampler, Step
from .sources import Source
from .transforms import Transform, eval_transform, train_transform

Batch = tuple[Tensor, Tensor, Tensor]


class Loader:
    """Batches (uint8 pixels `[B, C, H, W]`, targets `[B]`, indices `[B]`) of one split, for one process.

    It is sharded already: do not pass it to `accelerator.prepare`. Call :meth:`set_epoch` before each iteration.

    Args:
        source: the split.
        transform: PIL image → uint8 tensor.
        batch_size: per process.
        training: shuffled and augmented by (seed, epoch, index); else in order, each sample exactly once.
        rank, world: of this process. A streamed split takes them from torch.distributed.
        accum: batches per optimizer step.
        min_batch: see :class:`ReplaySampler`.
        workers: loader processes.
        pin_memory: for copies to a GPU.
    """

    def __init__(
        self,
        source: Source,
        transform: Transform,
        batch_size: int,
        *,
        training: bool,
        seed: int = 0,
        rank: int = 0,
        world: int = 1,
        accum: int = 1,
        min_batch: int = 0,
        workers: int = 0,
        pin_memory: bool = False,
    ) -> None:
        self.source, self.batch_size, self.world, self.accum, self.seed = source, batch_size, world, accum, seed
        self.training = training
        self._made_of: dict[str, Any] = dict(
            transform=transform, batch_size=batch_size, training=training, seed=seed, rank=rank, world=world,
            accum=accum, min_batch=min_batch, workers=workers, pin_memory=pin_memory,
        )  # fmt: skip
        self.generator = torch.Generator()
        common: dict[str, Any] = dict(
            num_workers=workers, pin_memory=pin_memory, generator=self.generator, worker_init_fn=_leave_process_group
        )
        if source.streamed:
            readers = max(1, workers) * world
            if source.shards is not None and source.shards < readers and (training or world > 1):
                raise UserError(
                    f'--workers {workers}: split {source.split!r} has {source.shards} shard(s) for {readers} readers '
                    f'({world} process(es)), and each needs one; use fewer --workers, or more shards'
                )
            source.dataset.set_loader_cfg(num_workers=workers)
            self.stream = ReplayStream(source, transform, seed if training else None, rank)
            self.sampler = None
            # not persistent: timm's readers seed themselves from their worker, once
            self.loader = DataLoader(self.stream, batch_size=batch_size, drop_last=training, **common)
        else:
            self.dataset = ReplayDataset(source, transform, seed if training else None)
            self.sampler = ReplaySampler(
                len(source), batch_size, seed=seed, shuffle=training, rank=rank, world=world, accum=accum,
                min_batch=min_batch,
            )  # fmt: skip
            self.loader = DataLoader(
                self.dataset,
                batch_sampler=self.sampler,
                persistent_workers=workers > 0,
                **common,
            )

    def set_epoch(self, epoch: int, start: int = 0, augmentation_epoch: int | None = None) -> None:
        """The next iteration gives epoch ``epoch`` (1-based), from batch ``start`` (0-based) on.

        Args:
            augmentation_epoch: the epoch whose augmented images are seen; None for its own.

        Raises:
            UserError: for another augmentation epoch of a streamed split.
        """
        self.generator.manual_seed(derive_seed(STREAM, self.seed, epoch) & 0x7FFFFFFFFFFFFFFF)
        if self.sampler is not None:
            self.sampler.set_epoch(epoch, start, augmentation_epoch)
        else:
            assert start == 0, 'a stream starts at its start'
            if augmentation_epoch not in (None, epoch):
                raise UserError('--teacher-cache-views: the images of a streamed dataset cannot be repeated')
            self.stream.set_epoch(epoch)

    def step(self, batch: int) -> Step:
        """Return what batch number ``batch`` (0-based) of the epoch counts."""
        if self.sampler is not None:
            return self.sampler.step(batch)
        group = min(self.accum, len(self) - batch // self.accum * self.accum)
        last = (batch + 1) % self.accum == 0 or batch + 1 == len(self)
        return Step(self.batch_size, group * self.batch_size * self.world, last)

    def of_the_whole(self) -> Loader:
        """Return a loader like this one of the whole split where this one has a share of it (`--train-fraction`), else
        itself."""
        if self.source.whole is None:
            return self
        loader = Loader(self.source.whole, **self._made_of)
        loader.dataset.bad_images = self.dataset.bad_images
        return loader

    @property
    def can_start_within(self) -> bool:
        """Whether an epoch can start at any batch; a stream starts at its start."""
        return self.sampler is not None

    @property
    def declared(self) -> int | None:
        """Images that a streamed split declares to hold; None where they can be counted."""
        return self.source.declared

    @property
    def updates_per_epoch(self) -> int:
        """Optimizer steps in an epoch."""
        return -(-len(self) // self.accum)

    def __len__(self) -> int:
        """Batches in an epoch, the same on every process."""
        if self.sampler is not None:
            return len(self.sampler)
        n = len(self.source)
        return n // self.batch_size if self.training else -(-n // self.batch_size)

    def left_out(self) -> Sequence[int]:
        """Images that the epoch leaves out, on every process (an incomplete last batch, see ``min_batch``)."""
        return self.sampler.left_out() if self.sampler is not None else ()

    def skip_bad_images(self, listed_in: Path) -> None:
        """From now on put another image in the place of one that cannot be read, and add a line to a file. Not for
        streamed splits; has no effect on workers that have started."""
        assert self.sampler is not None, 'first_look() refuses a stream'
        self.dataset.bad_images = listed_in

    def __iter__(self) -> Iterator[Batch]:
        return self._whole_stream() if self.sampler is None and self.training else iter(self.loader)

    def _whole_stream(self) -> Iterator[Batch]:
        """The batches of an epoch, which every process counts on."""
        count = 0
        for batch in self.loader:
            yield batch
            count += 1
        if count < len(self):
            raise SampleError(
                f'--train-split {self.source.split}: ended after {count} of {len(self)} batches; are files damaged?'
            )


def _leave_process_group(_: int) -> None:
    """A Ctrl-C or a scheduler's signal to the whole process group is for the training process: its workers keep
    running, so that it can end its step."""
    if hasattr(os, 'setpgrp'):
        os.setpgrp()


def create_loaders(
    train: Source,
    val: Source,
    data_config: dict[str, Any],
    *,
    batch_size: int,
    validation_batch_size: int | None = None,
    grad_accum_steps: int = 1,
    min_batch: int = 0,
    train_interpolation: str = 'random',
    seed: int = 0,
    rank: int = 0,
    world: int = 1,
    workers: int = 0,
    pin_memory: bool = False,
    jpeg_draft: bool = False,
    **augmentation: Any,
) -> tuple[Loader, Loader]:
    """Return the loaders of a run: augmented training batches, and validation batches as the student will be used.

    Args:
        data_config: the student's preprocessing: input_size, mean, std, interpolation, crop_pct, crop_mode.
        jpeg_draft, train_interpolation, augmentation: for :func:`train_transform`.
        Others: as in :class:`Loader`.
    """
    if min_batch and (batch_size < min_batch or (not train.streamed and len(train) < min_batch * world)):
        raise UserError(
            f'--batch-size {batch_size}: batch norm cannot train on single images; give at least {min_batch} a process '
            f'(the split has {len(train)} images for {world} process(es))'
        )
    c = data_config
    place: dict[str, Any] = dict(seed=seed, rank=rank, world=world, workers=workers, pin_memory=pin_memory)
    augment = train_transform(
        c['input_size'], mean=c['mean'], std=c['std'], interpolation=train_interpolation, jpeg_draft=jpeg_draft,
        **augmentation,
    )  # fmt: skip
    center = eval_transform(
        c['input_size'], interpolation=c['interpolation'], crop_pct=c['crop_pct'], crop_mode=c['crop_mode'],
        mean=c['mean'], jpeg_draft=jpeg_draft,
    )  # fmt: skip
    return (
        Loader(train, augment, batch_size, training=True, accum=grad_accum_steps, min_batch=min_batch, **place),
        Loader(val, center, validation_batch_size or batch_size, training=False, **place),
    )
