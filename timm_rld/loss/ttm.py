"""Transformed teacher matching: "Knowledge Distillation Based on Transformed Teacher Matching", Zheng, Yang, 2024.
Its weighted form is `wttm`."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from ._base import DistillLoss, check_temperature, check_weight
from ._ops import kl_div


def ttm_loss(student: Tensor, teacher: Tensor, gamma: float = 0.1) -> Tensor:
    """KL(q^gamma / U ‖ softmax(student)), U = Σ q^gamma, q = softmax(teacher); mean over the batch.

    The power transform is a temperature of 1/gamma on the teacher's side alone; the student is used at temperature 1,
    so that what is left of plain KD is a Rényi entropy of the student as regulariser.

    Args:
        student: logits `[B, C]`, float32 or higher.
        teacher: logits `[B, C]`.
        gamma: exponent, 0 < gamma.

    Returns:
        A 0-d tensor.
    """
    return kl_div(F.log_softmax(student, dim=1), F.log_softmax(gamma * teacher, dim=1))


class TTM(DistillLoss):
    """beta · :func:`ttm_loss`."""

    def __init__(self, gamma: float = 0.1, beta: float = 1.0) -> None:
        super().__init__()
        self.gamma = check_temperature('gamma', gamma)
        self.beta = check_weight('beta', beta)

    def loss(self, student: Tensor, teacher: Tensor, target: Tensor | None) -> Tensor:
        return self.beta * ttm_loss(student, teacher, self.gamma)
