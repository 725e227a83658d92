"""Label augment, as compared in "Knowledge Distillation with Refined Logits", Sun et al., ICCV 2025."""

from __future__ import annotations

from torch import Tensor

from ._base import DistillLoss, check_temperature
from .kd import kd_loss


def swap_top_and_true(teacher: Tensor, target: Tensor) -> Tensor:
    """The teacher's logits `[B, C]` with its highest logit and that of the true class exchanged."""
    target = target.unsqueeze(1)
    top = teacher.argmax(dim=1, keepdim=True)
    swapped = teacher.scatter(1, top, teacher.gather(1, target))
    return swapped.scatter(1, target, teacher.gather(1, top))


def la_loss(student: Tensor, teacher: Tensor, target: Tensor, temperature: float = 4.0) -> Tensor:
    """KD from a teacher that is never wrong: τ² · KL(softmax(swapped/τ) ‖ softmax(student/τ)), mean over the batch.

    Args:
        student: logits `[B, C]`, float32 or higher.
        teacher: logits `[B, C]`; :func:`swap_top_and_true` of them is what the student follows.
        target: class indices `[B]`.
        temperature: τ.

    Returns:
        A 0-d tensor.
    """
    return kd_loss(student, swap_top_and_true(teacher, target), temperature)


class LA(DistillLoss):
    """Module face of :func:`la_loss`."""

    needs_target = True

    def __init__(self, temperature: float = 4.0, standardize: bool = False) -> None:
        super().__init__()
        self.temperature = check_temperature('temperature', temperature)
        self.standardize = standardize

    def loss(self, student: Tensor, teacher: Tensor, target: Tensor) -> Tensor:
        return la_loss(student, teacher, target, self.temperature)
