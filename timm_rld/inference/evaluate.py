"""A model on a validation split: accuracy, calibration, size and speed, figures of each class."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor

from .. import metrics
from ..config import Config, data_named, resolve, taken_by
from ..data import Loader, Source, eval_transform, open_splits, open_validation
from ..distributed import create_accelerator, main_first, main_only
from ..engine import (
    Recorder,
    describe_size_and_speed,
    figures,
    gather,
    optimize_for_inference,
    record,
    wants_channels_last,
)
from ..errors import UsageError, UserError
from ..pairing import Pair, Teacher, create_teacher, look_up, to_memory_format
from ..run_folder import versions
from .files import check_folder, files_of, summary, write_all
from .model import OpenModel, model_name, open_model, output_of_each_class

Evaluation = dict[str, Any]


def evaluate_model(
    name: str,
    *,
    given: dict[str, Any] | None = None,
    weights: str = 'last',
    teacher: str | None = None,
    batch_size: int | None = None,
    device: str | None = None,
    output: str | None = None,
    log: Callable[[str], object] | None = None,
) -> Evaluation:
    """Evaluate a model, and a teacher beside it, on the validation split of a dataset; print a summary.

    Both see the same pixels, those of the model's own preprocessing, as in a run.

    Args:
        name: a run, a model folder, `hf-hub:user/model`, or a timm name.
        given: settings of the data and the device; those of a run otherwise.
        weights: of a run: `last`, `best` or `ema`.
        teacher: a model to compare with, or the teacher of the run.
        batch_size: per process; None for the run's, or 128.
        device: `cpu`, `cuda`, or None for a GPU where there is one.
        output: folder for predictions.parquet, evaluation.json, and per_class and confusion as CSV, Parquet and JSON.
        log: prints; None: the main process to stdout.

    Returns:
        What evaluation.json holds.

    Raises:
        UserError: a model or dataset that is not there, other classes, an output that cannot be written.
    """
    if output is not None:
        check_folder(Path(output).expanduser())
    if device == 'cuda' and not torch.cuda.is_available():
        raise UsageError('--device cuda: torch finds no GPU; use cpu')
    opened = open_model(name, weights)
    config = evaluation_settings(opened, given or {}, batch_size, teacher)
    cpu = device == 'cpu' or not torch.cuda.is_available()
    if cpu and config.mixed_precision == 'fp16' and 'mixed_precision' not in (given or {}):
        config.mixed_precision = 'no'  # of a run on a GPU
    accelerator = create_accelerator(cpu=device == 'cpu', **config.arguments_of('create_accelerator'))
    config.mixed_precision = accelerator.mixed_precision
    val = main_first(accelerator, lambda: open_validation_of(config, log or accelerator.print))
    outputs = output_of_each_class(opened.info, f'model {name}', val.class_names, val.num_classes)
    loader = evaluation_loader(opened, val, config, accelerator)
    pair = Pair(opened.model, None, opened.normalize, opened.data_config)
    if config.teacher is not None:
        pair.teacher = main_first(accelerator, lambda: _open_teacher(pair, val, config))
    recorders = _evaluate(pair, loader, outputs, accelerator, config)
    table = gather(recorders, accelerator, val.num_classes, in_order=loader.sampler is None)
    sizes = main_only(accelerator, lambda: describe_size_and_speed(pair, accelerator, config, list(recorders)))
    found: Evaluation = {
        'model': name, 'weights': weights, 'teacher': config.teacher, 'dataset': data_named(vars(config)),
        'val_split': val.split, 'images': len(table['index']), 'classes': val.num_classes,
        'models': {
            who: {**sizes[who], **figures(table, who, recorder.temperature, val.num_classes)}
            for who, recorder in recorders.items()
        },
        'versions': versions(),
    }  # fmt: skip
    if 'teacher' in recorders:
        right = [table[f'{who}_top1'] == table['target'] for who in ('student', 'teacher')]
        difference, *interval = metrics.mcnemar_interval(*right)
        found['difference'], found['difference_interval'] = 100 * difference, [100 * x for x in interval]
    names = val.class_names or opened.class_names
    if output is not None:
        folder = Path(output).expanduser()
        main_only(accelerator, lambda: write_all(folder, files_of(table, val, found, names)))
    (log or accelerator.print)(summary(found, table, names))
    return found


def names_other_data(opened: OpenModel, given: dict[str, Any]) -> bool:
    """Return whether what is given names other data than those of a model's run. With a dataset of its own, --data-dir
    says where it lies now, --labels which of its images; with one of the Hub, both name another one."""
    of_run = (opened.settings or Config()).dataset or ''
    of_hub = of_run.startswith(('hfds/', 'hfids/'))
    return 'dataset' in given or (of_hub and not given.keys().isdisjoint(('data_dir', 'labels')))


def evaluation_settings(
    opened: OpenModel, given: dict[str, Any], batch_size: int | None = None, teacher: str | None = None
) -> Config:
    """Return the settings of an evaluation: a run's, with what is given in their place."""
    run, of_data = opened.settings, taken_by('open_splits')
    if run is None and data_named(given) is None:
        raise UsageError(f'{opened.name}: give --data-dir D, --dataset NAME or --labels FILE to evaluate it on')
    base = run or Config()
    if names_other_data(opened, given):
        base = dataclasses.replace(base, **Config().pick(*of_data))
    elif given.keys() & {'labels', 'val_split'}:  # not the part of the training split that the run held out
        base = dataclasses.replace(base, val_fraction=None, val_seed=None, tune_holdout=None, train_on_holdout=False)
    if run is None or teacher != run.teacher:
        base = dataclasses.replace(base, **Config().pick(*taken_by('create_teacher')))
    elif opened.run is not None and (opened.run / 'teacher' / 'config.json').is_file():
        teacher = str(opened.run / 'teacher')  # it was trained there
    size = batch_size or (run or base).validation_batch_size
    base = dataclasses.replace(base, **given, validation_batch_size=size, report_to=(), sync_bn=False, resume=None)
    if teacher is not None and run is not None and teacher == run.teacher_name != run.teacher:
        raise UsageError(
            f'--teacher {teacher}: the closed teacher of {opened.name} cannot be evaluated again; '
            'its answers for the validation images are in predictions.parquet of the run'
        )
    of_training = taken_by('load_query', 'QueryTeacher', 'AnswersFile', 'TeacherCache')
    config = resolve(dataclasses.replace(base, **Config().pick(*of_training)))  # a network is evaluated as it is
    config.teacher = teacher and model_name(teacher, '--teacher')
    config.teacher_pretrained = True
    config.in_chans = opened.data_config['input_size'][0]
    return config


