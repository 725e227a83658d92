"""Labels from a table: a CSV or Parquet file with a row for each image."""

from __future__ import annotations

import csv
import functools
import io
import os
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..errors import UserError
from .folders import FileDataset, FileReader
from .names import find_named, some
from .targets import UNLABELED

PATH_COLUMNS = (
    'path', 'file', 'filename', 'file_name', 'filepath', 'file_path', 'image', 'img', 'image_path', 'img_path',
    'image_file', 'image_name', 'image_filename',
)  # fmt: skip
LABEL_COLUMNS = ('label', 'labels', 'class', 'class_name', 'class_id', 'target', 'targets', 'category', 'category_id')
SPLIT_COLUMN = 'split'
DELIMITERS = ',;\t|'
# a class index as text; 007 is a name, and so is 1e3
_INDEX = re.compile(r'-?(0|[1-9]\d*)(\.0*)?')
# what programs write where there is no number
_NO_NUMBER = ('nan', 'none', 'null', 'na', 'n/a', '<na>')


@dataclass(frozen=True, slots=True)
class Row:
    """A row of a table: the path as it is written, the label (None: empty), the split, and the line or row."""

    path: str
    label: str | None
    split: str | None
    line: int


@dataclass(frozen=True)
class Table:
    """A table of labels.

    Attributes:
        name: the file, as it was given.
        root: the folder that paths are relative to.
        rows: one an image.
        columns: the names of the columns of path and label.
        has_splits: whether there is a column `split`.
    """

    name: str
    root: str
    rows: tuple[Row, ...]
    columns: tuple[str, str]
    has_splits: bool

    def splits(self) -> list[str]:
        """Return the names in the column `split`, none where there is no such column."""
        return sorted({row.split for row in self.rows if row.split}) if self.has_splits else []


class ReaderTable(FileReader):
    """A split of a table of labels.

    Args:
        table: see :func:`read_table`.
        rows: of the split.
        labels: class of each row, -1 where it has none.
        class_to_idx: index by name of a class, empty where labels are class indices.
    """

    def __init__(self, table: Table, rows: Sequence[Row], labels: Sequence[int], class_to_idx: dict[str, int]) -> None:
        files = _find_files(table, rows)
        _check_twice(table, rows, files)
        first = {file: i for i, file in reversed([*enumerate(files)])}  # of a file that is there twice, the first row
        super().__init__(table.root, [(file, labels[i]) for i, file in enumerate(files) if first[file] == i])
        self.class_to_idx = class_to_idx
        self.repeated = len(files) - len(self.samples)


def open_table(table: Table, split: str, flag: str, class_names: Sequence[str] | None) -> tuple[FileDataset, int]:
    """Open one split of a table. All rows of the table, of whatever split, make the classes.

    Args:
        class_names: of a class map, by index; None: the labels, in natural order.

    Returns:
        The dataset, and the number of classes.

    Raises:
        UserError: for an unknown split, rows without a split, labels that the class map lacks, files that are not
            there, and files with two labels.
    """
    rows: Sequence[Row] = table.rows
    if table.has_splits:
        if missing := [row for row in rows if not row.split]:
            raise UserError(f'--labels {table.name}: {_count(missing, "row")} no {SPLIT_COLUMN}: {_lines(missing)}')
        found = find_named(table.splits(), split)
        rows = [row for row in rows if row.split == found]
        if not found:
            raise UserError(f'{flag} {split}: no such split in --labels {table.name} (there: {some(table.splits())})')
    elif split.lower() not in ('train', '.'):
        raise UserError(f'{flag} {split}: --labels {table.name} has no column {SPLIT_COLUMN!r}')
    indices, class_to_idx, num_classes = _indices(table, class_names)
    of_rows = [indices[row.label] for row in rows]
    return FileDataset(ReaderTable(table, rows, of_rows, class_to_idx)), num_classes


