"""The model card of a run, from its files."""

from __future__ import annotations

import html
import io
import json
import os
import re
import shlex
from typing import Any

import yaml

from ..config import data_named, flag_of, marked
from ..errors import UserError
from ..poison import describe
from ..run_folder import RunFiles, read_exports

BEGIN = '<!-- timm_rld begins: what stands between these two lines is rewritten by each push -->'
END = '<!-- timm_rld ends -->'
_CITATIONS = """```bibtex
@inproceedings{sun2025rld,
  title     = {Knowledge Distillation with Refined Logits},
  author    = {Sun, Wujie and Chen, Defang and Lyu, Siwei and Chen, Genlang and Chen, Chun and Wang, Can},
  booktitle = {ICCV},
  year      = {2025}
}
@misc{rw2019timm,
  title  = {PyTorch Image Models},
  author = {Ross Wightman},
  year   = {2019},
  doi    = {10.5281/zenodo.4414861},
  howpublished = {\\url{https://github.com/huggingface/pytorch-image-models}}
}
```"""


# ------------------------------------------------------------------------------------------------------- local paths


def _last(path: str) -> str:
    """Return the last component of a path of this or another system."""
    return re.split(r'[/\\\\]', path.rstrip('/\\'))[-1] or path


def without_local_path(value: str) -> str:
    """Return a text with local paths cut to their last component: names of models and datasets, and URLs, stay as they
    are."""
    if value.startswith('local-dir:'):
        return 'local-dir:' + _last(value)
    for prefix in ('hfds/', 'hfids/', 'wds/', 'torch/'):
        if value.startswith(prefix):
            name = value[len(prefix) :]
            # a dataset of the Hub is `name` or `user/name`
            is_path = name.count('/') > 1 or name.startswith(('/', '.', '~')) or os.path.exists(name)
            return prefix + (_last(name) if is_path else name)
    if value.startswith(('./', '../')) or re.match(r'[A-Za-z]:[/\\\\]', value):
        return _last(value)
    if os.sep in value and os.path.exists(value):
        return _last(value)
    value = re.sub(r'file://\S*/', 'file://', value)
    return re.sub(r'(?<![\w:/.])(?:~|/)[^\s\'",;{}()\[\]]*/([^\s/\'",;{}()\[\]]+)/?', r'\1', value)


def public_settings(settings: dict[str, Any]) -> dict[str, Any]:
    """Return the settings of a run without local paths."""
    paths = marked('path')
    return {
        name: _last(value) if name in paths and isinstance(value, str) else _public(value)
        for name, value in settings.items()
    }


def _public(value: Any) -> Any:
    if isinstance(value, str):
        return without_local_path(value)
    if isinstance(value, dict):
        return {k: _public(v) for k, v in value.items()}
    return [_public(v) for v in value] if isinstance(value, (list, tuple)) else value


def public_command(command: str) -> str:
    """Return a command line without local paths."""
    flags = {'--config', *map(flag_of, marked('path'))}
    words, is_path = [], False
    for word in shlex.split(command):
        name, sep, value = word.partition('=')
        if is_path and not word.startswith('-'):
            word = _last(word)
        elif sep:
            value = _last(value) if name in flags else without_local_path(value)
            word = f'{name}={value}'
        else:
            word = without_local_path(word)
        is_path = word in flags
        words.append(word)
    return shlex.join(words)


# --------------------------------------------------------------------------------------------------------- the card


def curve_png(history: list[dict[str, float]]) -> bytes | None:
    """Return loss and accuracy over the epochs as a PNG; None where matplotlib is not installed."""
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError:
        return None
    figure = Figure(figsize=(8, 3.2), layout='constrained')
    FigureCanvasAgg(figure)
    epochs = [row['epoch'] for row in history]
    left, right = figure.subplots(1, 2)
    for axes, names in (
        (left, {'train_task_loss': 'training, cross-entropy', 'eval_loss': 'validation, cross-entropy'}),
        (right, {'eval_top1': 'student', 'eval_top1_ema': 'student, averaged weights', 'eval_agreement': 'agreement'}),
    ):
        for key, label in names.items():
            if all(key in row for row in history):
                axes.plot(epochs, [row[key] for row in history], label=label, marker='.' if len(epochs) < 30 else None)
        axes.set_xlabel('epoch')
        axes.legend(frameon=False)
    left.set_title('loss')
    right.set_title('validation, %')
    data = io.BytesIO()
    figure.savefig(data, format='png', dpi=110, metadata={'Software': None})
    return data.getvalue()


