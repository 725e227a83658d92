"""The teacher of a run: trained first where that is asked for, then evaluated."""

from __future__ import annotations

import contextlib
import functools
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor

from ..cache import AnswersFile, TeacherCache
from ..config import Config
from ..data import Loader, Source
from ..distributed import main_only, main_writes
from ..errors import SampleError, UserError
from ..hub import export_model
from ..pairing import (
    ClosedTeacher,
    Pair,
    Queries,
    QueryTeacher,
    Teacher,
    asked_about,
    audit,
    check_accuracy,
    close_teacher,
    load_query,
    load_weights,
    weights_digest,
)
from ..run_folder import queries_in, teacher_is_trained, write_teacher_checksum
from ..task import DistillationTask
from .asking import name_images, total_queries
from .checkpoint import Checkpoints
from .evaluate import evaluate
from .fit import fit
from .predictions import Recorder
from .state import wants_channels_last


@dataclass
class EvaluatedTeacher:
    """What was found of a teacher on the validation split; empty where there is none.

    Attributes:
        top1, macro: percent; of an older cache there is no macro accuracy.
        predictions: this process's predicted classes `[n]`.
        digest: SHA-256 of its weights.
        recorder: what it says of each image; None where that is in the cache.
        cache: of its logits.
        queries: images that a closed teacher has answered for; None: it was not asked.
    """

    top1: float | None = None
    macro: float | None = None
    predictions: Tensor | None = None
    digest: str | None = None
    recorder: Recorder | None = None
    cache: TeacherCache | None = None
    queries: Queries | None = None


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
) -> Path | None:
    """Train a pair's teacher with cross-entropy and export it to FOLDER/teacher, unless an earlier process has done so,
    or none is to be trained (`--teacher-epochs`).

    Args:
        folder: of the run.
        config: of the run; its `teacher_epochs` and `teacher_lr` are used.
        checkpoints: as in :func:`fit`.
        class_names: label names of the exported model.

    Returns:
        The file of its weights; None where it was not trained.

    Raises:
        UserError: as :func:`fit`; where the file of an earlier process is damaged.
    """
    if not config.teacher_epochs or config.teacher is None:
        return None
    teacher, file = pair.teacher, folder / 'teacher' / 'model.safetensors'
    assert isinstance(teacher, Teacher) and config.smoothing is not None  # resolve() fills it in
    if teacher_is_trained(folder, file):
        teacher.model.load_state_dict(load_weights(str(file), '--resume'))
        return file
    model = teacher.model.requires_grad_(True)
    task = DistillationTask(model, None, None, smoothing=config.smoothing, normalize=teacher.normalize)
    log_file = folder / 'teacher.csv'
    settings = config.of_teacher()
    accelerator.print(f'training the teacher {config.teacher} first, for {settings.epochs} epoch(s) (--teacher-epochs)')
    fit(
        task, train_loader.of_the_whole(), val_loader, accelerator, settings, log_file=log_file,
        checkpoints=checkpoints, phase='teacher',
    )  # fmt: skip
    if task.has_ema():
        model.load_state_dict(task.trainable_module_ema.module.state_dict())
    teacher.requires_grad_(False).eval()
    export = functools.partial(export_model, data_config=pair.teacher_data_config, label_names=class_names)
    main_writes(accelerator, folder, export, model, file.parent)
    main_writes(accelerator, folder, write_teacher_checksum, folder, file)
    return file


def open_cache(
    config: Config, accelerator: Accelerator, train: Source, val: Source, data_config: dict[str, Any], distils: bool
) -> TeacherCache | AnswersFile | None:
    """Return what has the teacher's answers on disk: the cache of `--teacher-cache`, or the file of
    `--teacher-answers`; None where neither is named.

    Args:
        train, val: the splits.
        data_config: the student's preprocessing.
        distils: whether there is a criterion; without one a cache is not needed.
    """
    if config.teacher_answers:
        return AnswersFile(train=train, val=val, log=accelerator.print, **config.arguments_of('AnswersFile'))
    if not config.teacher_cache or not distils or not config.epochs:
        return None
    return TeacherCache(
        accelerator=accelerator, train=train, val=val, data_config=data_config,
        arguments=config.with_absolute_paths().arguments_of_each('open_splits', 'create_loaders', 'create_teacher'),
        depends_on=config.of_logits(), epochs=config.epochs,
        train_teacher=config.teacher is not None and bool(config.teacher_epochs),
        **config.arguments_of('TeacherCache'),
    )  # fmt: skip


