"""Probabilistic: "Learning Deep Representations with Probabilistic Knowledge Transfer", Passalis, Tefas, ECCV 2018."""

from __future__ import annotations

import torch
from torch import Tensor

from ._base import FeatureLoss, check_eps, pooled


def neighbours(x: Tensor, eps: float = 1e-7) -> Tensor:
    """(cos + 1) / 2 between rows, each row of the result divided by its sum. A row of zeros has the cosine 0 to all.

    Args:
        x: `[B, D]`, float32 or higher.
        eps: added to the norm of a row.

    Returns:
        `[B, B]`, each row sums to 1.
    """
    norm = torch.linalg.vector_norm(x, dim=1, keepdim=True)
    x = torch.where(norm > 0, x / (norm + eps), 0)  # no gradient at 0, where the published program gives NaN
    similar = (x @ x.T + 1) / 2
    return similar / similar.sum(dim=1, keepdim=True)


def pkt_loss(student: Tensor, teacher: Tensor, eps: float = 1e-7) -> Tensor:
    """b · log((b + eps) / (a + eps)), mean over all pairs of samples; a of the student and b of the teacher as in
    :func:`neighbours`.

    Args:
        student: `[B, D]`, float32 or higher.
        teacher: `[B, T]`.
        eps: see above.

    Returns:
        A 0-d tensor; 0 for a single sample.
    """
    a, b = neighbours(student, eps), neighbours(teacher, eps)
    return (b * ((b + eps) / (a + eps)).log()).mean()


class PKT(FeatureLoss):
    """:func:`pkt_loss` of pooled features, summed over the pairs. It compares the samples of one batch of one process:
    neither several processes nor accumulation give what one large batch gives.

    Args:
        eps: added to norms and probabilities.
    """

    def __init__(self, eps: float = 1e-7) -> None:
        super().__init__()
        self.eps = check_eps(eps)

    def loss(self, student: list[Tensor], teacher: list[Tensor]) -> Tensor:
        return torch.stack([pkt_loss(pooled(s), pooled(t), self.eps) for s, t in zip(student, teacher)]).sum()
