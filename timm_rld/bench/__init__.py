"""Benchmarks: figures as ratios within one run, so that they mean something on another machine.

Each is a module with `add_arguments(parser)` and `run(args)`, which gives the text to print.
"""

from __future__ import annotations

import importlib
from types import ModuleType

# name of the benchmark, which is that of its module → one line of help
BENCHMARKS = {
    'cache': 'filling a teacher cache and looking up in it, by the number of rows',
    'step': 'a training step and its parts, online and cached, beside what the two networks cost alone',
    'loss': 'time and memory of every criterion',
    'data': "images a second of the loader, beside timm's",
    'timm': "whole training beside timm's own script with --kd-model-name",
}


def benchmark(name: str) -> ModuleType:
    """The module of a benchmark."""
    return importlib.import_module(f'.{name}', __name__)