def open_query(
    pair: Pair,
    loader: Loader,
    accelerator: Accelerator,
    config: Config,
    cache: TeacherCache | AnswersFile | None = None,
) -> None:
    """Give a pair the closed teacher of `--teacher-query`, and ask it about eight training images: twice, to see
    whether its answers stay the same; or once, where a cache knows what it said of them.

    Args:
        loader: of the training images.
        cache: where it is complete nothing is asked.

    Raises:
        UserError: where it does not answer, not with what was asked for, or as another teacher than the cache's.
    """
    if config.teacher_query is None or (cache is not None and cache.complete):
        return
    assert not isinstance(cache, AnswersFile)  # which is complete
    rank = f'[process {accelerator.process_index}] ' if accelerator.num_processes > 1 else ''
    pair.teacher = teacher = QueryTeacher(
        load_query(config.teacher_query), pair.num_classes, name=f'--teacher-query {config.teacher_query}',
        log=lambda line: print(f'{rank}{line}', flush=True), **config.arguments_of('QueryTeacher'),
    )  # fmt: skip

    def try_out() -> None:
        images, names = _eight_images(loader, pair)
        known = cache.first_answers() if cache is not None else None
        used = 0
        if config.resume and config.experiment:
            used = queries_in(Path(config.output or 'output').expanduser() / config.experiment)
        if config.max_queries is not None and used + 2 * len(images) > config.max_queries:
            raise UserError(f'--max-queries {config.max_queries}: {used:,} are used already; give more')
        teacher.retries = 0  # who is down now is waited for by nobody
        with asked_about(names):
            first = teacher(images)
            again = teacher(images) if known is None else known.to(first)
        teacher.retries = config.query_retries
        changed = _difference(first, again, teacher.answers)
        if known is None and changed > 1e-3:
            by = f' (probabilities by up to {changed:.2g})' if teacher.answers == 'soft' else ''
            accelerator.print(
                f'note: {teacher.name}: says something else when it is asked again about the same images{by}: a run '
                'cannot be repeated exactly; with --teacher-cache an answer is kept and used again'
            )
        if known is not None and changed > _SAME[teacher.answers]:
            raise UserError(
                f'--teacher-cache {config.teacher_cache}: {teacher.name} now says something else of the same images: '
                'the answers there are of another teacher; name another folder'
            )
        if cache is not None and known is None:
            cache.keep_first_answers(first)

    main_only(accelerator, try_out)


_SAME = {'soft': 0.05, 'hard': 0.25}  # how far the answers of the same teacher may be apart (:func:`_difference`)


def _difference(first: Tensor, again: Tensor, answers: str) -> float:
    """Return the largest difference of two probabilities, or the share of images with another class."""
    if answers == 'hard':
        return (first.argmax(dim=1) != again.argmax(dim=1)).float().mean().item()
    return (first.exp() - again.exp()).abs().max().item()


