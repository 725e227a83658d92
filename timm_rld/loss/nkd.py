"""Normalised KD: "From Knowledge Distillation to Self-Knowledge Distillation: A Unified Approach with Normalized Loss
and Customized Soft Labels", Yang et al., ICCV 2023."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from ._base import DistillLoss, check_temperature, check_weight
from ._ops import without_class


def soft_target_loss(student: Tensor, teacher: Tensor, target: Tensor) -> Tensor:
    """-q_y log p_y, p = softmax(student), q = softmax(teacher) at temperature 1, mean over the batch.

    Args:
        student: logits `[B, C]`, float32 or higher.
        teacher: logits `[B, C]`.
        target: class indices y `[B]`.

    Returns:
        A 0-d tensor.
    """
    index = target.unsqueeze(1)
    return -(F.softmax(teacher, dim=1).gather(1, index) * F.log_softmax(student, dim=1).gather(1, index)).mean()


def other_classes_loss(student: Tensor, teacher: Tensor, target: Tensor, temperature: float = 1.0) -> Tensor:
    """-τ² · Σ q̂ log p̂ over all classes but the true one, p̂ and q̂ the softmax at τ over these; mean over the batch.

    A cross-entropy and no KL: where the student equals the teacher it is the entropy of q̂, and its gradient 0.

    Args:
        student: logits `[B, C]`, float32 or higher.
        teacher: logits `[B, C]`.
        target: class indices `[B]`.
        temperature: τ.

    Returns:
        A 0-d tensor.
    """
    log_p = F.log_softmax(without_class(student / temperature, target), dim=1)
    q = F.softmax(without_class(teacher / temperature, target), dim=1)
    return -(q * log_p).sum(dim=1).mean() * temperature**2


class NKD(DistillLoss):
    """Soft target + gamma · other classes (:func:`soft_target_loss`, :func:`other_classes_loss`).

    With two classes there is one other class, and the second term is 0.

    Diagnostics: ``target`` and ``others`` apart, unweighted.
    """

    needs_target = True

    def __init__(self, gamma: float = 3.5, temperature: float = 3.0) -> None:
        super().__init__()
        self.gamma = check_weight('gamma', gamma)
        self.temperature = check_temperature('temperature', temperature)

    def loss(self, student: Tensor, teacher: Tensor, target: Tensor) -> Tensor:
        of_target = soft_target_loss(student, teacher, target)
        of_others = other_classes_loss(student, teacher, target, self.temperature)
        self.diagnostics = {'target': of_target.detach(), 'others': of_others.detach()}
        return of_target + self.gamma * of_others
