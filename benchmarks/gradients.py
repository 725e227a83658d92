"""How strongly a criterion pulls at the student's logits beside the cross-entropy, by the number of classes.

python benchmarks/gradients.py
"""

from __future__ import annotations

import argparse
import sys

import torch
import torch.nn.functional as F
from torch import Tensor

from timm_rld.bench.measure import markdown, run_script
from timm_rld.errors import UsageError
from timm_rld.loss import CRITERIA, choose_criterion

ROWS = 2048


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        '--criteria', nargs='+', default=['rld', 'dkd', 'kd'], metavar='NAME', help='default: rld dkd kd'
    )
    parser.add_argument(
        '--classes', nargs='+', type=int, default=[10, 20, 40, 100, 200, 1000], metavar='N',
        help='default: 10 20 40 100 200 1000',
    )  # fmt: skip
    parser.add_argument('--seed', type=int, default=0, metavar='N', help='of the logits (default: 0)')


def run(args: argparse.Namespace) -> str:
    """Return the table as Markdown: the norm of each criterion's gradient, at its published options and weights, over
    that of the cross-entropy at its own, as means over rows of logits."""
    for name in args.criteria:
        if name not in CRITERIA or not CRITERIA[name].plain:
            raise UsageError(f'--criteria {name}: no criterion with a gradient; known: {", ".join(CRITERIA)}')
    for classes in args.classes:
        if classes < 2:
            raise UsageError(f'--classes {classes}: must be at least 2')
    rows: list[dict[str, float | str]] = []
    for classes in args.classes:
        student, teacher, target = logits(classes, args.seed)
        cross_entropy = norm(F.cross_entropy(student, target), student)
        row: dict[str, float | str] = {'classes': str(classes)}
        for name in args.criteria:
            info, criterion = choose_criterion(name, False, {})
            assert criterion is not None
            distilled = info.distill_weight * norm(criterion(student, teacher, target), student)
            own = (info.task_weight or 1.0) * cross_entropy
            row[f'`{name}`'] = distilled / own
        rows.append(row)
    return markdown(rows)


def logits(classes: int, seed: int) -> tuple[Tensor, Tensor, Tensor]:
    """Return logits of a student in training and of a teacher, both normal, the teacher's twice as wide and surer of
    the true class, `[n, C]`, and classes `[n]`."""
    generator = torch.Generator().manual_seed(seed)
    target = torch.randint(0, classes, (ROWS,), generator=generator)
    true = F.one_hot(target, classes)
    teacher = 2 * torch.randn(ROWS, classes, generator=generator) + 4 * true
    student = torch.randn(ROWS, classes, generator=generator) + 2 * true
    return student.requires_grad_(), teacher, target


def norm(loss: Tensor, student: Tensor) -> float:
    """Return the mean over the rows of the norm of the gradient."""
    return float(torch.autograd.grad(loss, student)[0].norm(dim=1).mean())


def main(argv: list[str] | None = None) -> int:
    """Print the table. Returns the exit code."""
    return run_script(sys.modules[__name__], argv)


if __name__ == '__main__':
    sys.exit(main())