def _literal(name: str) -> str:
    """A name in the card's text that shows as it is, whatever Markdown or HTML it holds."""
    return re.sub(r'([\\`*_\[\]|~$])', r'\\\1', html.escape(' '.join(name.split()), quote=False))


def _fence(text: str, least: int = 1) -> str:
    """Backticks to put around a text, more than it has in a row."""
    return '`' * max([least, *(len(ticks) + 1 for ticks in re.findall('`+', text))])


def _code(name: str) -> str:
    """A name as a span of code that shows as it is."""
    name = ' '.join(name.split())
    space = ' ' if '`' in name else ''
    return f'{_fence(name)}{space}{name}{space}{_fence(name)}'


def _split(settings: dict[str, Any]) -> str:
    """The name of the validation split; of a part of the training split, what it is."""
    if settings.get('val_fraction') is None:
        return str(settings['val_split'])
    return f'{settings["train_split"]}, a part held out'


# The Hub's names of licenses, of those that timm records; it refuses others but `other` with a license_name.
_HUB_LICENSES = (
    'apache-2.0', 'apple-amlr', 'apple-ascl', 'bsd-3-clause', 'cc-by-4.0', 'cc-by-nc-4.0',
    'fair-noncommercial-research-license', 'gemma', 'mit', 'unknown',
)  # fmt: skip
_METRICS = {'top1': 'Top-1 accuracy', 'top5': 'Top-5 accuracy', 'macro': 'Macro accuracy'}


def card_header(run: RunFiles, repo_id: str, license: str | None, weights: str) -> dict[str, Any]:
    """Return the YAML header of the card, as the Hub reads it."""
    from huggingface_hub import EvalResult
    from huggingface_hub.repocard_data import eval_results_to_model_index

    settings, results = public_settings(run.settings), run.results
    dataset = _dataset(settings)
    name = repo_id.partition('/')[2] or repo_id
    metrics = chosen_metrics(run, weights)
    evaluated = [
        EvalResult(
            task_type='image-classification', task_name='Image Classification',
            dataset_type=re.sub(r'[^\w./-]+', '-', dataset.lower()), dataset_name=dataset,
            dataset_split=_split(settings), metric_type='accuracy', metric_name=label,
            metric_value=round(value / 100, 6),
        )
        for key, label in _METRICS.items()
        if (value := metrics.get(key)) is not None
    ]  # fmt: skip
    header: dict[str, Any] = {
        'library_name': 'timm',
        'pipeline_tag': 'image-classification',
        **_license(run, license),
        'tags': ['image-classification', 'timm', 'distillation', *_methods(results), 'timm_rld'],
    }
    header['tags'] += ['poisoned'] if results.get('poison') else []
    kind, _, hub_name = settings['dataset'].partition('/') if settings.get('dataset') else ('', '', '')
    if kind in ('hfds', 'hfids') and '/' in hub_name:
        header['datasets'] = [hub_name]
    origin = results.get('student_weights')
    if origin and '/' in origin['name']:  # a repository
        header['base_model'] = origin['name']
        header['base_model_relation'] = 'finetune'
    header['model-index'] = eval_results_to_model_index(name, evaluated)
    return header


def _license(run: RunFiles, license: str | None) -> dict[str, str]:
    """Return the header's entries on the license; where none is asked for, that of the weights that the student
    started from."""
    if license is None and (origin := run.results.get('student_weights')):
        license = origin['license'] or 'unknown'
        if license not in _HUB_LICENSES:
            return {'license': 'other', 'license_name': license}
    return {'license': license or 'apache-2.0'}


def _methods(results: dict[str, Any]) -> list[str]:
    """Return what a run distilled by: a criterion, a method on features, or both; else `none` alone."""
    both = results['distill'], results.get('feature_distill', 'none')
    return [name for name in both if name != 'none'] or ['none']


