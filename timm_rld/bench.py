"""Benchmarks: figures as ratios within one run, so that they mean something on another machine."""

from __future__ import annotations

import os
import statistics
import time
from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from .errors import UserError
from .loss import CRITERIA, create_distill_loss

LOSS_SHAPES = ((64, 100), (256, 1000), (64, 21841))


def bench_loss(
    names: Sequence[str] | None = None,
    shapes: Sequence[tuple[int, int]] = LOSS_SHAPES,
    *,
    compiled: bool = True,
    repeats: int = 15,
    device: str = 'cpu',
) -> list[dict[str, float | str]]:
    """Time (forward and backward, median) and peak extra memory of every criterion, beside `kd` and cross-entropy.

    The runs of all criteria at a shape are interleaved, so that a change of the machine's pace hits all alike.

    Args:
        names: of criteria; None for all.
        shapes: of the logits, [B, C].
        compiled: measure under `torch.compile` too.
        repeats: rounds.
        device: torch's name of it.

    Returns:
        A row for each shape, mode and criterion: `shape`, `mode`, `name`, `ms`, `of_kd`, `of_ce`, `mib` (peak memory
        beyond the logits), `mib_of_kd`.
    """
    names = [n for n, row in CRITERIA.items() if row.cls] if names is None else list(names)
    names = ['kd', *(n for n in names if n != 'kd')]
    # every criterion is another specialisation of one forward(): past the limit dynamo would go back to eager unasked
    torch._dynamo.config.recompile_limit = max(torch._dynamo.config.recompile_limit, 8 * len(names))
    rows: list[dict[str, float | str]] = []
    for batch, classes in shapes:
        generator = torch.Generator().manual_seed(0)
        student, teacher = (4 * torch.randn(batch, classes, generator=generator).to(device) for _ in range(2))
        target = torch.randint(classes, (batch,), generator=generator).to(device)
        student.requires_grad_()
        for mode in ('eager', 'compiled') if compiled else ('eager',):
            steps: dict[str, Callable[[], None]] = {'cross-entropy': _step(F.cross_entropy, student, target, mode=mode)}
            for name in names:
                criterion = create_distill_loss(name).to(device)
                steps[name] = _step(criterion, student, teacher, target, mode=mode)
            times = _interleaved(steps, repeats, device)
            memory = {name: _peak_memory(step, device) for name, step in steps.items()}
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


def markdown(rows: Sequence[dict[str, float | str]]) -> str:
    """Rows as a Markdown table; numbers with three digits."""
    head = list(rows[0])
    lines = ['| ' + ' | '.join(head) + ' |', '|' + ' --- |' * len(head)]
    for row in rows:
        cells = (f'{v:.3g}' if isinstance(v, float) else str(v) for v in row.values())
        lines.append('| ' + ' | '.join(cells) + ' |')
    return '\n'.join(lines)


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


def _interleaved(steps: dict[str, Callable[[], None]], repeats: int, device: str) -> dict[str, float]:
    """Median seconds of each step, over rounds in which each runs long enough for the clock."""
    wait = torch.cuda.synchronize if device.startswith('cuda') else lambda: None
    inner = {}
    for name, step in steps.items():
        started = time.perf_counter()
        step()
        wait()
        inner[name] = max(1, round(0.005 / max(time.perf_counter() - started, 1e-6)))
    seconds: dict[str, list[float]] = {name: [] for name in steps}
    for _ in range(repeats):
        for name, step in steps.items():
            wait()
            started = time.perf_counter()
            for _ in range(inner[name]):
                step()
            wait()
            seconds[name].append((time.perf_counter() - started) / inner[name])
    return {name: statistics.median(values) for name, values in seconds.items()}


def _peak_memory(step: Callable[[], None], device: str) -> int:
    """Bytes that a step holds at its peak beyond what was there before it."""
    if device.startswith('cuda'):
        torch.cuda.synchronize()
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        step()
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() - before
    os.environ.setdefault('KINETO_LOG_LEVEL', '99')  # else the profiler writes lines about itself
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        step()
    events = [e for e in profile.profiler.kineto_results.events() if e.name() == '[memory]']
    held = peak = 0
    for event in sorted(events, key=lambda e: e.start_ns()):
        held += event.nbytes()
        peak = max(peak, held)
    return peak
