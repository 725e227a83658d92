"""`timm-rld report`: from a folder to files."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from ..errors import UserError, writing
from ..files import write_atomic
from ..run_folder import read_run
from . import plots
from .compare_page import baseline_of, compare_page, read_comparison
from .figures import read_predictions
from .images import data_config, open_images
from .page import require
from .run_page import Report, run_page


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
    if page.is_dir():
        raise UserError(f'--output {page}: is a folder; name a file in it, as {page / "report.html"}')
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
    log(f'{page}: {page.stat().st_size / 1e6:.1f} MB, opens in any browser')
    return list(files)


def _run_files(
    folder: Path, page: Path, baseline: str | Path | None, data_dir: str | None, log: Callable[[str], None]
) -> dict[Path, str]:
    run = read_run(folder)
    other = Path(baseline).expanduser() if baseline is not None else baseline_of(folder.resolve())
    of_baseline = None
    if other is not None:
        found = read_run(other)
        if found.results['num_classes'] != run.results['num_classes']:
            raise UserError(
                f'--baseline {other}: has {found.results["num_classes"]} classes, {folder} has '
                f'{run.results["num_classes"]}; name a run on the same data'
            )
        of_baseline = (found, read_predictions(other / 'predictions.parquet'))
    images = open_images(run, data_dir)
    if images.why:
        log(images.why)
    val_names = images.val.class_names if images.val is not None else None
    names = val_names or data_config(run).get('label_names') or []
    predictions = read_predictions(folder / 'predictions.parquet')
    report = Report(run, images, predictions, of_baseline, [str(name) for name in names], page.stem)
    html = run_page(report)
    return {page: html, **{page.with_name(f'{page.stem}-{suffix}.csv'): text for suffix, text in report.files.items()}}
