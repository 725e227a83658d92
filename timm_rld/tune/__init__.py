"""Search of the settings of distillation for one pair and one dataset: candidates (what is tried), plan (budget and
time), search (the rungs and the final runs), report (tables and the sentence under them)."""

from .report import markdown
from .search import tune

__all__ = ['markdown', 'tune']
