"""Plackett-Luce distillation: "PLD: A Choice-Theoretic List-Wise Knowledge Distillation", Bassam, Zhu, Bian, NeurIPS
2025."""

from __future__ import annotations

import math

import torch.nn.functional as F
from torch import Tensor

from ._base import DistillLoss, check_temperature


def pld_loss(student: Tensor, teacher: Tensor, target: Tensor, temperature: float = 4.0) -> Tensor:
    """Σ over ranks k of q_{π_k} · (log Σ over l ≥ k of exp s_{π_l} - s_{π_k}), mean over the batch.

    π ranks the classes: the true one first, then the others by falling teacher logit. q = softmax(t/τ). Each rank is a
    choice among the classes that are left, so the first one is a cross-entropy, weighted by the teacher's probability
    of the true class. The student is used at temperature 1, and there is no τ².

    Of equal teacher logits the class of the lower index comes first, as published.

    Args:
        student: logits `[B, C]`, float32 or higher.
        teacher: logits `[B, C]`.
        target: class indices `[B]`.
        temperature: τ, of the teacher's weights.

    Returns:
        A 0-d tensor.
    """
    ranked = teacher.scatter(1, target.unsqueeze(1), math.inf).argsort(dim=1, descending=True, stable=True)
    last_first = ranked.flip(1)
    s = student.gather(1, last_first)
    q = F.softmax(teacher / temperature, dim=1).gather(1, last_first)
    return (q * (s.logcumsumexp(dim=1) - s)).sum(dim=1).mean()


class PLD(DistillLoss):
    """Module face of :func:`pld_loss`. It ranks the true class first, so its task weight is 0."""

    needs_target = True

    def __init__(self, temperature: float = 4.0) -> None:
        super().__init__()
        self.temperature = check_temperature('temperature', temperature)

    def loss(self, student: Tensor, teacher: Tensor, target: Tensor) -> Tensor:
        return pld_loss(student, teacher, target, self.temperature)
