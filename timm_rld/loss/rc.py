"""Review and correction, as compared in "Knowledge Distillation with Refined Logits", Sun et al., ICCV 2025."""

from __future__ import annotations

from torch import Tensor

from ._base import DistillLoss, check_temperature, check_weight
from .kd import kd_loss


def correction_loss(student: Tensor, target: Tensor, temperature: float = 4.0) -> Tensor:
    """τ² · KL(softmax(corrected/τ) ‖ softmax(student/τ)), mean over the batch.

    ``corrected`` are the student's own logits, detached, with that of the true class raised to z_y + max z.

    Args:
        student: logits `[B, C]`, float32 or higher.
        target: class indices `[B]`.
        temperature: τ.

    Returns:
        A 0-d tensor.
    """
    own, target = student.detach(), target.unsqueeze(1)
    corrected = own.scatter(1, target, own.gather(1, target) + own.amax(dim=1, keepdim=True))
    return kd_loss(student, corrected, temperature)


class RC(DistillLoss):
    """kd_weight · KD + rc_weight · :func:`correction_loss`.

    As published it is not invariant to a shift of the student's logits: z_y + max z is not.
    """

    needs_target = True

    def __init__(
        self, temperature: float = 4.0, kd_weight: float = 1.0, rc_weight: float = 0.1, standardize: bool = False
    ) -> None:
        super().__init__()
        self.temperature = check_temperature('temperature', temperature)
        self.kd_weight, self.rc_weight = check_weight('kd_weight', kd_weight), check_weight('rc_weight', rc_weight)
        self.standardize = standardize

    def loss(self, student: Tensor, teacher: Tensor, target: Tensor) -> Tensor:
        kd = kd_loss(student, teacher, self.temperature)
        rc = correction_loss(student, target, self.temperature)
        self.diagnostics = {'kd': kd.detach(), 'rc': rc.detach()}
        return self.kd_weight * kd + self.rc_weight * rc
