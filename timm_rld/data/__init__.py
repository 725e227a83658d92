"""Data: sources → (uint8 pixels, target, index), with replayable augmentation."""

from .loader import Loader, create_loaders
from .mixing import MixedTarget, Mixing
from .sources import SAMPLE_NOTE, Source, open_split, open_splits
from .transforms import eval_transform, train_transform

__all__ = [
    'Loader',
    'MixedTarget',
    'Mixing',
    'SAMPLE_NOTE',
    'Source',
    'create_loaders',
    'eval_transform',
    'open_split',
    'open_splits',
    'train_transform',
]
