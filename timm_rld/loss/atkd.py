"""Adaptive temperature: "Adaptive Temperature Based on Logits Correlation in Knowledge Distillation", Matsuyama et al.,
2025."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from ._base import DistillLoss
from ._ops import kl_rows, standardize


def atkd_loss(student: Tensor, teacher: Tensor) -> Tensor:
    """T² · KL(softmax(t/T) ‖ softmax(s/T)) on standardised logits s, t, a temperature T for each sample, batch mean.

    T = (1 + √3) / 2 · max over classes and both networks of the absolute standardised logits, detached.

    Args:
        student: logits `[B, C]`, float32 or higher.
        teacher: logits `[B, C]`.

    Returns:
        A 0-d tensor.
    """
    s, t = standardize(student), standardize(teacher)
    highest = torch.maximum(s.detach().abs().amax(dim=1, keepdim=True), t.abs().amax(dim=1, keepdim=True))
    # two constant rows have no highest logit: any temperature will do
    temperature = torch.where(highest > 0, (1 + math.sqrt(3)) / 2 * highest, torch.ones_like(highest))
    log_s, log_t = F.log_softmax(s / temperature, dim=1), F.log_softmax(t / temperature, dim=1)
    kl = kl_rows(log_s, log_t)
    return (kl * temperature.squeeze(1).square()).mean()


class ATKD(DistillLoss):
    """Module face of :func:`atkd_loss`."""

    def loss(self, student: Tensor, teacher: Tensor, target: Tensor | None) -> Tensor:
        return atkd_loss(student, teacher)
