"""Relational: "Relational Knowledge Distillation", Park et al., CVPR 2019."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from .._base import check_weight
from ._base import FeatureLoss, check_eps, pooled, unit_rows


def relative_distances(x: Tensor, squared: bool = False, eps: float = 1e-12) -> Tensor:
    """Distances between rows, divided by their mean.

    Args:
        x: `[B, D]`, B at least 2, float32 or higher.
        squared: take squared distances.
        eps: the least squared distance of two rows.

    Returns:
        `[B, B]`, 0 on the diagonal.
    """
    norms, count = x.square().sum(dim=1), len(x)
    distances = (norms.unsqueeze(1) + norms.unsqueeze(0) - 2 * x @ x.T).clamp_min(eps)
    if not squared:
        distances = distances.sqrt()
    distances = distances.masked_fill(torch.eye(count, dtype=torch.bool, device=x.device), 0)
    return distances * (count * (count - 1) / distances.sum())


def angles(x: Tensor) -> Tensor:
    """Cosines of the angles at row i between rows j and k, for all triples.

    Args:
        x: `[B, D]`, float32 or higher.

    Returns:
        `[B, B, B]`.
    """
    directions = unit_rows(x.unsqueeze(0) - x.unsqueeze(1))
    return directions @ directions.transpose(1, 2)


def rkd_loss(
    student: Tensor,
    teacher: Tensor,
    distance_weight: float = 25.0,
    angle_weight: float = 50.0,
    squared: bool = False,
    eps: float = 1e-12,
) -> Tensor:
    """distance_weight · smooth L1 of :func:`relative_distances` + angle_weight · smooth L1 of :func:`angles`, means.

    Args:
        student: `[B, D]`, float32 or higher.
        teacher: `[B, T]`.
        distance_weight, angle_weight: of the two parts.
        squared, eps: of the distances.

    Returns:
        A 0-d tensor; 0 for a single sample, where the published program gives NaN, and for two by construction.
    """
    loss = student.sum() * 0
    if len(student) > 1 and distance_weight:
        s, t = (relative_distances(x, squared, eps) for x in (student, teacher))
        loss = loss + distance_weight * F.smooth_l1_loss(s, t)
    if len(student) > 1 and angle_weight:
        loss = loss + angle_weight * F.smooth_l1_loss(angles(student), angles(teacher))
    return loss


class RKD(FeatureLoss):
    """:func:`rkd_loss` of pooled features, summed over the pairs. It takes memory for B² · max(B, D)
    numbers, and compares the samples of one batch of one process: neither several processes nor accumulation give what
    one large batch gives.

    Args:
        distance_weight, angle_weight: of the two parts.
        squared: take squared distances.
        eps: the least squared distance.
    """

    def __init__(
        self, distance_weight: float = 25.0, angle_weight: float = 50.0, squared: bool = False, eps: float = 1e-12
    ) -> None:
        super().__init__()
        self.distance_weight = check_weight('distance_weight', distance_weight)
        self.angle_weight = check_weight('angle_weight', angle_weight)
        if not isinstance(squared, bool):
            raise ValueError(f'squared must be true or false, got {squared!r}')
        self.squared, self.eps = squared, check_eps(eps)

    def loss(self, student: list[Tensor], teacher: list[Tensor]) -> Tensor:
        options = (self.distance_weight, self.angle_weight, self.squared, self.eps)
        return torch.stack([rkd_loss(pooled(s), pooled(t), *options) for s, t in zip(student, teacher)]).sum()
