"""What the methods on features share: the checks on their input, the precision they work in, and small operations."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

Shapes = Sequence[Sequence[int]]


class FeatureLoss(nn.Module):
    """A method on features: `criterion(student_features, teacher_features)` gives its unweighted loss.

    Features are lists of maps `[B, C, H, W]` or vectors `[B, D]`, as many of the student as of the teacher, from the
    shallowest to the deepest. Whatever their dtype and whatever autocast says, the work is done in float32 (float64
    stays float64). The result is a 0-d tensor; several pairs are summed.

    Subclasses write :meth:`loss`. Layers of their own are parameters to train, and always use the statistics of the
    batch.
    """

    name: str  # in the table, of a criterion that create_feature_loss() has made

    def forward(self, student_features: Sequence[Tensor], teacher_features: Sequence[Tensor]) -> Tensor:
        """Compute the term.

        Args:
            student_features: `[B, C, H, W]` or `[B, D]` each, any floating dtype.
            teacher_features: likewise, with the same B; no gradient flows into them.

        Returns:
            The unweighted term, a 0-d tensor in float32 or higher.

        Raises:
            ValueError: if they are not as described.
        """
        self._check(student_features, teacher_features)
        first = student_features[0]
        dtype = torch.promote_types(first.dtype, torch.float32)
        with torch.autocast(first.device.type, enabled=False):
            student = [f.to(dtype) for f in student_features]
            teacher = [f.detach().to(dtype) for f in teacher_features]
            return self.loss(student, teacher)

    def loss(self, student: list[Tensor], teacher: list[Tensor]) -> Tensor:
        """The method's formula on checked features of one dtype, float32 or float64."""
        raise NotImplementedError

    def _check(self, student: Sequence[Tensor], teacher: Sequence[Tensor]) -> None:
        name = type(self).__name__
        for who, features in (('student', student), ('teacher', teacher)):
            if isinstance(features, Tensor) or not features:
                raise ValueError(f"{name}: expected a list of the {who}'s features, got {_describe(features)}")
            for f in features:
                if f.ndim not in (2, 4) or not f.is_floating_point() or not f.numel():
                    raise ValueError(
                        f'{name}: expected floating-point {who} features [B, C, H, W] or [B, D], got {_describe(f)}'
                    )
        if len(student) != len(teacher):
            raise ValueError(f'{name}: expected as many features of both, got {len(student)} and {len(teacher)}')
        if len(batches := {len(f) for f in (*student, *teacher)}) > 1:
            raise ValueError(f'{name}: expected features of one batch, got {" and ".join(map(str, sorted(batches)))}')


def _describe(value: object) -> str:
    if not isinstance(value, Tensor):
        return repr(value)
    return f'{str(value.dtype).removeprefix("torch.")} {list(value.shape)}'


def check_maps(name: str, *features: Tensor) -> None:
    """Raise ValueError where one of some features is no map `[B, C, H, W]`."""
    for f in features:
        if f.ndim != 4:
            raise ValueError(f'{name}: expected maps [B, C, H, W], got {_describe(f)}')


def width_and_size(shape: Sequence[int]) -> tuple[int, tuple[int, int]]:
    """Return channels and (H, W) of a feature's shape, with or without the batch: vectors have (1, 1).

    Raises:
        ValueError: for another number of dimensions.
    """
    dims = [int(n) for n in shape]
    if len(dims) not in (1, 2, 3, 4) or min(dims) < 1:
        raise ValueError(f'expected a shape [B, C, H, W] or [B, D], got {dims}')
    return (dims[-3], (dims[-2], dims[-1])) if len(dims) > 2 else (dims[-1], (1, 1))


def pooled(feature: Tensor) -> Tensor:
    """A map `[B, C, H, W]` as its mean over positions `[B, C]`; vectors as they are."""
    return feature.mean(dim=(2, 3)) if feature.ndim == 4 else feature


def to_size(feature: Tensor, size: tuple[int, int]) -> Tensor:
    """A map `[B, C, H, W]` pooled to (h, w) by adaptive averages."""
    return feature if tuple(feature.shape[-2:]) == size else F.adaptive_avg_pool2d(feature, size)


def to_one_size(student: Tensor, teacher: Tensor) -> tuple[Tensor, Tensor]:
    """Two maps, the larger one pooled to the size of the smaller one."""
    size = min(student.shape[-2], teacher.shape[-2]), min(student.shape[-1], teacher.shape[-1])
    return to_size(student, size), to_size(teacher, size)


def unit_rows(x: Tensor, eps: float = 1e-12) -> Tensor:
    """x / max(‖x‖, eps) along the last dimension.

    Through a row that is no longer than eps flows no gradient: it would be 1 / eps times as long.
    """
    norm = torch.linalg.vector_norm(x, dim=-1, keepdim=True)
    return torch.where(norm > eps, x / norm.clamp_min(eps), (x / eps).detach())


class BatchNorm(nn.Module):
    """Batch norm by the statistics of the batch, always: it keeps no others, so that a checkpoint holds weight and bias
    alone. Of a single value it gives the bias.

    Args:
        channels: of its input `[B, C, H, W]`.
        eps: added to the variance.
    """

    def __init__(self, channels: int, eps: float = 1e-5) -> None:
        super().__init__()
        self.weight, self.bias = nn.Parameter(torch.ones(channels)), nn.Parameter(torch.zeros(channels))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        if x.numel() == x.shape[1]:  # which torch refuses
            return x * 0 + self.bias.view(1, -1, 1, 1)
        return F.batch_norm(x, None, None, self.weight, self.bias, training=True, eps=self.eps)


def check_eps(value: float) -> float:
    """Return ``value`` as a float, or raise ValueError where it is no number above 0 and below 1."""
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 < value < 1:
        raise ValueError(f'eps must be a number above 0 and below 1, got {value!r}')
    return float(value)
