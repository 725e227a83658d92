"""The classes of all images of a split, without reading an image."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..errors import UserError

UNLABELED = -1


def targets_of(dataset: Any) -> NDArray[np.int64] | None:
    """Return the class of each image of a dataset that timm made, :data:`UNLABELED` where it has none.

    Returns:
        `[n]`; None for a stream, and where the dataset does not say.

    Raises:
        UserError: for a column of `hfds/` that does not hold class indices.
    """
    reader: Any = getattr(dataset, 'reader', None)
    if reader is None:  # of torchvision
        found = getattr(dataset, 'targets', None)
        found = None if found is None else np.asarray(found)
        known = found is not None and found.ndim == 1 and found.dtype.kind in 'iu' and len(found) == len(dataset)
        return found.astype(np.int64) if found is not None and known else None
    if (found := getattr(reader, 'targets', None)) is not None:  # a tar
        return np.asarray(found, dtype=np.int64)
    if (samples := getattr(reader, 'samples', None)) is not None:
        return np.fromiter((target for _, target in samples), dtype=np.int64, count=len(samples))
    if hasattr(getattr(reader, 'dataset', None), 'unique'):
        return _of_column(reader)
    return None


def _of_column(reader: Any) -> NDArray[np.int64]:
    """The label column of `hfds/`, through the class map if there is one."""
    column = reader.dataset.data.column(reader.label_key)
    if not getattr(reader, 'remap_class', False):
        return class_indices(column, f'--target-key {reader.label_key}')
    mapping, names = reader.class_to_idx, reader._source_names
    encoded = column.combine_chunks().dictionary_encode()
    values = encoded.dictionary.to_pylist()
    unlabeled = [x == -1 and -1 not in mapping for x in values]
    found = [UNLABELED if u else mapping.get(x, mapping.get(names.get(x, x))) for x, u in zip(values, unlabeled)]
    if lost := [names.get(x, x) for x, index in zip(values, found) if index is None]:
        raise UserError(f'--class-map: no line for the label {", ".join(map(repr, lost[:5]))}')
    table = np.array([*found, UNLABELED], dtype=np.int64)
    return table[encoded.indices.fill_null(len(values)).to_numpy(zero_copy_only=False)]


def class_indices(column: Any, flag: str) -> NDArray[np.int64]:
    """Return a column of a table as class indices. Whole numbers may be floats; null, NaN and -1 are unlabelled.

    Args:
        column: a chunked array of pyarrow.
        flag: that named it, for messages.

    Returns:
        `[n]`, :data:`UNLABELED` where there is no label.

    Raises:
        UserError: for anything else.
    """
    import pyarrow as pa
    import pyarrow.compute as pc

    hint = 'give an integer column, or name the classes with --class-map FILE'
    if pa.types.is_boolean(column.type):
        column = column.cast(pa.int64())
    if not (pa.types.is_integer(column.type) or pa.types.is_floating(column.type) or pa.types.is_null(column.type)):
        first = pc.drop_null(column).slice(0, 1).to_pylist()
        raise UserError(f'{flag}: expected class indices, found {first[0] if first else None!r}; {hint}')
    if pa.types.is_null(column.type):
        return np.full(len(column), UNLABELED)
    if pa.types.is_integer(column.type):
        found = pc.fill_null(column.cast(pa.int64()), UNLABELED).to_numpy()
    else:
        values = pc.fill_null(column.cast(pa.float64()), float(UNLABELED)).to_numpy()
        values = np.where(np.isnan(values), UNLABELED, values)
        if len(odd := values[values != np.floor(values)]) or len(odd := values[np.isinf(values)]):
            raise UserError(f'{flag}: expected class indices, found {odd[0]}; {hint}')
        found = values.astype(np.int64)
    if len(found) and found.min() < UNLABELED:
        raise UserError(f'{flag}: label {found.min()} found; classes are counted from 0, and -1 is unlabelled')
    return np.asarray(found, dtype=np.int64)
