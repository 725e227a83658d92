"""What the benchmarks share: interleaved timing, peak memory, tables."""

from __future__ import annotations

import argparse
import os
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from types import ModuleType

import torch

from ..config import Parser
from ..errors import run_main

Rows = Sequence[dict[str, float | str]]


def markdown(rows: Rows) -> str:
    """Rows as a Markdown table; numbers with three digits."""
    head = list(rows[0])
    lines = ['| ' + ' | '.join(head) + ' |', '|' + ' --- |' * len(head)]
    for row in rows:
        cells = (f'{v:.3g}' if isinstance(v, float) else str(v) for v in row.values())
        lines.append('| ' + ' | '.join(cells) + ' |')
    return '\n'.join(lines)


def interleaved(steps: dict[str, Callable[[], None]], repeats: int, device: str) -> dict[str, float]:
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


def peak_memory(step: Callable[[], None], device: str) -> int:
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


def run_script(module: ModuleType, argv: Sequence[str] | None = None) -> int:
    """Run a benchmark's module as a command and print its result.

    Args:
        module: with `add_arguments(parser)` and `run(args)`.
        argv: None for the command line's.

    Returns:
        The exit code.
    """
    argv = sys.argv[1:] if argv is None else list(argv)
    name = Path(module.__file__ or '').name
    parser = Parser(prog=name, description=module.__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    module.add_arguments(parser)
    parser.add_argument('--debug', action='store_true', help='show tracebacks')
    return run_main(lambda: print(module.run(parser.parse_args(argv))), name, '--debug' in argv)
