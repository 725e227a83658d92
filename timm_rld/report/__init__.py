"""Pages that one can look at: a run's report, a comparison's, and what `timm-rld data` found.

page.py makes one HTML file of a template; figures.py has the numbers, plots.py draws them, images.py finds the
pictures, rules.py says what they mean; run/ has the blocks of a run's report; run_page.py and compare_page.py put a
report together, and write.py writes it.
"""

from .page import Cell, Picture, Table, render, thumbnail
from .write import write_report

__all__ = ['Cell', 'Picture', 'render', 'Table', 'thumbnail', 'write_report']
