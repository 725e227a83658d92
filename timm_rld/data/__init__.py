"""Data: sources → (uint8 pixels, target, index), with replayable augmentation."""

from .loader import Loader, create_loaders
from .mixing import MixedTarget, Mixing
from .sources import SAMPLE_NOTE, Source, open_split, open_splits
from .transforms import eval_transform, train_transform

# Names of settings, for the recipe: the arguments of open_splits and of create_loaders.
SPLIT_SETTINGS = (
    'dataset', 'data_dir', 'train_split', 'val_split', 'train_num_samples', 'val_num_samples', 'num_classes',
    'class_map', 'input_key', 'target_key', 'in_chans', 'batch_size', 'validation_batch_size', 'seed',
    'dataset_download',
)  # fmt: skip
LOADER_SETTINGS = (
    'batch_size', 'validation_batch_size', 'grad_accum_steps', 'seed', 'workers', 'no_aug', 'train_crop_mode',
    'crop_padding', 'scale', 'ratio', 'hflip', 'vflip', 'color_jitter', 'aa', 'train_interpolation', 'reprob',
    'remode', 'recount', 'jpeg_draft',
)  # fmt: skip

__all__ = [
    'LOADER_SETTINGS',
    'SPLIT_SETTINGS',
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
