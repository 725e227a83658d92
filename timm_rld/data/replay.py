"""Replay: every random number of the data comes from (seed, epoch, index) or (seed, epoch).

From this follow exact resume at any batch, the same run whatever the number of workers, and the same global batches
whatever the number of processes. The epoch travels with each index, from the sampler through the loader's queue, so it
reaches persistent workers too.
"""

from __future__ import annotations

import contextlib
import itertools
import random
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset, IterableDataset, get_worker_info

from ..errors import SampleError
from ..seeds import REPLACEMENT, SAMPLE, STREAM, STREAM_SAMPLE, derive_seed
from .images import decode, reason
from .sources import Source
from .transforms import DraftTransform


def seed_generators(*key: int) -> None:
    """From here on Python's, NumPy's and torch's CPU generators follow from ``key``; timm's transforms draw from all
    three."""
    seed = derive_seed(*key)
    random.seed(seed)
    np.random.seed(seed & 0xFFFFFFFF)
    torch.random.default_generator.manual_seed(seed & 0x7FFFFFFFFFFFFFFF)


@contextlib.contextmanager
def keep_generators() -> Iterator[None]:
    """After the block the three generators continue as before it (without workers dropout shares torch's)."""
    python, numpy, torch_ = random.getstate(), np.random.get_state(), torch.random.get_rng_state()
    try:
        yield
    finally:
        random.setstate(python)
        np.random.set_state(numpy)
        torch.random.set_rng_state(torch_)


@contextlib.contextmanager
def seeded(*key: int) -> Iterator[None]:
    """Within the block the generators follow from ``key``; afterwards they continue as before."""
    with keep_generators():
        seed_generators(*key)
        yield


class ReplayDataset(Dataset[tuple[Tensor, int, int]]):
    """An indexable split: key (augmentation epoch, index) → (uint8 pixels `[C, H, W]`, target, index).

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
                raise SampleError(f'{e}; a line in a --skip-list FILE leaves it out') from e
            image, target = self._replacement(epoch, index, e)
        if self.draft is not None:
            return self.draft.rest(image), target, index
        self._seed(key)
        return self.transform(image), target, index

    def _read(self, index: int, key: tuple[int, int]) -> tuple[Any, int]:
        """Image ``index``; a draft cuts it by the random numbers of ``key``, of which the rest follow in the rest."""
        draft = self.draft
        if draft is None:
            return self.source.read(index)

        def decode(image: Any) -> Any:
            self._seed(key)
            return draft.decode(image, self.source.exif)

        return self.source.read(index, decode)

    def _seed(self, key: tuple[int, int]) -> None:
        if self.seed is not None:
            seed_generators(SAMPLE, self.seed, *key)

    def _replacement(self, epoch: int, index: int, error: SampleError) -> tuple[Any, int]:
        """Another image, drawn by (seed, epoch, index); a line in the list records it."""
        assert self.bad_images is not None
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
        raise SampleError(f'{error}; nor can 100 replacements be read')

    def __len__(self) -> int:
        return len(self.source)


class ReplayStream(IterableDataset[tuple[Tensor, int, int]]):
    """A streamed split. Its order is that of timm's reader; the "index" is a sample's place in its worker's stream, so
    replay holds for the same number of processes and workers, from the start of an epoch."""

    def __init__(self, source: Source, transform: Callable[[Any], Tensor], seed: int | None, rank: int = 0) -> None:
        self.source, self.transform, self.seed, self.rank = source, transform, seed, rank
        self.epoch = 0

    def set_epoch(self, epoch: int) -> None:
        """The next iteration gives epoch ``epoch`` (1-based)."""
        self.epoch = epoch
        self.source.dataset.set_epoch(epoch)
        if self.source.shards is not None:
            # without workers, timm's reader of shards would go on with the shuffling of the epoch before
            reader = self.source.dataset.reader
            reader.ds, reader.worker_seed = None, derive_seed(STREAM, self.seed or 0, epoch, self.rank)

    def __iter__(self) -> Iterator[tuple[Tensor, int, int]]:
        worker = get_worker_info()
        worker_id = worker.id if worker else 0
        for place, (image, target) in enumerate(self._images()):
            if self.seed is None:
                yield self.transform(image), int(target), place
                continue
            with seeded(STREAM_SAMPLE, self.seed, self.epoch, self.rank, worker_id, place):
                pixels = self.transform(image)
            yield pixels, int(target), place

    def _images(self) -> Iterator[tuple[Any, Any]]:
        """The images, decoded, with their classes, in the order of timm's reader."""
        source, samples = self.source, iter(self.source.dataset)
        for place in itertools.count():
            try:
                image, target = next(samples)
                for value, key in ((image, 'input_key'), (target, 'target_key')):
                    if value is None:
                        raise ValueError(f'its {getattr(source.dataset.reader, key)!r} is null')
                if target != int(target) or not 0 <= int(target) < source.num_classes:
                    raise ValueError(
                        f'its label is {target!r}, and there are {source.num_classes} classes, from 0 '
                        '(--num-classes, --class-map)'
                    )
                image = decode(image, source.image_mode, source.exif)
            except StopIteration:
                return
            except Exception as e:
                where = f'image {place} of the streamed split {source.split!r}, in the order in which they come,'
                raise SampleError(f'{where} cannot be read: {reason(e)}') from e
            yield image, target

    def __len__(self) -> int:
        return len(self.source)
