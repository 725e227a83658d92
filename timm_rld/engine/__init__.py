"""Training and evaluation on Accelerate, with timm's optimizers and schedulers."""

from .checkpoint import Checkpoints
from .evaluate import evaluate
from .fit import fit
from .optim import check_settings, create_optimizer, create_scheduler
from .state import wants_channels_last
from .teacher_training import TeacherFigures, evaluate_teacher, optimize_for_inference, train_teacher

__all__ = [
    'check_settings', 'Checkpoints', 'create_optimizer', 'create_scheduler', 'evaluate', 'evaluate_teacher', 'fit',
    'optimize_for_inference', 'TeacherFigures', 'train_teacher', 'wants_channels_last',
]  # fmt: skip
