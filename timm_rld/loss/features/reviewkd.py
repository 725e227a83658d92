"""Knowledge review: "Distilling Knowledge via Knowledge Review", Chen et al., CVPR 2021."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ._base import BatchNorm, FeatureLoss, Shapes, to_one_size, width_and_size


def hcl_loss(student: Sequence[Tensor], teacher: Sequence[Tensor]) -> Tensor:
    """Hierarchical context: for each pair of maps the mean squared error at full size (weight 1) and of the maps pooled
    to l×l, l in 4, 2, 1 below their size (weights 1/2, 1/4, 1/8, in the order of those there are), divided by the sum
    of the weights; summed over the pairs.

    Args:
        student: maps `[B, C, H, W]`, float32 or higher.
        teacher: maps of the same shapes.

    Returns:
        A 0-d tensor.
    """
    losses = []
    for s, t in zip(student, teacher):
        loss, weight, total = F.mse_loss(s, t), 1.0, 1.0
        for side in (4, 2, 1):
            if side < min(s.shape[-2:]):
                weight /= 2
                small, goal = F.adaptive_avg_pool2d(s, side), F.adaptive_avg_pool2d(t, side)
                loss = loss + weight * F.mse_loss(small, goal)
                total += weight
        losses.append(loss / total)
    return torch.stack(losses).sum()


class Fusion(nn.Module):
    """Attention-based fusion of a map of the student with what was fused of the deeper ones.

    x = BN(1×1 conv(feature)); with y, the last x up-sampled to its size (nearest), and two gates
    g = sigmoid(1×1 conv([x, y])): x ← g_0·x + g_1·y; the output is BN(3×3 conv(x)).

    Args:
        channels: of the feature.
        mid_channels: of x.
        width: of the output.
        fuse: whether there is a y.
    """

    def __init__(self, channels: int, mid_channels: int, width: int, fuse: bool) -> None:
        super().__init__()
        self.conv1 = nn.Sequential(nn.Conv2d(channels, mid_channels, 1, bias=False), BatchNorm(mid_channels))
        self.conv2 = nn.Sequential(nn.Conv2d(mid_channels, width, 3, padding=1, bias=False), BatchNorm(width))
        self.att_conv = nn.Sequential(nn.Conv2d(2 * mid_channels, 2, 1), nn.Sigmoid()) if fuse else None
        for layers in (self.conv1, self.conv2):
            nn.init.kaiming_uniform_(layers[0].weight, a=1)  # type: ignore[arg-type]  # of a convolution

    def forward(self, feature: Tensor, deeper: Tensor | None) -> tuple[Tensor, Tensor]:
        """A feature `[B, C, H, W]`, and x of the deeper one → the output `[B, width, H, W]`, x."""
        x = self.conv1(feature)
        if self.att_conv is not None and deeper is not None:
            y = F.interpolate(deeper, x.shape[-2:], mode='nearest')
            gates = self.att_conv(torch.cat([x, y], dim=1))
            x = x * gates[:, :1] + y * gates[:, 1:]
        return self.conv2(x), x


class ReviewKD(FeatureLoss):
    """:func:`hcl_loss` of the student's maps, each fused with the deeper ones (:class:`Fusion`), and the teacher's.

    Vectors `[B, D]`, such as the pooled features, are maps of 1×1. Where a student's map and the teacher's have other
    sizes, the larger one is pooled. The published program takes both networks' maps before their last activation; here
    they are those that they are given.

    Args:
        student_shapes, teacher_shapes: of the features, from the shallowest to the deepest.
        mid_channels: of what is fused; None for the width of the student's deepest feature, at most 512.
    """

    def __init__(self, student_shapes: Shapes, teacher_shapes: Shapes, mid_channels: int | None = None) -> None:
        super().__init__()
        widths, goals = ([width_and_size(s)[0] for s in shapes] for shapes in (student_shapes, teacher_shapes))
        if mid_channels is None:
            mid_channels = min(512, widths[-1])
        if isinstance(mid_channels, bool) or not isinstance(mid_channels, int) or mid_channels < 1:
            raise ValueError(f'mid_channels must be a whole number of at least 1, got {mid_channels!r}')
        pairs = list(zip(widths, goals))[::-1]
        self.abfs = nn.ModuleList(Fusion(w, mid_channels, goal, i > 0) for i, (w, goal) in enumerate(pairs))

    def loss(self, student: list[Tensor], teacher: list[Tensor]) -> Tensor:
        if len(student) != len(self.abfs):
            raise ValueError(f'ReviewKD: made for {len(self.abfs)} features, got {len(student)}')
        pairs, deeper = [], None
        for fusion, s, t in zip(self.abfs, map(as_map, student[::-1]), map(as_map, teacher[::-1])):
            output, deeper = fusion(s, deeper)
            pairs.append(to_one_size(output, t))
        return hcl_loss(*zip(*pairs))


def as_map(feature: Tensor) -> Tensor:
    """Vectors `[B, D]` as maps `[B, D, 1, 1]`; maps as they are."""
    return feature[..., None, None] if feature.ndim == 2 else feature
