"""Curriculum temperature: "Curriculum Temperature for Knowledge Distillation", Li et al., AAAI 2023."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from ._base import DistillLoss, check_temperature
from .kd import kd_loss


class CTKD(DistillLoss):
    """KD at a temperature that is learned against the student: τ² · KL, τ = t_start + t_end · sigmoid(θ).

    θ (from 1.0) is a parameter. Its gradient is multiplied by
    λ(e) = -(1 - cos(π · min(e, decay_epochs) / decay_epochs)) / 2, e the epoch (1-based), so that it rises against the
    student step by step. The optimizer gets θ without weight decay, which would pull τ to its middle.

    Args:
        t_start, t_end: bounds of τ: t_start .. t_start + t_end.
        decay_epochs: epochs until λ is -1.
        standardize: standardise both logits first.

    Diagnostics: ``temperature``.
    """

    def __init__(
        self, t_start: float = 1.0, t_end: float = 20.0, decay_epochs: int = 10, standardize: bool = False
    ) -> None:
        super().__init__()
        self.t_start, self.t_end = check_temperature('t_start', t_start), check_temperature('t_end', t_end)
        self.decay_epochs = check_temperature('decay_epochs', decay_epochs)
        self.standardize = standardize
        self.theta = nn.Parameter(torch.ones(()))
        self.set_epoch(1)

    def set_epoch(self, epoch: int) -> None:
        """Set λ for an epoch (1-based)."""
        self.factor = -(1 - math.cos(math.pi * min(epoch, self.decay_epochs) / self.decay_epochs)) / 2

    def loss(self, student: Tensor, teacher: Tensor, target: Tensor | None) -> Tensor:
        theta = self.theta.detach() + self.factor * (self.theta - self.theta.detach())
        temperature = (self.t_start + self.t_end * theta.sigmoid()).to(student.dtype)
        self.diagnostics = {'temperature': temperature.detach()}
        return kd_loss(student, teacher, temperature)
