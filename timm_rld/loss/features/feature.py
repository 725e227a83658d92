"""Pooled features by their mean squared error, as timm's `FeatureDistillationTask` has it."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn

from ._base import FeatureLoss, Shapes, pooled, width_and_size


def feature_loss(student: Tensor, teacher: Tensor) -> Tensor:
    """(student - teacher)², mean over features and batch.

    Args:
        student: `[B, D]`, float32 or higher.
        teacher: `[B, D]`.

    Returns:
        A 0-d tensor.
    """
    return F.mse_loss(student, teacher)


class Feature(FeatureLoss):
    """:func:`feature_loss` of pooled features; the student's go through a linear layer with bias first where the widths
    differ.

    Args:
        student_shapes, teacher_shapes: of one feature each, `[B, D]`; None where the widths are the same.
    """

    def __init__(self, student_shapes: Shapes | None = None, teacher_shapes: Shapes | None = None) -> None:
        super().__init__()
        self.projection: nn.Module | None = None
        if student_shapes is not None and teacher_shapes is not None:
            (student, _), (teacher, _) = width_and_size(student_shapes[-1]), width_and_size(teacher_shapes[-1])
            if student != teacher:
                self.projection = nn.Linear(student, teacher)

    def loss(self, student: list[Tensor], teacher: list[Tensor]) -> Tensor:
        s, t = pooled(student[-1]), pooled(teacher[-1])
        if self.projection is not None:
            s = self.projection(s)
        if s.shape != t.shape:
            raise ValueError(
                f'Feature: the student has {s.shape[1]} features, the teacher {t.shape[1]}; give student_shapes and '
                'teacher_shapes'
            )
        return feature_loss(s, t)
