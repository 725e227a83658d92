"""Transformed teacher matching: "Knowledge Distillation Based on Transformed Teacher Matching", Zheng, Yang, 2024."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from ._base import DistillLoss, check_temperature, check_weight
from ._ops import kl_rows


def wttm_loss(student: Tensor, teacher: Tensor, gamma: float = 0.1) -> Tensor:
    """U · KL(p^gamma / U ‖ softmax(student)), U = Σ p^gamma, p = softmax(teacher); mean over the batch.

    The power transform stands for a temperature of 1/gamma on the teacher's side alone; U, large where the teacher is
    unsure, weights the sample.

    Args:
        student: logits `[B, C]`, float32 or higher; used at temperature 1.
        teacher: logits `[B, C]`.
        gamma: exponent, 0 < gamma.

    Returns:
        A 0-d tensor.
    """
    powered = gamma * F.log_softmax(teacher, dim=1)
    log_u = powered.logsumexp(dim=1, keepdim=True)
    kl = kl_rows(F.log_softmax(student, dim=1), powered - log_u)
    return (log_u.squeeze(1).exp() * kl).mean()


class WTTM(DistillLoss):
    """beta · :func:`wttm_loss`."""

    def __init__(self, gamma: float = 0.1, beta: float = 3.0) -> None:
        super().__init__()
        self.gamma = check_temperature('gamma', gamma)
        self.beta = check_weight('beta', beta)

    def loss(self, student: Tensor, teacher: Tensor, target: Tensor | None) -> Tensor:
        return self.beta * wttm_loss(student, teacher, self.gamma)
