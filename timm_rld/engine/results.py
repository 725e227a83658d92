"""What a run says of its student and teacher once it is trained: model folders, predictions, figures, size, speed."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator

from ..cache import TeacherCache
from ..config import Config
from ..data import Loader
from ..distributed import main_only, main_writes
from ..pairing import Pair, Teacher, teacher_skeleton, to_memory_format
from ..task import DistillationTask
from .asking import sum_over_processes
from .checkpoint import Checkpoints, Damaged, Position, read_checkpoint
from .generated import describe_generated
from .predictions import Recorder, figures, gather, record, write_predictions
from .speed import Network, latencies, size_of
from .state import wants_channels_last
from .teacher_training import EvaluatedTeacher


def export_students(
    task: DistillationTask,
    folder: Path,
    results: dict[str, Any],
    export: Callable[..., Path],
    checkpoints: Checkpoints,
    accelerator: Accelerator,
) -> dict[str, dict[str, Any]]:
    """Write the trained student as model folders: `student` (the last epoch), `student_ema` (the averaged weights, if
    there are any), and `student_best` where the best epoch on validation is another one.

    Args:
        folder: of the run.
        results: of the run: its `best_epoch` and `epochs`.
        export: (model, folder, about=…) → the folder.
        checkpoints: that of the best epoch is among them.

    Returns:
        For each folder its `weights` (`last`, `ema`, `best`) and `epoch`.
    """
    student, best, epochs = task.trainable_module, int(results['best_epoch']), int(results['epochs'])
    folders: dict[str, dict[str, Any]] = {'student': {'weights': 'last', 'epoch': epochs}}
    about = f'The weights are those of the last epoch ({epochs}).'
    main_writes(accelerator, folder, export, student, folder / 'student', about=about)
    if task.has_ema():
        folders['student_ema'] = {'weights': 'ema', 'epoch': epochs}
        about = f'The weights are the moving average after the last epoch ({epochs}).'
        main_writes(accelerator, folder, export, task.trainable_module_ema.module, folder / 'student_ema', about=about)

    def write_best() -> bool:
        try:
            weights = read_checkpoint(checkpoints.folder / Position('student', best, None, 0).name).weights['model']
        except Damaged as e:
            accelerator.print(f'note: no {folder / "student_best"}: the checkpoint of epoch {best} is damaged ({e})')
            return False
        last = {k: v.clone() for k, v in student.state_dict().items()}
        student.load_state_dict(weights)
        try:
            about = f'The weights are those of epoch {best}, chosen as the best on the validation split itself.'
            export(student, folder / 'student_best', about=about)
        finally:
            student.load_state_dict(last)
        return True

    if best != epochs and main_only(accelerator, write_best):
        folders['student_best'] = {'weights': 'best', 'epoch': best}
    return folders


def describe_models(
    pair: Pair,
    teacher: EvaluatedTeacher,
    recorder: Recorder,
    loader: Loader,
    accelerator: Accelerator,
    config: Config,
    folder: Path,
) -> dict[str, Any]:
    """Write predictions.parquet, and return what results.json says of the two networks. Called on every process.

    Args:
        teacher: of :func:`evaluate_teacher`.
        recorder: of the student's last evaluation, which is made once more where it is empty. (Without epochs there
            is no student.)
        loader: of the validation split.
        folder: of the run.

    Returns:
        `models`: of `student` and `teacher` size (:func:`size_of`), speed (:func:`latencies`) and :func:`figures`; of a
        closed teacher what can be known of it, and what it answers with; of a student trained on generated images also
        `generator` (:func:`describe_generated`). `queries`: images that the closed teacher was asked about.
    """
    recorders: dict[str, Recorder] = {}
    if config.epochs:
        recorders['student'] = recorder or record_student(pair, loader, accelerator, config)
        recorders['student'].finish(accelerator, pair.num_classes)
    if teacher.top1 is not None:
        recorders['teacher'] = teacher.recorder or _from_cache(teacher.cache, recorders['student'])
    table = gather(recorders, accelerator, pair.num_classes, in_order=loader.sampler is None)
    if config.black_box == 'hard' and 'teacher' in recorders:
        for column in ('top1_prob', 'target_prob', 'loss'):  # it gave none
            table[f'teacher_{column}'] = np.full_like(table[f'teacher_{column}'], np.nan)
    if not config.no_predictions and 'student' in recorders:
        main_writes(accelerator, folder, write_predictions, folder / 'predictions.parquet', table, loader)
    sizes = main_only(accelerator, lambda: describe_size_and_speed(pair, accelerator, config, list(recorders)))
    models = {
        name: {**sizes[name], **figures(table, name, recorder.temperature, pair.num_classes)}
        for name, recorder in recorders.items()
    }
    if config.black_box is not None and 'teacher' in models:
        models['teacher'] = {'answers': config.black_box, **models['teacher']}
    if (folder / 'generator').is_dir() and config.epochs:
        models['generator'] = main_only(accelerator, lambda: describe_generated(pair, accelerator, config, folder))
    if teacher.queries is None:
        return {'models': models}
    queries = sum_over_processes(teacher.queries.count, accelerator)
    accelerator.print(f'the teacher was asked about {queries:,} image(s)')
    return {'models': models, 'queries': queries}


def record_student(pair: Pair, loader: Loader, accelerator: Accelerator, config: Config) -> Recorder:
    """Return the record of a student's evaluation as :func:`timm_rld.engine.fit` makes it, in its memory layout."""
    student = pair.student.to(accelerator.device).eval()
    normalize = pair.normalize.to(accelerator.device)
    channels_last = wants_channels_last(config, accelerator)
    to_memory_format(student, torch.channels_last if channels_last else torch.contiguous_format)
    return record(lambda pixels: student(normalize(pixels)), loader, accelerator)


