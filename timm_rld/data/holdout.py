"""A part of the training images that is held out, for validation."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from ..errors import UserError


def stratified_holdout(
    targets: Sequence[int] | NDArray[np.int64], keys: Sequence[str], fraction: float, seed: int
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Divide images into those kept and those held out, with the same share of each class.

    Of the n images of a class, round(fraction · n) are held out, at least one and at most n - 1: those whose key has
    the lowest hash with the seed. Whether an image is held out thus depends on its key and on how many others of its
    class have a lower hash, so that adding files moves few of those that were there.

    Args:
        targets: class of each image.
        keys: what stands for each image, and stays the same when others are added: a path relative to the root.
        fraction: of the images to hold out, between 0 and 1.
        seed: another one gives another part.

    Returns:
        The indices of the images kept, and of those held out, both in ascending order.

    Raises:
        UserError: where a class has one image alone.
    """
    assert len(targets) == len(keys) and 0 < fraction < 1
    classes: dict[int, list[int]] = {}
    for index, target in enumerate(np.asarray(targets).tolist()):
        classes.setdefault(target, []).append(index)
    if single := sorted(target for target, members in classes.items() if len(members) == 1):
        listed = ', '.join(map(str, single[:5])) + (', …' if len(single) > 5 else '')
        raise UserError(f'class {listed}: has one image alone, which cannot be both kept and held out')
    held: list[int] = []
    for members in classes.values():
        count = min(max(1, round(fraction * len(members))), len(members) - 1)
        held += sorted(members, key=lambda index: (_hash(seed, keys[index]), index))[:count]
    out = np.zeros(len(keys), dtype=bool)
    out[held] = True
    return np.flatnonzero(~out), np.flatnonzero(out)


def _hash(seed: int, key: str) -> bytes:
    return hashlib.blake2b(f'{seed}\0{key}'.encode('utf-8', 'surrogateescape'), digest_size=8).digest()
