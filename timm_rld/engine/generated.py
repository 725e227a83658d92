"""A student on generated images: its generator, trained or read, on disk, and what it makes."""

from __future__ import annotations

import functools
import json
import math
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import safetensors.torch
import torch
from accelerate import Accelerator
from PIL import Image

from ..config import Config
from ..data import Loader, NoiseLoader, Source
from ..data.noise import noise
from ..distributed import main_only, main_writes
from ..errors import Stopped, UserError
from ..files import sha256_of, write_atomic
from ..loss import MEKD, DistillLoss, top_probability
from ..metrics import collapse
from ..models import Generator, generator_of
from ..models.generator import check_size
from ..pairing import ClosedTeacher, Pair, load_weights, to_memory_format
from ..seeds import SHOWN
from .asking import total_queries
from .checkpoint import Checkpoints
from .generator_training import LARGEST_IMAGES, read_images, spread, train_generator
from .mekd_settings import generator_settings
from .state import wants_channels_last

ARCHITECTURE = 'mekd_generator'
ROWS, COLUMNS = 4, 10  # of the picture of generated images


def check_data(criterion: DistillLoss | None, train: Source, config: Config) -> None:
    """Check, before anything is trained, what of a criterion depends on the data.

    Raises:
        UserError: of MEKD also for a stream, for fewer training images than the generator's batch, and for a generator
            that would be too large, or that is for other classes or channels.
    """
    if criterion is None:
        return
    criterion.check_classes(train.num_classes)
    if not isinstance(criterion, MEKD) or not config.epochs:
        return
    channels = int(config.in_chans)
    if config.generator is not None:
        read_generator(config.generator, train.num_classes, channels)
        return
    settings = generator_settings(**config.arguments_of('generator_settings'))
    if train.streamed:
        raise UserError(
            f'--distill {config.distill}: split {train.split!r} is read as a stream, and the generator is trained on '
            'images that are kept in memory; use hfds/… or a folder, or give a --generator'
        )
    if len(train) < settings.batch_size:
        smaller = f', or --generator-kwargs batch_size={max(2, len(train) // 2)}' if len(train) > 1 else ''
        raise UserError(
            f'--distill {config.distill}: {len(train)} training image(s) are fewer than a batch of the generator; give '
            f'a larger --train-fraction{smaller}'
        )
    if why := check_size(train.num_classes, settings.img_size, channels):
        raise UserError(f'--generator-kwargs {why}')
    if (size := len(train) * channels * settings.img_size**2) > LARGEST_IMAGES:
        raise UserError(
            f'--distill {config.distill}: {len(train):,} images of {settings.img_size}×{settings.img_size} would take '
            f'{size / 2**30:.0f} GiB of memory; give a smaller --train-fraction'
        )


# ------------------------------------------------------------------------------------------------------------ generator


def read_generator(path: str, num_classes: int, in_chans: int) -> Generator:
    """Return the generator that `--generator` names: a file of weights, its folder, or that of its run.

    Raises:
        UserError: where it is none, or is for other classes or channels.
    """
    place, flag = Path(path).expanduser(), f'--generator {path}'
    for folder in (place / 'generator', place):
        if (folder / 'model.safetensors').is_file():
            place = folder / 'model.safetensors'
            break
    if place.is_dir():
        raise UserError(f'{flag}: holds no generator (generator/model.safetensors); has its run finished phase 1?')
    try:
        found = generator_of(load_weights(str(place), '--generator'))
    except UserError:
        raise
    except ValueError as e:
        raise UserError(f'{flag}: {e}; name a run of --distill mekd, or its folder generator') from e
    if found.num_classes != num_classes:
        raise UserError(
            f'{flag}: its images are made of rows of {found.num_classes} classes, the dataset has {num_classes}; '
            'remove it to train one'
        )
    if found.in_chans != in_chans:
        raise UserError(
            f'{flag}: its images have {found.in_chans} channel(s), this run has {in_chans} (--in-chans); '
            'remove it to train one'
        )
    return found


def write_generator(generator: Generator, folder: Path, figures: dict[str, Any]) -> None:
    """Write model.safetensors, and then config.json: sizes, figures of its training, and the digest of the weights."""
    folder.mkdir(parents=True, exist_ok=True)
    weights = {k: v.detach().cpu().contiguous() for k, v in generator.state_dict().items()}
    write_atomic(folder / 'model.safetensors', safetensors.torch.save(weights))
    config = {
        'architecture': ARCHITECTURE, 'num_classes': generator.num_classes, 'img_size': generator.img_size,
        'in_chans': generator.in_chans, 'sha256': sha256_of(folder / 'model.safetensors'), 'figures': figures,
    }  # fmt: skip
    write_atomic(folder / 'config.json', json.dumps(config, indent=1))


