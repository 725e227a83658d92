"""Refined logit distillation: "Knowledge Distillation with Refined Logits", Sun et al., ICCV 2025.

A teacher that is wrong about a sample still knows how sure one may be about it, and how the classes below the true one
relate. RLD keeps these two and drops the rest, instead of moving the teacher's logits about by hand.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from ._base import DistillLoss, check_temperature, check_weight
from ._ops import binary_log_probs


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
    confidence = F.softmax(teacher / temperature, dim=1).amax(dim=1)
    return _scd(student / temperature, confidence, target) * temperature**2


def _scd(student: Tensor, confidence: Tensor, target: Tensor) -> Tensor:
    t = torch.stack([confidence, 1 - confidence], dim=1)
    return (torch.xlogy(t, t) - t * binary_log_probs(student, target)).sum(dim=1).mean()


def misleading_classes(teacher: Tensor, target: Tensor) -> Tensor:
    """Where the teacher ranks a class at or above the true one, ties and the true one included: -1 `[B, C]`, else 0.

    It is a number rather than a bool since on a CPU adding it is several times as fast as `masked_fill`.
    """
    return (teacher.gather(1, target.unsqueeze(1)) - teacher).relu_().sign_().sub_(1)


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
    misleading = misleading_classes(teacher, target)
    return _mcd(student / temperature, teacher / temperature, misleading, -misleading.sum(dim=1)) * temperature**2


def _mcd(student: Tensor, teacher: Tensor, misleading: Tensor, masked_count: Tensor) -> Tensor:
    # Masked logits become the lowest finite number: minus infinity would make NaN of a row without a class left.
    highest = torch.finfo(student.dtype).max
    teacher = torch.add(teacher, misleading, alpha=highest)
    teacher.sub_(teacher.amax(dim=1, keepdim=True))
    p = F.softmax(teacher, dim=1)
    # Σ p log p, with log p = teacher + log(max p): a log_softmax less, and no slow exp of what is far below zero
    negative_entropy = torch.linalg.vecdot(p, teacher) + p.amax(dim=1).log()
    del teacher  # a [B, C] less while the student's are made
    log_q = F.log_softmax(torch.add(student, misleading, alpha=highest), dim=1)
    kl = negative_entropy - torch.linalg.vecdot(p, log_q)
    return (kl * (masked_count < student.shape[1])).mean()


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
    number of classes masked; 1 is the true class alone), ``masked_mass`` (the teacher's probability, at
    ``alpha_temperature``, that the mask removes, the true class's included).
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
        misleading = misleading_classes(teacher, target)
        masked_count = -misleading.sum(dim=1)
        s = s_alpha = student / self.temperature
        t = t_alpha = teacher / self.temperature
        if self.alpha_temperature != self.temperature:
            s_alpha, t_alpha = student / self.alpha_temperature, teacher / self.alpha_temperature
        p = F.softmax(t_alpha, dim=1)
        confidence, masked_mass = p.amax(dim=1), -torch.linalg.vecdot(p, misleading)
        del p
        scd = _scd(s_alpha, confidence, target) * self.alpha_temperature**2
        mcd = _mcd(s, t, misleading, masked_count) * self.temperature**2
        true = teacher.gather(1, target.unsqueeze(1))
        self.diagnostics = {
            'scd': scd.detach(),
            'mcd': mcd.detach(),
            'teacher_wrong': (true < teacher.amax(dim=1, keepdim=True)).to(teacher.dtype).mean(),
            'masked_classes': masked_count.mean(),
            'masked_mass': masked_mass.mean(),
        }
        return self.alpha * scd + self.beta * mcd
