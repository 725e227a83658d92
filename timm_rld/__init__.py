"""Refined logit distillation for timm.

Importing this registers the CIFAR networks with timm (`cifar_…`), and costs little more than `import timm`: each public
name loads its module when first used. (The command line, `timm-rld`, registers them where a command needs them.)
"""

from __future__ import annotations

import importlib
import os
import sys
from typing import Any


def _is_command_line() -> bool:
    """Whether this process is `timm-rld VERB` or `python -m timm_rld VERB`, of which few need timm or torch."""
    program = sys.argv[0] if getattr(sys, 'argv', None) else ''
    if program == '-m':  # which it is while Python looks for a module to run, of whatever package
        return ('-m', __name__) in zip(sys.orig_argv, sys.orig_argv[1:])
    return os.path.basename(program).removesuffix('.exe') == 'timm-rld'


if not _is_command_line():
    from . import models as models

__version__ = '0.1.0'

_PUBLIC = {
    'create_distill_loss': 'loss',
    'create_feature_loss': 'loss',
    'describe_criteria': 'loss',
    'describe_methods': 'loss',
    'create_features': 'task',
    'create_pair': 'pairing',
    'create_student': 'pairing',
    'create_teacher': 'pairing',
    'Pair': 'pairing',
    'QueryTeacher': 'pairing',
    'TeacherQuery': 'pairing',
    'Teacher': 'pairing',
    'DistillationTask': 'task',
    'Generator': 'models',
    'mekd_loss': 'loss',
    'MixedTarget': 'data',
    'poison_logits': 'poison',
    'poisoned_indices': 'poison',
    'export_model': 'hub',
    'UserError': 'errors',
}

__all__ = [*_PUBLIC, '__version__']


def __getattr__(name: str) -> Any:
    if name not in _PUBLIC:
        raise AttributeError(f'module {__name__!r} has no attribute {name!r}')
    value = getattr(importlib.import_module(f'.{_PUBLIC[name]}', __name__), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *_PUBLIC})