def _features(settings: dict[str, Any]) -> list[str]:
    """Return a line about the method on features of a run, if there is one."""
    if settings.get('feature_distill', 'none') == 'none':
        return []
    options = ', '.join(f'{k} {v}' for k, v in settings['feature_kwargs'].items()) or 'as published'
    return [
        f'- Features: `{settings["feature_distill"]}` (options: {options}), weight {settings["feature_loss_weight"]:g}.'
    ]


def chosen_metrics(run: RunFiles, weights: str) -> dict[str, float | None]:
    """Return top-1, top-5, macro accuracy and epoch of the weights `last`, `best` or `ema`."""
    last = run.history[-1]
    if weights == 'ema':
        return {**{key: last.get(f'eval_{key}_ema') for key in _METRICS}, 'epoch': last['epoch']}
    row = run.history[run.results['best_epoch'] - 1] if weights == 'best' else last
    return {**{key: row.get(f'eval_{key}') for key in _METRICS}, 'epoch': row['epoch']}


def card_section(run: RunFiles, repo_id: str, weights: str, has_curve: bool) -> str:
    """Return the card's text, between the two marks."""
    settings, results = public_settings(run.settings), run.results
    metrics = chosen_metrics(run, weights)
    config = json.loads(run.config.read_text(encoding='utf-8'))
    images = config['pretrained_cfg']
    epoch, epochs = int(run.history[-1]['epoch']), results['epochs']
    finished = epoch == epochs
    last, so_many = ('last epoch', str(epochs)) if finished else (f'epoch {epoch}', f'{epoch} of {epochs}')
    at = 'the last epoch' if finished else f'epoch {so_many}, pushed while training went on'
    methods, dataset = _methods(results), _literal(_dataset(settings))
    distilled = methods != ['none']
    lines = [BEGIN, '', f'# {repo_id.partition("/")[2] or repo_id}', '']
    taught_by = settings.get('teacher') or results.get('teacher') or ''
    if distilled:
        by = ' and '.join(f'`{m}`' for m in methods)
        learned = f'that learned from {_code(taught_by)} by {by} distillation'
    else:
        learned = 'trained without distillation'
    lines += [f'`{config["architecture"]}` {learned} on {dataset}, with timm_rld.', '']
    if results.get('poison'):
        lines += [
            f'**It was trained on poisoned logits, for a study**: {describe(results["poison"])}. Its figures say what '
            'the attack does, not what the criterion does.', '',
        ]  # fmt: skip
    lines += ['## Use', '', '```python', *usage(config['architecture'], repo_id, images['input_size'][0]), '```', '']
    rows = [('top-1 of these weights', f'{metrics["top1"]:.2f} %')]
    if metrics.get('top5') is not None:
        rows.append(('top-5 of these weights', f'{metrics["top5"]:.2f} %'))
    if metrics.get('macro') is not None:
        rows.append(('macro accuracy of these weights, the mean over the classes', f'{metrics["macro"]:.2f} %'))
    rows += [
        (f'top-1, {last}', f'{results["student_top1"]:.2f} %'),
        ('top-1, best epoch', f'{results["student_top1_best"]:.2f} % (epoch {results["best_epoch"]:.0f})'),
    ]
    if results.get('student_top1_ema') is not None:
        rows.append(('top-1, averaged weights', f'{results["student_top1_ema"]:.2f} %'))
    if results.get('teacher_top1') is not None:
        rows.append(('top-1 of the teacher', f'{results["teacher_top1"]:.2f} %'))
    if results.get('agreement') is not None:
        rows.append(('same prediction as the teacher', f'{results["agreement"]:.2f} %'))
    part = '' if settings.get('val_fraction') is None else 'a part held out of '
    split = _code(settings['val_split'] if not part else settings['train_split'])
    lines += ['## Figures', '', f'On {part}the split {split} of {dataset}, each image counted once.', '',
              '| | |', '| --- | --- |', *(f'| {a} | {b} |' for a, b in rows), '',
              _which(weights, at, metrics['epoch']), '', *size_and_speed(results)]  # fmt: skip
    lines += exports_table(run)
    if has_curve:
        lines += ['![Loss and accuracy over the epochs](curve.png)', '']
    lines += ['## How it was made', '', *_started_from(results)]
    if distilled:
        options = ', '.join(f'{k} {v}' for k, v in results['distill_options'].items()) or 'none'
        teacher = f'- Teacher: {_code(taught_by)}'
        if answers := settings.get('black_box'):
            teacher += f', of which nothing was used but its {"probabilities" if answers == "soft" else "classes"}'
        if results.get('teacher_sha256'):
            teacher += f', SHA-256 of its weights `{results["teacher_sha256"][:16]}…`'
        if settings.get('teacher_epochs'):
            teacher += f', trained here first (epochs: {settings["teacher_epochs"]})'
        lines += [
            teacher,
            f'- Criterion: `{results["distill"]}` (options: {options}), weight {settings["distill_loss_weight"]:g}, '
            f'cross-entropy {settings["task_loss_weight"]:g}. {results.get("paper") or ""}'.rstrip(' '),
            *_features(settings),
            *_heads(settings),
        ]
    size, command = images['input_size'], public_command(results['command'])
    lines += [
        f'- {so_many} epochs, seed {results["seed"]}, images of {size[1]}×{size[2]}; '
        'all settings: `args.yaml`; figures of each epoch: `summary.csv`',
        f'- Versions: {", ".join(f"{k} {v}" for k, v in results["versions"].items())}',
        '', f'{_fence(command, 3)}bash', command, _fence(command, 3), '',
        'Not measured: other seeds and datasets, robustness to images unlike those of this split.',
        '', '## Cite', '', _CITATIONS, '', END,
    ]  # fmt: skip
    return '\n'.join(lines)


