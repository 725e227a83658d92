"""NormKD: "NormKD: Normalized Logits for Knowledge Distillation", Chi et al., 2023."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from ._base import DistillLoss, check_temperature
from ._ops import kl_rows


def _deviation(logits: Tensor) -> Tensor:
    """Unbiased standard deviation of each row `[B, 1]`; 1 for a constant row, whose own has no gradient."""
    variance = logits.var(dim=1, keepdim=True)
    return torch.where(variance > 0, variance, torch.ones_like(variance)).sqrt()


def normkd_loss(student: Tensor, teacher: Tensor, t_norm: float = 2.0) -> Tensor:
    """Each row of each network at its own temperature t_norm · σ, KL weighted by (t_norm · σ_T)², mean over the batch.

    σ is the row's unbiased standard deviation, without a shift of the mean and without an epsilon; gradient flows
    through σ of the student.

    Args:
        student: logits `[B, C]`, float32 or higher.
        teacher: logits `[B, C]`.
        t_norm: temperature in deviations.

    Returns:
        A 0-d tensor.
    """
    tau_s, tau_t = t_norm * _deviation(student), t_norm * _deviation(teacher)
    log_s, log_t = F.log_softmax(student / tau_s, dim=1), F.log_softmax(teacher / tau_t, dim=1)
    kl = kl_rows(log_s, log_t)
    return (kl * tau_t.squeeze(1).square()).mean()


class NormKD(DistillLoss):
    """Module face of :func:`normkd_loss`."""

    def __init__(self, t_norm: float = 2.0) -> None:
        super().__init__()
        self.t_norm = check_temperature('t_norm', t_norm)

    def loss(self, student: Tensor, teacher: Tensor, target: Tensor | None) -> Tensor:
        return normkd_loss(student, teacher, self.t_norm)
