"""A file of answers that a closed teacher has given elsewhere: one an image, whatever its augmentation."""

from __future__ import annotations

import csv
import os
import re
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ..data import Source
from ..data.replay import ReplayDataset
from ..data.table import LABEL_COLUMNS, PATH_COLUMNS, SPLIT_COLUMN
from ..errors import UserError
from ..pairing import QueryError, Teacher, check_answer, hard_rows, soft_rows

FLAG = '--teacher-answers'
_CLASS = (*LABEL_COLUMNS, 'class_1')  # as `timm-rld predict` writes it
_PROBABILITIES, _INDEX = 'probabilities', 'index'
_NUMBERED = ('', 'p', 'prob_')  # before a class's number, where each has a column
_SHOWN = 5  # images that a message names
Columns = dict[str, Any]
Place = tuple[int, int]  # 0: training split, 1: validation split; and the image's place in it


class AnswersFile:
    """The answers of a file, in the place of a teacher and of a cache of its logits.

    The file is Parquet or CSV, with a row for each image: its name (a column `file`, `path`, …) or its place in the
    training split (`index`), with a column `split` also that in the validation split; and a class (`class`, by name or
    number), or the probabilities: as a list in a column `probabilities`, beside which a class is not read, or a column
    for each class, under its name or number. It is held in memory, 4 bytes a probability.

    Args:
        path: of the file.
        train, val: the splits.
        answers: `soft` or `hard`; of probabilities, `hard` takes the highest.
        log: prints a line.

    Attributes:
        complete: True, as of a complete cache: there is no teacher to be asked.
        has_validation: whether there is an answer for each validation image.

    Raises:
        UserError: where it cannot be read, an answer is none, an image has two, or a training image has none.
    """

    complete, by_image = True, False

    def __init__(
        self, path: str, train: Source, val: Source, answers: str, log: Callable[[str], object] = print
    ) -> None:
        if train.streamed:
            raise UserError(f'{FLAG} {path}: the images of a stream have no name or place to find an answer by')
        self.answers, self.num_classes = answers, train.num_classes
        columns = read_columns(path)
        names, places = _find_images(columns, train, val, path)
        self.values = _read_answers(columns, train, answers, names, path)
        rows = [np.full(len(split), -1) for split in (train, val)]
        for row, place in enumerate(places):
            if place is not None:
                split, index = place
                if rows[split][index] >= 0:
                    raise UserError(f'{FLAG} {path}: has two answers for {names[row]}')
                rows[split][index] = row
        self.rows, self.val_rows = rows
        if lost := np.flatnonzero(self.rows < 0).tolist():
            raise UserError(
                f'{FLAG} {path}: lacks {len(lost):,} of {len(train):,} training images: {_some(map(train.key, lost))}'
            )
        kind = {'soft': 'probabilities', 'hard': 'classes'}[answers]
        log(f'{FLAG} {path}: {kind} of {len(train):,} training images, each used for every augmented version of it')
        if unknown := _not_in_the_dataset(names, places, train.whole, columns):
            log(f'note: {FLAG} {path}: {len(unknown):,} of its images are not in this dataset: {_some(unknown)}')
        without = int((self.val_rows < 0).sum())
        self.has_validation = not without
        if without:
            log(f'note: {without:,} of {len(val):,} validation images have no answer, so the teacher is not checked')

    def _answers(self, rows: NDArray[np.int64]) -> Tensor:
        values = torch.from_numpy(self.values[rows])
        return soft_rows(values) if self.answers == 'soft' else hard_rows(values, self.num_classes)

    def logits(
        self, epoch: int, indices: Tensor, target: Tensor, compute: Callable[..., Tensor] | None = None
    ) -> Tensor:
        """Return the answers for a batch, rows `[B, C]` as those of :class:`timm_rld.pairing.ClosedTeacher`."""
        return self._answers(self.rows[indices.numpy()]).to(target.device)

    def missing(self, epoch: int, indices: Tensor) -> int:
        return 0

    def flush(self) -> None: ...

    def end_epoch(
        self, epoch: int, left_out: Sequence[int], dataset: ReplayDataset, compute: Callable[[Tensor], Tensor] | None
    ) -> None: ...

    def open(self, weights: Path | None = None, teacher: Teacher | None = None) -> None: ...

    def validation_logits(self, indices: Sequence[int]) -> Tensor:
        """Return the answers for some validation images, rows `[n, C]`, on the CPU."""
        return self._answers(self.val_rows[np.asarray(indices, dtype=np.int64)])


