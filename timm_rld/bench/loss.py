"""Time and memory of the criteria."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from ..errors import UsageError, UserError
from ..loss import CRITERIA, create_distill_loss, get_criterion
from .measure import interleaved, markdown, peak_memory

MODES = ('eager', 'compiled')
LOSS_SHAPES = ((64, 100), (256, 1000), (64, 21841))


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the benchmark's flags."""
    parser.add_argument('--criteria', nargs='+', metavar='NAME', help='default: all')
    shapes = [f'{b}x{c}' for b, c in LOSS_SHAPES]
    parser.add_argument('--shapes', nargs='+', default=shapes, metavar='BxC', help=f'default: {" ".join(shapes)}')
    parser.add_argument('--no-compile', action='store_true', help='eager alone')
    parser.add_argument('--repeats', type=int, default=15)
    parser.add_argument('--device', default='cpu')


def run(args: argparse.Namespace) -> str:
    """Return the table as Markdown."""
    for name in args.criteria or ():
        row = get_criterion(name)
        if not row.plain:
            why = 'is measured with its networks: timm-rld bench step --distill mekd'
            raise UsageError(f'--criteria {name}: {why if row.generated else "distils nothing"}')
    if args.repeats < 1:
        raise UsageError(f'--repeats {args.repeats}: must be at least 1')
    shapes = [parse_shape(s) for s in args.shapes]
    return markdown(
        bench_loss(
            args.criteria,
            shapes,
            modes=MODES[:1] if args.no_compile else MODES,
            repeats=args.repeats,
            device=args.device,
        )
    )


def bench_loss(
    names: Sequence[str] | None = None,
    shapes: Sequence[tuple[int, int]] = LOSS_SHAPES,
    *,
    modes: Sequence[str] = MODES,
    repeats: int = 15,
    device: str = 'cpu',
) -> list[dict[str, float | str]]:
    """Time (forward and backward, median) and peak extra memory of every criterion, beside `kd` and cross-entropy.

    The runs of all criteria at a shape are interleaved, so that variation in machine speed affects all alike.

    Args:
        names: of criteria; None for all.
        shapes: of the logits, [B, C].
        modes: of `eager` and `compiled`.
        repeats: rounds.
        device: torch's name of it.

    Returns:
        A row for each shape, mode and criterion: `shape`, `mode`, `name`, `ms`, `of_kd`, `of_ce`, `mib` (peak memory
        beyond the logits), `mib_of_kd`.
    """
    names = [n for n, row in CRITERIA.items() if row.plain] if names is None else list(names)
    names = ['kd', *(n for n in names if n != 'kd')]
    # every criterion is another specialisation of one forward(): past the limit dynamo would go back to eager unasked
    torch._dynamo.config.recompile_limit = max(torch._dynamo.config.recompile_limit, 8 * len(names))
    rows: list[dict[str, float | str]] = []
    for batch, classes in shapes:
        generator = torch.Generator().manual_seed(0)
        student, teacher = (4 * torch.randn(batch, classes, generator=generator).to(device) for _ in range(2))
        target = torch.randint(classes, (batch,), generator=generator).to(device)
        student.requires_grad_()
        for mode in modes:
            steps: dict[str, Callable[[], None]] = {'cross-entropy': _step(F.cross_entropy, student, target, mode=mode)}
            for name in names:
                criterion = create_distill_loss(name).to(device)
                steps[name] = _step(criterion, student, teacher, target, mode=mode)
            times = interleaved(steps, repeats, device)
            memory = {name: peak_memory(step, device) for name, step in steps.items()}
            for name, seconds in times.items():
                rows.append(
                    dict(
                        shape=f'[{batch}, {classes}]',
                        mode=mode,
                        name=name,
                        ms=1000 * seconds,
                        of_kd=seconds / times['kd'],
                        of_ce=seconds / times['cross-entropy'],
                        mib=memory[name] / 2**20,
                        mib_of_kd=memory[name] / max(memory['kd'], 1),
                    )
                )
    return rows


def parse_shape(text: str) -> tuple[int, int]:
    """`256x1000` → (256, 1000)."""
    batch, _, classes = text.partition('x')
    if not (batch.isdigit() and classes.isdigit() and int(batch) > 0 and int(classes) > 1):
        raise UserError(f'--shapes {text}: expected BATCHxCLASSES, e.g. 256x1000')
    return int(batch), int(classes)


def _step(criterion: Callable[..., Tensor], student: Tensor, *rest: Tensor, mode: str) -> Callable[[], None]:
    function = torch.compile(criterion) if mode == 'compiled' else criterion

    def step() -> None:
        student.grad = None
        function(student, *rest).backward()

    for _ in range(3):
        step()
    return step
