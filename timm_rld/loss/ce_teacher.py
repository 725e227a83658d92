"""Cross-entropy with the teacher's class, the hard distillation of "Training data-efficient image transformers &
distillation through attention", Touvron et al., ICML 2021."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from ._base import DistillLoss


def ce_teacher_loss(student: Tensor, teacher: Tensor) -> Tensor:
    """-log softmax(student)[k], k = argmax of the teacher's row, mean over the batch. No label is used.

    Args:
        student: logits `[B, C]`, float32 or higher.
        teacher: `[B, C]`: logits, or any row that is highest at the teacher's class, such as a one-hot row.

    Returns:
        A 0-d tensor.
    """
    return F.cross_entropy(student, teacher.argmax(dim=1))


class CETeacher(DistillLoss):
    """Module face of :func:`ce_teacher_loss`. Its task weight is 0, where the paper has 1/2 for each of the two."""

    def loss(self, student: Tensor, teacher: Tensor, target: Tensor | None) -> Tensor:
        return ce_teacher_loss(student, teacher)
