"""What every criterion shares: the checks on its input, the precision it works in, logit standardisation."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import UsageError
from ._ops import standardize


class DistillLoss(nn.Module):
    """A distillation criterion: `criterion(student_logits, teacher_logits, target)` gives its unweighted loss.

    Whatever the logits' dtype and whatever autocast says, the work is done in float32 (float64 stays float64). The
    result is a 0-d tensor, the mean over the batch.

    Subclasses write :meth:`loss`, and may fill ``self.diagnostics`` with detached 0-d tensors, and may have a
    ``set_epoch(epoch)`` (1-based) where the criterion changes over the run.

    Attributes:
        needs_target: whether the loss depends on ``target``. If not, ``target`` is ignored and may be None.
        diagnostics: figures about the last batch, detached 0-d tensors by name.
    """

    name: str  # in the table, of a criterion that create_distill_loss() has made
    needs_target = False
    standardize = False

    def __init__(self) -> None:
        super().__init__()
        self.diagnostics: dict[str, Tensor] = {}
        self._checked_on: set[torch.device] = set()

    def forward(self, student_logits: Tensor, teacher_logits: Tensor, target: Tensor | None = None) -> Tensor:
        """Compute the distillation term.

        Args:
            student_logits: `[B, C]`, any floating dtype.
            teacher_logits: `[B, C]`, any floating dtype; no gradient flows into them.
            target: class indices `[B]`, int64.

        Returns:
            The unweighted term, a 0-d tensor in float32 or higher.

        Raises:
            ValueError: if shapes, the target or the teacher's values are not as described. Values are
                read at the first call on each device only, as that waits for it, and not under torch.compile.
        """
        self._check(student_logits, teacher_logits, target)
        dtype = torch.promote_types(student_logits.dtype, torch.float32)
        with torch.autocast(student_logits.device.type, enabled=False):
            student, teacher = student_logits.to(dtype), teacher_logits.detach().to(dtype)
            if self.standardize:
                student, teacher = standardize(student), standardize(teacher)
            return self.loss(student, teacher, target)

    def loss(self, student: Tensor, teacher: Tensor, target: Any) -> Tensor:
        """The criterion's formula on checked logits `[B, C]` of one dtype, float32 or float64. ``target`` is a tensor
        where ``needs_target``, else a tensor or None."""
        raise NotImplementedError

    def check_classes(self, classes: int) -> None:
        """Check options that depend on the number of classes; done at each call too.

        Raises:
            UsageError: where one does not fit; the message says what does.
        """

    def _check(self, student: Tensor, teacher: Tensor, target: Tensor | None) -> None:
        name = type(self).__name__
        if student.ndim != 2 or not student.is_floating_point() or student.shape[1] < 2 or not student.shape[0]:
            raise ValueError(
                f'{name}: expected floating-point student logits [B, C] with B >= 1, C >= 2, got {_describe(student)}'
            )
        if teacher.shape != student.shape or not teacher.is_floating_point():
            raise ValueError(
                f"{name}: expected teacher logits like the student's {_describe(student)}, got {_describe(teacher)}"
            )
        self.check_classes(student.shape[1])
        if self.needs_target:
            if target is None:
                raise ValueError(f'{name}: needs the class indices [B] as target, got None')
            if target.ndim != 1 or target.shape[0] != student.shape[0] or target.dtype != torch.int64:
                raise ValueError(
                    f'{name}: expected class indices int64 [{student.shape[0]}] as target, got {_describe(target)}'
                    + (' (a soft target: this criterion needs an index)' if target.is_floating_point() else '')
                )
        if torch.compiler.is_compiling() or student.device in self._checked_on:
            return
        if not torch.isfinite(teacher).all():
            raise ValueError(f"{name}: the teacher's logits hold NaN or infinity")
        if self.needs_target and target is not None and target.numel():
            least, most = int(target.min()), int(target.max())
            if not 0 <= least <= most < student.shape[1]:
                raise ValueError(f'{name}: expected targets in 0..{student.shape[1] - 1}, got {least}..{most}')
        self._checked_on.add(student.device)


def check_temperature(name: str, value: float) -> float:
    """Return ``value`` as a float, or raise ValueError where it is no number from 1e-4 to 1e6."""
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not 1e-4 <= value <= 1e6:
        raise ValueError(f'{name} must be a positive number (1e-4 to 1e6), got {value!r}')
    return float(value)


def check_weight(name: str, value: float) -> float:
    """Return ``value`` as a float, or raise ValueError where it is no finite number of at least 0."""
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 <= value < math.inf:
        raise ValueError(f'{name} must be a finite number of at least 0, got {value!r}')
    return float(value)


def check_choice(name: str, value: Any, choices: Sequence[Any]) -> Any:
    """Return ``value``, or raise ValueError where it is none of ``choices``."""
    if isinstance(value, bool) or value not in choices:
        raise ValueError(f'{name} must be {", ".join(map(str, choices[:-1]))} or {choices[-1]}, got {value!r}')
    return value


def check_top_k(value: int | None, least: int) -> int | None:
    """Return ``value``, or raise ValueError where it is neither None nor a whole number of at least ``least``."""
    if value is not None and (isinstance(value, bool) or not isinstance(value, int) or value < least):
        raise ValueError(f'top_k must be a whole number of at least {least}, got {value!r}')
    return value


def fit_top_k(name: str, given: int | None, published: int, least: int, most: int, classes: int) -> int:
    """Return how many classes to take: those given, else the published number or the nearest from ``least`` to
    ``most``.

    Args:
        name: of the criterion, for the message.
        given, published: None or a number, and the one to take without.
        least, most: what fits.
        classes: C.

    Raises:
        UsageError: where the number given, or any number, does not fit.
    """
    if most < least:
        raise UsageError(f'{name} needs at least {classes + least - most} classes, got {classes}')
    if given is not None and not least <= given <= most:
        fits = f'{least} to {most} do' if least < most else f'{least} does'
        raise UsageError(f'{name}: top_k={given} does not fit {classes} classes; {fits}')
    return min(max(published if given is None else given, least), most)


def _describe(x: Tensor) -> str:
    return f'{str(x.dtype).removeprefix("torch.")} {list(x.shape)}'