def _from_cache(cache: TeacherCache | None, student: Recorder) -> Recorder:
    """Return the record of a teacher's evaluation, of the images that the student's has, from the cache."""
    assert cache is not None and student.columns is not None
    recorder, indices, target = Recorder(), *(torch.from_numpy(student.columns[k]) for k in ('index', 'target'))
    for part in torch.arange(len(indices)).split(1024):
        recorder(indices[part], target[part], cache.validation_logits(indices[part].tolist()))
    return recorder


def describe_size_and_speed(
    pair: Pair, accelerator: Accelerator, config: Config, names: Sequence[str]
) -> dict[str, dict[str, Any]]:
    """Return :func:`size_of` and, unless that is switched off, :func:`latencies` of a pair's networks.

    The teacher's size is told from its network without weights, since the one that is loaded has its batch norms
    folded, and with a complete cache none is; then its speed is left out. What cannot be found, as for want of memory,
    is left out with a note: a run that has ended must not fail here.

    Of a closed teacher neither is known.

    Args:
        names: `student`, `teacher`, or both.
    """
    found: dict[str, dict[str, Any]] = {name: {} for name in names}

    def add(what: str, figures_of: Callable[[], dict[str, dict[str, Any]]]) -> None:
        try:
            for name, more in figures_of().items():
                found[name] |= more
        except Exception as e:
            why = (str(e) or type(e).__name__).splitlines()[0]
            accelerator.print(f'note: the {what} is not known ({why})')

    size, networks = pair.data_config['input_size'], {'student': (pair.student, pair.normalize)}
    if 'student' in found:
        add('size of the student', lambda: {'student': size_of(pair.student, size)})
    if 'teacher' in found and config.black_box is None:
        of_teacher = dict(config.arguments_of('create_teacher'), num_classes=pair.num_classes)
        add(
            'size of the teacher',
            lambda: {'teacher': size_of(*teacher_skeleton(image_size=pair.image_size, **of_teacher))},
        )
        if isinstance(pair.teacher, Teacher):
            networks['teacher'] = pair.teacher.model, pair.teacher.normalize
    if not config.no_speed:
        there: dict[str, Network] = {name: network for name, network in networks.items() if name in found}
        batch_sizes = (1, config.validation_batch_size or 1)
        layout = wants_channels_last(config, accelerator)
        add('speed (--no-speed does not measure it)', lambda: latencies(there, size, batch_sizes, accelerator, layout))
    return found
