"""Generalised decoupled KD: "Rethinking Decoupled Knowledge Distillation: A Predictive Distribution Perspective",
Zheng, Cheng, 2025."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from ._base import DistillLoss, check_choice, check_temperature, check_top_k, check_weight, fit_top_k
from ._ops import kl_div, mask_of


def group_losses(
    student: Tensor,
    teacher: Tensor,
    top_k: int = 5,
    temperature: float = 4.0,
    kl_type: str = 'forward',
    strategy: str = 'best',
    groups: int = 2,
) -> tuple[Tensor, Tensor, Tensor]:
    """KL between groups of classes, inside the leading group, and inside the rest; each τ² · KL, mean over the batch.

    The leading group K is the teacher's ``top_k`` highest classes, the rest are all others:

        between = τ² · KL([q_K, q_rest] ‖ [p_K, p_rest])      q_G = Σ over G of softmax(t/τ), p_G likewise from s
        inside  = τ² · KL(softmax(t_K/τ) ‖ softmax(s_K/τ))
        outside = τ² · KL(softmax(t_rest/τ) ‖ softmax(s_rest/τ))

    With three groups the teacher's first class is a group of its own: ``between`` compares three masses, and ``inside``
    is over ranks 2 to ``top_k``. Of equal logits `torch.topk` decides which belong to K.

    The published program masks classes by -1000 and takes the log of a sum of probabilities: wrong from margins of 1000
    τ on, and NaN in float32 from about 100 τ. This works on log-sum-exps and gathered logits, exact at any margin.

    Args:
        student: logits `[B, C]`, float32 or higher.
        teacher: logits `[B, C]`.
        top_k: size of K, from 1 (2 with three groups) to C - 1.
        temperature: τ.
        kl_type: of ``inside`` and ``outside``: `forward` KL(q ‖ p), `reverse` KL(p ‖ q), or `both`, half of each.
        strategy: `best`; with `worst` the ranks are counted from the teacher's lowest class.
        groups: 2 or 3.

    Returns:
        Three 0-d tensors.
    """
    s, t = student / temperature, teacher / temperature
    leading = t.topk(top_k, dim=1, largest=strategy == 'best').indices
    mask = mask_of(t, leading)
    parts: tuple[list[Tensor], list[Tensor]] = ([], [])
    for z, part in zip((s, t), parts):
        ranked = z.gather(1, leading)
        part += [ranked] if groups == 2 else [ranked[:, :1], ranked[:, 1:]]
        part.append(z + mask)
    log_p, log_q = (
        F.log_softmax(torch.cat([g.logsumexp(dim=1, keepdim=True) for g in part], dim=1), dim=1) for part in parts
    )
    between = kl_div(log_p, log_q)
    inside, outside = (
        _kl(F.log_softmax(of_s, dim=1), F.log_softmax(of_t, dim=1), kl_type)
        for of_s, of_t in zip(parts[0][-2:], parts[1][-2:])
    )
    return between * temperature**2, inside * temperature**2, outside * temperature**2


def _kl(log_p: Tensor, log_q: Tensor, kl_type: str) -> Tensor:
    if kl_type == 'both':
        return (kl_div(log_p, log_q) + kl_div(log_q, log_p)) / 2
    return kl_div(log_p, log_q) if kl_type == 'forward' else kl_div(log_q, log_p)


class GDKD(DistillLoss):
    """w0 · between + w1 · inside + w2 · outside (:func:`group_losses`).

    Args:
        w0, w1, w2: weights of the three terms.
        top_k: None for the published 5 (4 with three groups), or C - 1 where that is less.
        temperature: τ.
        kl_type: `forward`, `reverse` or `both`.
        strategy: `best` or `worst`.
        groups: 2, or 3 as in the variant published as GDKD3.
        standardize: standardise both logits first.

    Diagnostics: ``between``, ``inside`` and ``outside`` apart, unweighted.
    """

    def __init__(
        self,
        w0: float = 1.0,
        w1: float = 1.0,
        w2: float = 8.0,
        top_k: int | None = None,
        temperature: float = 4.0,
        kl_type: str = 'forward',
        strategy: str = 'best',
        groups: int = 2,
        standardize: bool = False,
    ) -> None:
        super().__init__()
        self.w0, self.w1, self.w2 = check_weight('w0', w0), check_weight('w1', w1), check_weight('w2', w2)
        self.temperature = check_temperature('temperature', temperature)
        self.kl_type = check_choice('kl_type', kl_type, ('forward', 'reverse', 'both'))
        self.strategy = check_choice('strategy', strategy, ('best', 'worst'))
        self.groups = check_choice('groups', groups, (2, 3))
        self.top_k = check_top_k(top_k, groups - 1)
        self.standardize = standardize

    def check_classes(self, classes: int) -> None:
        self._top_k(classes)

    def _top_k(self, classes: int) -> int:
        name, published = ('gdkd', 5) if self.groups == 2 else ('gdkd with groups=3', 4)
        return fit_top_k(name, self.top_k, published, self.groups - 1, classes - 1, classes)

    def loss(self, student: Tensor, teacher: Tensor, target: Tensor | None) -> Tensor:
        top_k = self._top_k(student.shape[1])
        between, inside, outside = group_losses(
            student, teacher, top_k, self.temperature, self.kl_type, self.strategy, self.groups
        )
        self.diagnostics = {'between': between.detach(), 'inside': inside.detach(), 'outside': outside.detach()}
        return self.w0 * between + self.w1 * inside + self.w2 * outside
