"""Log-space helpers that the criteria share. All take logits `[B, C]` in float32 or higher."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def standardize(logits: Tensor) -> Tensor:
    """Standardise each row: (z - mean) / (1e-7 + std), std unbiased.

    "Logit Standardization in Knowledge Distillation", Sun et al., CVPR 2024.

    Args:
        logits: `[B, C]`.

    Returns:
        `[B, C]`.
    """
    return (logits - logits.mean(dim=-1, keepdim=True)) / (1e-7 + logits.std(dim=-1, keepdim=True))


def kl_div(student_log_probs: Tensor, teacher_log_probs: Tensor) -> Tensor:
    """Batch mean of KL(teacher ‖ student) between rows of log-probabilities `[B, C]`, a 0-d tensor."""
    return F.kl_div(student_log_probs, teacher_log_probs, reduction='batchmean', log_target=True)


def kl_rows(student_log_probs: Tensor, teacher_log_probs: Tensor) -> Tensor:
    """KL(teacher ‖ student) of each row of log-probabilities `[B, C]`, `[B]`."""
    return F.kl_div(student_log_probs, teacher_log_probs, reduction='none', log_target=True).sum(dim=1)


def without_class(logits: Tensor, index: Tensor) -> Tensor:
    """Take one class of each row out of a softmax: its logit becomes the lowest finite number, and passes no gradient.

    Args:
        logits: `[B, C]`.
        index: int64 `[B]`.

    Returns:
        `[B, C]`.
    """
    return logits.scatter(1, index.unsqueeze(1), torch.finfo(logits.dtype).min)


def mask_of(logits: Tensor, index: Tensor) -> Tensor:
    """What takes k classes of each row out of a softmax when it is added to logits: the lowest finite number at
    ``index`` `[B, k]`, else 0, `[B, C]` like ``logits``. One mask serves both networks, and an addition costs less than
    a scatter, in the backward pass and compiled most of all."""
    return torch.zeros_like(logits).scatter_(1, index, torch.finfo(logits.dtype).min)


def one_hot(logits: Tensor, index: Tensor) -> Tensor:
    """bool `[B, C]` like ``logits``, True at ``index`` `[B]` of each row."""
    return torch.zeros_like(logits, dtype=torch.bool).scatter_(1, index.unsqueeze(1), True)


def binary_log_probs(logits: Tensor, index: Tensor) -> Tensor:
    """Log-probabilities of "class `index`" and "any other class" under softmax(logits).

    The second one is a log-sum-exp over the other classes, not log(1 - p), which loses every digit when p nears 1.

    Args:
        logits: `[B, C]`.
        index: int64 `[B]`.

    Returns:
        `[B, 2]`, each row sums to 1 after exp.
    """
    others = without_class(logits, index).logsumexp(dim=1, keepdim=True)
    return F.log_softmax(torch.cat([logits.gather(1, index.unsqueeze(1)), others], dim=1), dim=1)
