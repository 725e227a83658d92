"""Hints: "FitNets: Hints for Thin Deep Nets", Romero et al., ICLR 2015."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ._base import BatchNorm, FeatureLoss, Shapes, check_eps, check_maps, to_size, width_and_size

PUBLISHED_STAGE = 3


def fitnet_loss(student: Tensor, teacher: Tensor) -> Tensor:
    """(student - teacher)², mean over all positions, channels and samples.

    Args:
        student: `[B, T, h, w]`, float32 or higher.
        teacher: `[B, T, h, w]`.

    Returns:
        A 0-d tensor.
    """
    return F.mse_loss(student, teacher)


class FitNet(FeatureLoss):
    """:func:`fitnet_loss` of one pair of maps, the student's through a convolution with bias, batch norm and ReLU.

    The convolution brings the student's map to the teacher's size: 3×3 with stride 2 where it is twice as large, a
    transposed 4×4 with stride 2 where it is half as large, else one without padding of 1 + H_s - H_t. Where that would
    be larger than half of the student's map, or negative, the larger map is pooled and the convolution is 1×1.

    Args:
        student_shapes, teacher_shapes: of the maps, `[B, C, H, W]` each.
        stage: which of several pairs, 1 for the first; None for the published third, or the last of fewer.
        eps: of the batch norm.
    """

    def __init__(
        self, student_shapes: Shapes, teacher_shapes: Shapes, stage: int | None = None, eps: float = 1e-5
    ) -> None:
        super().__init__()
        self.at = choose_stage(stage, min(len(student_shapes), len(teacher_shapes)))
        (channels, size), (width, goal) = (width_and_size(s[self.at]) for s in (student_shapes, teacher_shapes))
        # what is pooled before the convolution: the teacher where it is the larger, the student where it is far larger
        self.sizes = size, goal
        self.conv: nn.Module
        kernel = 1 + size[0] - goal[0], 1 + size[1] - goal[1]
        if size == (2 * goal[0], 2 * goal[1]):
            self.conv = nn.Conv2d(channels, width, 3, stride=2, padding=1)
        elif goal == (2 * size[0], 2 * size[1]):
            self.conv = nn.ConvTranspose2d(channels, width, 4, stride=2, padding=1)
        elif all(1 <= k <= 1 + s // 2 for k, s in zip(kernel, size)):
            self.conv = nn.Conv2d(channels, width, kernel)
        else:
            smaller = min(size[0], goal[0]), min(size[1], goal[1])
            self.sizes = smaller, smaller
            self.conv = nn.Conv2d(channels, width, 1)
        self.bn = BatchNorm(width, check_eps(eps))

    def loss(self, student: list[Tensor], teacher: list[Tensor]) -> Tensor:
        s, t = student[self.at], teacher[self.at]
        check_maps('FitNet', s, t)
        s, t = (to_size(x, size) for x, size in zip((s, t), self.sizes))
        return fitnet_loss(torch.relu(self.bn(self.conv(s))), t)


def choose_stage(stage: int | None, count: int) -> int:
    """Return the place of a stage among so many, 0 for the first.

    Args:
        stage: 1 for the first; None for the published third, or the last of fewer.

    Raises:
        ValueError: where there is no such stage.
    """
    if stage is None:
        return min(PUBLISHED_STAGE, count) - 1
    if isinstance(stage, bool) or not isinstance(stage, int) or not 1 <= stage <= count:
        raise ValueError(f'stage must be a whole number from 1 to {count}, the pairs of maps; got {stage!r}')
    return stage - 1