def _finished(folder: Path) -> dict[str, Any] | None:
    """Return config.json of a generator that an earlier process of this run has finished, or None.

    Raises:
        UserError: where its weights are not what was written.
    """
    if not (folder / 'config.json').exists():
        return None
    config = json.loads((folder / 'config.json').read_text(encoding='utf-8'))
    weights = folder / 'model.safetensors'
    if not weights.exists() or sha256_of(weights) != config['sha256']:
        raise UserError(f'{weights}: is damaged or gone; delete {folder} to make it again')
    return config


def prepare_images(
    criterion: DistillLoss | None,
    pair: Pair,
    folder: Path,
    config: Config,
    class_names: Sequence[str] | None = None,
    *,
    train_loader: Loader,
    accelerator: Accelerator,
    checkpoints: Checkpoints | None = None,
    **_: Any,
) -> Loader | NoiseLoader:
    """Return the loader that a student is trained with: that of the training images, or with MEKD, after phase 1, one
    of noise (:func:`prepare_generator`)."""
    if not isinstance(criterion, MEKD):
        return train_loader
    return prepare_generator(criterion, pair, folder, train_loader, accelerator, config, checkpoints, class_names)


def prepare_generator(
    criterion: MEKD,
    pair: Pair,
    folder: Path,
    train_loader: Loader,
    accelerator: Accelerator,
    config: Config,
    checkpoints: Checkpoints | None = None,
    class_names: Sequence[str] | None = None,
) -> NoiseLoader:
    """Phase 1 of a run: give a criterion its generator, in FOLDER/generator, where an earlier process of the run, or a
    `--generator`, has not left one already trained on the training images.

    Args:
        criterion: is given the generator.
        pair: its teacher says which images look like a class.
        folder: of the run.
        train_loader: of the training images.
        checkpoints: as in :func:`timm_rld.engine.fit`.
        class_names: for messages.

    Returns:
        The loader of phase 2, with noise in the place of images.

    Raises:
        UserError, Stopped: as :func:`train_generator`.
    """
    assert pair.teacher is not None and config.batch_size is not None and config.grad_accum_steps is not None
    answers, home = getattr(pair.teacher, 'answers', 'logits'), folder / 'generator'
    steps = config.steps_per_epoch
    assert steps is not None  # resolve() fills it in
    made = main_only(accelerator, functools.partial(_finished, home))
    if made is None:
        generator, figures = _make_generator(pair, answers, folder, train_loader, accelerator, config, checkpoints)
        criterion.use(generator, answers, pair.image_size)
        _check_budget(pair, accelerator, folder)
        figures |= main_only(accelerator, lambda: inspect_generator(criterion, pair, accelerator, config.seed, home))
        main_writes(accelerator, folder, write_generator, generator, home, figures)
    else:
        generator, figures = generator_of(load_weights(str(home / 'model.safetensors'), '--resume')), made['figures']
    to_memory_format(
        generator, torch.channels_last if wants_channels_last(config, accelerator) else torch.contiguous_format
    )
    criterion.use(generator.to(accelerator.device), answers, pair.image_size)
    accelerator.print(
        f'generated images, as the teacher sees them: {figures["classes"]} of {pair.num_classes} classes occur, '
        f'entropy {figures["entropy"]:.2f} of 1, mean confidence {figures["teacher_confidence"]:.2f}'
    )
    if warning := collapse(figures['counts'], class_names):
        accelerator.print(f'Warning: {warning}')
    return NoiseLoader(
        pair.num_classes, config.batch_size, steps, seed=config.seed, accum=config.grad_accum_steps,
        rank=accelerator.process_index, world=accelerator.num_processes,
    )  # fmt: skip


def _check_budget(pair: Pair, accelerator: Accelerator, folder: Path) -> None:
    """Raise Stopped where `--max-queries` does not allow to look at what a generator makes."""
    if isinstance(pair.teacher, ClosedTeacher) and (limit := pair.teacher.queries.limit) is not None:
        used, needed = total_queries(pair.teacher, accelerator), images_to_inspect(pair.num_classes)
        if used + needed > limit:
            raise Stopped(
                f'--max-queries: {used:,} are used, and looking at the generator needs {needed:,} more; '
                f'accelerate launch train_distill.py --resume {folder} --max-queries N continues', 1
            )  # fmt: skip


def _make_generator(
    pair: Pair, answers: str, folder: Path, train_loader: Loader, accelerator: Accelerator, config: Config,
    checkpoints: Checkpoints | None,
) -> tuple[Generator, dict[str, Any]]:  # fmt: skip
    """Return a generator, read or trained, and the last figures of its training."""
    in_chans = pair.data_config['input_size'][0]
    if config.generator is not None:
        accelerator.print(f'generator of {config.generator}')
        return read_generator(config.generator, pair.num_classes, in_chans).to(accelerator.device), {}
    assert pair.teacher is not None
    settings = generator_settings(**config.arguments_of('generator_settings'))
    source = train_loader.source
    accelerator.print(
        f'training the generator first, for {settings.epochs} epoch(s) (--generator-epochs) on {len(source):,} images '
        f'of {settings.img_size}×{settings.img_size}, whose labels are not read'
    )
    assert isinstance(config.workers, int)
    bad = folder / 'bad_images.txt' if config.on_bad_image == 'skip' else None
    images = read_images(source, settings.img_size, in_chans, pair.data_config, config.workers, bad)
    generator, history = train_generator(
        images, pair.teacher, answers, settings, accelerator, num_classes=pair.num_classes,
        image_size=pair.image_size, seed=config.seed, folder=folder, checkpoints=checkpoints,
    )  # fmt: skip
    last = history[-1]
    return generator, {k: last[k] for k in ('epoch', 'd_loss', 'g_loss', 'd_real', 'd_fake') if k in last}


