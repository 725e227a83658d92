"""DIST: "Knowledge Distillation from A Stronger Teacher", Huang et al., NeurIPS 2022."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from ._base import DistillLoss, check_temperature, check_weight


def _correlation_distance(a: Tensor, b: Tensor, dim: int) -> Tensor:
    """1 - the mean of Pearson's ρ between a and b `[B, C]` along ``dim``, ρ = centred a·b / (‖a‖ ‖b‖ + 1e-8)."""
    a, b = (x - x.mean(dim=dim, keepdim=True) for x in (a, b))
    norms = torch.linalg.vector_norm(a, dim=dim) * torch.linalg.vector_norm(b, dim=dim)
    return 1 - ((a * b).sum(dim=dim) / (norms + 1e-8)).mean()


def inter_class_loss(student: Tensor, teacher: Tensor, temperature: float = 4.0) -> Tensor:
    """τ² · (1 - mean over samples of ρ(p_i, q_i)), p = softmax(s/τ), q = softmax(t/τ), ρ Pearson's correlation of rows.

    Args:
        student: logits `[B, C]`, float32 or higher.
        teacher: logits `[B, C]`.
        temperature: τ.

    Returns:
        A 0-d tensor.
    """
    p, q = F.softmax(student / temperature, dim=1), F.softmax(teacher / temperature, dim=1)
    return _correlation_distance(p, q, 1) * temperature**2


def intra_class_loss(student: Tensor, teacher: Tensor, temperature: float = 4.0) -> Tensor:
    """τ² · (1 - mean over classes of ρ(p_·j, q_·j)), ρ Pearson's correlation of columns, over the samples of the batch.

    Arguments and result as :func:`inter_class_loss`.
    """
    p, q = F.softmax(student / temperature, dim=1), F.softmax(teacher / temperature, dim=1)
    return _correlation_distance(p, q, 0) * temperature**2


class DIST(DistillLoss):
    """beta · inter-class + gamma · intra-class correlation (:func:`inter_class_loss`, :func:`intra_class_loss`).

    The second one's columns are those of one batch of one process: neither several processes nor accumulation give what
    one large batch gives, and with a single sample it is a constant. Where the student's probabilities are equal for
    all classes the correlation is 0 and its gradient large (1e6), as published.

    Diagnostics: ``inter`` and ``intra`` apart, unweighted.
    """

    def __init__(self, beta: float = 1.0, gamma: float = 1.0, temperature: float = 4.0) -> None:
        super().__init__()
        self.beta, self.gamma = check_weight('beta', beta), check_weight('gamma', gamma)
        self.temperature = check_temperature('temperature', temperature)

    def loss(self, student: Tensor, teacher: Tensor, target: Tensor | None) -> Tensor:
        p, q = F.softmax(student / self.temperature, dim=1), F.softmax(teacher / self.temperature, dim=1)
        inter = _correlation_distance(p, q, 1) * self.temperature**2
        intra = _correlation_distance(p, q, 0) * self.temperature**2
        self.diagnostics = {'inter': inter.detach(), 'intra': intra.detach()}
        return self.beta * inter + self.gamma * intra
