"""How a run went: curves, what the networks saw, where the time went, settings."""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from ...config import FIELDS, Config, flag_of, resolve
from ...errors import UserError
from ...loss import published_defaults
from .. import figures, plots
from ..images import data_config, first_images, read_facts
from ..page import Picture, Table
from .report import Report

_DIAGNOSTICS = {
    'scd': 'Sample confidence (scd)', 'mcd': 'Masked correlation (mcd)', 'teacher_wrong': 'Teacher wrong, share',
    'masked_classes': 'Classes masked', 'masked_mass': "Teacher's probability masked",
    'main_top1': 'Main head, top-1 in training', 'distill_top1': 'Distillation head, top-1 in training',
}  # fmt: skip


def curves(r: Report) -> dict[str, Any]:
    """Losses, top-1, agreement, learning rate and the criterion's diagnostics, over the epochs."""
    h = r.run.history
    epochs = figures.column(h, 'epoch')

    def series(*wanted: tuple[str, str, str]) -> list[tuple[str, str, list[float]]]:
        return [(name, colour, figures.column(h, key)) for key, name, colour in wanted if figures.has(h, key)]

    top1, teacher = figures.column(h, 'eval_top1'), r.results.get('teacher_top1')
    losses = series(('train_task_loss', 'training', 'third'), ('eval_loss', 'validation', 'student'))
    drawn = [
        plots.lines('Cross-entropy', epochs, losses),
        plots.lines('Validation top-1', epochs, series(
            ('eval_top1', 'student', 'student'), ('eval_top1_ema', 'averaged weights', 'fourth'),
        ), level=('teacher', teacher) if teacher is not None else None, unit='%'),
    ]  # fmt: skip
    if figures.has(h, 'eval_agreement'):
        drawn.append(plots.lines("Names the teacher's class", epochs, series(
            ('eval_agreement', 'its first', 'teacher'), ('eval_second_class', 'its second', 'third'),
        ), unit='%'))  # fmt: skip
    if figures.has(h, 'train_poisoned'):
        drawn.append(plots.lines('Training top-1, by image', epochs, series(
            ('train_top1_clean', 'not poisoned', 'student'), ('train_top1_poisoned', 'poisoned', 'fourth'),
        ), unit='%'))  # fmt: skip
    if figures.has(h, 'train_kd_loss'):
        drawn.append(plots.lines('Distillation loss', epochs, series(('train_kd_loss', 'loss', 'fourth'))))
    drawn.append(plots.lines('Learning rate', epochs, series(('lr', 'learning rate', 'accent'))))
    known = {'train_loss', 'train_task_loss', 'train_kd_loss', 'train_poisoned', 'train_top1_poisoned',
             'train_top1_clean'}  # fmt: skip
    others = [k for k in dict.fromkeys(k for row in h for k in row) if k.startswith('train_') and k not in known]
    diagnostics = [
        plots.lines(_DIAGNOSTICS.get(k[6:], k[6:].replace('_', ' ').capitalize()), epochs, series((k, k[6:], 'accent')))
        for k in others
        if figures.has(h, k)
    ]
    last = h[-1]
    gap = last['eval_loss'] - last['train_task_loss'] if {'eval_loss', 'train_task_loss'} <= set(last) else None
    agreement = figures.column(h, 'eval_agreement')
    r.facts.update(
        top1_rise=figures.late_rise(top1, 0.1), loss_gap=gap, best_lead=top1[r.results['best_epoch'] - 1] - top1[-1],
        agreement=last.get('eval_agreement'), agreement_rise=figures.late_rise(agreement, 0.2),
    )  # fmt: skip
    return {'plots': drawn, 'diagnostics': diagnostics}


def seen(r: Report) -> dict[str, Any]:
    """A mosaic of augmented training images, and what normalisation makes of them; nothing where the student saw
    none."""
    if r.model('generator'):
        return {}
    try:
        found = first_images(r.run, r.images)
    except (UserError, OSError, KeyError, ValueError) as e:
        return {'missing': f'No pictures: {str(e).partition(chr(10))[0]}'}
    if found is None:
        again = ['timm-rld', 'report', str(r.run.folder), '--data-dir', 'DIR']
        return {'missing': r.images.why, 'missing_command': shlex.join(again)}
    pictures = []
    for i, (source, target) in enumerate(zip(found.pictures(), found.target)):
        lines: list[str | tuple[str, str]] = [r.name(target)]
        if found.other[i] != target:
            share = 100 * found.lam[i]
            lines = [f'{r.name(target)} {share:.0f}%', f'{r.name(found.other[i])} {100 - share:.0f}%']
        tone = ''
        if found.teacher is not None:
            tone = 'good' if found.teacher[i] == target else 'bad'
            lines.append(('teacher', r.name(found.teacher[i])))
        pictures.append(Picture(source, lines, f'training image of {r.name(target)}', tone))
    config = data_config(r.run)
    mean, std = found.statistics()
    after_mean, after_std = (mean - config['mean']) / config['std'], std / np.asarray(config['std'])
    worst = int(np.argmax(abs(after_mean) + abs(np.log(np.maximum(after_std, 1e-6)))))
    of_data = {'data_mean': ' '.join(f'{x:.3f}' for x in mean), 'data_std': ' '.join(f'{x:.3f}' for x in std)}
    r.facts.update(worst_mean=float(after_mean[worst]), worst_std=float(after_std[worst]), **of_data)
    if found.teacher is not None:
        r.facts['teacher_wrong_seen'] = 100 * float(np.mean(np.asarray(found.teacher) != np.asarray(found.target)))
    channels = ('red', 'green', 'blue') if len(mean) == 3 else ('grey',)
    rows = [[name, f'{m:.3f}', f'{s:.3f}', f'{am:+.2f}', f'{as_:.2f}']
            for name, m, s, am, as_ in zip(channels, mean, std, after_mean, after_std)]  # fmt: skip
    columns = ['channel', 'mean#', 'deviation#', 'mean, normalised#', 'deviation, normalised#']
    size = ' × '.join(map(str, found.pixels.shape[2:]))
    return {'mosaic': pictures, 'table': Table(columns, rows), 'size': size}


