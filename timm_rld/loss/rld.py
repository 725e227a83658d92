"""Refined logit distillation: "Knowledge Distillation with Refined Logits", Sun et al., ICCV 2025.

A teacher that is wrong about a sample still knows how sure one may be about it, and how the classes below the true one
relate. RLD keeps these two and drops the rest, instead of moving the teacher's logits about by hand.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ._base import DistillLoss, check_temperature, check_weight
from ._ops import binary_log_probs, kl_rows


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
    t = torch.stack([confidence, 1 - confidence], dim=1)
    kl = torch.xlogy(t, t) - t * binary_log_probs(student / temperature, target)
    return kl.sum(dim=1).mean() * temperature**2


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
    # Masked logits become the lowest finite number: minus infinity would make NaN of a row without a class left.
    highest = torch.finfo(student.dtype).max
    log_p, log_q = (
        F.log_softmax(torch.add(logits / temperature, misleading, alpha=highest), dim=1)
        for logits in (teacher, student)
    )
    left = misleading.sum(dim=1) > -student.shape[1]
    return (kl_rows(log_q, log_p) * left).mean() * temperature**2


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
        weights = (self.alpha, self.beta, self.temperature, self.alpha_temperature)
        loss, scd, mcd, masked_count, masked_mass = _RefinedLogits.apply(student, teacher, target, *weights)
        true = teacher.gather(1, target.unsqueeze(1))
        self.diagnostics = {
            'scd': scd,
            'mcd': mcd,
            'teacher_wrong': (true < teacher.amax(dim=1, keepdim=True)).to(teacher.dtype).mean(),
            'masked_classes': masked_count,
            'masked_mass': masked_mass,
        }
        return loss


class _RefinedLogits(torch.autograd.Function):
    """alpha · SCD + beta · MCD and its gradient in one go, in four tensors [B, C] where autograd would hold a dozen.

    On a CPU the cost of a criterion is that of the memory it asks for; this one asks for no more than `kd`. With σ the
    student's probability of the true class, q that of the others among themselves, and p, r the teacher's and the
    student's distribution over the classes that are not masked, the gradient of a sample is

        alpha · τ_α · (σ - t) · (onehot(target) - q)  +  beta · τ · (r - p).
    """

    @staticmethod
    def forward(
        ctx: Any,
        student: Tensor,
        teacher: Tensor,
        target: Tensor,
        alpha: float,
        beta: float,
        temperature: float,
        alpha_temperature: float,
    ) -> tuple[Tensor, ...]:
        batch, classes = student.shape
        index = target.unsqueeze(1)
        highest = torch.finfo(student.dtype).max
        misleading = misleading_classes(teacher, target)
        masked_count = -misleading.sum(dim=1)
        # masked logits become the lowest finite number: minus infinity would make NaN of a row without a class left

        # the teacher: how sure, and its distribution p below the true class
        work = teacher / alpha_temperature
        p = F.softmax(work, dim=1)
        confidence, masked_mass = p.amax(dim=1), -torch.linalg.vecdot(p, misleading)
        if alpha_temperature != temperature:
            torch.div(teacher, temperature, out=work)
        negative_entropy = _softmax_below_(work.add_(misleading, alpha=highest), p)
        negative_entropy += torch.linalg.vecdot(p, work)

        # the student's sample confidence, from the log-odds of the true class
        torch.div(student, alpha_temperature, out=work)
        true = work.gather(1, index).squeeze(1)
        work.scatter_(1, index, -highest)
        grad = torch.empty_like(work)
        highest_other = work.amax(dim=1)
        odds = true - highest_other + _softmax_below_(work, grad)
        scd = (
            torch.xlogy(confidence, confidence)
            + torch.special.xlog1py(1 - confidence, -confidence)
            - confidence * F.logsigmoid(odds)
            - (1 - confidence) * F.logsigmoid(-odds)
        )
        error = (odds.sigmoid() - confidence).mul_(alpha * alpha_temperature / batch).unsqueeze(1)
        grad.mul_(-error).scatter_(1, index, error)

        # the student's distribution r below the true class, against p
        valid = (masked_count < classes).to(student.dtype)
        torch.div(student, temperature, out=work).add_(misleading, alpha=highest)
        r = misleading
        minus_log_sum = _softmax_below_(work, r)
        mcd = (negative_entropy - torch.linalg.vecdot(p, work) - minus_log_sum) * valid
        grad.add_(r.sub_(p).mul_(valid.mul_(beta * temperature / batch).unsqueeze(1)))

        scd, mcd = scd.mean() * alpha_temperature**2, mcd.mean() * temperature**2
        figures = scd, mcd, masked_count.mean(), masked_mass.mean()
        ctx.save_for_backward(grad)
        ctx.mark_non_differentiable(*figures)
        return alpha * scd + beta * mcd, *figures

    @staticmethod
    def backward(ctx: Any, grad_loss: Tensor, *_: None) -> tuple[Tensor | None, ...]:
        (grad,) = ctx.saved_tensors
        if torch.is_grad_enabled() and not torch.compiler.is_compiling():
            raise RuntimeError(
                'RLD has no second derivative (create_graph=True); its two terms, sample_confidence_loss and '
                'masked_correlation_loss, have one'
            )
        return grad * grad_loss, *[None] * 6


def _softmax_below_(logits: Tensor, out: Tensor) -> Tensor:
    """Write softmax(logits) into ``out`` and take each row's highest from ``logits``, in place: then log softmax is
    ``logits`` plus the result `[B]`. The log-sum-exp costs no pass of its own, since the highest probability is exp of
    its negative."""
    logits.sub_(logits.amax(dim=1, keepdim=True))
    torch.softmax(logits, dim=1, out=out)
    return out.amax(dim=1).log_()
