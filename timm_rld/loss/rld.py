"""Refined logit distillation: "Knowledge Distillation with Refined Logits", Sun et al., ICCV 2025.

A teacher that is wrong about a sample still knows how sure one may be about it, and how the classes below the true one
relate. RLD keeps these two and drops the rest, instead of moving the teacher's logits about by hand.
"""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from ._base import DistillLoss, check_temperature, check_weight
from ._ops import binary_log_probs, kl_div, mask_classes


def sample_confidence_loss(student: Tensor, teacher: Tensor, target: Tensor, temperature: float = 4.0) -> Tensor:
    """SCD: the student's probability of the true class follows the teacher's top-1 probability.

    τ² · KL([t, 1-t] ‖ [s, 1-s]), mean over the batch, where t = max softmax(teacher/τ), whatever class it falls on, and
    s = softmax(student/τ)[target].

    Args:
        student: logits `[B, C]`, float32 or higher.
        teacher: logits `[B, C]`.
        target: class indices `[B]`.
        temperature: τ.

    Returns:
        A 0-d tensor.
    """
    log_s = binary_log_probs(student / temperature, target)
    log_t = binary_log_probs(teacher / temperature, teacher.argmax(dim=1))
    return kl_div(log_s, log_t) * temperature**2


def misleading_classes(teacher: Tensor, target: Tensor) -> Tensor:
    """The classes that the teacher ranks at or above the true one (the true one and ties included), bool `[B, C]`."""
    return teacher >= teacher.gather(1, target.unsqueeze(1))


def masked_correlation_loss(student: Tensor, teacher: Tensor, target: Tensor, temperature: float = 4.0) -> Tensor:
    """MCD: among the classes that the teacher ranks strictly below the true one, the student follows the teacher.

    τ² · KL(softmax(teacher/τ) ‖ softmax(student/τ)), mean over the batch, both over the classes c with
    teacher[c] < teacher[target] alone. A sample with no such class, or only one, adds 0.

    Args:
        student: logits `[B, C]`, float32 or higher.
        teacher: logits `[B, C]`.
        target: class indices `[B]`.
        temperature: τ.

    Returns:
        A 0-d tensor.
    """
    masked = misleading_classes(teacher, target)
    log_s = F.log_softmax(mask_classes(student / temperature, masked), dim=1)
    log_t = F.log_softmax(mask_classes(teacher / temperature, masked), dim=1)
    return kl_div(log_s, log_t) * temperature**2


class RLD(DistillLoss):
    """alpha · SCD + beta · MCD (:func:`sample_confidence_loss`, :func:`masked_correlation_loss`).

    Args:
        alpha: weight of the sample confidence term.
        beta: weight of the masked correlation term.
        temperature: τ of the masked correlation term.
        alpha_temperature: τ of the sample confidence term. None takes ``temperature``, as in the paper; the published
            program's own default is 1.
        standardize: standardise both logits first (:func:`timm_rld.loss._ops.standardize`).

    Diagnostics: ``scd`` and ``mcd`` apart (unweighted), ``teacher_wrong`` (share of samples), ``masked_classes`` (mean
    number of classes masked; 1 is the true class alone).
    """

    needs_target = True

    def __init__(
        self,
        alpha: float = 1.0,
        beta: float = 8.0,
        temperature: float = 4.0,
        alpha_temperature: float | None = None,
        standardize: bool = False,
    ) -> None:
        super().__init__()
        self.alpha, self.beta = check_weight('alpha', alpha), check_weight('beta', beta)
        self.temperature = check_temperature('temperature', temperature)
        self.alpha_temperature = (
            self.temperature if alpha_temperature is None else check_temperature('alpha_temperature', alpha_temperature)
        )
        self.standardize = standardize

    def loss(self, student: Tensor, teacher: Tensor, target: Tensor) -> Tensor:
        scd = sample_confidence_loss(student, teacher, target, self.alpha_temperature)
        mcd = masked_correlation_loss(student, teacher, target, self.temperature)
        self.diagnostics = {
            'scd': scd.detach(),
            'mcd': mcd.detach(),
            'teacher_wrong': (teacher.argmax(dim=1) != target).to(teacher.dtype).mean(),
            'masked_classes': misleading_classes(teacher, target).sum(dim=1).to(teacher.dtype).mean(),
        }
        return self.alpha * scd + self.beta * mcd
