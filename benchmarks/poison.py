"""What a criterion should do under poisoned logits (the mean field of docs/poison.md), beside what a study measured.

timm-rld compare --poison fdla pcfdla zero --poison-fraction 0 0.3 1 ... --output out
python benchmarks/poison.py out --output docs/images/poison.png
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from timm_rld.bench.measure import run_script
from timm_rld.errors import UserError
from timm_rld.loss import CRITERIA, create_distill_loss
from timm_rld.poison import poison_logits
from timm_rld.poison_study import curve, names_of

STEPS = 400
COPIES = 10  # of a row, of which tenths are poisoned
COLOURS = {'rld': '#1f6fb4', 'kd': '#c8452d', 'dkd': '#d9912b', 'la': '#3b8f57', 'none': '#555555'}


def loss_of_rows(
    name: str, clean: Tensor, poisoned: Tensor, target: Tensor, fraction: float
) -> Callable[[Tensor], Tensor]:
    """Return a function of a student's logits `[N, C]`: the sum over rows of task_weight · CE + distill_weight ·
    criterion (published weights and options, ramp 1, no label smoothing), where a share of a row's copies is poisoned.

    Args:
        name: a criterion.
        clean, poisoned: logits of the teacher `[N, C]`.
        target: `[N]`.
        fraction: the share, in tenths.
    """
    info, criterion = CRITERIA[name], create_distill_loss(name)
    lies = (torch.arange(COPIES) < round(fraction * COPIES))[None, :, None]
    teacher = torch.where(lies, poisoned.double()[:, None], clean.double()[:, None]).flatten(0, 1)
    index = target.repeat_interleave(COPIES)

    def loss(student: Tensor) -> Tensor:
        copies = student.repeat_interleave(COPIES, dim=0)
        found = info.distill_weight * criterion(copies, teacher, index)
        if info.task_weight:
            found = found + info.task_weight * F.cross_entropy(copies, index)
        return found * len(student)

    return loss


def mean_field(name: str, clean: Tensor, poisoned: Tensor, target: Tensor, fraction: float) -> Tensor:
    """Return the logits of a student that fits each row on its own, `[N, C]` in float64: where :func:`loss_of_rows` is
    stationary, sought from zeros. (`rc` has no such point to be found by descent: its gradient is not that of its
    loss.)"""
    loss = loss_of_rows(name, clean, poisoned, target, fraction)
    student = torch.zeros_like(clean, dtype=torch.float64, requires_grad=True)
    optimizer = torch.optim.LBFGS([student], max_iter=STEPS, history_size=50, tolerance_grad=1e-8,
                                  tolerance_change=1e-13, line_search_fn='strong_wolfe')  # fmt: skip

    def closure() -> float:
        optimizer.zero_grad()
        found = loss(student)
        found.backward()
        return found.item()

    optimizer.step(closure)
    return student.detach()


def margin(logits: Tensor, target: Tensor) -> Tensor:
    """Return the logit of the true class minus the highest other, `[N]`."""
    index = target[:, None]
    return logits.gather(1, index)[:, 0] - logits.scatter(1, index, -torch.inf).amax(1)


def mean_field_margins(
    name: str, clean: Tensor, poisoned: Tensor, target: Tensor, fractions: Sequence[float], size: int = 1
) -> Tensor:
    """Return :func:`margin` of :func:`mean_field` at each fraction, `[N, fractions]`.

    Args:
        size: rows that are sought together; `lr`, whose means are over the rows on which the teacher is right, and
            wrong, takes one.
    """
    parts = [slice(i, i + size) for i in range(0, len(target), size)]
    found = []
    for fraction in fractions:
        rows = [mean_field(name, clean[p], poisoned[p], target[p], fraction) for p in parts]
        found.append(margin(torch.cat(rows), target))
    return torch.stack(found, dim=1)


def share_where_wrong_kd_wins(clean: Tensor, poisoned: Tensor, temperature: float = 4.0) -> Tensor:
    """Return from which poisoned share on KD without cross-entropy names the clean teacher's second class: (a - b) /
    ((a - b) + (c - d)), with a, b the clean softened probabilities of first and second, and c, d those of second and
    first after the attack, `[N]`."""
    top = clean.topk(2, dim=1).indices
    before, after = ((z / temperature).softmax(1).gather(1, top) for z in (clean, poisoned))
    gap, turned = before[:, 0] - before[:, 1], after[:, 1] - after[:, 0]
    return gap / (gap + turned)
