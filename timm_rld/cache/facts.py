"""What a cached logit depends on."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..config import Config, flag_of
from ..data import LOADER_SETTINGS, Source
from ..pairing import constructor_arguments, look_up, resize_mode, resized_to

FORMAT = 1
# of the loaders' settings, those that an image does not depend on
_NO_MATTER = {'batch_size', 'validation_batch_size', 'grad_accum_steps', 'seed', 'workers'}


@dataclass
class Purpose:
    """What a run wants of a cache.

    Attributes:
        config: resolved.
        train, val: the splits.
        data_config: the student's preprocessing.
        precision: `no`, `bf16` or `fp16`.
    """

    config: Config
    train: Source
    val: Source
    data_config: dict[str, Any]
    precision: str

    def facts(self, weights: str) -> dict[str, Any]:
        """What the rows of the views depend on, by name, but for the number of the view.

        Args:
            weights: of the teacher, a digest.
        """
        c = self.config
        without = _NO_MATTER | (set() if c.reprob else {'remode', 'recount'})
        without |= set() if c.train_crop_mode == 'pad' else {'crop_padding'}
        facts = {
            **self._teacher(weights),
            **self._split(c.train_split, self.train),
            'size of the view': self.data_config['input_size'],
            '--seed': c.seed,
            **{flag_of(name): getattr(c, name) for name in LOADER_SETTINGS if name not in without},
            '--torchcompile': c.torchcompile,
            '--teacher-cache-dtype': c.teacher_cache_dtype,
        }
        if c.reprob or c.aa:  # they fill in the student's mean
            facts.update({'--mean': self.data_config['mean'], '--std': self.data_config['std']})
        return _plain(facts)

    def validation_facts(self, weights: str) -> dict[str, Any]:
        """What the rows of the validation split depend on."""
        how = {k: self.data_config[k] for k in ('input_size', 'interpolation', 'crop_pct', 'crop_mode')}
        split = self._split(self.config.val_split, self.val)
        return _plain({**self._teacher(weights), **split, **how, '--jpeg-draft': self.config.jpeg_draft})

    def _teacher(self, weights: str) -> dict[str, Any]:
        c = self.config
        card = look_up(c.teacher, '--teacher')
        own = card.config
        class_map = c.teacher_class_map
        if class_map and os.path.isfile(class_map):
            class_map = f'sha256 {_sha256(Path(class_map))}'
        elif class_map:
            class_map = f'{class_map} {hashlib.sha256(repr(own.get("label_names")).encode()).hexdigest()}'
        size = resized_to(card, c.teacher_img_size, tuple(self.data_config['input_size'][-2:]))
        return {
            'format': FORMAT,
            'weights of the teacher': weights,
            'architecture of the teacher': card.architecture,
            'arguments of the teacher': constructor_arguments(card, c.teacher_img_size),
            '--teacher-class-map': class_map,
            '--teacher-mean': _rounded(c.teacher_mean or own.get('mean')),
            '--teacher-std': _rounded(c.teacher_std or own.get('std')),
            '--teacher-img-size': size and list(size),
            "interpolation of the teacher's resize": size and resize_mode(own.get('interpolation')),
            '--mixed-precision': self.precision,
        }

    def _split(self, name: str, source: Source) -> dict[str, Any]:
        dataset = self.config.dataset
        if dataset and os.path.exists(os.path.expanduser(dataset.partition('/')[2])):
            dataset = 'a folder'  # it may be moved: the digest tells it
        return {
            '--dataset': dataset, '--input-key': self.config.input_key, 'split': name, 'images': len(source),
            'classes': source.num_classes, 'files and labels (a digest)': source.digest(),
            'a sample of images (a digest)': source.sample_digest(),
        }  # fmt: skip


def _rounded(values: Sequence[float] | None) -> list[float] | None:
    """As an exported model's config has them."""
    return [round(v, 6) for v in values] if values else None


def _plain(facts: dict[str, Any]) -> dict[str, Any]:
    """As JSON would give it back."""
    return {k: list(v) if isinstance(v, tuple) else v for k, v in facts.items()}


def difference(there: dict[str, Any], ours: dict[str, Any]) -> str:
    """The first facts that differ, with both values; empty where none does."""

    def shown(value: Any) -> str:
        text = str(value)
        return f'{text[:12]}…' if len(text) > 40 else text

    names = [name for name in {**ours, **there} if there.get(name) != ours.get(name)]
    return '; '.join(f'{name} {shown(there.get(name))}, not {shown(ours.get(name))}' for name in names[:3])


def weights_file(teacher: str, checkpoint: str | None = None) -> Path | None:
    """The file that holds a teacher's weights on this machine, so that its hash stands for them; None where there is
    none (yet).

    Args:
        teacher: a timm name, `hf-hub:user/model` or `local-dir:path`.
        checkpoint: a file in place of the published ones.
    """
    if checkpoint is not None:
        path = Path(checkpoint).expanduser()
        return path if path.is_file() else None
    from huggingface_hub import try_to_load_from_cache
    from timm.models import _hub

    card = look_up(teacher, '--teacher')
    config = card.config
    if card.source == 'local-dir':
        candidates = [Path(teacher.partition(':')[2]).expanduser() / name for name in _hub._PREFERRED_FILES]
    elif config.get('file'):
        candidates = [Path(config['file'])]
    elif config.get('hf_hub_id'):
        repository, revision = _hub.hf_split(config['hf_hub_id'])
        default = config.get('hf_hub_filename') or _hub.HF_WEIGHTS_NAME
        names = [*_hub._get_safe_alternatives(default), default]
        found = (try_to_load_from_cache(repository, name, revision=revision) for name in names)
        candidates = [Path(path) for path in found if isinstance(path, str)]
    elif config.get('url'):
        candidates = [Path(_hub.get_cache_dir()) / os.path.basename(config['url'])]
    else:
        candidates = []
    return next((path for path in candidates if path.is_file()), None)


def _sha256(path: Path) -> str:
    with path.open('rb') as f:
        digest = hashlib.sha256()
        while block := f.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()
