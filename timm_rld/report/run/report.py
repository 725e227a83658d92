"""What the blocks of the report of a run are made from."""

from __future__ import annotations

import math
import shlex
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ...run_folder import RunFiles
from ..figures import Predictions
from ..images import Images

ROWS = 100  # classes in a table


@dataclass
class Report:
    """A report in the making.

    Attributes:
        run: its files.
        images: its data.
        predictions: of the student and its teacher, or None.
        baseline: a run without distillation, and its predictions.
        names: of the classes.
        facts: what the rules see.
        files: CSVs to be written beside the page, by their suffix.
        page: the page's file, from which those files have their names.
    """

    run: RunFiles
    images: Images
    predictions: Predictions | None
    baseline: tuple[RunFiles, Predictions | None] | None
    names: list[str]
    page: Path
    facts: dict[str, Any] = field(default_factory=dict)
    files: dict[str, str] = field(default_factory=dict)

    @property
    def stem(self) -> str:
        """Name of the page without `.html`."""
        return self.page.stem

    @property
    def results(self) -> dict[str, Any]:
        """results.json of the run."""
        return self.run.results

    def name(self, index: int) -> str:
        """The name of a class."""
        return self.names[index] if index < len(self.names) else f'class {index}'

    def model(self, who: str) -> dict[str, Any]:
        """What results.json says of a network; of older runs little."""
        models = self.results.get('models')
        found = models.get(who) if isinstance(models, dict) else None
        return found if isinstance(found, dict) else {}


def method_of(results: dict[str, Any]) -> str:
    """What a run distilled by, as `--criteria` of a comparison takes it."""
    features = results.get('feature_distill', 'none')
    return results['distill'] if features == 'none' else f'{results["distill"]}+{features}'


def points(value: float | None) -> str:
    """Show a top-1 or share in percent; nothing where it is not known."""
    return '' if value is None or not math.isfinite(value) else f'{value:.2f} %'


def no_predictions(r: Report) -> dict[str, Any]:
    """Return a block that names the command by which the run gets its predictions."""
    teacher = r.run.settings.get('teacher')  # of a run that trained its teacher, this means the trained one
    words = ['timm-rld', 'evaluate', str(r.run.folder), *(['--teacher', teacher] if teacher else []),
             '--output', str(r.run.folder)]  # fmt: skip
    return {'missing': 'This run has no predictions.parquet, so that this block is empty. This makes it:',
            'missing_command': shlex.join(words)}  # fmt: skip