def answers_kind(path: str, asked: str | None = None) -> str:
    """Return what a file of answers holds, `soft` or `hard`. A class beside columns of other names, which may be those
    of the classes, is what is asked for.

    Args:
        path: of the file.
        asked: `soft`, `hard`, or None for nothing.

    Raises:
        UserError: where it cannot be read.
    """
    columns = read_columns(path, names_alone=True)
    probabilities = _PROBABILITIES in columns or any(f'{prefix}0' in columns for prefix in _NUMBERED)
    others = set(columns) - {*PATH_COLUMNS, *_CLASS, _INDEX, SPLIT_COLUMN}
    perhaps = asked == 'soft' and len(others) > 1
    return 'hard' if _first(_CLASS, columns) and not probabilities and not perhaps else 'soft'


def read_columns(path: str, names_alone: bool = False) -> Columns:
    """Return a file's columns by name, each a list of texts (CSV) or of values (Parquet).

    Args:
        names_alone: the values are not needed.

    Raises:
        UserError: where it cannot be read.
    """
    file = Path(path).expanduser()
    try:
        if file.suffix.lower() == '.parquet':
            return _read_parquet(file, names_alone)
        if file.suffix.lower() != '.csv':
            raise ValueError('expected a .parquet or .csv file')
        with file.open(encoding='utf-8-sig', newline='') as f:
            names, *rows = [next(csv.reader(f), [])] if names_alone else [*csv.reader(f)] or [[]]
        rows = [row for row in rows if row]
        if odd := [row for row in rows if len(row) != len(names)]:
            raise ValueError(f'a line has {len(odd[0])} fields, the first one {len(names)}')
        return {name: [row[i] for row in rows] for i, name in enumerate(names)}
    except (OSError, ValueError, csv.Error) as e:
        raise UserError(f'{FLAG} {path}: cannot be read ({getattr(e, "strerror", None) or e})') from e


def _read_parquet(file: Path, names_alone: bool) -> Columns:
    import pyarrow as pa
    import pyarrow.parquet as pq

    with pq.ParquetFile(file) as parquet:
        if names_alone:
            return dict.fromkeys(parquet.schema_arrow.names)
        table = parquet.read()
    columns: Columns = {}
    for name in table.column_names:
        column = table.column(name).combine_chunks()
        if pa.types.is_list(column.type) or pa.types.is_fixed_size_list(column.type):
            values = column.flatten().to_numpy(zero_copy_only=False)
            if column.null_count or len(values) % max(len(column), 1) or len(set(column.value_lengths().tolist())) > 1:
                raise ValueError(f'the lists in its column {name!r} are not all of one length')
            columns[name] = values.reshape(len(column), -1)
        else:
            columns[name] = column.to_pylist()
    return columns


def _find_images(columns: Columns, train: Source, val: Source, path: str) -> tuple[list[str], list[Place | None]]:
    """Return for each row a name for messages, and its image; None: it is in neither split."""
    by_name = _first(PATH_COLUMNS, columns)
    key = by_name or (_INDEX if _INDEX in columns else None)
    if key is None:
        raise UserError(f'{FLAG} {path}: needs a column file (names of images) or index; it has {_some(columns)}')
    names = ['' if x is None else str(x) for x in columns[key]]
    names = [x.removeprefix('./') if by_name else x.removesuffix('.0') for x in names]
    splits = [str(x) for x in columns[SPLIT_COLUMN]] if SPLIT_COLUMN in columns else None
    known: list[dict[str, int]] = []
    for source in (train, val):
        known.append(_names(source) if by_name else _places(source))
        if splits is None and not by_name and val.dataset is not train.dataset:
            known.append({})  # numbers are those of the training split, of which a part may be held out
            break
    found: list[Place | None] = []
    for row, name in enumerate(names):
        there = [
            (i, known[i][name])
            for i, source in enumerate((train, val))
            if name in known[i] and (splits is None or splits[row] in (source.split, _split_of(source, train)))
        ]
        if len(there) > 1:
            raise UserError(
                f'{FLAG} {path}: {name} is a training and a validation image; a column split ({train.split}, '
                f'{val.split}) tells which'
            )
        found.append(there[0] if there else None)
    return [f'{_INDEX} {name}' if not by_name else name for name in names], found


def _split_of(source: Source, train: Source) -> str:
    """Return the name of the split that a source is a part of."""
    return train.split if source.dataset is train.dataset else source.split


