"""Multi-level logit distillation: "Multi-Level Logit Distillation", Jin, Wang, Lin, CVPR 2023. One view."""

from __future__ import annotations

from collections.abc import Sequence

import torch.nn.functional as F
from torch import Tensor

from ._base import DistillLoss, check_temperature
from ._ops import kl_div


def mlkd_loss(student: Tensor, teacher: Tensor, temperatures: Sequence[float] = (4.0, 3.0, 5.0, 2.0, 6.0)) -> Tensor:
    """Σ over τ of m · τ² KL(P_T ‖ P_S) + c · ‖P_TᵀP_T - P_SᵀP_S‖²/C + m · ‖P_TP_Tᵀ - P_SP_Sᵀ‖²/B.

    P is softmax(logits/τ) `[B, C]`, norms are Frobenius's, KL is the batch mean. m is the share of samples whose
    teacher confidence (τ = 1) is at most its median over the batch, c the share of classes whose summed teacher
    probability is at most its median.

    In the paper m and c select samples and classes; in the published program, which this matches, the mask multiplies
    an already averaged loss, so that it acts only as a fraction. The paper's second, strongly augmented view is
    left out.

    Args:
        student: logits `[B, C]`, float32 or higher.
        teacher: logits `[B, C]`.
        temperatures: the τ.

    Returns:
        A 0-d tensor.
    """
    batch, classes = student.shape
    p = teacher.softmax(dim=1)
    confidence, mass = p.amax(dim=1), p.sum(dim=0)
    m = (confidence <= confidence.median()).to(p.dtype).mean()
    c = (mass <= mass.median()).to(p.dtype).mean()
    total = student.new_zeros(())
    for temperature in temperatures:
        log_s = F.log_softmax(student / temperature, dim=1)
        log_t = F.log_softmax(teacher / temperature, dim=1)
        s, t = log_s.exp(), log_t.exp()
        total = total + m * temperature**2 * kl_div(log_s, log_t)
        total = total + c * _gram_distance(t.T, s.T) / classes + m * _gram_distance(t, s) / batch
    return total


def _gram_distance(a: Tensor, b: Tensor) -> Tensor:
    """‖a aᵀ - b bᵀ‖² (Frobenius), by the smaller of the Gram matrices: it equals ‖aᵀa‖² - 2‖aᵀb‖² + ‖bᵀb‖²."""
    if a.shape[0] <= a.shape[1]:
        return (a @ a.T - b @ b.T).square().sum()
    return (a.T @ a).square().sum() - 2 * (a.T @ b).square().sum() + (b.T @ b).square().sum()


class MLKD(DistillLoss):
    """Module face of :func:`mlkd_loss`.

    Its medians and Gram matrices are those of one batch of one process: neither several processes nor accumulation give
    what one large batch gives.
    """

    def __init__(self, temperatures: Sequence[float] = (4.0, 3.0, 5.0, 2.0, 6.0), standardize: bool = False) -> None:
        super().__init__()
        if isinstance(temperatures, (int, float)):
            temperatures = [temperatures]
        self.temperatures = [check_temperature('temperatures', t) for t in temperatures]
        if not self.temperatures:
            raise ValueError('temperatures must not be empty')
        self.standardize = standardize

    def loss(self, student: Tensor, teacher: Tensor, target: Tensor | None) -> Tensor:
        return mlkd_loss(student, teacher, self.temperatures)
