"""The commands and settings that the sentences of a report name."""

from __future__ import annotations

import os
import shlex
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from ...config import FIELDS, flag_of, taken_by
from ...poison import describe
from ..images import data_config
from .report import Report, method_of

_START = ('accelerate', 'launch', 'train_distill.py')
# of what opens the splits, that a look at the data does not depend on, or is given by name
_NOT_OF_DATA = ('dataset', 'seed', 'batch_size', 'validation_batch_size', 'dataset_download')


def base_facts(r: Report) -> dict[str, Any]:
    """Return the commands and settings that sentences name."""
    return {**_settings(r), **_trainings(r), **_tools(r)}


def _settings(r: Report) -> dict[str, Any]:
    """What the run was, and values to try in place of its own."""
    settings, results, run = r.run.settings, r.results, r.run.folder
    padding = settings.get('crop_padding') or 4
    return {
        'run': shlex.quote(str(run)), 'name': shlex.quote(run.name),
        'suspects_file': shlex.quote(str(r.page.with_name(f'{r.stem}-suspects.csv'))),
        'distill': results['distill'], 'poison': results.get('poison') and describe(results['poison']),
        'student_family': _family(results.get('student')), 'teacher_family': _family(settings.get('teacher')),
        'student_top1': results['student_top1'], 'teacher_top1': results.get('teacher_top1'),
        'chance': 100 / results['num_classes'], 'best_epoch': results['best_epoch'],
        'epochs': results['epochs'], 'twice_epochs': 2 * results['epochs'],
        'temperature': (results.get('distill_options') or {}).get('temperature'),
        'half_weight': _half_weight(settings), 'smoothing': settings.get('smoothing'),
        'no_aug': '--no-aug' in shlex.split(results['command']),
        'gentler': f'--crop-padding {padding // 2}' if settings.get('train_crop_mode') == 'pad' else '--scale 0.35 1',
        'larger': 2 * data_config(r.run)['input_size'][-1],
    }  # fmt: skip


def _trainings(r: Report) -> dict[str, Any]:
    """Commands that train this run again with a difference, and comparisons of it; with its own teacher, where it has
    trained one."""
    run, settings, results = r.run.folder, r.run.settings, r.results
    config = ['--config', str(run / 'args.yaml'), *(['--no-push-to-hub'] if settings.get('push_to_hub') else [])]
    teacher = ['--teacher', f'local-dir:{run / "teacher"}', '--teacher-epochs', '0', '--teacher-pretrained']
    same = [*config, *(teacher if (run / 'teacher' / 'config.json').exists() else [])]

    def again(suffix: str, *flags: str, settings: Sequence[str] = same) -> str:
        return shlex.join([*_START, *settings, *flags, '--experiment', f'{run.name}-{suffix}'])

    def comparison(*criteria: str) -> str:
        flags = ['--criteria', *criteria, '--seeds', '0', '1', '2', '--output', f'{run}-compare', *same]
        return shlex.join(['timm-rld', 'compare', *flags])

    seed, held_out = str(results['seed'] + 1), settings.get('val_seed')
    val_seed = [] if held_out is None else ['--val-seed', str(held_out)]
    another_seed = again(f'seed{seed}', '--seed', seed, *val_seed)
    better_teacher = f"timm-rld list models '{_family(settings.get('teacher'))}'"
    if epochs := settings.get('teacher_epochs'):
        better_teacher = again('taught', '--teacher-epochs', str(2 * epochs), settings=config)
    method = method_of(results)
    own = method if method != 'none' else 'rld'
    clean = ['--feature-distill', 'none'] if results.get('feature_distill', 'none') != 'none' else []
    clean += ['--poison', 'none'] if results.get('poison') else []
    clean += ['--no-standardize'] if settings.get('standardize') else []
    words = [word for word in shlex.split(results['command']) if word not in ('--no-aug', '--push-to-hub')]
    return {
        'train': shlex.join([*_START, *same]),
        'train_none': again('none', '--distill', 'none', *clean) if own == method else None,
        'train_clean': again('clean', '--poison', 'none'),
        'again': again('again', settings=config),
        'another_seed': another_seed,
        'another_generator': _another_generator(r) or another_seed,
        'better_teacher': better_teacher,
        'with_augmentation': shlex.join(['accelerate', 'launch', *words, '--experiment', f'{run.name}-augmented']),
        'compare': comparison('none', own) if results.get('teacher') else another_seed,
        'compare_kd': comparison('kd', 'rld'),
        'compare_dkd': comparison(own, 'dkd' if own != 'dkd' else 'rld'),
    }


