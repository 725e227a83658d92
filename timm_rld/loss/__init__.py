"""Distillation criteria: one file a paper, one table, `create_distill_loss(name, **options)`."""

from ._base import DistillLoss
from .atkd import ATKD, atkd_loss
from .bild import BiLD, bild_loss
from .ctkd import CTKD
from .dkd import DKD, non_target_class_loss, target_class_loss
from .kd import KD, kd_loss
from .la import LA, la_loss
from .lr import LR, lr_loss
from .mlkd import MLKD, mlkd_loss
from .normkd import NormKD, normkd_loss
from .rc import RC, correction_loss
from .registry import (
    CRITERIA,
    CriterionInfo,
    Knob,
    choose_criterion,
    create_distill_loss,
    describe_criteria,
    get_criterion,
)
from .rld import RLD, masked_correlation_loss, sample_confidence_loss
from .wttm import WTTM, wttm_loss

__all__ = [
    'ATKD', 'atkd_loss', 'BiLD', 'bild_loss', 'choose_criterion', 'correction_loss', 'create_distill_loss', 'CRITERIA',
    'CriterionInfo', 'CTKD', 'describe_criteria', 'DistillLoss', 'DKD', 'get_criterion', 'KD', 'kd_loss', 'Knob',
    'LA', 'la_loss', 'LR', 'lr_loss', 'masked_correlation_loss', 'MLKD', 'mlkd_loss', 'non_target_class_loss', 'NormKD',
    'normkd_loss', 'RC', 'RLD', 'sample_confidence_loss', 'target_class_loss', 'WTTM', 'wttm_loss',
]  # fmt: skip
