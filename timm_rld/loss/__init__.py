"""Distillation criteria: one file a paper, one table, `create_distill_loss(name, **options)`."""

from ._base import DistillLoss
from ._factory import CRITERIA, Criterion, create_distill_loss, describe_criteria, get_criterion
from .kd import KD, kd_loss
from .rld import RLD, masked_correlation_loss, sample_confidence_loss

__all__ = [
    'CRITERIA',
    'Criterion',
    'DistillLoss',
    'KD',
    'RLD',
    'create_distill_loss',
    'describe_criteria',
    'get_criterion',
    'kd_loss',
    'masked_correlation_loss',
    'sample_confidence_loss',
]
