"""Attention transfer: "Paying More Attention to Attention: Improving the Performance of Convolutional Neural Networks
via Attention Transfer", Zagoruyko, Komodakis, ICLR 2017."""

from __future__ import annotations

import torch
from torch import Tensor

from ._base import FeatureLoss, check_maps, to_one_size, unit_rows


def attention(feature: Tensor, p: int = 2) -> Tensor:
    """The mean over channels of fᵖ, flattened and divided by its norm.

    Args:
        feature: `[B, C, H, W]`, float32 or higher.
        p: the power.

    Returns:
        `[B, H·W]`.
    """
    if p > 2:  # of another scale it is the same, and does not overflow
        feature = feature / feature.detach().abs().amax(dim=(1, 2, 3), keepdim=True).clamp_min(1e-30)
    return unit_rows(feature.pow(p).mean(dim=1).flatten(1))


def at_loss(student: Tensor, teacher: Tensor, p: int = 2) -> Tensor:
    """(a_s - a_t)², mean over positions and batch, a as in :func:`attention`. The larger map is pooled to the size of
    the smaller one first.

    Args:
        student: `[B, C, H, W]`, float32 or higher.
        teacher: `[B, T, h, w]`.
        p: the power.

    Returns:
        A 0-d tensor.
    """
    student, teacher = to_one_size(student, teacher)
    return (attention(student, p) - attention(teacher, p)).square().mean()


class AT(FeatureLoss):
    """:func:`at_loss`, summed over the pairs of maps.

    Args:
        p: the power of a feature, a whole number of at least 1.
    """

    def __init__(self, p: int = 2) -> None:
        super().__init__()
        if isinstance(p, bool) or not isinstance(p, int) or p < 1:
            raise ValueError(f'p must be a whole number of at least 1, got {p!r}')
        self.p = p

    def loss(self, student: list[Tensor], teacher: list[Tensor]) -> Tensor:
        check_maps('AT', *student, *teacher)
        return torch.stack([at_loss(s, t, self.p) for s, t in zip(student, teacher)]).sum()
