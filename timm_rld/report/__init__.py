"""Pages that one can look at: a run's report, a comparison's, and what `timm-rld data` found."""

from .page import Cell, Picture, Table, render, thumbnail

__all__ = ['Cell', 'Picture', 'Table', 'render', 'thumbnail']
