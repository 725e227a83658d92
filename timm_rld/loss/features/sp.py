"""Similarity-preserving: "Similarity-Preserving Knowledge Distillation", Tung, Mori, ICCV 2019."""

from __future__ import annotations

import torch
from torch import Tensor

from ._base import FeatureLoss, unit_rows


def similarities(feature: Tensor) -> Tensor:
    """G = F·Fᵀ, F the flattened features of each sample, each row of G divided by its norm.

    Args:
        feature: `[B, …]`, float32 or higher.

    Returns:
        `[B, B]`.
    """
    flat = feature.flatten(1)
    return unit_rows(flat @ flat.T)


def sp_loss(student: Tensor, teacher: Tensor) -> Tensor:
    """Σ (G_t - G_s)² / B², G as in :func:`similarities`.

    A sample whose features are all 0 has no gradient; the published program gives it one of 1e11.

    Args:
        student: `[B, …]`, float32 or higher.
        teacher: `[B, …]`.

    Returns:
        A 0-d tensor; 0 for a single sample.
    """
    return (similarities(teacher) - similarities(student)).square().mean()


class SP(FeatureLoss):
    """:func:`sp_loss`, summed over the pairs. The similarities are those within one batch of one process: neither
    several processes nor accumulation give what one large batch gives."""

    def loss(self, student: list[Tensor], teacher: list[Tensor]) -> Tensor:
        return torch.stack([sp_loss(s, t) for s, t in zip(student, teacher)]).sum()