def _places(source: Source) -> dict[str, int]:
    """Return the place of each image in a source by its place in the split, of which a source may be a part."""
    return {str(source.place(i)): i for i in range(len(source))}


def _not_in_the_dataset(
    names: list[str], places: Sequence[Place | None], whole: Source | None, columns: Columns
) -> list[str]:
    """Return the names of the images that are in neither split, nor in the one of which there is a share alone."""
    there: set[str] = set()
    if whole is not None:
        there = set(_names(whole)) if _first(PATH_COLUMNS, columns) else {f'{_INDEX} {i}' for i in _places(whole)}
    return [name for name, place in zip(names, places) if place is None and name not in there]


def _names(source: Source) -> dict[str, int]:
    """Return the place of each image by all names that it may have: its path below the root of the split, the same with
    the name of that folder, in full, and that of its file in predictions.parquet."""
    found: dict[str, int] = {}
    files, short = source.files(), source.file_names()
    if short is None:
        return found
    for i, name in enumerate(short):
        full = files[i] if files else ''
        root = full.removesuffix(source.key(i).replace('/', os.sep)).rstrip(os.sep)
        also = (f'{os.path.basename(root)}/{name}', full, os.path.abspath(full)) if root else ()
        found.update(dict.fromkeys((name, source.key(i), *also), i))
    return found


def _read_answers(columns: Columns, source: Source, answers: str, names: list[str], path: str) -> NDArray[Any]:
    """Return classes int64 `[N]` or probabilities float32 `[N, C]`, checked."""
    found: NDArray[Any]
    try:
        if _PROBABILITIES in columns:  # a class beside them may be the true one
            found = _lists(columns[_PROBABILITIES])
        elif each := _columns_of_classes(columns, source):
            found = np.array([columns[name] for name in each], dtype=np.float32).T
        elif answers == 'soft' and _first(_CLASS, columns):
            raise ValueError('holds classes and no probabilities; --black-box hard takes them')
        elif column := _first(_CLASS, columns):
            found = _classes(columns[column], source, column)
        else:
            raise ValueError(
                f'needs a column class, a column probabilities, or a column for each class; it has {_some(columns)}'
            )
    except ValueError as e:
        raise UserError(f'{FLAG} {path}: {e}') from e
    try:
        return check_answer(found, len(names), source.num_classes, answers)
    except QueryError as whole:
        for row, name in enumerate(names):  # which of them it is
            try:
                check_answer(found[row : row + 1], 1, source.num_classes, answers)
            except QueryError as e:
                raise UserError(f'{FLAG} {path}: {name}: {e}') from e
        raise UserError(f'{FLAG} {path}: {whole}') from whole


def _classes(values: Iterable[Any], source: Source, column: str) -> NDArray[np.int64]:
    names = {name: i for i, name in enumerate(source.class_names or ())}
    texts = [str(x) for x in values]
    if all(text in names for text in texts):
        return np.array([names[text] for text in texts], dtype=np.int64)
    for text in texts:
        if not re.fullmatch(r'-?\d+(\.0)?', text):
            raise ValueError(f'its column {column!r} holds {text!r}, neither a class of the dataset nor a number')
    return np.array([int(float(text)) for text in texts], dtype=np.int64)


def _lists(values: Any) -> NDArray[np.float32]:
    if isinstance(values, np.ndarray):
        return values.astype(np.float32)
    rows = [[float(x) for x in re.split(r'[\s,;]+', str(text).strip('[] '))] for text in values]
    if len({len(row) for row in rows}) > 1:
        raise ValueError(f'the lists in its column {_PROBABILITIES!r} are not all of one length')
    return np.array(rows, dtype=np.float32)


def _columns_of_classes(columns: Columns, source: Source) -> list[str]:
    """Return the columns of probabilities, one for each class: `cat`, `dog`; `0`, `1`; `p0`, `p1`; `prob_0`, `prob_1`.
    Empty where there are none."""
    numbered = ([f'{prefix}{i}' for i in range(source.num_classes)] for prefix in _NUMBERED)
    for names in (source.class_names or [], *numbered):
        if names and all(name in columns for name in names):
            return list(names)
    return []


def _first(names: Sequence[str], columns: Columns) -> str | None:
    return next((name for name in names if name in columns), None)


def _some(names: Iterable[str]) -> str:
    names = list(names)
    return ', '.join(names[:_SHOWN]) + (', …' if len(names) > _SHOWN else '')
