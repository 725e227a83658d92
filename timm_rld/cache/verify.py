"""Recompute a random sample of cached rows, and compare."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch

from ..config import Config, load_yaml_text
from ..data import LOADER_SETTINGS, SPLIT_SETTINGS, create_loaders, open_splits
from ..errors import UserError
from ..pairing import create_teacher
from ._rows import Rows, rounded
from .facts import Purpose, _sha256, difference, weights_file
from .teacher import read_body

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
    """Hold all rows of a cache to their checksums, and recompute a random sample from the images and the teacher.

    Args:
        folder: of the cache.
        rows: how many.
        seed: of the sample.
        data_dir, teacher_checkpoint: where data and weights lie now, if they have been moved.
        device: torch's name of it; None for a GPU where there is one.

    Returns:
        Lines: what was compared, and the largest difference.

    Raises:
        UserError: where rows differ by more than rounding explains, or data or weights are not those of the cache.
    """
    folder = Path(folder).expanduser()
    body = read_body(folder)
    config = Config(**load_yaml_text(body['settings']))
    if data_dir is not None:
        config.data_dir = data_dir
    facts, data_config = body['facts'], body['data_config']
    checkpoint = teacher_checkpoint or config.teacher_checkpoint
    if checkpoint is None and config.teacher_epochs:
        checkpoint = body['weights_file']
    train, val = open_splits(**config.pick(*SPLIT_SETTINGS))
    teacher = create_teacher(
        config.teacher, train.num_classes, class_names=train.class_names, checkpoint=checkpoint,
        class_map=config.teacher_class_map, in_chans=config.in_chans, img_size=config.teacher_img_size,
        view_size=tuple(data_config['input_size'][-2:]), mean=config.teacher_mean, std=config.teacher_std,
    )  # fmt: skip
    file = weights_file(config.teacher, checkpoint)
    weights = facts['weights of the teacher'] if file is None else f'sha256 {_sha256(file)}'
    purpose = Purpose(config, train, val, data_config, facts['--mixed-precision'])
    if found := difference(facts, purpose.facts(weights)):
        raise UserError(f'{folder}: data or teacher are not those that it was filled from: {found}')
    if device == 'cuda' and not torch.cuda.is_available():
        raise UserError('--device cuda: there is none that torch can use; take cpu')
    device = torch.device(device or ('cuda' if torch.cuda.is_available() else 'cpu'))
    teacher.quicken(data_config['input_size'])
    teacher.to(device)
    settings = {**config.pick(*LOADER_SETTINGS), 'workers': 0}
    dataset = create_loaders(train, val, data_config, **settings)[0].dataset

    generator = np.random.default_rng(seed)
    files = sorted(folder.glob('view-*.safetensors'))
    views = {int(path.stem.partition('-')[2]): Rows(path) for path in files}
    there = [(view, index) for view, r in views.items() for index in np.flatnonzero(r.filled()).tolist()]
    if not there:
        return f'{folder}: holds no rows yet'
    sample = [there[i] for i in generator.permutation(len(there))[:rows]]
    dtype = views[sample[0][0]].dtype
    allowed = _BY_DTYPE[dtype] + _BY_PRECISION[facts['--mixed-precision']]
    precision = {'bf16': torch.bfloat16, 'fp16': torch.float16}.get(facts['--mixed-precision'])
    worst, moved = 0.0, 0
    wrong = [f'view {view}, image {index} (damaged)' for view, r in views.items() for index in r.damaged()]
    for start in range(0, len(sample), 32):
        keys = sample[start : start + 32]
        pixels, target, _ = zip(*(dataset[key] for key in keys))
        target = torch.tensor(target)
        batch = torch.stack([torch.as_tensor(p) for p in pixels]).to(device)
        with torch.autocast(device.type, precision, enabled=precision is not None):
            logits = teacher(batch).float().cpu()
        for (view, index), new, y in zip(keys, logits, target):
            old = views[view].read(np.array([index]))
            if old is None:
                continue
            off = ((old[0].float() - new).abs().max() / new.abs().max().clamp(min=1e-6)).item()
            worst = max(worst, off)
            if not off <= allowed:
                wrong.append(f'view {view}, image {index} (by {off:.2g} of the largest logit)')
            mask = rounded(new[None], y[None], dtype)[0] >= rounded(new[None], y[None], dtype)[0][y]
            moved += int((mask != (old[0] >= old[0][y])).any())
    if wrong:
        raise UserError(
            f'{folder}: {len(wrong)} row(s) are not what the teacher says: {"; ".join(wrong[:5])}. '
            'Delete the files of these views, or the folder, to have them filled anew'
        )
    full = sum(bool(r.filled().all()) for r in views.values())
    return (
        f'{folder}: {len(views)} view(s), {full} complete, {len(there):,} rows, all whole; '
        f'{len(sample):,} recomputed: they differ '
        f'by at most {worst:.2g} of the largest logit ({allowed:.2g} allowed for rounding); '
        f'what RLD masks is another in {moved}'
    )
