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
    """
    return (logits - logits.mean(dim=-1, keepdim=True)) / (1e-7 + logits.std(dim=-1, keepdim=True))


def kl_div(student_log_probs: Tensor, teacher_log_probs: Tensor) -> Tensor:
    """Batch mean of KL(teacher ‖ student) between rows of log-probabilities `[B, C]`, a 0-d tensor."""
    return F.kl_div(student_log_probs, teacher_log_probs, reduction='batchmean', log_target=True)


def mask_classes(logits: Tensor, masked: Tensor) -> Tensor:
    """Take classes out of a softmax: their logits become the lowest finite number, and pass no gradient.

    A row of which every class is masked becomes constant, so that a KL divergence between two such rows is 0
    (minus infinity would give NaN there).

    Args:
        logits: `[B, C]`.
        masked: bool `[B, C]`, True where the class is taken out.
    """
    return logits.masked_fill(masked, torch.finfo(logits.dtype).min)


def binary_log_probs(logits: Tensor, index: Tensor) -> Tensor:
    """Log-probabilities of "class `index`" and "any other class" under softmax(logits).

    The second one is a log-sum-exp over the other classes, not log(1 - p), which loses every digit when p nears 1.

    Args:
        logits: `[B, C]`.
        index: int64 `[B]`.

    Returns:
        `[B, 2]`, each row sums to 1 after exp.
    """
    index = index.unsqueeze(1)
    others = mask_classes(logits, torch.zeros_like(logits, dtype=torch.bool).scatter_(1, index, True))
    pair = torch.cat([logits.gather(1, index), others.logsumexp(dim=1, keepdim=True)], dim=1)
    return F.log_softmax(pair, dim=1)