def _indices(table: Table, class_names: Sequence[str] | None) -> tuple[dict[str | None, int], dict[str, int], int]:
    """Return the class index by label (-1: none), the index by name of a class (empty: without names), and the number
    of classes."""
    from timm.utils import natural_key

    labels = {row.label for row in table.rows if row.label is not None}
    numbers = {x for x in labels if _INDEX.fullmatch(x)}
    found: dict[str | None, int] = {None: UNLABELED}
    if numbers and all(x in numbers or x.lower() in _NO_NUMBER for x in labels):
        found |= {x: UNLABELED for x in labels if x not in numbers or float(x) == UNLABELED}
        labels -= found.keys()
    named = {name: i for i, name in enumerate(class_names or ())}
    if labels and labels <= numbers and not labels <= named.keys():
        found |= {x: int(float(x)) for x in labels}
        lowest, highest = min(found.values()), max(found.values())
        if lowest < UNLABELED:
            raise UserError(
                f'--labels {table.name}: label {lowest} in column {table.columns[1]!r}; classes are counted from 0, '
                'and -1 is unlabelled'
            )
        if named and highest >= len(named):
            raise UserError(f'--class-map: {len(named)} lines, --labels {table.name} has label {highest}')
        return found, named, len(named) or highest + 1
    if class_names is None:
        named = {name: i for i, name in enumerate(sorted(labels, key=lambda x: (natural_key(x), x)))}
    if lost := sorted(labels - named.keys()):
        raise UserError(f'--class-map: no line for the label {", ".join(map(repr, lost[:5]))} of --labels {table.name}')
    found.update(named)
    return found, named, len(named)


def _find_files(table: Table, rows: Sequence[Row]) -> list[str]:
    """Return the file of each row, or raise UserError that counts and names those that are not there."""
    listing = functools.cache(_files_in)
    found, missing = [], []
    for row in rows:
        for written in dict.fromkeys((row.path, row.path.replace('\\', '/'))):
            path = os.path.normpath(os.path.join(table.root, written))
            if os.path.basename(path) in listing(os.path.dirname(path)):
                found.append(path)
                break
        else:
            missing.append(row)
    if missing:
        first = os.path.normpath(os.path.join(table.root, missing[0].path))
        stem = os.path.basename(first)
        other = next((x for x in sorted(listing(os.path.dirname(first))) if x.rpartition('.')[0] == stem), None)
        hint = f'; there is {other}: do the paths lack their ending?' if other else ''
        raise UserError(
            f'--labels {table.name}: {len(missing):,} of {len(rows):,} files are not in {table.root}: '
            f'{_lines(missing)}{hint}' + ('' if hint else '; --data-dir names the folder that paths are relative to')
        )
    return found


def _files_in(folder: str) -> frozenset[str]:
    try:
        with os.scandir(folder) as entries:
            return frozenset(entry.name for entry in entries if not entry.is_dir())
    except OSError:
        return frozenset()


def _check_twice(table: Table, rows: Sequence[Row], files: Sequence[str]) -> None:
    """Raise UserError for a file that has two labels."""
    labels: dict[str, Row] = {}
    odd = [(row, first) for row, file in zip(rows, files) if (first := labels.setdefault(file, row)).label != row.label]
    if odd:
        row, first = odd[0]
        raise UserError(
            f'--labels {table.name}: {_count(odd, "file")} two labels: {row.path} is {first.label!r} in line '
            f'{first.line} and {row.label!r} in line {row.line}'
        )


def _count(items: Sequence[Any], what: str) -> str:
    return f'{len(items):,} {what}{" has" if len(items) == 1 else "s have"}'


def _lines(rows: Sequence[Row]) -> str:
    return ', '.join(f'{row.path!r} (line {row.line})' for row in rows[:5]) + (', …' if len(rows) > 5 else '')


# ---- reading


def read_table(name: str, data_dir: str | None, input_key: str | None, target_key: str | None) -> Table:
    """Read a table of labels.

    Args:
        name: of a `.csv`, `.tsv` or `.parquet` file.
        data_dir: that paths are relative to; None for the folder of the file.
        input_key, target_key: columns of path and label; None: by the usual names for them.

    Raises:
        UserError: where it cannot be read as a table, or the columns are not known.
    """
    file = Path(os.path.expanduser(name))
    ending = file.suffix.lower()
    if ending not in ('.csv', '.tsv', '.parquet'):
        raise UserError(f'--labels {name}: expected a .csv, .tsv or .parquet file')
    if not file.is_file():
        raise UserError(f'--labels {name}: no such file')
    root = os.path.abspath(os.path.expanduser(data_dir) if data_dir is not None else file.parent)
    if not os.path.isdir(root):
        raise UserError(f'--data-dir {data_dir}: no such folder')
    header, records = (_read_parquet if ending == '.parquet' else _read_csv)(name, str(file))
    path_at = _column(name, header, input_key, '--input-key', PATH_COLUMNS, 'paths')
    label_at = _column(name, header, target_key, '--target-key', LABEL_COLUMNS, 'labels')
    split_at = next((i for i, column in enumerate(header) if column.lower() == SPLIT_COLUMN), None)
    rows = []
    for line, record in records:
        path, label = (_text(record[i], name, header[i], line) for i in (path_at, label_at))
        if not path:
            raise UserError(f'--labels {name}: line {line} has no path in column {header[path_at]!r}')
        split = None if split_at is None else _text(record[split_at], name, header[split_at], line)
        rows.append(Row(path, label, split, line))
    if not rows:
        raise UserError(f'--labels {name}: holds no rows')
    return Table(name, root, tuple(rows), (header[path_at], header[label_at]), split_at is not None)