def _eight_images(loader: Loader, pair: Pair) -> tuple[Tensor, str]:
    """Return eight training images, evenly spaced, as the first epoch sees them, and words for messages; of a stream,
    eight images of noise."""
    if loader.source.streamed:
        generator = torch.Generator().manual_seed(0)
        size = pair.data_config['input_size']
        return torch.randint(256, (8, *size), generator=generator, dtype=torch.uint8), '8 images of noise'
    found: dict[int, Tensor] = {}
    for index in [i * len(loader.source) // 8 for i in range(8)]:
        with contextlib.suppress(SampleError):  # the run says so when it gets there
            found[index] = torch.as_tensor(loader.dataset[1, index][0])
    return torch.stack([*found.values()]), name_images(loader.source, [*found])


def evaluate_teacher(
    pair: Pair,
    loader: Loader,
    accelerator: Accelerator,
    config: Config,
    cache: TeacherCache | AnswersFile | None = None,
    weights: Path | None = None,
    folder: Path | None = None,
) -> EvaluatedTeacher:
    """Optimise a teacher for inference, close it where that is asked for (`--black-box`), evaluate it, print the result
    and where it differs from the student, and stop where it is near chance.

    Args:
        cache: an earlier evaluation in it is read; else this one is cached.
        weights: the teacher's file, where it was trained here.
        folder: of the run, where the queries of a closed teacher are counted.

    Returns:
        What was found; of a file of answers without those of the validation images nothing.

    Raises:
        UserError: below `--min-teacher-acc`; where `--max-queries` is not enough for the validation images.
    """
    recorder, differences = None, audit(pair)
    if cache is not None:
        cache.open(weights, pair.teacher if isinstance(pair.teacher, Teacher) else None)
    if isinstance(pair.teacher, Teacher):
        optimize_for_inference(pair, accelerator, config)
        if config.black_box is not None:
            pair.teacher = close_teacher(pair.teacher, config.black_box, config.max_queries)
    queries = count_queries(pair.teacher, accelerator, config, folder)
    if isinstance(cache, AnswersFile) and not cache.has_validation:
        return EvaluatedTeacher()
    if isinstance(cache, TeacherCache) and cache.validated:
        assert loader.sampler is not None  # a stream has no cache
        loader.set_epoch(0)
        top1, macro, predictions, digest = cache.validation(loader.sampler.indices())
        predictions = predictions.to(accelerator.device)
    else:
        recorder = (
            None if isinstance(cache, TeacherCache) else Recorder()
        )  # what is cached is read when it is asked for
        metrics, predictions = ask_validation(pair.teacher, loader, accelerator, cache, recorder)
        top1, macro, digest = metrics['top1'], metrics['macro'], None
        if isinstance(pair.teacher, ClosedTeacher):
            digest = pair.teacher.digest  # of a function there is none
        elif pair.teacher is not None:
            digest = weights_digest(pair.teacher)
        if isinstance(cache, TeacherCache):
            cache.end_validation(top1, macro, digest, getattr(pair.teacher, 'folded', 0))
    found = f'teacher {config.teacher_name}: top-1 {top1:.2f} on {loader.source.split}'
    accelerator.print('\n  '.join([found, *differences]))
    check_accuracy(str(config.teacher_name), top1, pair.num_classes, config.min_teacher_acc)
    if recorder is not None:
        recorder.finish(accelerator, pair.num_classes)  # its logits need not be kept while the student trains
    cached_logits = cache if isinstance(cache, TeacherCache) else None
    return EvaluatedTeacher(top1, macro, predictions, digest, recorder, cached_logits, queries)


def count_queries(
    teacher: Teacher | ClosedTeacher | None, accelerator: Accelerator, config: Config, folder: Path | None
) -> Queries | None:
    """Return what counts the queries of a closed teacher; with a folder, it goes on from those of earlier processes of
    the run. None where nothing is asked."""
    if config.black_box is None or config.teacher_answers is not None:
        return None
    queries = teacher.queries if isinstance(teacher, ClosedTeacher) else Queries()
    if folder is not None:
        folder.mkdir(parents=True, exist_ok=True)
        queries.keep_in(folder / f'queries-{accelerator.process_index}.txt')
    return queries


def ask_validation(
    teacher: Teacher | ClosedTeacher | None,
    loader: Loader,
    accelerator: Accelerator,
    cache: TeacherCache | AnswersFile | None,
    recorder: Recorder | None,
) -> tuple[dict[str, float], Tensor]:
    """Evaluate a teacher (:func:`evaluate`), or its answers in a file; a cache keeps what it says, of a function each
    answer as it comes.

    Raises:
        UserError: where `--max-queries` is not enough.
    """
    if isinstance(cache, AnswersFile):
        of_file = cache
        return evaluate(
            lambda pixels, indices: of_file.validation_logits(indices.tolist()).to(pixels.device), loader, accelerator,
            on_batch=recorder, with_indices=True,
        )  # fmt: skip
    if not isinstance(teacher, ClosedTeacher):
        assert teacher is not None
        return evaluate(teacher, loader, accelerator, on_batch=recorder if cache is None else cache.write_validation)
    by_image = cache is not None and cache.by_image
    if (limit := teacher.queries.limit) is not None:
        used = total_queries(teacher, accelerator)
        needed = cache.missing_validation() if cache is not None and by_image else loader.source.images
        if used + needed > limit:
            raise UserError(
                f'--max-queries {limit}: {used:,} are used, and the validation images need {needed:,} more; give more'
            )

    def predict(pixels: Tensor, indices: Tensor) -> Tensor:
        def compute(chosen: Tensor | None = None) -> Tensor:
            with asked_about(name_images(loader.source, (indices if chosen is None else indices[chosen]).tolist())):
                return teacher(pixels if chosen is None else pixels[chosen.to(pixels.device)])

        if cache is None or not by_image:
            return compute()
        return cache.ask_validation(indices, compute).to(pixels.device)

    on_batch = recorder if cache is None else None if by_image else cache.write_validation
    return evaluate(predict, loader, accelerator, on_batch=on_batch, with_indices=True)


def optimize_for_inference(pair: Pair, accelerator: Accelerator, config: Config) -> None:
    """Fold and lay out a teacher (:meth:`Teacher.optimize_for_inference`), and move it to the device."""
    assert isinstance(pair.teacher, Teacher)
    # on the CPU, where float32 is float32: a GPU's convolutions round to TF32, with which no fold would pass the check
    channels_last = wants_channels_last(config, accelerator)
    pair.teacher.cpu().optimize_for_inference(pair.data_config['input_size'], channels_last)
    pair.teacher.to(accelerator.device)
