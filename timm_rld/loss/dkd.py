"""Decoupled knowledge distillation: "Decoupled Knowledge Distillation", Zhao et al., CVPR 2022."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from ._base import DistillLoss, check_temperature, check_weight
from ._ops import binary_log_probs, kl_div, without_class


def target_class_loss(student: Tensor, teacher: Tensor, target: Tensor, temperature: float = 4.0) -> Tensor:
    """TCKD: τ² · KL([t, 1-t] ‖ [s, 1-s]), mean over the batch, with t, s the softened probabilities of the true class.

    Args:
        student: logits `[B, C]`, float32 or higher.
        teacher: logits `[B, C]`.
        target: class indices `[B]`.
        temperature: τ.

    Returns:
        A 0-d tensor.
    """
    log_s = binary_log_probs(student / temperature, target)
    return kl_div(log_s, binary_log_probs(teacher / temperature, target)) * temperature**2


def non_target_class_loss(student: Tensor, teacher: Tensor, target: Tensor, temperature: float = 4.0) -> Tensor:
    """NCKD: τ² · KL(softmax(teacher/τ) ‖ softmax(student/τ)) over all classes but the true one, mean over the batch.

    Arguments and result as :func:`target_class_loss`.
    """
    log_s = F.log_softmax(without_class(student / temperature, target), dim=1)
    return kl_div(log_s, F.log_softmax(without_class(teacher / temperature, target), dim=1)) * temperature**2


class DKD(DistillLoss):
    """alpha · TCKD + beta · NCKD (:func:`target_class_loss`, :func:`non_target_class_loss`).

    Diagnostics: ``tckd`` and ``nckd`` apart, unweighted.
    """

    needs_target = True

    def __init__(
        self, alpha: float = 1.0, beta: float = 8.0, temperature: float = 4.0, standardize: bool = False
    ) -> None:
        super().__init__()
        self.alpha, self.beta = check_weight('alpha', alpha), check_weight('beta', beta)
        self.temperature = check_temperature('temperature', temperature)
        self.standardize = standardize

    def loss(self, student: Tensor, teacher: Tensor, target: Tensor) -> Tensor:
        tckd = target_class_loss(student, teacher, target, self.temperature)
        nckd = non_target_class_loss(student, teacher, target, self.temperature)
        self.diagnostics = {'tckd': tckd.detach(), 'nckd': nckd.detach()}
        return self.alpha * tckd + self.beta * nckd
