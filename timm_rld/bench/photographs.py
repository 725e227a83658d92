"""Synthetic photographs, for benchmarks without a dataset."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from PIL import Image


def draw_photograph(rng: np.random.Generator, size: tuple[int, int]) -> Image.Image:
    """Return smooth noise at several scales, the coarser the stronger, as in photographs: about 50 KB as a JPEG of
    500×375."""
    width, height = size
    pixels = np.full((height, width, 3), 118, np.float32)
    for cells, strength in ((3, 60), (8, 40), (24, 25), (80, 14), (250, 7)):
        shape = (max(2, cells * height // width), cells)
        # mostly grey: the channels of a photograph go together
        coarse = 0.9 * rng.normal(0, strength, (*shape, 1)) + 0.5 * rng.normal(0, strength, (*shape, 3))
        for channel in range(3):
            layer = Image.fromarray(coarse[..., channel].astype(np.float32))
            pixels[..., channel] += np.asarray(layer.resize(size, Image.Resampling.BICUBIC))
    return Image.fromarray(pixels.clip(0, 255).astype(np.uint8))


def write_photographs(root: Path, count: int, size: tuple[int, int]) -> None:
    """Write JPEGs into folders of two classes."""
    rng = np.random.default_rng(0)
    for i in range(count):
        path = root / 'ab'[i % 2] / f'{i:05}.jpg'
        path.parent.mkdir(parents=True, exist_ok=True)
        draw_photograph(rng, size).save(path, quality=90)
