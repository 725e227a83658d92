"""Continuing a run: what may change, and what is refused by name."""

from __future__ import annotations

import dataclasses
import functools
import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import broadcast_object_list

from .config import Config, flag_of, load_yaml, load_yaml_text, marked, to_yaml, warmup_epochs
from .data import Source, class_weights
from .data.images import DECODING_RULES
from .distributed import main_only, raise_on_all
from .errors import Stopped, UserError
from .files import sha256_of
from .run_folder import claim, is_finished, write_inputs


def open_run(
    config: Config, accelerator: Accelerator, train: Source, val: Source, teacher_facts: Callable[..., dict[str, str]]
) -> Path:
    """Make the run folder: `OUTPUT/EXPERIMENT`, by default `output/<time>-<student>-<distill>`, the same on all ranks,
    and write args.yaml and facts.json into it (with `--val-fraction` also validation.txt: what is held out); or with
    `--resume` continue in the one that is there.

    Args:
        train, val: the splits.
        teacher_facts: :func:`timm_rld.pairing.teacher_facts`.

    Returns:
        The folder.

    Raises:
        Stopped: with exit code 0, where the run that is to be resumed has finished.
        UserError: where it holds files already, cannot be written, is in use by another run, or where the run that is
            to be resumed has other settings or facts.
    """
    from timm.models import safe_model_name

    # check_settings() and resolve() have seen to these
    assert config.student is not None and config.epochs is not None and isinstance(config.workers, int)
    of_teacher = functools.partial(teacher_facts, **config.arguments_of('teacher_facts'))
    facts = gather_facts(accelerator, train, val, config.workers, **config.arguments_of('gather_facts'))
    facts |= main_only(accelerator, of_teacher)  # reads the whole file of its weights
    name = config.experiment or '-'.join(
        [time.strftime('%Y%m%d-%H%M%S'), safe_model_name(config.student), config.method]
    )
    (name,) = broadcast_object_list([name])  # another rank may be a second later
    folder = Path(config.output or 'output').expanduser() / name
    error, finished = None, False
    if accelerator.is_main_process:
        try:
            if claim(folder, resume=config.resume is not None):
                check_unchanged(folder, config, facts)
                finished = is_finished(folder, config.epochs)
            elif config.resume:
                accelerator.print(f'--resume {config.resume}: nothing to resume in {folder}, starting a new run')
            held_out = val.keys() if config.val_fraction is not None else None
            write_inputs(folder, to_yaml(config.changed(resume=None)), facts, held_out)
        except OSError as e:
            error = UserError(f'--output: {folder} cannot be written ({e.strerror or e}); give another --output')
        except UserError as e:
            error = e
    raise_on_all(error)
    if broadcast_object_list([finished])[0]:
        raise Stopped(f'{folder} has finished, there is nothing to resume', 0)
    accelerator.project_configuration.set_directories(str(folder))
    accelerator.project_configuration.logging_dir = str(folder)
    return folder


def check_unchanged(folder: Path, config: Config, facts: dict[str, Any]) -> None:
    """Raise UserError where the result would not be that of the run that was started."""
    then = {**load_yaml_text(to_yaml(Config())), **load_yaml(str(folder / 'args.yaml'), '--resume')}
    now = load_yaml_text(to_yaml(config))
    free = marked('resumable')
    changed = []
    for name, value in now.items():
        if name in free or then.get(name) == value:
            continue
        if name == 'teacher_lr' and value == now['lr'] != then['lr'] == then['teacher_lr']:
            continue  # it follows --lr
        if name == 'epochs' and value > then['epochs'] and _may_be_longer(config, then['epochs']):
            continue
        why = ' (more epochs would change this schedule)' if name == 'epochs' else ''
        changed.append(f'{flag_of(name)} {then.get(name)}, not {value}{why}')
    if changed:
        raise UserError(
            f'--resume: {folder} was started with {"; ".join(changed[:4])}. '
            'Leave it as it was, or start again under another --experiment'
        )
    try:
        facts_then = json.loads((folder / 'facts.json').read_text(encoding='utf-8'))
        facts_then.items()
    except (OSError, ValueError, AttributeError) as e:
        raise UserError(
            f'--resume: {folder}/facts.json is missing or damaged, so data and machine cannot be compared with those '
            'of the run; start again under another --experiment'
        ) from e
    for name, value in facts.items():
        if (then_value := facts_then.get(name, value)) != value:  # the weights' file need not have been on this disk
            raise UserError(f'--resume: {folder} was started with {name} {then_value}, now {value}: another result')


def _may_be_longer(config: Config, epochs: int) -> bool:
    """Return whether the learning rate of an epoch does not depend on how many there are."""
    steady = config.sched in ('multistep', 'step', 'constant', 'none') and not config.cooldown_epochs
    return steady and warmup_epochs(dataclasses.replace(config, epochs=epochs)) == warmup_epochs(config)


def gather_facts(
    accelerator: Accelerator,
    train: Source,
    val: Source,
    workers: int,
    weights: str | None = None,
    answers: str | None = None,
) -> dict[str, Any]:
    """Return what a result depends on beside the settings, by name: data, processes, threads; with class weights what
    they are, since their file may be another by now, and what a file of answers holds."""
    on_cpu = accelerator.device.type == 'cpu'
    of_classes = class_weights(train, weights)
    return {
        'processes': accelerator.num_processes,
        'device': accelerator.device.type,
        **({'CPU threads (--cpu-threads)': torch.get_num_threads()} if on_cpu else {}),
        **({'--workers of a streamed dataset': workers} if train.streamed else {}),
        'training images': len(train),
        'validation images': len(val),
        'classes': train.num_classes,
        'files and labels (a digest)': f'{train.digest()} {val.digest()}',
        'rules of decoding images': DECODING_RULES,
        **({'class weights': [round(w, 6) for w in of_classes.tolist()]} if of_classes is not None else {}),
        **({'--teacher-answers (a digest)': sha256_of(Path(answers).expanduser())} if answers else {}),
    }
