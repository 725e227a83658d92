"""Benchmarks for users: figures as ratios within one run, so that they mean something on another machine.

Each is a module with `add_arguments(parser)` and `run(args)`, which returns the text to print. Those for developers are
scripts in `benchmarks/`, of the same form.
"""

from __future__ import annotations

import importlib
from types import ModuleType

# name of the benchmark, which is that of its module → one line of help
BENCHMARKS = {
    'step': 'a training step and its parts, online and cached, beside what the two networks cost alone',
    'loss': 'time and memory of every criterion',
}


def benchmark(name: str) -> ModuleType:
    """Return the module of a benchmark."""
    return importlib.import_module(f'.{name}', __name__)
