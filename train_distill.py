#!/usr/bin/env python
"""Distil a timm student from a timm teacher.

    accelerate launch train_distill.py --teacher resnet34 --student resnet18 --distill rld

Read it top to bottom: config → data → pair → teacher → loss, task, fit → export.
"""

from __future__ import annotations

import functools
import shlex
import sys
from typing import Any

import timm_rld
from timm_rld.config import Config, parse_args, resolve, uses_sample
from timm_rld.errors import run_main


def run(config: Config, command: str = '') -> dict[str, Any]:
    """Train as the settings say. Returns what results.json holds, and the run folder as `run`."""
    from accelerate.utils import set_seed

    from timm_rld import data, engine, hub, pairing, push, runs
    from timm_rld.cache import TeacherCache
    from timm_rld.checkpoint import Checkpoints
    from timm_rld.loss import choose_criterion
    from timm_rld.task import DistillationTask

    # ---- config
    engine.check_settings(resolve(config))
    row, criterion = choose_criterion(config.distill, config.standardize, config.distill_kwargs)
    accelerator = engine.create_accelerator(config)
    config = resolve(
        config, accelerator.num_processes, task_loss_weight=row.task_weight, distill_loss_weight=row.distill_weight,
        distill_warmup_epochs=row.warmup_epochs,
    )  # fmt: skip
    say = accelerator.print
    if config.push_to_hub:
        check = functools.partial(push.check_hub, *(getattr(config, s) for s in push.CHECKED))
        config.hub_model_id = runs.main_only(accelerator, check)

    # ---- data
    if uses_sample(config):
        say(data.SAMPLE_NOTE)
    splits = functools.partial(data.open_splits, **config.pick(*data.SPLIT_SETTINGS))
    train_split, val_split = runs.main_first(accelerator, splits)
    num_classes, class_names = train_split.num_classes, train_split.class_names

    # ---- pair
    fit_teacher = config.teacher is not None and config.teacher_epochs > 0
    kept = config.teacher_cache is not None and criterion is not None and config.epochs > 0
    cache = TeacherCache(config, accelerator, train_split, val_split) if kept else None
    pair = pairing.create_pair(
        config.teacher, config.student, num_classes, class_names=class_names, fit_teacher=fit_teacher,
        crop_pct=config.crop_pct or (1.0 if config.train_crop_mode == 'pad' else None),
        student_kwargs={'drop_rate': config.drop, 'drop_path_rate': config.drop_path, **config.model_kwargs},
        needs_teacher=cache and cache.needs_teacher, **config.pick(*pairing.PAIR_SETTINGS),
    )  # fmt: skip
    runs.main_only(accelerator, functools.partial(pairing.check_exports, pair, fit_teacher))
    student, teacher = pair.student, pair.teacher
    trained = [student, teacher] if fit_teacher else [student]
    train_loader, val_loader = data.create_loaders(
        train_split, val_split, pair.data_config, min_batch=2 if any(map(pairing.has_batch_norm, trained)) else 0,
        rank=accelerator.process_index, world=accelerator.num_processes, pin_memory=accelerator.device.type == 'cuda',
        **config.pick(*data.LOADER_SETTINGS),
    )  # fmt: skip
    config.img_size, config.mixed_precision = pair.img_size, accelerator.mixed_precision

    judge = functools.partial(engine.judge_teacher, pair, val_loader, accelerator, config, num_classes, cache)
    judged = judge() if config.teacher is not None and not fit_teacher else (None, None, None)
    run_folder = runs.open_run(config, accelerator, train_split, val_split)
    save = functools.partial(runs.main_saves, accelerator, run_folder)
    checkpoints = Checkpoints(run_folder / 'checkpoints', config.checkpoint_hist, say)
    checkpoints.prepare(config.resume, accelerator)
    if config.on_bad_image == 'skip':
        train_loader.skip_bad_images(run_folder / 'bad_images.txt')
    accelerator.init_trackers('timm_rld', config={'command': command})

    def fit(task: DistillationTask, settings: Config, log: str, **kwargs: Any) -> list[dict[str, float]]:
        set_seed(config.seed, device_specific=True)
        where = dict(log_file=run_folder / log, checkpoints=checkpoints)
        return engine.fit(task, train_loader, val_loader, accelerator, settings, **where, **kwargs)

    def finish(results: dict[str, Any]) -> dict[str, Any]:
        save(runs.write_results, run_folder, results)
        accelerator.end_training()
        say(f'{run_folder}: {runs.in_a_line(results)}')
        if config.push_to_hub and accelerator.is_main_process and config.epochs:
            push.push_run(run_folder, after=checkpoints.on_epoch_end, **config.pick(*push.SETTINGS), say=say)
        return {**results, 'run': str(run_folder)}

    # ---- teacher
    fitted = run_folder / 'teacher' / 'model.safetensors'
    if fit_teacher and runs.teacher_is_fitted(run_folder, fitted):  # by an earlier process
        teacher.model.load_state_dict(pairing.load_weights(str(fitted), '--resume'))
    elif fit_teacher:
        model = teacher.model.requires_grad_(True)
        task = DistillationTask(model, None, None, smoothing=config.smoothing, view=teacher.view)
        fit(task, config.of_teacher(), 'teacher.csv', title='teacher')
        if task.has_ema():
            model.load_state_dict(task.trainable_module_ema.module.state_dict())
        teacher.requires_grad_(False).eval()
        save(hub.export_model, model, fitted.parent, data_config=pair.teacher_data_config, label_names=class_names)
        save(runs.seal_teacher, run_folder, fitted)
    top1, reference, digest = judge(fitted) if fit_teacher else judged

    results = dict(
        config.pick('teacher', 'student', 'distill', 'epochs', 'seed'), distill_options=dict(row.options),
        num_classes=num_classes, teacher_top1=top1, command=command, paper=row.cited, teacher_sha256=digest,
        versions=runs.versions(),
    )  # fmt: skip
    if config.epochs == 0:
        return finish(results)

    # ---- loss, task, fit
    task = DistillationTask(
        student, teacher if criterion is not None else None, criterion, view=pair.view, cache=cache,
        warmup_epochs=config.distill_warmup_epochs,
        **config.pick('task_loss_weight', 'distill_loss_weight', 'smoothing'),
    )  # fmt: skip
    export = functools.partial(hub.export_model, data_config=pair.data_config, label_names=class_names)
    if config.push_to_hub and accelerator.is_main_process:
        settings = config.pick('hub_strategy', *push.SETTINGS)
        checkpoints.on_epoch_end = push.BackgroundPush(run_folder, results, student, export, say, **settings)
    history = fit(task, config, 'summary.csv', reference=reference)

    # ---- export
    save(export, student, run_folder / 'student')
    if task.has_ema():
        save(export, task.trainable_module_ema.module, run_folder / 'student_ema')
    return finish({**results, **runs.outcome(history)})


def main(argv: list[str] | None = None) -> int:
    """The command line. Returns the exit code: 0, 2 for wrong usage, 1 for any other failure."""
    argv = sys.argv[1:] if argv is None else argv
    command = shlex.join(['train_distill.py', *argv])

    def program() -> None:
        run(parse_args(argv, epilog=lambda: f'criteria (--distill):\n{timm_rld.describe_criteria()}'), command)

    return run_main(program, 'train_distill.py', debug='--debug' in argv)


if __name__ == '__main__':
    sys.exit(main())
