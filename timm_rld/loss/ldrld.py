"""Local dense relational logit distillation: "Local Dense Logit Relations for Enhanced Knowledge Distillation", Xu et
al., ICCV 2025."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from ._base import DistillLoss, check_temperature, check_top_k, check_weight, fit_top_k
from ._ops import kl_div, mask_of


def local_relations_loss(student: Tensor, teacher: Tensor, temperature: float = 4.0) -> Tensor:
    """(whole + Σ over pairs of ranks i < j of w_ij · τ² KL_ij) / (k(k-1)/2 + 1), mean over the batch.

    KL_ij = KL(softmax([t_i, t_j]/τ) ‖ softmax([s_i, s_j]/τ)), whole = τ² KL(softmax(t/τ) ‖ softmax(s/τ)) over all k
    classes, w_ij = 2 / (1.5 + j - i) · exp(-0.05 (i + j)): near and leading ranks weigh most.

    With k = 2 the whole is the one pair, and has its weight too, as in the published program.

    Args:
        student: logits `[B, k]` of the student's k highest classes, highest first (ranks 1 to k).
        teacher: logits `[B, k]` of the same classes.
        temperature: τ.

    Returns:
        A 0-d tensor.
    """
    k = student.shape[1]
    s, t = student / temperature, teacher / temperature
    i, j = torch.triu_indices(k, k, offset=1, device=s.device)
    ranks = torch.arange(1, k + 1, dtype=s.dtype, device=s.device)
    weights = 2 / (1.5 + ranks[j] - ranks[i]) * torch.exp(-0.05 * (ranks[i] + ranks[j]))
    d_s, d_t = s[:, i] - s[:, j], t[:, i] - t[:, j]
    pairs = d_t.sigmoid() * (F.logsigmoid(d_t) - F.logsigmoid(d_s))
    pairs = pairs + (-d_t).sigmoid() * (F.logsigmoid(-d_t) - F.logsigmoid(-d_s))
    whole = kl_div(F.log_softmax(s, dim=1), F.log_softmax(t, dim=1))
    if k == 2:
        whole = whole * weights[0]
    return (whole + (pairs * weights).sum(dim=1).mean()) * temperature**2 / (k * (k - 1) / 2 + 1)


class LDRLD(DistillLoss):
    """alpha · relations among the student's k highest classes + beta · τ² KL over the classes outside these.

    The relations are :func:`local_relations_loss`, of the classes that the student itself ranks highest; where equal
    logits meet rank k `torch.topk` decides. The KL outside is of softmax over the other classes alone.

    Args:
        alpha, beta: weights of the two terms.
        top_k: k, from 2 to C; at C nothing is outside, and that term is 0 (the published program takes it over all
            classes then). None for the published 7, or C - 1 where that is less (2 with two classes).
        temperature: τ.
        standardize: standardise both logits first.

    Diagnostics: ``local`` and ``rest`` apart, unweighted.
    """

    def __init__(
        self,
        alpha: float = 10.5,
        beta: float = 7.0,
        top_k: int | None = None,
        temperature: float = 4.0,
        standardize: bool = False,
    ) -> None:
        super().__init__()
        self.alpha, self.beta = check_weight('alpha', alpha), check_weight('beta', beta)
        self.top_k = check_top_k(top_k, 2)
        self.temperature = check_temperature('temperature', temperature)
        self.standardize = standardize

    def check_classes(self, classes: int) -> None:
        self._top_k(classes)

    def _top_k(self, classes: int) -> int:
        published = min(7, classes - 1)  # something is left outside
        return fit_top_k('ldrld', self.top_k, published, 2, classes, classes)

    def loss(self, student: Tensor, teacher: Tensor, target: Tensor | None) -> Tensor:
        classes = student.shape[1]
        top_k = self._top_k(classes)
        leading = student.detach().topk(top_k, dim=1).indices
        local = local_relations_loss(student.gather(1, leading), teacher.gather(1, leading), self.temperature)
        if top_k == classes:
            rest = torch.zeros_like(local)
        else:
            mask = mask_of(teacher, leading)
            log_p, log_q = (F.log_softmax(z / self.temperature + mask, dim=1) for z in (student, teacher))
            rest = kl_div(log_p, log_q) * self.temperature**2
        self.diagnostics = {'local': local.detach(), 'rest': rest.detach()}
        return self.alpha * local + self.beta * rest