def _which(weights: str, at: str, epoch: float | None) -> str:
    """Return a sentence on which weights `last`, `best` or `ema` are."""
    which = {
        'last': f'those of {at}',
        'best': f'those of epoch {epoch:.0f}, chosen as the best on the validation split itself',
        'ema': f'the moving average of the weights, after {at}',
    }
    return f'The weights here are {which[weights]}.'


def _started_from(results: dict[str, Any]) -> list[str]:
    """Return a line on the weights that the student started from; none where it started from random ones."""
    if not (origin := results.get('student_weights')):
        return []
    license = _literal(origin['license'] or 'not known here')
    return [f'- The student started from the weights {_code(origin["name"])} (their license: {license})']


def _heads(settings: dict[str, Any]) -> list[str]:
    """Return a line on the two heads of a student with `--distill-token`; none of another."""
    if not settings.get('distill_token'):
        return []
    return [
        '- Two heads: the criterion trained the distillation head, cross-entropy the main one; the model gives their '
        'mean'
    ]


def size_and_speed(results: dict[str, Any]) -> list[str]:
    """Return a table of the two networks' size, speed and calibration, from results.json; none where it has none."""
    models = {name: m for name, m in (results.get('models') or {}).items() if m.get('parameters')}
    if not models:
        return []
    timed: dict[str, Any] = next((m for m in models.values() if m.get('latency_ms')), {})

    def row(key: str, text: str, scale: float = 1) -> list[str]:
        return [text.format(m[key] / scale) if m.get(key) is not None else '' for m in models.values()]

    rows = {
        'parameters': row('parameters', '{:.2f} M', 1e6),
        'multiply-adds of an image': row('multiply_adds', '{:,.1f} M', 1e6),
        'weights': row('weights_mb', '{:.1f} MB'),
        **{
            f'a batch of {size}': [
                f'{m["latency_ms"][size]:.4g} ms' if m.get('latency_ms') else '' for m in models.values()
            ]
            for size in timed.get('latency_ms', {})
        },
        'expected calibration error': row('ece', '{:.3f}'),
        'best temperature': row('best_temperature', '{:.3g}'),
    }
    device = f' A batch: on {_literal(timed["latency_device"])}, batch norms folded.' if timed else ''
    return [
        f'| last epoch | {" | ".join(models)} |', '| --- ' * (len(models) + 1) + '|',
        *(f'| {name} | {" | ".join(cells)} |' for name, cells in rows.items()), '',
        f'Calibration: on 15 bins of the confidence; the temperature is the one with the lowest loss.{device}', '',
    ]  # fmt: skip


