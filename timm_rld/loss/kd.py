"""Knowledge distillation: "Distilling the Knowledge in a Neural Network", Hinton, Vinyals, Dean, 2015."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from ._base import DistillLoss, check_temperature
from ._ops import kl_div


def kd_loss(student: Tensor, teacher: Tensor, temperature: float | Tensor = 4.0) -> Tensor:
    """τ² · KL(softmax(teacher/τ) ‖ softmax(student/τ)), mean over the batch.

    Args:
        student: logits `[B, C]`, float32 or higher.
        teacher: logits `[B, C]`.
        temperature: τ, a number or a 0-d tensor.

    Returns:
        A 0-d tensor.
    """
    log_p_student = F.log_softmax(student / temperature, dim=1)
    log_p_teacher = F.log_softmax(teacher / temperature, dim=1)
    return kl_div(log_p_student, log_p_teacher) * temperature**2


class KD(DistillLoss):
    """Module face of :func:`kd_loss`."""

    def __init__(self, temperature: float = 4.0, standardize: bool = False) -> None:
        super().__init__()
        self.temperature = check_temperature('temperature', temperature)
        self.standardize = standardize

    def loss(self, student: Tensor, teacher: Tensor, target: Tensor | None) -> Tensor:
        return kd_loss(student, teacher, self.temperature)
