"""What an evaluation leaves: files, and a summary for the terminal."""

from __future__ import annotations

import csv
import io
import json
import math
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from .. import metrics
from ..data import Source
from ..engine import parquet_of
from ..errors import UserError, writing
from ..files import write_atomic

LARGEST_MATRIX = 2000  # classes: beyond, the confusion matrix would be a file of tens of megabytes that nobody reads
Table = dict[str, NDArray[Any]]
Rows = list[dict[str, Any]]


def check_folder(folder: Path) -> None:
    """Make a folder to write into, before any work.

    Raises:
        UserError: where files cannot be written into it.
    """
    with writing(f'--output {folder}'):
        folder.mkdir(parents=True, exist_ok=True)
    if not os.access(folder, os.W_OK):
        raise UserError(f'--output {folder}: cannot be written (Permission denied); give another folder')


def write_all(folder: Path, files: dict[str, str | bytes]) -> None:
    """Write files, each whole or not at all."""
    with writing(f'--output {folder}'):
        for name, data in files.items():
            write_atomic(folder / name, data)


def files_of(table: Table, val: Source, found: dict[str, Any], names: Sequence[str]) -> dict[str, str | bytes]:
    """Return the files of an evaluation, by name.

    Args:
        table: of :func:`timm_rld.engine.gather`.
        val: the split.
        found: for evaluation.json.
        names: of the classes.
    """
    files: dict[str, str | bytes] = {
        'predictions.parquet': parquet_of(table, val.file_names()),
        'evaluation.json': json.dumps(found, indent=2, ensure_ascii=False),
    }
    files |= in_each_format('per_class', per_class_rows(table, names))
    if len(names) <= LARGEST_MATRIX:
        matrix = metrics.confusion(table['target'], table['student_top1'], len(names))
        rows = [{'class': name, **dict(zip(_distinct(names), row))} for name, row in zip(names, matrix.tolist())]
        files |= in_each_format('confusion', rows, {'classes': list(names), 'matrix': matrix.tolist()})
    return files


def _distinct(names: Sequence[str]) -> list[str]:
    """Column names: those of the classes, with their number where one comes twice or is that of the first column."""
    seen = [*names, 'class']
    return [name if seen.count(name) == 1 else f'{name} ({i})' for i, name in enumerate(names)]


def per_class_rows(table: Table, names: Sequence[str]) -> Rows:
    """Return a row for each class: `index`, `class`, `images`, how many were `predicted` to be of it, `correct`,
    `accuracy` in percent (None without images); of a teacher also `teacher_predicted` and so on."""
    columns: dict[str, Sequence[Any]] = {'index': range(len(names)), 'class': names}
    for who, prefix in (('student', ''), ('teacher', 'teacher_')):
        if f'{who}_top1' not in table:
            continue
        found = metrics.per_class(table['target'], table[f'{who}_top1'], len(names))
        columns['images'] = found.pop('images').tolist()
        percent = [None if math.isnan(x) else 100 * x for x in found.pop('accuracy').tolist()]
        columns |= {f'{prefix}{k}': v.tolist() for k, v in found.items()} | {f'{prefix}accuracy': percent}
    return [dict(zip(columns, row)) for row in zip(*columns.values())]


def in_each_format(name: str, rows: Rows, as_json: Any = None) -> dict[str, str | bytes]:
    """Return rows as NAME.csv, NAME.parquet and NAME.json (there ``as_json``, if it is given)."""
    text = json.dumps(rows if as_json is None else as_json, indent=None if as_json else 1, ensure_ascii=False)
    return {f'{name}.csv': csv_of(rows), f'{name}.parquet': parquet_rows(rows), f'{name}.json': text}


def csv_of(rows: Rows) -> str:
    """Return rows as CSV, with a line of names; None is left empty."""
    text = io.StringIO()
    writer = csv.DictWriter(text, list(rows[0]) if rows else [], lineterminator='\n')
    writer.writeheader()
    writer.writerows({k: f'{v:.6g}' if isinstance(v, float) else v for k, v in row.items()} for row in rows)
    return text.getvalue()


def parquet_rows(rows: Rows, columns: Sequence[str] = ()) -> bytes:
    """Return rows as Parquet.

    Args:
        columns: their names, for a file that has them without a row too.
    """
    import pyarrow as pa
    import pyarrow.parquet as pq

    data = io.BytesIO()
    table = pa.Table.from_pylist(rows) if rows else pa.table({name: pa.array([], pa.null()) for name in columns})
    pq.write_table(table, data, compression='zstd')
    return data.getvalue()


def summary(found: dict[str, Any], table: Table, names: Sequence[str], worst: int = 5) -> str:
    """Return what the terminal shows of an evaluation."""
    models = found['models']
    lines = [
        f'{found["images"]:,} images of {found["classes"]} classes (split {found["val_split"]} of '
        f'{found["dataset"] or "the sample"})'
    ]
    rows: dict[str, list[str]] = {'': [found['model'], *([found['teacher']] if 'teacher' in models else [])]}
    every = list(models.values())
    rows['top-1, %'] = [f'{m["top1"]:.2f} ({m["top1_interval"][0]:.2f} to {m["top1_interval"][1]:.2f})' for m in every]
    rows['macro top-1, %'] = [f'{m["macro_top1"]:.2f}' for m in every]
    rows['loss'] = [f'{m["loss"]:.4f}' for m in every]
    rows['calibration error (15 bins)'] = [f'{m["ece"]:.4f}' for m in every]
    rows['best temperature'] = [f'{m["best_temperature"]:.3g}' for m in every]
    if all('parameters' in m for m in every):
        rows['parameters'] = [f'{m["parameters"]:,}' for m in every]
        rows['multiply-adds'] = [f'{m["multiply_adds"]:,}' if m['multiply_adds'] else 'unknown' for m in every]
        rows['weights, MB'] = [f'{m["weights_mb"]:.1f}' for m in every]
    for size in next((m['latency_ms'] for m in every if 'latency_ms' in m), {}):
        rows[f'a batch of {size}, ms'] = [f'{m["latency_ms"][size]:.4g}' if 'latency_ms' in m else '' for m in every]
    widths = [max(map(len, column)) for column in zip(*([k, *cells] for k, cells in rows.items()))]
    for key, cells in rows.items():
        lines.append('  '.join(cell.ljust(width) for cell, width in zip([key, *cells], widths)).rstrip())
    if 'difference' in found:
        low, high = found['difference_interval']
        lines.append(f'the first minus the second: {found["difference"]:+.2f} ({low:+.2f} to {high:+.2f}, paired)')
    accuracy = [row for row in per_class_rows(table, names) if row['images']]
    accuracy.sort(key=lambda row: row['accuracy'])
    shown = (f'{row["class"]} {row["accuracy"]:.1f} ({row["images"]:,} images)' for row in accuracy[:worst])
    lines.append(f'lowest classes, %: {", ".join(shown)}')
    wrong = table['target'] != table['student_top1']
    pairs, counts = np.unique(
        np.stack([table['target'][wrong], table['student_top1'][wrong]], axis=1), axis=0, return_counts=True
    )
    order = np.argsort(-counts, kind='stable')[:worst]
    taken = (f'{names[pairs[i][0]]} for {names[pairs[i][1]]} ({counts[i]:,})' for i in order)
    if len(order):
        lines.append(f'most often taken: {", ".join(taken)}')
    return '\n'.join(lines)
