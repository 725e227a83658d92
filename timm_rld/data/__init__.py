"""Data: sources → (uint8 pixels, target, index), with replayable augmentation."""

from .holdout import stratified_holdout
from .loader import Loader, create_loaders
from .mixup import MixedTarget, Mixup
from .sampler import ReplaySampler, Step
from .sources import SAMPLE_NOTE, Source, open_split
from .splits import open_splits
from .transforms import eval_transform, train_transform

__all__ = [
    'create_loaders', 'eval_transform', 'Loader', 'MixedTarget', 'Mixup', 'open_split', 'open_splits', 'ReplaySampler',
    'SAMPLE_NOTE', 'Source', 'Step', 'stratified_holdout', 'train_transform',
]  # fmt: skip
