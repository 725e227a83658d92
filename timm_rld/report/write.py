"""`timm-rld report`: from a folder to files."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from pathlib import Path

import numpy as np

from ..errors import UserError, check_file, writing
from ..files import write_atomic
from ..run_folder import RunFiles, read_run
from . import plots
from .compare_page import baseline_of, compare_page, read_comparison
from .figures import Predictions, read_predictions
from .images import data_config, open_images
from .page import require
from .run import Report
from .run_page import run_page


def write_report(
    folder: str | Path,
    output: str | Path | None = None,
    *,
    baseline: str | Path | None = None,
    data_dir: str | None = None,
    log: Callable[[str], None] = print,
) -> list[Path]:
    """Write the report of a run, or of a comparison.

    Args:
        folder: of a finished run, or of `timm-rld compare`.
        output: the page; by default `report.html` in the folder. Its CSVs lie beside it.
        baseline: a run without distillation to compare with; by default that of the comparison that the run is part of.
        data_dir: where the data lie now, if they have been moved.
        log: prints a line.

    Returns:
        The files: the page first.

    Raises:
        UserError: where the folder is neither, a package is missing, or a file cannot be written.
    """
    require()
    plots.require()
    folder = Path(folder).expanduser()
    page = Path(output).expanduser() if output is not None else folder / 'report.html'
    if output is not None:
        check_file('--output', page)
    if (folder / 'tune.json').exists():
        raise UserError(
            f'{folder}: is a search, whose tables are in tune.md; name a run in it, e.g. '
            f'{folder / "final" / "none-seed0"}'
        )
    comparison = read_comparison(folder)
    if comparison is not None:
        for value, flag in ((baseline, '--baseline'), (data_dir, '--data-dir')):
            if value is not None:
                raise UserError(f'{flag} {value}: belongs to the report of a run; {folder} is a comparison')
        files = {page: compare_page(folder, comparison)}
    else:
        files = _run_files(folder, page, baseline, data_dir, log)
    with writing(f'--output {page}' if output is not None else page):
        for path, text in files.items():
            write_atomic(path, text)
    log(f'{page}: {page.stat().st_size / 1000:,.0f} kB, opens in any browser')
    return list(files)


def _read_baseline(run: RunFiles, folder: Path) -> tuple[RunFiles, Predictions | None]:
    """Return a run without distillation, and its predictions.

    Raises:
        UserError: where it is none, or was evaluated on other images than ``run``.
    """
    found, what = read_run(folder), f'--baseline {folder}'
    for name, flag in (('distill', '--distill'), ('feature_distill', '--feature-distill')):
        if (value := found.results.get(name, 'none')) != 'none':
            raise UserError(f'{what}: was trained with {flag} {value}; name a run with --distill none')
    classes, of_run = found.results['num_classes'], run.results['num_classes']
    if classes != of_run:
        raise UserError(f'{what}: has {classes} classes, {run.folder} has {of_run}; name a run on the same data')
    theirs, own = (read_predictions(r.folder / 'predictions.parquet') for r in (found, run))
    if theirs and own and not (np.array_equal(theirs.index, own.index) and np.array_equal(theirs.target, own.target)):
        raise UserError(f'{what}: was evaluated on other images than {run.folder}; name a run on the same data')
    return found, theirs


def _run_files(
    folder: Path, page: Path, baseline: str | Path | None, data_dir: str | None, log: Callable[[str], None]
) -> dict[Path, str]:
    run = read_run(folder)
    of_baseline = _read_baseline(run, Path(baseline).expanduser()) if baseline is not None else None
    if baseline is None and (other := baseline_of(folder.resolve())) is not None:
        with contextlib.suppress(UserError):  # nobody has named it
            of_baseline = _read_baseline(run, other)
    images = open_images(run, data_dir)
    if images.why:
        log(images.why)
    val_names = images.val.class_names if images.val is not None else None
    names = val_names or data_config(run).get('label_names') or []
    predictions = read_predictions(folder / 'predictions.parquet')
    report = Report(run, images, predictions, of_baseline, [str(name) for name in names], page)
    html = run_page(report)
    return {page: html, **{page.with_name(f'{page.stem}-{suffix}.csv'): text for suffix, text in report.files.items()}}
