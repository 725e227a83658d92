"""The images of a run, for thumbnails: from the data that its args.yaml names, where they are still there."""

from __future__ import annotations

import dataclasses
import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from ..cache import Rows
from ..config import FIELDS, Config
from ..data import MixedTarget, Mixup, Source, create_loaders, open_splits
from ..errors import UserError
from ..run_folder import RunFiles
from .figures import Array
from .page import thumbnail

SIZE = 128  # pixels of a thumbnail's longer side


@dataclass(frozen=True)
class Images:
    """The splits of a run, or why they are not at hand.

    Attributes:
        config: settings of the run.
        train, val: the splits; None where they cannot be read.
        why: a sentence for the page; empty where they are there.
    """

    config: Config
    train: Source | None
    val: Source | None
    why: str

    def thumbnail(self, index: int) -> str:
        """Return an image of the validation split as a data URI; empty where it cannot be read."""
        if self.val is None or self.val.streamed:
            return ''
        try:
            return thumbnail(self.val.read(index)[0], SIZE)
        except UserError:
            return ''


def open_images(run: RunFiles, data_dir: str | None = None) -> Images:
    """Return the images of a run.

    Args:
        data_dir: where the data lie now, if they have been moved.
    """
    config = Config(**{name: value for name, value in run.settings.items() if name in FIELDS})
    config = dataclasses.replace(config, **_moved(config, data_dir))
    try:
        train, val = open_splits(**config.arguments_of('open_splits'))
        _check_same(run, train, val)
    except UserError as e:
        return Images(config, None, None, f'No pictures: {e}')
    except Exception as e:  # a page without pictures is better than none
        return Images(config, None, None, f'No pictures: the data cannot be read ({type(e).__name__}: {e})')
    if val.streamed:
        return Images(config, train, val, 'No pictures: a streamed dataset cannot be read by index.')
    return Images(config, train, val, '')


def _moved(config: Config, data_dir: str | None) -> dict[str, Any]:
    """Return the settings that say where the data lie."""
    if data_dir is None:
        return {}
    kind, _, path = (config.dataset or '').partition('/')
    local = kind in ('hfds', 'hfids') and (os.path.isabs(path) or os.path.exists(path) or path.startswith(('.', '~')))
    return {'dataset': f'{kind}/{data_dir}', 'data_dir': None} if local else {'data_dir': data_dir}


def _check_same(run: RunFiles, train: Source, val: Source) -> None:
    """Raise UserError where the splits are not those of the run, as far as facts.json tells."""
    then = read_facts(run).get('files and labels (a digest)')
    if then is not None and then != f'{train.digest()} {val.digest()}':
        raise UserError('the data there have other files or labels than those of the run (--data-dir names others)')


def read_facts(run: RunFiles) -> dict[str, Any]:
    """Return what facts.json of a run holds; empty where it is missing or damaged."""
    try:
        return dict(json.loads((run.folder / 'facts.json').read_text(encoding='utf-8')))
    except (OSError, ValueError, TypeError):
        return {}


def class_counts(source: Source | None, classes: int) -> Array | None:
    """Return the number of images of each class, `[C]`; None where it is not known without reading them."""
    targets = None if source is None else source.targets
    return None if targets is None else np.bincount(targets[targets >= 0], minlength=classes)


@dataclass(frozen=True)
class Seen:
    """The first images of epoch 1, as the networks saw them.

    Attributes:
        pixels: uint8 `[N, C, H, W]`.
        target: their classes.
        other: classes of what is mixed in; their own where nothing is.
        lam: share of the image itself, the rest being that of the other.
        teacher: classes that a cached teacher gave them, or None.
    """

    pixels: Tensor
    target: list[int]
    other: list[int]
    lam: list[float]
    teacher: list[int] | None

    def pictures(self) -> list[str]:
        """Return each as a data URI."""
        return [thumbnail(_image(p), SIZE) for p in self.pixels]

    def statistics(self) -> tuple[Array, Array]:
        """Return mean and deviation of each channel, pixels in 0..1."""
        level = np.arange(256) / 255
        counts = [torch.bincount(channel.flatten(), minlength=256).numpy() for channel in self.pixels.unbind(1)]
        mean = np.array([np.average(level, weights=n) for n in counts])
        return mean, np.array([np.average((level - m) ** 2, weights=n) ** 0.5 for m, n in zip(mean, counts)])


def first_images(run: RunFiles, images: Images, count: int = 32) -> Seen | None:
    """Return the first images of epoch 1, made again by replay: the very pixels that both networks saw.

    Returns:
        They, or None where the data are not at hand, or streamed.
    """
    config, train, val = images.config, images.train, images.val
    if train is None or val is None or train.streamed:
        return None
    loader, _ = create_loaders(
        train, val, data_config(run), rank=0, world=int(read_facts(run).get('processes', 1)),
        **{**config.arguments_of('create_loaders'), 'workers': 0},
    )  # fmt: skip
    assert loader.sampler is not None
    loader.set_epoch(1)
    mixup, found = Mixup(**config.arguments_of('Mixup')), []
    shown: list[tuple[int, int]] = []
    for number, batch in enumerate(loader.sampler):
        room = count - len(shown)
        keys = batch if len(batch) <= room else batch[: room + 1]  # an image is mixed with the one before it
        first = 0 if keys is batch else 1
        read = [loader.dataset[key] for key in keys]
        pixels, target = torch.stack([p for p, *_ in read]), torch.tensor([y for _, y, _ in read])
        pixels, mixed = mixup(pixels, target, 1, number)
        other, lam = (mixed.b, mixed.lam) if isinstance(mixed, MixedTarget) else (target, 1.0)
        found += [(p, y, z, lam) for p, y, z in zip(pixels[first:], target[first:].tolist(), other[first:].tolist())]
        shown += keys[first:]
        if len(shown) == count:
            break
    seen, targets, others, lams = zip(*found)
    logits = _cached(config, [index for _, index in shown])
    teacher = None if logits is None else logits.argmax(dim=1).tolist()
    return Seen(torch.stack(seen), list(targets), list(others), list(lams), teacher)


def data_config(run: RunFiles) -> dict[str, Any]:
    """Return the student's preprocessing, as its folder has it."""
    return json.loads(run.config.read_text(encoding='utf-8'))['pretrained_cfg']


def _cached(config: Config, indices: list[int]) -> Tensor | None:
    """Return the teacher's logits on images of epoch 1, where a cache has them all."""
    if config.teacher_cache is None:
        return None
    try:
        return Rows(Path(config.teacher_cache).expanduser() / 'epoch-0001.safetensors').read(np.array(indices))
    except (UserError, IndexError):
        return None


def _image(pixels: Tensor) -> Image.Image:
    array = pixels.permute(1, 2, 0).numpy()
    return Image.fromarray(array[..., 0] if array.shape[2] == 1 else array)
