"""What a cached logit depends on."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..data import Source
from ..data.images import DECODING_RULES
from ..files import sha256_of
from ..pairing import constructor_arguments, look_up, resize_mode, resized_to

FORMAT = 2


@dataclass(frozen=True)
class CacheKey:
    """What the rows of a cache depend on, as facts by name.

    Attributes:
        arguments: of :func:`create_teacher`, :func:`open_splits` and :func:`create_loaders`, by function.
        depends_on: further settings that a training row depends on, by flag: the augmentation, the compilation.
        dtype: of the rows.
        train, val: the splits.
        data_config: the student's preprocessing.
        precision: `no`, `bf16` or `fp16`.
    """

    arguments: dict[str, dict[str, Any]]
    depends_on: dict[str, Any]
    dtype: str
    train: Source
    val: Source
    data_config: dict[str, Any]
    precision: str

    def training(self, weights: str) -> dict[str, Any]:
        """Return what the training rows depend on, but for the augmentation epoch.

        Args:
            weights: of the teacher, a digest.
        """
        facts = {
            **self._teacher(weights),
            **self._split(self.train),
            'image size': self.data_config['input_size'],
            '--seed': self.arguments['create_loaders']['seed'],
            **self.depends_on,
            '--teacher-cache-dtype': self.dtype,
        }
        if self.depends_on.get('--reprob') or self.depends_on.get('--aa'):  # they fill in the student's mean
            facts.update({'--mean': self.data_config['mean'], '--std': self.data_config['std']})
        return _plain(facts)

    def validation(self, weights: str) -> dict[str, Any]:
        """Return what the validation rows depend on; arguments as in :meth:`training`."""
        how = {k: self.data_config[k] for k in ('input_size', 'interpolation', 'crop_pct', 'crop_mode')}
        how['--jpeg-draft'] = self.arguments['create_loaders']['jpeg_draft']
        how['--no-exif'] = self.arguments['open_splits']['no_exif']
        closed: dict[str, Any] = {
            flag: self.depends_on[flag] for flag in ('--black-box', '--teacher-query') if flag in self.depends_on
        }
        return _plain({**self._teacher(weights), **closed, **self._split(self.val), **how})

    def _teacher(self, weights: str) -> dict[str, Any]:
        a = self.arguments['create_teacher']
        if a['name'] is None:  # --teacher-query, see depends_on
            return {'format': FORMAT}
        info = look_up(a['name'], '--teacher')
        own, class_map = info.config, a['class_map']
        if class_map and os.path.isfile(class_map):
            class_map = f'sha256 {sha256_of(Path(class_map))}'
        elif class_map:
            class_map = f'{class_map} {hashlib.sha256(repr(own.get("label_names")).encode()).hexdigest()}'
        size = resized_to(info, a['img_size'], tuple(self.data_config['input_size'][-2:]))
        return {
            'format': FORMAT,
            'weights of the teacher': weights,
            'architecture of the teacher': info.architecture,
            'arguments of the teacher': constructor_arguments(info, a['img_size']),
            '--teacher-class-map': class_map,
            '--teacher-mean': _rounded(a['mean'] or own.get('mean')),
            '--teacher-std': _rounded(a['std'] or own.get('std')),
            '--teacher-img-size': size and list(size),
            "interpolation of the teacher's resize": size and resize_mode(own.get('interpolation')),
            '--mixed-precision': self.precision,
        }

    def _split(self, source: Source) -> dict[str, Any]:
        a = self.arguments['open_splits']
        dataset = a['dataset']
        if dataset and os.path.exists(os.path.expanduser(dataset.partition('/')[2])):
            dataset = 'a folder'  # it may be moved: the digest identifies it
        return {
            '--dataset': dataset, '--input-key': a['input_key'], 'split': source.split, 'images': len(source),
            'classes': source.num_classes, 'files and labels (a digest)': source.digest(),
            'a sample of images (a digest)': source.sample_digest(), 'rules of decoding': DECODING_RULES,
        }  # fmt: skip


def teacher_digest(weights: Path | None, weights_digest: str | None) -> str:
    """Return what stands for a teacher's weights: the SHA-256 of their file, or, where there is none, of the
    weights."""
    return f'sha256 {sha256_of(weights)}' if weights else f'weights {weights_digest}'


def short_digest(facts: dict[str, Any]) -> str:
    """Return 8 hexadecimal digits that stand for some facts."""
    return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()[:8]


def _rounded(values: Sequence[float] | None) -> list[float] | None:
    """Return values as an exported model's config has them."""
    return [round(v, 6) for v in values] if values else None


def _plain(facts: dict[str, Any]) -> dict[str, Any]:
    """Return facts as JSON would give them back."""
    return {k: list(v) if isinstance(v, tuple) else v for k, v in facts.items()}


def difference(there: dict[str, Any], ours: dict[str, Any]) -> str:
    """Return the first facts that differ, with both values, or an empty text."""

    def shown(value: Any) -> str:
        text = str(value)
        return f'{text[:12]}…' if len(text) > 40 else text

    names = [name for name in {**ours, **there} if there.get(name) != ours.get(name)]
    return '; '.join(f'{name} {shown(there.get(name))}, not {shown(ours.get(name))}' for name in names[:3])
