"""The teacher of a run: trained first where that is asked for, then evaluated."""

from __future__ import annotations

import functools
from dataclasses import dataclass
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
from .evaluate import evaluate, two_highest
from .fit import fit
from .predictions import Recorder
from .state import wants_channels_last


@dataclass
class EvaluatedTeacher:
    """What was found of a teacher on the validation split; empty where there is none.

    Attributes:
        top1, macro: percent; of an older cache there is no macro accuracy.
        predictions: of this process's images the two highest classes, `[n, 2]`.
        digest: SHA-256 of its weights.
        recorder: what it says of each image; None where that is in the cache.
        cache: of its logits.
    """

    top1: float | None = None
    macro: float | None = None
    predictions: Tensor | None = None
    digest: str | None = None
    recorder: Recorder | None = None
    cache: TeacherCache | None = None


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
    accelerator.print(f'training the teacher {config.teacher} first, for {settings.epochs} epoch(s) (--teacher-epochs)')
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
) -> EvaluatedTeacher:
    """Optimise a teacher for inference, evaluate it, print the result and where it differs from the student, and stop
    where it is near chance.

    Args:
        cache: an earlier evaluation in it is read; else this one is cached.
        weights: the teacher's file, where it was trained here.

    Returns:
        What was found.

    Raises:
        UserError: below `--min-teacher-acc`.
    """
    recorder = None
    if cache is not None:
        cache.open(weights, pair.teacher)
    if pair.teacher is not None:
        optimize_for_inference(pair, accelerator, config)
    if cache is not None and cache.validated:
        assert loader.sampler is not None  # a stream has no cache
        loader.set_epoch(0)
        top1, macro, logits, digest = cache.validation(loader.sampler.indices())
        predictions = two_highest(logits).to(accelerator.device)
    else:
        assert pair.teacher is not None
        recorder = Recorder() if cache is None else None  # else what is cached is read when it is asked for
        metrics, predictions = evaluate(
            pair.teacher, loader, accelerator, on_batch=recorder if cache is None else cache.write_validation
        )
        top1, macro, digest = metrics['top1'], metrics['macro'], weights_digest(pair.teacher)
        if cache is not None:
            cache.end_validation(top1, macro, digest, pair.teacher.folded)
    found = f'teacher {config.teacher}: top-1 {top1:.2f} on {loader.source.split}'
    accelerator.print('\n  '.join([found, *audit(pair)]))
    check_accuracy(str(config.teacher), top1, pair.num_classes, config.min_teacher_acc)
    if recorder is not None:
        recorder.finish(accelerator, pair.num_classes)  # its logits need not be kept while the student trains
    return EvaluatedTeacher(top1, macro, predictions, digest, recorder, cache)


def optimize_for_inference(pair: Pair, accelerator: Accelerator, config: Config) -> None:
    """Fold and lay out a teacher (:meth:`Teacher.optimize_for_inference`), and move it to the device."""
    assert pair.teacher is not None
    # on the CPU, where float32 is float32: a GPU's convolutions round to TF32, with which no fold would pass the check
    channels_last = wants_channels_last(config, accelerator)
    pair.teacher.cpu().optimize_for_inference(pair.data_config['input_size'], channels_last)
    pair.teacher.to(accelerator.device)