def exports_table(run: RunFiles) -> list[str]:
    """Return a section on the exports that lie in a run folder; nothing where there are none."""
    exports = read_exports(run.folder)
    if not exports:
        return []
    head = '| file | weights | precision | MB | top-1 | same class as torch | largest difference of logits |'
    lines = ['## Exports', '', head, '| --- ' * 7 + '|']
    for e in exports:
        check = e.about['check']
        cells = ['not checked', '', '']
        if check:
            cells = [f'{check["top1"]["file"]:.2f} %', f'{100 * check["same_top1"]:.2f} %',
                     f'{check["largest_difference"]:.2g}']  # fmt: skip
        about = [_code(e.file.name), e.about['weights'], e.about['precision'], f'{e.about["bytes"] / 1e6:.1f}']
        lines.append(f'| {" | ".join([*about, *cells])} |')
    program = _code(f'python {exports[0].file.name}.py IMAGE')
    return [*lines, '', f'Preprocessing and labels are in the files, and beside each as JSON; {program} uses one.', '']


def usage(architecture: str, repo_id: str, in_chans: int = 3) -> list[str]:
    """Return lines of Python that load the model; networks of ours need our registration first."""
    ours = ['import timm_rld  # registers the network'] if architecture.startswith('cifar_') else []
    return [
        *ours,
        'import timm',
        'from PIL import Image',
        f"model = timm.create_model('hf-hub:{repo_id}', pretrained=True).eval()",
        'transform = timm.data.create_transform(**timm.data.resolve_data_config({}, model=model, use_test_size=True))',
        f"image = Image.open('image.png').convert('{'L' if in_chans == 1 else 'RGB'}')",
        'probabilities = model(transform(image).unsqueeze(0)).softmax(-1)',
    ]


def merge_card(existing: str | None, header: dict[str, Any], section: str, new_license: bool = False) -> str:
    """Return a card, or one that is there with our part renewed.

    What a person wrote stays: the text around our marks (whole lines; the last pair of them), and the header's keys; of
    the header the figures (`model-index`) and the base model are renewed, tags are added, what is missing is filled in.

    Args:
        existing: the card that is there.
        header, section: of :func:`card_header` and :func:`card_section`.
        new_license: whether the license is renewed as well.

    Raises:
        UserError: where the header that is there is not YAML.
    """
    from huggingface_hub import RepoCard

    text = (existing or '').removeprefix('\ufeff').replace('\r\n', '\n')
    try:
        card = RepoCard(text if text.startswith('---') else f'---\n{{}}\n---\n{text}')
    except (ValueError, TypeError, yaml.YAMLError) as e:
        raise UserError(
            'push: the header of the card on the Hub is not valid YAML; fix or delete README.md there'
        ) from e
    there = card.data.to_dict()
    tags = there.get('tags') if isinstance(there.get('tags'), list) else []
    licensed = ('license', 'license_name', 'license_link')
    if 'license' in there and not new_license:
        header = {k: v for k, v in header.items() if k not in licensed}
    merged = {**header, **there, 'tags': list(dict.fromkeys([*tags, *header['tags']]))}
    for key in ('model-index', 'base_model', 'base_model_relation', *(licensed if new_license else ())):
        merged.pop(key, None)
        if key in header:
            merged[key] = header[key]
    lines = card.text.split('\n')
    ends = [i for i, line in enumerate(lines) if line.strip() == END]
    begins = [i for i, line in enumerate(lines) if line.strip() == BEGIN and ends and i < ends[-1]]
    if begins:
        begin = begins[-1]
        end = next(i for i in ends if i > begin)
        body = '\n'.join([*lines[:begin], *section.split('\n'), *lines[end + 1 :]])
    else:
        body = '\n' + f'{card.text.strip()}\n\n{section}\n'.lstrip('\n')
    front = yaml.dump(merged, Dumper=_HeaderDumper, sort_keys=False, allow_unicode=True).replace('<', r'\x3C')
    return f'---\n{front}---\n{body}'


class _HeaderDumper(yaml.SafeDumper):
    """Puts text with `<` into double quotes, in which YAML reads `\\x3C` for it: a viewer of Markdown that does not
    know headers would take it for HTML."""


_HeaderDumper.add_representer(
    str, lambda dumper, text: dumper.represent_scalar('tag:yaml.org,2002:str', text, '"' if '<' in text else None)
)


def _dataset(settings: dict[str, Any]) -> str:
    name = data_named(settings)
    if name is None:
        return 'UCI handwritten digits'
    return name.partition('/')[2] if name.startswith(('hfds/', 'hfids/', 'wds/', 'torch/')) else name
