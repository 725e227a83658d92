"""Training and evaluation on Accelerate, with timm's optimizers and schedulers."""

from .checkpoint import Checkpoints
from .evaluate import evaluate
from .fit import fit
from .generated import check_data, prepare_images
from .optim import check_settings, create_optimizer, create_scheduler
from .predictions import Recorder, figures, gather, parquet_of, record
from .results import describe_models, describe_size_and_speed, export_students, record_student
from .speed import device_name, frozen_network, latencies, median_ms, size_of
from .state import wants_channels_last
from .teacher_training import (
    EvaluatedTeacher,
    evaluate_teacher,
    open_cache,
    open_query,
    optimize_for_inference,
    train_teacher,
)

__all__ = [
    'check_data', 'check_settings', 'Checkpoints', 'create_optimizer', 'create_scheduler', 'describe_models',
    'describe_size_and_speed', 'device_name', 'evaluate', 'evaluate_teacher', 'EvaluatedTeacher', 'export_students',
    'figures', 'fit', 'frozen_network', 'gather', 'latencies', 'median_ms', 'open_cache', 'open_query',
    'optimize_for_inference', 'parquet_of', 'prepare_images', 'record', 'record_student', 'Recorder', 'size_of',
    'train_teacher', 'wants_channels_last',
]  # fmt: skip
