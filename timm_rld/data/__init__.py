"""Data: sources → (uint8 pixels, target, index), with replayable augmentation."""

from .check import Finding, Findings, check_data, describe
from .class_weights import class_counts, class_weights, describe_classes
from .holdout import stratified_holdout
from .loader import Loader, create_loaders
from .look import first_look, note_unlisted
from .mixup import MixedTarget, Mixup
from .noise import NoiseLoader
from .sampler import ReplaySampler, Step
from .sources import SAMPLE_NOTE, Source, open_split
from .splits import open_splits, open_validation
from .transforms import eval_transform, train_transform

__all__ = [
    'check_data', 'class_counts', 'class_weights', 'create_loaders', 'describe', 'describe_classes',
    'eval_transform', 'Finding', 'Findings', 'first_look', 'Loader', 'MixedTarget', 'Mixup', 'NoiseLoader',
    'note_unlisted',
    'open_split', 'open_splits', 'open_validation', 'ReplaySampler', 'SAMPLE_NOTE', 'Source', 'Step',
    'stratified_holdout', 'train_transform',
]  # fmt: skip