def open_validation_of(config: Config, log: Callable[[str], object]) -> Source:
    """Return the validation split of the settings of an evaluation."""
    if config.val_fraction is not None or config.tune_holdout is not None:
        return open_splits(**config.arguments_of('open_splits'))[1]
    return open_validation(log=log, **config.arguments_of('open_validation'))  # it need not have a training split


def _open_teacher(pair: Pair, val: Source, config: Config) -> Teacher:
    arguments, what = config.arguments_of('create_teacher'), f'--teacher {config.teacher}'
    if config.teacher_checkpoint is None:
        info = look_up(arguments['name'], '--teacher')
        if not info.has_weights:
            raise UserError(f'{what}: no weights are published for it; give a folder, or hf-hub:user/model')
        if config.teacher_class_map is None:
            classes = val.class_names, val.num_classes
            arguments['class_map'] = output_of_each_class(info, what, *classes)
    return create_teacher(
        num_classes=val.num_classes, class_names=val.class_names, image_size=pair.image_size, **arguments
    )  # fmt: skip


def evaluation_loader(opened: OpenModel, val: Source, config: Config, accelerator: Accelerator) -> Loader:
    """Return the loader of a split through a model's own preprocessing."""
    c = opened.data_config
    assert isinstance(config.workers, int) and config.validation_batch_size is not None  # resolve() fills them in
    transform = eval_transform(
        c['input_size'], interpolation=c['interpolation'], crop_pct=c['crop_pct'], crop_mode=c['crop_mode'],
        mean=c['mean'], jpeg_draft=config.jpeg_draft,
    )  # fmt: skip
    return Loader(
        val, transform, config.validation_batch_size, training=False, seed=config.seed,
        rank=accelerator.process_index, world=accelerator.num_processes, workers=config.workers,
        pin_memory=accelerator.device.type == 'cuda',
    )  # fmt: skip


def _evaluate(
    pair: Pair, loader: Loader, outputs: list[int] | None, accelerator: Accelerator, config: Config
) -> dict[str, Recorder]:
    """Return the records of both networks."""
    device = accelerator.device
    model, normalize = pair.student.to(device), pair.normalize.to(device)
    channels_last = wants_channels_last(config, accelerator)
    to_memory_format(model, torch.channels_last if channels_last else torch.contiguous_format)
    index = None if outputs is None else torch.tensor(outputs, device=device)

    def predict(pixels: Tensor) -> Tensor:
        logits = model(normalize(pixels))
        return logits if index is None else logits.index_select(1, index)

    recorders = {'student': record(predict, loader, accelerator, title='model')}
    if pair.teacher is not None:
        optimize_for_inference(pair, accelerator, config)
        recorders['teacher'] = record(pair.teacher, loader, accelerator, title='teacher')
    return recorders