# ---------------------------------------------------------------------------------------------------- what it generates


def images_to_inspect(num_classes: int) -> int:
    """Return how many generated images the teacher is asked about: 16 a class, 128 to 16,384."""
    return min(max(128, 16 * num_classes), 16384)


def inspect_generator(criterion: MEKD, pair: Pair, accelerator: Accelerator, seed: int, folder: Path) -> dict[str, Any]:
    """Ask the teacher about generated images, and keep what it says in FOLDER/answers.safetensors.

    Returns:
        `images`, `counts` of the classes, `classes` that occur, `entropy` (of log C) and `teacher_confidence`.
    """
    assert pair.teacher is not None
    tops, confidences = [], []
    for z in noise(images_to_inspect(pair.num_classes), pair.num_classes, SHOWN, seed).split(128):
        with accelerator.autocast():
            rows = pair.teacher(criterion.pixels(z.to(accelerator.device))).float()
        tops.append(rows.argmax(dim=1).cpu())
        confidences.append(top_probability(rows, criterion.answers).cpu())
    top, confidence = torch.cat(tops), torch.cat(confidences)
    folder.mkdir(parents=True, exist_ok=True)
    write_atomic(folder / 'answers.safetensors', safetensors.torch.save({'top': top, 'confidence': confidence}))
    counts = torch.bincount(top, minlength=pair.num_classes).tolist()
    figures = {'images': len(top), 'counts': counts, **spread(counts)}
    return {**figures, 'teacher_confidence': confidence.mean().item()}


def describe_generated(pair: Pair, accelerator: Accelerator, config: Config, folder: Path) -> dict[str, Any]:
    """Write generated.png, a grid of generated images, and return what results.json says of them. For the main process.

    Returns:
        The figures of :func:`inspect_generator` and of the generator's last epoch, `img_size`, `agreement` of student
        and teacher (percent), `student_confidence`, `rows`, `columns` and, for each image of the grid, `shown`:
        teacher's class and probability, student's class and probability.
    """
    home, device = folder / 'generator', accelerator.device
    said = safetensors.torch.load_file(home / 'answers.safetensors')
    generator = generator_of(load_weights(str(home / 'model.safetensors'), '--resume')).to(device)
    criterion = MEKD(generator)
    criterion.use(generator, image_size=pair.image_size)
    student, normalize = pair.student.to(device).eval(), pair.normalize.to(device)
    rows = []
    with torch.inference_mode():
        for z in noise(len(said['top']), pair.num_classes, SHOWN, config.seed).split(128):
            with accelerator.autocast():
                rows.append(student(normalize(criterion.pixels(z.to(device)))).float().softmax(dim=1).cpu())
        first = noise(len(said['top']), pair.num_classes, SHOWN, config.seed)[: ROWS * COLUMNS]
        tiles = (127.5 * (generator(first.to(device)) + 1)).round().clamp(0, 255).byte().cpu().numpy()
    confidence, top = torch.cat(rows).max(dim=1)
    _write_grid(tiles, folder / 'generated.png')
    columns = [said['top'], said['confidence'], top, confidence]
    shown = [[int(a), round(float(b), 4), int(c), round(float(d), 4)] for a, b, c, d in zip(*columns)][: len(tiles)]
    figures = json.loads((home / 'config.json').read_text(encoding='utf-8'))['figures']
    return {
        **figures, 'img_size': generator.img_size, 'answers': getattr(pair.teacher, 'answers', 'logits'),
        'agreement': 100 * (top == said['top']).float().mean().item(), 'student_confidence': confidence.mean().item(),
        'rows': math.ceil(len(tiles) / COLUMNS), 'columns': COLUMNS, 'shown': shown,
    }  # fmt: skip


def _write_grid(tiles: Any, path: Path) -> None:
    """Write images `[N, channels, n, n]` as one picture, row by row, without space between them."""
    count, channels, n, _ = tiles.shape
    rows = math.ceil(count / COLUMNS)
    grid = np.zeros((rows * n, COLUMNS * n, channels), dtype=np.uint8)
    for i, tile in enumerate(tiles):
        y, x = divmod(i, COLUMNS)
        grid[y * n : y * n + n, x * n : x * n + n] = tile.transpose(1, 2, 0)
    part = path.with_name(f'.{path.name}')
    Image.fromarray(grid[..., 0] if channels == 1 else grid).save(part, 'png')
    os.replace(part, path)
