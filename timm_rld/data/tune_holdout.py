"""The share of the training split that `timm-rld tune` chooses by, in the place of the validation split."""

from __future__ import annotations

import numpy as np

from ..errors import UserError
from .holdout import stratified_holdout
from .sources import Source

SMALLEST_CLASS = 10


def hold_out_to_tune(train: Source, fraction: float, seed: int, keep_all: bool = False) -> tuple[Source, Source]:
    """Divide a training split into what candidates train on, and what they are compared on.

    Args:
        fraction: of each class to hold out.
        seed: another one holds out other images.
        keep_all: train on the images held out too, as the teacher does.

    Returns:
        The two parts.

    Raises:
        UserError: for a stream, a dataset that does not give its labels, and classes of fewer than 10 images.
    """
    flag = f'--tune-holdout {fraction:g}'
    if train.streamed:
        raise UserError(
            f'{flag}: split {train.split!r} is read as a stream, of which no share can be held out; '
            'use hfds/… or a folder'
        )
    targets = train.targets
    if targets is None:
        raise UserError(f'{flag}: the dataset does not give the labels of {train.split!r} without its images')
    counts = np.bincount(targets[targets >= 0], minlength=train.num_classes)
    if (smallest := int(counts[counts > 0].min(initial=SMALLEST_CLASS))) < SMALLEST_CLASS:
        label = int(np.flatnonzero(counts == smallest)[0])
        name = repr(train.class_names[label]) if train.class_names else str(label)
        raise UserError(
            f'{flag}: class {name} has {smallest} training image(s), too few to choose by; at least {SMALLEST_CLASS} '
            'in each class are needed'
        )
    kept, held = stratified_holdout(targets, train.keys(), fraction, seed)
    return train if keep_all else train.subset(kept), train.subset(held, f'{train.split}, the share held out')