def _tools(r: Report) -> dict[str, Any]:
    """Commands that look at the run, its data and its speed."""
    run, settings = r.run.folder, r.run.settings
    images = settings.get('data_dir')
    beside = os.path.dirname(settings.get('labels') or '') or '.'  # where the files of a table are sought
    target = settings.get('dataset') or images or beside
    data = [target, *_given(settings, [n for n in taken_by('open_splits') if n not in _NOT_OF_DATA], target)]
    if (settings.get('val_fraction') or settings.get('train_fraction')) and 'seed' in settings:
        data += ['--seed', str(settings['seed'])]  # which images these are
    measured = {'teacher': settings.get('teacher'), 'student': r.results.get('student'),
                'img_size': data_config(r.run)['input_size'][-1], 'batch_size': settings.get('batch_size')}  # fmt: skip
    bench = [x for n, v in measured.items() if v and not str(v).startswith(('local-dir:', 'hf-hub:'))
             for x in (flag_of(n), str(v))]  # fmt: skip
    return {
        'report_baseline': shlex.join(['timm-rld', 'report', 'RUN', '--baseline', str(run)]),
        'check_data': shlex.join(['timm-rld', 'data', *data]),
        'bench': shlex.join(['timm-rld', 'bench', 'step', *bench]),
        'use': shlex.join(['timm-rld', 'predict', str(run), images]) if images and Path(images).is_dir() else None,
    }


def _given(settings: Mapping[str, Any], names: Iterable[str], target: str) -> list[str]:
    """Return settings that differ from their defaults, as flags; not the one that names ``target``."""
    flags: list[str] = []
    for name in names:
        value = settings.get(name)
        if value in (None, target, FIELDS[name].default):
            continue
        flags += [flag_of(name)] if value is True else [flag_of(name), str(value)]
    return flags


def _half_weight(settings: Mapping[str, Any]) -> str:
    """Return the flag that halves the weight of what a run distils by: of a criterion, else of a method on features."""
    name = 'distill_loss_weight' if settings.get('distill') != 'none' else 'feature_loss_weight'
    return f'{flag_of(name)} {(settings.get(name) or 1) / 2:g}'


def _another_generator(r: Report) -> str | None:
    """Return the command that trains another generator, where the run was given one; None if its run is gone."""
    if not (given := r.run.settings.get('generator')):
        return None
    for folder in (file := Path(given), *file.parents[:2]):  # a run, its folder `generator`, or the weights in that
        if (folder / 'args.yaml').is_file():
            seed = str(int(r.results['seed']) + 1)
            config = ['--config', str(folder / 'args.yaml'), '--no-push-to-hub']
            return shlex.join([*_START, *config, '--seed', seed, '--experiment', f'{folder.name}-seed{seed}'])
    return None


def _family(name: str | None) -> str:
    """A pattern that finds the networks of a name's family: `*resnet*` of `cifar_resnet20.x`."""
    stem = (name or '').rpartition('/')[2].rpartition(':')[2].partition('.')[0].removeprefix('cifar_')
    letters = stem.rstrip('0123456789_')
    return f'*{letters.partition("_")[0] or "resnet"}*'.replace("'", '')
