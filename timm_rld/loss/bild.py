"""Bi-directional logits differences: "BiLD: Bi-directional Logits Difference Loss for Large Language Model
Distillation", Li et al., COLING 2025. Published for language models; the weights here are ours."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from ._base import DistillLoss, check_temperature
from ._ops import kl_div


def bild_loss(student: Tensor, teacher: Tensor, top_k: int = 8, temperature: float = 3.0) -> Tensor:
    """Σ over both leaders of KL(softmax(d_T/τ) ‖ softmax(d_S/τ)), mean over the batch.

    d are the k(k-1)/2 differences z_i - z_j, i < j, of the leader's k highest logits in its own order, taken from both
    networks; k = min(top_k, C). The leaders are the teacher and the student. No τ².

    Args:
        student: logits `[B, C]`, float32 or higher.
        teacher: logits `[B, C]`.
        top_k: how many logits.
        temperature: τ.

    Returns:
        A 0-d tensor.
    """
    k = min(top_k, student.shape[1])
    i, j = torch.triu_indices(k, k, offset=1, device=student.device)

    def led_by(leader: Tensor) -> Tensor:
        order = leader.detach().topk(k, dim=1).indices
        s, t = student.gather(1, order), teacher.gather(1, order)
        log_s, log_t = (F.log_softmax((z[:, i] - z[:, j]) / temperature, dim=1) for z in (s, t))
        return kl_div(log_s, log_t)

    return led_by(teacher) + led_by(student)


class BiLD(DistillLoss):
    """Module face of :func:`bild_loss`."""

    def __init__(self, top_k: int = 8, temperature: float = 3.0) -> None:
        super().__init__()
        if isinstance(top_k, bool) or not isinstance(top_k, int) or top_k < 2:
            raise ValueError(f'top_k must be a whole number of at least 2, got {top_k!r}')
        self.top_k, self.temperature = top_k, check_temperature('temperature', temperature)

    def loss(self, student: Tensor, teacher: Tensor, target: Tensor | None) -> Tensor:
        return bild_loss(student, teacher, self.top_k, self.temperature)