def time_spent(r: Report) -> dict[str, Any]:
    """Where the time of the epochs went, by part."""
    shares, h = figures.time_shares(r.run.history), r.run.history
    r.facts.update({f'share_{part}': 100 * share for part, share in shares.items()}, can_cache=_can_cache(r))
    if not shares:
        return {'plots': [], 'tiles': []}
    total = sum(float(np.nansum(figures.column(h, f'seconds_{part}'))) for part in shares)
    names = {'data': 'waiting for images', 'teacher': 'teacher', 'student': 'student', 'other': 'other'}
    tiles = [(names[part], f'{100 * share:.1f} %', _duration(share * total)) for part, share in shares.items()]
    speed = r.results.get('train_images_per_second')
    tiles.append(('training', _duration(total), f'{speed:,.0f} images a second' if speed else ''))
    parts: dict[str, Sequence[float]] = {names[part]: figures.column(h, f'seconds_{part}') for part in shares}
    return {'plots': [plots.stacked_time(figures.column(h, 'epoch'), parts)], 'tiles': tiles}


def _can_cache(r: Report) -> bool:
    """Return whether cached logits would spare the next run the teacher."""
    s = r.run.settings
    streamed = str(s.get('dataset')).startswith(('wds/', 'hfids/'))
    runs_all_the_same = s.get('feature_distill', 'none') != 'none' or r.results['distill'] == 'none'
    refused = ('teacher_cache', 'mixup', 'cutmix', 'cutmix_minmax', 'teacher_answers')
    skips = s.get('on_bad_image') == 'skip'
    return not (any(s.get(n) for n in refused) or r.model('generator') or streamed or runs_all_the_same or skips)


def _duration(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    if hours or minutes >= 10:
        return f'{hours} h {minutes:02} min' if hours else f'{minutes} min'
    return f'{minutes} min {rest:02} s' if minutes else f'{seconds:.1f} s'


def settings(r: Report) -> dict[str, Any]:
    """Command, settings that differ from the defaults, versions, digests."""
    defaults = _defaults(r)
    changed = [[flag_of(name), _shown(value), _shown(getattr(defaults, name))]
               for name, value in r.run.settings.items()
               if name in FIELDS and _shown(value) != _shown(getattr(defaults, name))]  # fmt: skip
    facts = read_facts(r.run)
    if r.results.get('teacher_sha256'):
        facts["SHA-256 of the teacher's weights"] = r.results['teacher_sha256']
    if r.results.get('paper'):
        facts['criterion'] = r.results['paper']
    facts |= {f'version of {name}': version for name, version in (r.results.get('versions') or {}).items()}
    return {
        'changed': Table(['setting', 'value', 'default'], changed, 'Settings that differ from the defaults'),
        'recorded': Table(['fact', 'value'], [[k, _shown(v)] for k, v in facts.items()], 'Data, machine, versions'),
    }  # fmt: skip


_OF_THE_RUN = ('teacher', 'student', 'dataset', 'data_dir', 'labels')


def _defaults(r: Report) -> Config:
    """The settings of a run of this pair, data and length that gave no other."""
    then = r.run.settings
    given: dict[str, Any] = {
        n: then.get(n) for n in (*_OF_THE_RUN, 'distill', 'feature_distill', 'epochs') if then.get(n)
    }
    facts = read_facts(r.run)
    try:
        found = resolve(
            Config(**given), int(facts.get('processes', 1)), facts.get('training images'), published_defaults
        )
        without: dict[str, Any] = {name: getattr(Config(), name) for name in given}
        return replace(found, **without)
    except (UserError, ValueError):
        return Config()


def _shown(value: Any) -> str:
    if isinstance(value, (list, tuple)):
        return ' '.join(map(str, value))
    if isinstance(value, dict):
        return ' '.join(f'{k}={v}' for k, v in value.items())
    return '' if value is None else f'{value:g}' if isinstance(value, float) else str(value)
