"""Recompute a random sample of cached rows, and compare."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..data import create_loaders, open_splits
from ..data.replay import ReplayDataset
from ..errors import UserError
from ..pairing import ClosedTeacher, Teacher, close_teacher, create_teacher, weights_file
from .key import CacheKey, difference, teacher_digest
from .rows import Rows, rounded
from .teacher_cache import read_body

# How far a logit may be from a stored one, as a share of the row's largest: by its dtype, and by the precision that the
# teacher works in (another batch gives other roundings).
_BY_DTYPE = {torch.float16: 2**-9, torch.bfloat16: 2**-6, torch.float32: 0.0}
_BY_PRECISION = {'no': 2e-5, 'bf16': 3e-2, 'fp16': 4e-3}


def verify(
    folder: str | Path,
    *,
    rows: int = 256,
    seed: int = 0,
    data_dir: str | None = None,
    teacher_checkpoint: str | None = None,
    device: str | None = None,
) -> str:
    """Check all rows of a cache against their checksums, and recompute a random sample from the images and the teacher.

    Args:
        folder: of the cache.
        rows: how many to recompute.
        seed: of the sample.
        data_dir, teacher_checkpoint: where data and weights are now, if they have been moved.
        device: torch's name of it; None for a GPU where there is one.

    The answers of `--teacher-query` are not asked for again: their rows are checked against their checksums alone.

    Returns:
        A line: what was compared, and the largest difference.

    Raises:
        UserError: where rows differ by more than rounding explains, or data or weights are not those of the cache.
    """
    folder = Path(folder).expanduser()
    body = read_body(folder)
    if device == 'cuda' and not torch.cuda.is_available():
        raise UserError('--device cuda: torch finds no GPU; use cpu')
    files = {int(path.stem.partition('-')[2]): Rows(path) for path in sorted(folder.glob('epoch-*.safetensors'))}
    there = [(epoch, index) for epoch, r in files.items() for index in np.flatnonzero(r.filled()).tolist()]
    if not there:
        return f'{folder}: holds no rows yet'
    if query := body['depends_on'].get('--teacher-query'):
        return _without_asking(folder, files, query)
    dataset, open_teacher = _rebuild(folder, body, data_dir, teacher_checkpoint)
    place = torch.device(device or ('cuda' if torch.cuda.is_available() else 'cpu'))
    open_teacher.optimize_for_inference(body['data_config']['input_size'])
    open_teacher.to(place)
    answers = body['depends_on'].get('--black-box')
    teacher = close_teacher(open_teacher, answers) if answers else open_teacher
    sample = [there[i] for i in np.random.default_rng(seed).permutation(len(there))[:rows]]
    dtype, mixed_precision = files[sample[0][0]].dtype, body['facts']['--mixed-precision']
    allowed = _BY_DTYPE[dtype] + _BY_PRECISION[mixed_precision]
    worst, remasked = 0.0, 0
    wrong = [f'epoch {epoch}, image {index} (damaged)' for epoch, r in files.items() for index in r.damaged()]
    for start in range(0, len(sample), 32):
        keys = sample[start : start + 32]
        for (epoch, index), new, y in zip(keys, *_recompute(dataset, teacher, keys, place, mixed_precision)):
            old = files[epoch].read(np.array([index]))
            if old is None:
                continue
            off = ((old[0].float() - new).abs().max() / new.abs().max().clamp(min=1e-6)).item()
            worst = max(worst, off)
            if not off <= allowed:
                wrong.append(f'epoch {epoch}, image {index} (by {off:.2g} of the largest logit)')
            stored = rounded(new[None], y[None], dtype)[0]
            remasked += int(((stored >= stored[y]) != (old[0] >= old[0][y])).any())
    if wrong:
        raise UserError(
            f'{folder}: {len(wrong)} row(s) are not the logits of the teacher: {"; ".join(wrong[:5])}. '
            'Delete the files of these epochs, or the folder, to have them computed again'
        )
    full = sum(bool(r.filled().all()) for r in files.values())
    return (
        f'{folder}: {len(files)} augmentation epoch(s), {full} complete, {len(there):,} rows, all whole; '
        f'{len(sample):,} recomputed: they differ by at most {worst:.2g} of the largest logit '
        f'({allowed:.2g} allowed for rounding); RLD masks other classes in {remasked}'
    )


def _without_asking(folder: Path, files: dict[int, Rows], query: str) -> str:
    """Check checksums alone."""
    damaged = [f'epoch {epoch}, image {index}' for epoch, r in files.items() for index in r.damaged()]
    if damaged:
        raise UserError(
            f'{folder}: {len(damaged)} row(s) are damaged: {"; ".join(damaged[:5])}. Delete the files of these epochs '
            'to have them asked for again'
        )
    count = sum(int(r.filled().sum()) for r in files.values())
    return f'{folder}: {count:,} answers of {query}, all whole; they are not asked for again, to save queries'


def _rebuild(
    folder: Path, body: dict[str, Any], data_dir: str | None, teacher_checkpoint: str | None
) -> tuple[ReplayDataset, Teacher]:
    """Build the dataset and the teacher again that a cache was filled from.

    Raises:
        UserError: where they are others.
    """
    splits, of_teacher = dict(body['arguments']['open_splits']), dict(body['arguments']['create_teacher'])
    if data_dir is not None:
        splits['data_dir'] = data_dir
    trained = body['weights_file'] if body.get('train_teacher') else None
    of_teacher['checkpoint'] = teacher_checkpoint or of_teacher['checkpoint'] or trained
    train, val = open_splits(**splits)
    data_config, facts = body['data_config'], body['facts']
    teacher = create_teacher(
        num_classes=train.num_classes, class_names=train.class_names,
        image_size=tuple(data_config['input_size'][-2:]), **{**of_teacher, 'pretrained': True},
    )  # fmt: skip
    file = weights_file(of_teacher['name'], of_teacher['checkpoint'])
    weights = facts['weights of the teacher'] if file is None else teacher_digest(file, None)
    arguments = {**body['arguments'], 'open_splits': splits}
    dtype, precision = facts['--teacher-cache-dtype'], facts['--mixed-precision']
    key = CacheKey(arguments, body['depends_on'], dtype, train, val, data_config, precision)
    if found := difference(facts, key.training(weights)):
        raise UserError(f'{folder}: data or teacher are not those that it was filled from: {found}')
    loader, _ = create_loaders(train, val, data_config, **{**body['arguments']['create_loaders'], 'workers': 0})
    return loader.dataset, teacher


def _recompute(
    dataset: ReplayDataset,
    teacher: Teacher | ClosedTeacher,
    keys: list[tuple[int, int]],
    device: torch.device,
    mixed_precision: str,
) -> tuple[Tensor, Tensor]:
    """Return the logits `[B, C]` and targets `[B]` of some images (augmentation epoch, index)."""
    pixels, target, _ = zip(*(dataset[key] for key in keys))
    batch = torch.stack([torch.as_tensor(p) for p in pixels]).to(device)
    precision = {'bf16': torch.bfloat16, 'fp16': torch.float16}.get(mixed_precision)
    with torch.autocast(device.type, precision, enabled=precision is not None):
        return teacher(batch).float().cpu(), torch.tensor(target)
