"""α-β-divergence: "ABKD: Pursuing a Proper Allocation of the Probability Mass in Knowledge Distillation via
α-β-Divergence", Wang et al., ICML 2025."""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ._base import DistillLoss, check_temperature


def abkd_loss(
    student: Tensor, teacher: Tensor, alpha: float = 0.8, beta: float = 0.3, temperature: float = 4.0
) -> Tensor:
    """-Σ (q^α p^β - α/(α+β) q^(α+β) - β/(α+β) p^(α+β)) / (αβ), mean over the batch; no τ².

    p = softmax(s/τ), q = softmax(t/τ), the sum over classes. Where an exponent is 0 it is the limit of this formula:

        β = 0:      Σ (q^α log(q^α/p^α) - q^α + p^α) / α²           forward KL at α = 1
        α = 0:      Σ (p^β log(p^β/q^β) - p^β + q^β) / β²           reverse KL at β = 1
        α + β = 0:  Σ (log(p^α/q^α) + q^α/p^α - 1) / α²
        both 0:     ½ Σ (log p - log q)²

    The published program has α (for α = 0: β) times the first three, so that it jumps there: for its numbers multiply
    the distillation weight by α where β or α + β is 0, and by β where α is 0.

    It is computed as Σ (a - b)² · exp[(α+β)a, αa + βb, (α+β)b], a = log q, b = log p, with the second divided
    difference of exp: smooth in α and β, so limits need no case of their own. With negative exponents values grow as
    powers of 1/p; powers beyond the root of the dtype's largest number are cut off there, so that all stays finite.

    Args:
        student: logits `[B, C]`, float32 or higher.
        teacher: logits `[B, C]`.
        alpha, beta: any numbers.
        temperature: τ.

    Returns:
        A 0-d tensor. It has no second derivative.
    """
    log_p, log_q = F.log_softmax(student / temperature, dim=1), F.log_softmax(teacher / temperature, dim=1)
    loss: Tensor = _ABDivergence.apply(log_p, log_q, alpha, beta)
    return loss


def _exp_difference(x: Tensor, y: Tensor) -> Tensor:
    """exp[x, y] = (eˣ - eʸ) / (x - y), and eˣ where they are equal; precise however near they are."""
    gap = (x - y).abs()
    return torch.maximum(x, y).exp() * torch.where(gap > 0, -torch.expm1(-gap) / gap, 1)


def _second_exp_difference(x: Tensor, y: Tensor, z: Tensor) -> Tensor:
    """exp[x, y, z], the second divided difference of exp: ½ eˣ where all are equal; precise however near they are."""
    low, high = torch.minimum(torch.minimum(x, y), z), torch.maximum(torch.maximum(x, y), z)
    middle = torch.maximum(torch.minimum(x, y), torch.minimum(torch.maximum(x, y), z))
    a, b = middle - high, low - high  # exp[x, y, z] = e^high · exp[0, a, b]
    zero = torch.zeros_like(a)
    apart = (_exp_difference(zero, a) - _exp_difference(a, b)) / -b
    # less than 1 apart: Σ over n of h_n / (n + 2)!, h_n = Σ aⁱ bⁿ⁻ⁱ
    h = power = torch.ones_like(a)
    near, a, b = h / 2, a.clamp(min=-1), b.clamp(min=-1)
    for n in range(1, 18 if x.dtype == torch.float64 else 10):
        power = power * b
        h = h * a + power
        near = near + h / math.factorial(n + 2)
    return high.exp() * torch.where(b > -1, near, apart)


class _ABDivergence(torch.autograd.Function):
    """:func:`abkd_loss` of log-probabilities; its gradient in log p is (b - a) · exp[αa + βb, (α+β)b]."""

    @staticmethod
    def forward(ctx: Any, log_p: Tensor, log_q: Tensor, alpha: float, beta: float) -> Tensor:
        most = math.log(torch.finfo(log_p.dtype).max) / 2
        both = alpha + beta
        x, y, z = (
            power.clamp_(max=most) for power in (both * log_q, alpha * log_q + beta * log_p, both * log_p)
        )  # fmt: skip
        difference = log_p - log_q
        if min(abs(alpha), abs(beta), abs(both)) > 0.1:  # far from every limit: three exponentials will do
            loss = (alpha / both * x.exp() + beta / both * z.exp() - y.exp()).sum() / (alpha * beta)
        else:
            loss = (difference.square() * _second_exp_difference(x, y, z)).sum()
        ctx.save_for_backward(difference.mul_(_exp_difference(y, z)))
        return loss / log_p.shape[0]

    @staticmethod
    def backward(ctx: Any, grad_loss: Tensor) -> tuple[Tensor | None, ...]:
        (gradient,) = ctx.saved_tensors
        if torch.is_grad_enabled() and not torch.compiler.is_compiling():
            raise RuntimeError('ABKD has no second derivative (create_graph=True)')
        return gradient * (grad_loss / gradient.shape[0]), None, None, None


class ABKD(DistillLoss):
    """Module face of :func:`abkd_loss`."""

    def __init__(self, alpha: float = 0.8, beta: float = 0.3, temperature: float = 4.0) -> None:
        super().__init__()
        for name, value in (('alpha', alpha), ('beta', beta)):
            if isinstance(value, bool) or not isinstance(value, (int, float)) or not abs(value) <= 10:
                raise ValueError(f'{name} must be a number from -10 to 10, got {value!r}')
        self.alpha, self.beta = float(alpha), float(beta)
        self.temperature = check_temperature('temperature', temperature)

    def loss(self, student: Tensor, teacher: Tensor, target: Tensor | None) -> Tensor:
        return abkd_loss(student, teacher, self.alpha, self.beta, self.temperature)
