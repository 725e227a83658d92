"""The teacher of a run: trained first where that is asked for, then evaluated."""

from __future__ import annotations

import functools
from pathlib import Path

from accelerate import Accelerator
from torch import Tensor

from ..cache import TeacherCache
from ..config import Config
from ..data import Loader
from ..distributed import main_writes
from ..hub import export_model
from ..pairing import Pair, audit, check_accuracy, load_weights, weights_digest
from ..run_folder import teacher_is_trained, write_teacher_checksum
from ..task import DistillationTask
from .checkpoint import Checkpoints
from .evaluate import evaluate
from .fit import fit
from .state import wants_channels_last


def train_teacher(
    pair: Pair,
    folder: Path,
    train_loader: Loader,
    val_loader: Loader,
    accelerator: Accelerator,
    config: Config,
    *,
    checkpoints: Checkpoints | None = None,
    class_names: list[str] | None = None,
) -> Path:
    """Train a pair's teacher with cross-entropy and export it to FOLDER/teacher, unless an earlier process has done so.

    Args:
        folder: of the run.
        config: of the run; its `teacher_epochs` and `teacher_lr` are used.
        checkpoints: as in :func:`fit`.
        class_names: label names of the exported model.

    Returns:
        The file of its weights.

    Raises:
        UserError: as :func:`fit`; where the file of an earlier process is damaged.
    """
    teacher, file = pair.teacher, folder / 'teacher' / 'model.safetensors'
    assert teacher is not None and config.smoothing is not None  # resolve() fills it in
    if teacher_is_trained(folder, file):
        teacher.model.load_state_dict(load_weights(str(file), '--resume'))
        return file
    model = teacher.model.requires_grad_(True)
    task = DistillationTask(model, None, None, smoothing=config.smoothing, normalize=teacher.normalize)
    log_file = folder / 'teacher.csv'
    settings = config.of_teacher()
    fit(
        task, train_loader, val_loader, accelerator, settings, log_file=log_file, checkpoints=checkpoints,
        phase='teacher',
    )  # fmt: skip
    if task.has_ema():
        model.load_state_dict(task.trainable_module_ema.module.state_dict())
    teacher.requires_grad_(False).eval()
    export = functools.partial(export_model, data_config=pair.teacher_data_config, label_names=class_names)
    main_writes(accelerator, folder, export, model, file.parent)
    main_writes(accelerator, folder, write_teacher_checksum, folder, file)
    return file


def evaluate_teacher(
    pair: Pair,
    loader: Loader,
    accelerator: Accelerator,
    config: Config,
    cache: TeacherCache | None = None,
    weights: Path | None = None,
) -> tuple[float, Tensor, str | None]:
    """Optimise a teacher for inference, evaluate it, print the result and where it differs from the student, and stop
    where it is near chance.

    Args:
        cache: an earlier evaluation in it is read; else this one is cached.
        weights: the teacher's file, where it was trained here.

    Returns:
        Its top-1 (percent), this process's predicted classes `[n]`, and the SHA-256 of its weights.

    Raises:
        UserError: below `--min-teacher-acc`.
    """
    if cache is not None:
        cache.open(weights, pair.teacher)
    if pair.teacher is not None:
        optimize_for_inference(pair, accelerator, config)
    if cache is not None and cache.validated:
        assert loader.sampler is not None  # a stream has no cache
        loader.set_epoch(0)
        top1, predictions, digest = cache.validation(loader.sampler.indices())
        predictions = predictions.to(accelerator.device)
    else:
        assert pair.teacher is not None
        metrics, predictions = evaluate(
            pair.teacher, loader, accelerator, on_batch=cache.write_validation if cache is not None else None
        )
        top1, digest = metrics['top1'], weights_digest(pair.teacher)
        if cache is not None:
            cache.end_validation(top1, digest, pair.teacher.folded)
    found = f'teacher {config.teacher}: top-1 {top1:.2f} on {loader.source.split}'
    accelerator.print('\n  '.join([found, *audit(pair)]))
    check_accuracy(str(config.teacher), top1, pair.num_classes, config.min_teacher_acc)
    return top1, predictions, digest


def optimize_for_inference(pair: Pair, accelerator: Accelerator, config: Config) -> None:
    """Fold and lay out a teacher (:meth:`Teacher.optimize_for_inference`), and move it to the device."""
    assert pair.teacher is not None
    # on the CPU, where float32 is float32: a GPU's convolutions round to TF32, with which no fold would pass the check
    channels_last = wants_channels_last(config, accelerator)
    pair.teacher.cpu().optimize_for_inference(pair.data_config['input_size'], channels_last)
    pair.teacher.to(accelerator.device)
