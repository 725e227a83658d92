"""What the benchmarks share: interleaved timing, peak memory, idle time of the device, tables."""

from __future__ import annotations

import argparse
import math
import os
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

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


class Profiled:
    """A context whose work on a device is recorded by torch.profiler.

    Args:
        device: torch's name of it. On a CPU its work is the operators, so that the rest is Python's.

    Attributes:
        idle: after it, the share of the time from the first piece of work to the last in which none was done; NaN where
            there was none.
    """

    def __init__(self, device: str) -> None:
        self.on_gpu, self.idle = device.startswith('cuda'), math.nan
        os.environ.setdefault('KINETO_LOG_LEVEL', '99')  # else the profiler writes lines about itself
        activity = torch.profiler.ProfilerActivity.CUDA if self.on_gpu else torch.profiler.ProfilerActivity.CPU
        self.profile = torch.profiler.profile(activities=[activity])

    def __enter__(self) -> Profiled:
        if self.on_gpu:
            torch.cuda.synchronize()
        self.profile.__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        if self.on_gpu:
            torch.cuda.synchronize()
        self.profile.__exit__(*error)
        kind = torch.autograd.DeviceType.CUDA if self.on_gpu else torch.autograd.DeviceType.CPU
        profiler: Any = self.profile.profiler
        # annotations (as of an optimizer's step) span what is within them, and what is not
        events = [
            e for e in profiler.kineto_results.events()
            if e.device_type() == kind and not (hasattr(e, 'is_user_annotation') and e.is_user_annotation())
        ]  # fmt: skip
        self.idle = idle_share([(e.start_ns(), e.start_ns() + e.duration_ns()) for e in events])


def idle_share(intervals: Sequence[tuple[float, float]]) -> float:
    """Return the share of the time from the first start to the last end in which nothing ran; NaN without any.

    Args:
        intervals: start and end of each piece of work; they may overlap.
    """
    busy, reached, first = 0.0, -math.inf, math.nan
    for start, end in sorted(interval for interval in intervals if interval[1] > interval[0]):
        first = start if math.isnan(first) else first
        busy += max(0.0, end - max(start, reached))
        reached = max(reached, end)
    return 1 - busy / (reached - first) if busy else math.nan


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