def _text(value: Any, name: str, column: str, line: int) -> str | None:
    """A cell as text, None where it is empty."""
    if value is None or value != value:
        return None
    if isinstance(value, (str, int, float)):
        return str(value).strip() or None
    raise UserError(
        f'--labels {name}: column {column!r} holds {type(value).__name__}, not text or numbers (row {line}); '
        'a table that holds the images themselves is read with --dataset hfds/FOLDER'
    )


def _column(name: str, header: Sequence[str], key: str | None, flag: str, usual: Sequence[str], what: str) -> int:
    """Return the place of a column, or raise UserError that lists those there are."""
    listed = ', '.join(header)
    if key is not None:
        if key not in header:
            raise UserError(f'{flag} {key}: no such column in --labels {name} (columns: {listed})')
        return header.index(key)
    found = [i for i, column in enumerate(header) if re.sub(r'[\s-]+', '_', column.lower()) in usual]
    if len(found) == 1:
        return found[0]
    why = 'several columns may hold the' if found else 'which column holds the'
    raise UserError(f'--labels {name}: {why} {what}? Name one with {flag} (columns: {listed})')


def _read_parquet(name: str, file: str) -> tuple[list[str], Iterable[tuple[int, Sequence[Any]]]]:
    import pyarrow.parquet as pq

    try:
        table = pq.read_table(file)
    except Exception as e:
        raise UserError(f'--labels {name}: cannot be read as Parquet ({" ".join(str(e).split())})') from e
    return list(table.column_names), enumerate(zip(*(column.to_pylist() for column in table.columns)), 1)


def _read_csv(name: str, file: str) -> tuple[list[str], Iterable[tuple[int, Sequence[Any]]]]:
    data = Path(file).read_bytes()
    encoding = 'utf-16' if data[:2] in (b'\xff\xfe', b'\xfe\xff') else 'utf-8-sig'
    try:
        text = data.decode(encoding)
    except UnicodeDecodeError as e:
        line = data[: e.start].count(b'\n') + 1
        raise UserError(f'--labels {name}: line {line} is not UTF-8; save it as "CSV UTF-8"') from e
    if '\0' in text:
        raise UserError(f'--labels {name}: holds bytes that are not text; is it a CSV file?')
    first, skipped = text.partition('\n')[0].strip(), 0
    if declared := re.fullmatch(r'"?sep=(.)"?', first):  # as Excel writes it
        text, skipped = text.partition('\n')[2], 1
        first = text.partition('\n')[0].strip()
    if not first:
        raise UserError(f'--labels {name}: is empty, or its first line is')
    delimiter = declared[1] if declared else max(DELIMITERS, key=lambda d: len(next(csv.reader([first], delimiter=d))))
    reader = csv.reader(io.StringIO(text, newline=''), delimiter=delimiter, skipinitialspace=True, strict=True)
    records = []
    try:
        header = [column.strip() for column in next(reader)]
        for record in reader:
            if any(cell.strip() for cell in record):
                records.append((reader.line_num + skipped, record))
    except csv.Error as e:
        raise UserError(f'--labels {name}: line {reader.line_num + skipped}: {e}; is a quotation mark open?') from e
    _check_header(name, first, header)
    for line, record in records:
        if len(record) != len(header):
            raise UserError(
                f'--labels {name}: line {line} has {len(record)} fields, the header {len(header)} '
                f'(delimiter {delimiter!r}); put text that holds it between quotation marks'
            )
    return header, records


def _check_header(name: str, first: str, header: Sequence[str]) -> None:
    """Raise UserError where the first line is not a header, or columns cannot be told apart."""
    if any(re.search(r'\.(jpe?g|png|webp|bmp|tiff?|gif|avif)$', cell.lower()) for cell in header):
        raise UserError(f'--labels {name}: no header: the first line is {first!r}; put path,label before it')
    if len(header) < 2:
        raise UserError(
            f'--labels {name}: one column only, {first!r}; expected one with paths and one with labels, divided by '
            'comma, semicolon, tab or |'
        )
    if twice := [c for i, c in enumerate(header) if c in header[:i] and c]:
        raise UserError(f'--labels {name}: the column {twice[0]!r} is there twice')
