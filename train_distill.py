#!/usr/bin/env python
"""Distil a timm student from a timm teacher.

    accelerate launch train_distill.py --teacher resnet34 --student resnet18 --distill rld

Read it top to bottom: config → data → student, teacher → criterion, task → fit → export.
"""

from __future__ import annotations

import functools
import os
import shlex
import sys
from typing import Any

# Before torch loads: a thread of GNU OpenMP that waits spins a hundredth as long before it sleeps. On idle cores that
# is as fast (no spinning at all costs an eighth); beside another program a step takes two thirds of the time.
if 'OMP_WAIT_POLICY' not in os.environ:
    os.environ.setdefault('GOMP_SPINCOUNT', '3000')

import timm_rld  # noqa: E402
from timm_rld.config import Config, describe_derived, parse_args, resolve  # noqa: E402
from timm_rld.errors import run_main  # noqa: E402


def run(config: Config, command: str = '') -> dict[str, Any]:
    """Train with the given settings. Returns what results.json holds, and the run folder as `run`."""
    import torch

    from timm_rld import data, engine, hub, loss, pairing, poison, run_folder
    from timm_rld.distributed import create_accelerator, main_first, main_only, main_writes
    from timm_rld.mekd_task import MEKDTask
    from timm_rld.resume import open_run
    from timm_rld.task import DistillationTask, create_features

    # ---- config
    config = resolve(config)
    engine.check_settings(config)
    info, criterion = loss.choose_criterion(config.distill, config.standardize, config.distill_kwargs, config.black_box)
    accelerator = create_accelerator(**config.arguments_of('create_accelerator'))
    log, is_main = accelerator.print, accelerator.is_main_process
    if config.push_to_hub:
        config.give(hub_model_id=main_only(accelerator, lambda: hub.check_hub(**config.arguments_of('check_hub'))))

    # ---- data
    open_splits = functools.partial(data.open_splits, log=log, **config.arguments_of('open_splits'))
    train_split, val_split = main_first(accelerator, open_splits)
    held_out = config.val_fraction or config.tune_holdout  # of the training split
    config.give(train_split=train_split.split, val_split=config.val_split if held_out else val_split.split)
    main_only(accelerator, lambda: data.first_look(train_split, val_split, config.on_bad_image, log))
    num_classes, class_names = train_split.num_classes, train_split.class_names
    engine.check_data(criterion, train_split, config)
    config = resolve(config, accelerator.num_processes, train_split.images, loss.published_defaults)
    for line in (*describe_derived(config), *data.describe_classes(train_split)):
        log(line)
    class_weights = data.class_weights(train_split, **config.arguments_of('class_weights'))
    attacker = poison.create_poison(train_split, **config.arguments_of('create_poison'))

    # ---- student, teacher
    torch.manual_seed(config.seed)  # before each of the two, so that neither's start depends on the other
    of_student = {**config.arguments_of('create_student'), **pairing.check_kwargs(config.model_kwargs)}
    pair = pairing.create_student(num_classes=num_classes, **of_student)
    train_teacher = config.teacher is not None and config.teacher_epochs > 0
    cache = engine.open_cache(config, accelerator, train_split, val_split, pair.data_config, criterion is not None)
    torch.manual_seed(config.seed)
    if config.teacher is not None and (cache is None or not cache.complete or config.feature_distill != 'none'):
        pair.teacher = pairing.create_teacher(
            num_classes=num_classes, class_names=class_names, to_train=train_teacher, image_size=pair.image_size,
            **config.arguments_of('create_teacher'),
        )  # fmt: skip
    features = create_features(pair, log=log, **config.arguments_of('create_features'))
    trained = pair.trained(train_teacher)
    main_only(accelerator, lambda: [hub.check_export(*network) for network in trained])
    train_loader, val_loader = data.create_loaders(
        train_split, val_split, pair.data_config,
        min_batch=2 if any(pairing.has_batch_norm(model) for model, *_ in trained) else 0,
        rank=accelerator.process_index, world=accelerator.num_processes, pin_memory=accelerator.device.type == 'cuda',
        **config.arguments_of('create_loaders'),
    )  # fmt: skip
    config.img_size, config.mixed_precision = pair.img_size, accelerator.mixed_precision
    evaluate_teacher = functools.partial(engine.evaluate_teacher, pair, val_loader, accelerator, config, cache)
    engine.open_query(pair, train_loader, accelerator, config, cache)
    later = config.teacher is None or train_teacher or config.black_box  # a closed one: when its queries can be counted
    teacher = engine.EvaluatedTeacher() if later else evaluate_teacher()

    folder = open_run(config, accelerator, train_split, val_split, pairing.teacher_facts)
    checkpoints = engine.Checkpoints(folder / 'checkpoints', config.checkpoint_hist, log, config.best_by)
    checkpoints.prepare(config.resume, accelerator)
    if config.on_bad_image == 'skip':
        train_loader.skip_bad_images(folder / 'bad_images.txt')
    accelerator.init_trackers('timm_rld', config={'command': command})
    run_on = dict(accelerator=accelerator, train_loader=train_loader, val_loader=val_loader, checkpoints=checkpoints)
    weights = engine.train_teacher(pair, folder, config=config, class_names=class_names, **run_on)
    if later and config.teacher_name:
        teacher = evaluate_teacher(weights, folder)

    # ---- criterion, task → fit → export
    results = dict(
        config.pick('student', 'distill', 'feature_distill', 'epochs', 'seed'), teacher=config.teacher_name,
        teacher_top1=teacher.top1, distill_options=dict(info.options), num_classes=num_classes, command=command,
        teacher_macro=teacher.macro, teacher_sha256=teacher.digest, paper=info.cited, versions=run_folder.versions(),
        poison=poison.facts(attacker), student_weights=pair.student_weights,
    )  # fmt: skip
    logs = dict(log_file=folder / 'summary.csv', reference=teacher.predictions, recorder=engine.Recorder())
    if config.epochs:
        run_on['train_loader'] = engine.prepare_images(criterion, pair, folder, config, class_names, **run_on)
        task = (MEKDTask if info.generated else DistillationTask)(
            pair.student, pair.teacher if criterion or features else None, criterion, normalize=pair.normalize,
            cache=cache, features=features, class_weights=class_weights, poison=attacker,
            **config.arguments_of('DistillationTask'),
        )  # fmt: skip
        export = functools.partial(hub.export_model, data_config=pair.data_config, label_names=class_names)
        if config.push_to_hub and is_main:
            checkpoints.on_epoch_end = hub.BackgroundPush(
                folder, dict(results), pair.student, export, log, **config.arguments_of('BackgroundPush')
            )
        results |= run_folder.outcome(engine.fit(task, config=config, **logs, **run_on), config.best_by)
        results['student_folders'] = engine.export_students(task, folder, results, export, checkpoints, accelerator)
    results |= engine.describe_models(pair, teacher, logs['recorder'], val_loader, accelerator, config, folder)
    main_writes(accelerator, folder, run_folder.write_results, folder, results)
    accelerator.end_training()
    log(f'{folder}: {run_folder.summary_line(results)}')
    if config.push_to_hub and is_main and config.epochs:
        hub.push_run(folder, after=checkpoints.on_epoch_end, log=log, **config.arguments_of('push_run'))
    return {**results, 'run': str(folder)}


def main(argv: list[str] | None = None) -> int:
    """The command line. Returns the exit code: 0, 2 for wrong usage, 1 for any other failure."""
    argv = sys.argv[1:] if argv is None else argv
    command = shlex.join(['train_distill.py', *argv])

    def program() -> None:
        run(parse_args(argv, epilog=lambda: timm_rld.describe_methods()), command)

    return run_main(program, 'train_distill.py', debug='--debug' in argv)


if __name__ == '__main__':
    sys.exit(main())
