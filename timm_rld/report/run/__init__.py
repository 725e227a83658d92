"""The blocks of the report of a run, each from its files and predictions, with the facts that sentences need."""

from .commands import base_facts
from .generated import generated
from .predictions import answers, calibration, classes
from .report import Report, method_of
from .training import curves, seen, settings, time_spent
from .verdict import verdict

__all__ = [
    'answers', 'base_facts', 'calibration', 'classes', 'curves', 'generated', 'method_of', 'Report', 'seen', 'settings',
    'time_spent', 'verdict',
]  # fmt: skip
