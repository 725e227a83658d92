"""The commands and settings that the sentences of a report name."""

from __future__ import annotations

import os
import shlex
from pathlib import Path
from typing import Any

from ...config import flag_of
from ...poison import describe
from ..images import data_config
from .report import Report, method_of


def base_facts(r: Report) -> dict[str, Any]:
    """Return the commands and settings that sentences name."""
    run, settings, results = r.run.folder, r.run.settings, r.results
    config = ['--config', str(run / 'args.yaml')]
    trained = (run / 'teacher' / 'config.json').exists()
    teacher = ['--teacher', f'local-dir:{run / "teacher"}', '--teacher-epochs', '0', '--teacher-pretrained']
    both = [*config, *(teacher if trained else [])]
    start = ['accelerate', 'launch', 'train_distill.py']
    train = [*start, *both]
    name, out = shlex.quote(run.name), f'{run}-compare'
    epochs, options = results['epochs'], results.get('distill_options') or {}
    temperature = options.get('temperature')
    words = shlex.split(results['command'])
    padding = settings.get('crop_padding') or 4
    beside = os.path.dirname(settings.get('labels') or '') or '.'  # where the files of a table are sought
    target = settings.get('dataset') or settings.get('data_dir') or beside
    data = [target, *(x for n in ('data_dir', 'labels', 'train_split', 'val_split', 'val_fraction')
                      if settings.get(n) not in (None, target)
                      for x in (flag_of(n), str(settings[n])))]  # fmt: skip
    measured = {'teacher': settings.get('teacher'), 'student': results.get('student'),
                'img_size': data_config(r.run)['input_size'][-1], 'batch_size': settings.get('batch_size')}  # fmt: skip
    bench = [x for n, v in measured.items() if v and not str(v).startswith(('local-dir:', 'hf-hub:'))
             for x in (flag_of(n), str(v))]  # fmt: skip

    def comparison(*criteria: str) -> str:
        flags = ['--criteria', *criteria, '--seeds', '0', '1', '2', '--output', out, *both]
        return shlex.join(['timm-rld', 'compare', *flags])

    def another_seed() -> str:
        seed = results['seed'] + 1
        held_out = settings.get('val_seed')
        same = [] if held_out is None else ['--val-seed', str(held_out)]
        return shlex.join([*train, '--seed', str(seed), *same, '--experiment', f'{run.name}-seed{seed}'])

    images = settings.get('data_dir')
    method, features = method_of(results), results.get('feature_distill', 'none')
    own = method if method != 'none' else 'rld'
    clean = ' --feature-distill none' if features != 'none' else ''
    clean += ' --poison none' if results.get('poison') else ''
    clean += ' --no-standardize' if settings.get('standardize') else ''
    return {
        'poison': results.get('poison') and describe(results['poison']),
        'train_clean': f'{shlex.join(train)} --poison none --experiment {name}-clean',
        'distill': results['distill'],
        'epochs': epochs, 'chance': 100 / results['num_classes'], 'run': shlex.quote(str(run)), 'name': name,
        'train': shlex.join(train),
        'train_none': None if own != method else (
            f'{shlex.join(train)} --distill none{clean} --experiment {name}-none'
        ),
        'better_teacher': f'{shlex.join([*start, *config])} --teacher-epochs {2 * longer} --experiment {name}-taught'
        if (longer := settings.get('teacher_epochs')) else f"timm-rld list models '{_family(settings.get('teacher'))}'",
        'report_baseline': shlex.join(['timm-rld', 'report', 'RUN', '--baseline', str(run)]),
        'compare': comparison('none', own) if results.get('teacher') else another_seed(),
        'another_seed': another_seed(),
        'compare_kd': comparison('kd', 'rld'),
        'compare_dkd': comparison(own, 'dkd' if own != 'dkd' else 'rld'), 'twice_epochs': 2 * epochs,
        'teacher_family': _family(settings.get('teacher')), 'student_family': _family(results.get('student')),
        'again': shlex.join([*start, *config, '--experiment', f'{run.name}-again']),
        'with_augmentation': shlex.join(['accelerate', 'launch', *(w for w in words if w != '--no-aug'),
                                         '--experiment', f'{run.name}-augmented']),
        'check_data': shlex.join(['timm-rld', 'data', *data]),
        'bench': shlex.join(['timm-rld', 'bench', 'step', *bench]),
        'half_weight': (settings.get('distill_loss_weight') or 1) / 2, 'temperature': temperature,
        'smoothing': settings.get('smoothing'), 'no_aug': '--no-aug' in words,
        'gentler': f'--crop-padding {padding // 2}' if settings.get('train_crop_mode') == 'pad' else '--scale 0.35 1',
        'larger': 2 * data_config(r.run)['input_size'][-1], 'student_top1': results['student_top1'],
        'teacher_top1': results.get('teacher_top1'), 'best_epoch': results['best_epoch'],
        'use': shlex.join(['timm-rld', 'predict', str(run), images]) if images and Path(images).is_dir() else None,
        'suspects_file': shlex.quote(str(r.page.with_name(f'{r.stem}-suspects.csv'))),
    }  # fmt: skip


def _family(name: str | None) -> str:
    """A pattern that finds the networks of a name's family: `*resnet*` of `cifar_resnet20.x`."""
    stem = (name or '').rpartition('/')[2].rpartition(':')[2].partition('.')[0].removeprefix('cifar_')
    letters = stem.rstrip('0123456789_')
    return f'*{letters.partition("_")[0] or "resnet"}*'.replace("'", '')
