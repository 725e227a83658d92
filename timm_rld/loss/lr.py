"""Label revision: "Improve Knowledge Distillation via Label Revision and Data Selection", Lan et al., 2024."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from ._base import DistillLoss, check_weight
from ._ops import one_hot


def lr_loss(
    student: Tensor, teacher: Tensor, target: Tensor, lambda1: float = 4.0, lambda2: float = 1.0, eta: float = 0.8
) -> Tensor:
    """Cross-entropy and logits where the teacher is right, revised probabilities where it is wrong.

    Over the samples where the teacher is right: CE(student, target) + lambda1 · MSE(student, teacher), means over these
    samples (and classes). Over those where it is wrong: lambda2 · MSE(softmax(student), b · p + (1-b) · onehot), p =
    softmax(teacher), b = eta / (max p - p_y + 1), mean over samples and classes. A subset without samples adds 0.

    Args:
        student: logits `[B, C]`, float32 or higher.
        teacher: logits `[B, C]`.
        target: class indices `[B]`.

    Returns:
        A 0-d tensor.
    """
    classes = student.shape[1]
    right = (teacher.argmax(dim=1) == target).to(student.dtype)
    wrong = 1 - right
    ce = F.cross_entropy(student, target, reduction='none')
    matched = (student - teacher).square().mean(dim=1)
    p = teacher.softmax(dim=1)
    b = eta / (p.amax(dim=1, keepdim=True) - p.gather(1, target.unsqueeze(1)) + 1)
    revised = b * p + (1 - b) * one_hot(teacher, target)
    revision = (student.softmax(dim=1) - revised).square().sum(dim=1) / classes
    of_right = (right * (ce + lambda1 * matched)).sum() / right.sum().clamp(min=1)
    return of_right + lambda2 * (wrong * revision).sum() / wrong.sum().clamp(min=1)


class LR(DistillLoss):
    """Module face of :func:`lr_loss`. It holds its own cross-entropy, so its task weight is 0.

    The means are over the samples of the batch that the teacher gets right, and wrong. They are those of each process's
    batch and of each accumulation step: neither several processes nor accumulation give exactly what one large batch
    gives.
    """

    needs_target = True

    def __init__(self, lambda1: float = 4.0, lambda2: float = 1.0, eta: float = 0.8) -> None:
        super().__init__()
        self.lambda1, self.lambda2 = check_weight('lambda1', lambda1), check_weight('lambda2', lambda2)
        self.eta = check_weight('eta', eta)

    def loss(self, student: Tensor, teacher: Tensor, target: Tensor) -> Tensor:
        return lr_loss(student, teacher, target, self.lambda1, self.lambda2, self.eta)
