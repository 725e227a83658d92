"""Distillation criteria: one file a paper, one table, `create_distill_loss(name, **options)`."""

from ._base import DistillLoss
from .abkd import ABKD, abkd_loss
from .atkd import ATKD, atkd_loss
from .bild import BiLD, bild_loss
from .ce_teacher import CETeacher, ce_teacher_loss
from .ctkd import CTKD
from .dist import DIST, inter_class_loss, intra_class_loss
from .dkd import DKD, non_target_class_loss, target_class_loss
from .features import FEATURES, FeatureLoss, create_feature_loss, describe_features
from .gdkd import GDKD, group_losses
from .kd import KD, kd_loss
from .la import LA, la_loss
from .ldrld import LDRLD, local_relations_loss
from .lr import LR, lr_loss
from .mekd import (
    MEKD,
    adversarial_loss,
    discriminator_loss,
    information_loss,
    mekd_loss,
    mekd_losses,
    to_pixels,
    top_probability,
)
from .mlkd import MLKD, mlkd_loss
from .nkd import NKD, other_classes_loss, soft_target_loss
from .normkd import NormKD, normkd_loss
from .pld import PLD, pld_loss
from .rc import RC, correction_loss
from .registry import (
    CRITERIA,
    CriterionInfo,
    Knob,
    choose_criterion,
    create_distill_loss,
    describe_criteria,
    describe_methods,
    get_criterion,
    published_defaults,
)
from .rld import RLD, masked_correlation_loss, sample_confidence_loss
from .ttm import TTM, ttm_loss
from .wttm import WTTM, wttm_loss

__all__ = [
    'ABKD', 'abkd_loss', 'adversarial_loss', 'ATKD', 'atkd_loss', 'BiLD', 'bild_loss', 'ce_teacher_loss', 'CETeacher',
    'choose_criterion', 'correction_loss', 'create_distill_loss', 'create_feature_loss', 'CRITERIA', 'CriterionInfo',
    'CTKD', 'describe_criteria', 'describe_features', 'describe_methods', 'discriminator_loss', 'DIST', 'DistillLoss',
    'DKD', 'FeatureLoss', 'FEATURES', 'GDKD', 'get_criterion', 'group_losses', 'information_loss', 'inter_class_loss',
    'intra_class_loss', 'KD', 'kd_loss', 'Knob', 'LA', 'la_loss', 'LDRLD', 'local_relations_loss', 'LR', 'lr_loss',
    'masked_correlation_loss', 'MEKD', 'mekd_loss', 'mekd_losses', 'MLKD', 'mlkd_loss', 'NKD',
    'non_target_class_loss', 'NormKD', 'normkd_loss', 'other_classes_loss', 'PLD', 'pld_loss', 'published_defaults',
    'RC', 'RLD', 'sample_confidence_loss', 'soft_target_loss', 'target_class_loss', 'to_pixels', 'top_probability',
    'TTM', 'ttm_loss', 'WTTM', 'wttm_loss',
]  # fmt: skip
