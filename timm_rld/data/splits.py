"""The training and the validation split of a dataset: which they are, and whether they fit each other."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from ..errors import UserError
from ..seeds import SHARE, derive_seed
from .holdout import stratified_holdout
from .names import TRAIN_NAMES, VALIDATION_NAMES, first_named, some
from .overlap import overlap
from .sources import SAMPLE_NOTE, Source, open_split
from .table import SPLIT_COLUMN, Table, read_table
from .tune_holdout import hold_out_to_tune

OFFER = 'or hold out a part of the training images: --val-fraction 0.1'


def open_splits(
    dataset: str | None,
    train_split: str | None = None,
    val_split: str | None = None,
    *,
    val_fraction: float | None = None,
    val_seed: int | None = None,
    seed: int = 42,
    labels: str | None = None,
    data_dir: str | None = None,
    train_num_samples: int | None = None,
    val_num_samples: int | None = None,
    batch_size: int = 1,
    validation_batch_size: int = 1,
    tune_holdout: float | None = None,
    train_on_holdout: bool = False,
    train_fraction: float | None = None,
    log: Callable[[str], object] = lambda _: None,
    **kwargs: Any,
) -> tuple[Source, Source]:
    """Open the training and the validation split of a dataset; other arguments as :func:`open_split`.

    Args:
        train_split, val_split: their names. Where they are not given: `train` or `training`; the first that there is of
            :data:`VALIDATION_NAMES`.
        val_fraction: hold out this part of the training split instead, the same of each class
            (:func:`stratified_holdout`), and open no other.
        val_seed: of the part that is held out; None for ``seed``.
        tune_holdout, train_on_holdout: in the place of the validation split, which is not opened, hold out a share of
            the training split, or of what ``val_fraction`` leaves of it (:func:`hold_out_to_tune`).
        train_fraction: of what is then left to train on, take this share alone (:func:`take_share`).
        log: prints a line: what was taken, and what is odd about it.

    Returns:
        The two splits.

    Raises:
        UserError: also where the two do not have the same classes, where a class of the validation split has no
            training image, and where there is nothing to validate on.
    """
    if dataset is None and data_dir is None and labels is None:
        log(SAMPLE_NOTE)
    _check_one_of(val_fraction, val_split)
    data_dir = None if data_dir is None else os.path.expanduser(data_dir)
    keys = (kwargs.get('input_key'), kwargs.get('target_key'))
    table = None if labels is None else read_table(labels, data_dir, *keys)
    common: dict[str, Any] = dict(kwargs, seed=seed, labels=table, data_dir=data_dir)
    known = _known(dataset, data_dir, table)
    train = _open_training(
        dataset, train_split, known, val_fraction is not None, flag='--train-split', is_training=True,
        num_samples=train_num_samples, batch_size=batch_size, **common,
    )  # fmt: skip
    if train_split is None and train.split not in TRAIN_NAMES[:1]:
        where = f'the classes right in {data_dir}' if train.split == '.' else train.split
        log(f'Training split: {where} (--train-split names another)')
    _log_left_out(train, log)
    if val_fraction is not None:
        train, val = hold_out(train, val_fraction, seed if val_seed is None else val_seed)
        log(
            f'--val-fraction {val_fraction:g}: {len(train):,} images to train on, {len(val):,} of the same split held '
            'out for validation'
        )
    if tune_holdout is not None:
        train, val = hold_out_to_tune(train, tune_holdout, seed, train_on_holdout)
    elif val_fraction is None:
        of_val = dict(num_samples=val_num_samples, batch_size=validation_batch_size, **common)
        val = _open_validation(dataset, val_split, known, train, log, **of_val)
        check_same_classes(train, val)
        if same := overlap(train, val):
            log(f'Warning: {same}')
        if note := classes_not_validated(train, val):
            log(note)
    if train_fraction is not None:
        train = take_share(train, train_fraction, seed)
        log(f'--train-fraction {train_fraction:g}: {_count(len(train), "image")} of {len(train.whole or ()):,}')
    if note := classes_without_images(train):
        log(note)
    return train, val


def _check_one_of(val_fraction: float | None, val_split: str | None) -> None:
    if val_fraction is not None and val_split is not None:
        raise UserError(
            f'--val-fraction {val_fraction:g} with --val-split {val_split}: the validation images are a part of the '
            'training split, or a split of their own; remove one of the two'
        )


def open_validation(
    dataset: str | None,
    val_split: str | None = None,
    *,
    labels: str | None = None,
    data_dir: str | None = None,
    val_num_samples: int | None = None,
    validation_batch_size: int = 1,
    log: Callable[[str], object] = lambda _: None,
    **kwargs: Any,
) -> Source:
    """Open the validation split of a dataset alone, which need not have another; arguments as :func:`open_splits`."""
    data_dir = None if data_dir is None else os.path.expanduser(data_dir)
    table = None
    if labels is not None:
        table = read_table(labels, data_dir, kwargs.get('input_key'), kwargs.get('target_key'))
    known = _known(dataset, data_dir, table)
    return _open_validation(
        dataset, val_split, known, None, log, labels=table, data_dir=data_dir, num_samples=val_num_samples,
        batch_size=validation_batch_size, **kwargs,
    )  # fmt: skip


def _open_validation(
    dataset: str | None,
    split: str | None,
    known: _Known,
    train: Source | None,
    log: Callable[[str], object],
    **kwargs: Any,
) -> Source:
    """Open the validation split, whether its name was given or not; ``train`` is the training split if it is open."""
    source = open_split(dataset, split or _validation_name(known, train, dataset), flag='--val-split', **kwargs)
    if split is None and known.kind != 'sample':
        log(f'Validation split: {source.split} (--val-split names another)')
    _log_left_out(source, log)
    return source


def hold_out(source: Source, fraction: float, seed: int) -> tuple[Source, Source]:
    """Return the part of a split to train on and the part to validate on, see :func:`stratified_holdout`.

    Raises:
        UserError: for a stream, where the classes are not known without reading images, and where a class has one
            image alone.
    """
    flag = f'--val-fraction {fraction:g}'
    if source.streamed:
        raise UserError(f'{flag}: a streamed dataset cannot be divided; name a validation split with --val-split')
    if (targets := source.targets) is None:
        raise UserError(
            f'{flag}: this dataset does not give its labels without reading the images; name a validation split with '
            '--val-split'
        )
    classes, counts = np.unique(targets, return_counts=True)
    if len(single := classes[counts == 1]):
        raise UserError(
            f'{flag}: {listed(source, single)} {"has" if len(single) == 1 else "have"} one image alone, which cannot '
            'be both trained on and held out; add images, or leave the class out'
        )
    kept, held = stratified_holdout(targets, source.keys(), fraction, seed)
    name = 'held-out part' if source.split == '.' else f'held-out part of {source.split}'
    return source.subset(kept), source.subset(held, split=name)


def take_share(source: Source, fraction: float, seed: int) -> Source:
    """Return a share of a split: the first floor(fraction · N + ½) images of a permutation that follows from the seed,
    in the order of the split. No label is read, and a smaller share is part of a larger one.

    Raises:
        UserError: for a stream, whose length is not known, and where no image would be left.
    """
    flag = f'--train-fraction {fraction:g}'
    if source.streamed:
        raise UserError(f'{flag}: a streamed dataset cannot be divided; use hfds/… or a folder')
    count = int(fraction * len(source) + 0.5)
    if not count:
        raise UserError(f'{flag}: no image of {_count(len(source), "image")} would be left; give a larger share')
    order = np.random.default_rng(derive_seed(SHARE, seed)).permutation(len(source))
    share = source.subset(np.sort(order[:count]))
    share.whole = source
    return share


def listed(source: Source, classes: Iterable[int], at_most: int = 5) -> str:
    """Return the names of some classes as a text: `class 'a', 'b', … (12 in all)`."""
    classes = [int(c) for c in classes]
    names = [repr(source.class_names[c]) if source.class_names else str(c) for c in classes[:at_most]]
    more = f', … ({len(classes):,} in all)' if len(classes) > at_most else ''
    return f'class{"" if len(classes) == 1 else "es"} {", ".join(names)}{more}'


def check_same_classes(train: Source, val: Source) -> None:
    """Raise UserError unless both splits have the same classes in the same order, naming the first differences."""
    a, b = train.class_names, val.class_names
    if a is not None and b is not None and a != b:
        if missing := [repr(x) for x in a if x not in b]:
            what = f'{", ".join(missing[:5])} only in {train.split!r}'
        elif missing := [repr(x) for x in b if x not in a]:
            what = f'{", ".join(missing[:5])} only in {val.split!r}'
        else:
            i = next(i for i, (x, y) in enumerate(zip(a, b)) if x != y)
            what = f'class {i} is {a[i]!r} in {train.split!r}, {b[i]!r} in {val.split!r}'
        raise UserError(
            f'--train-split {train.split} and --val-split {val.split} have different classes: {what}. '
            'A --class-map FILE (one name per line) gives both the same list.'
        )
    check_trained_classes(train, val)
    if val.num_classes > train.num_classes:
        raise UserError(
            f'--train-split {train.split} has {train.num_classes} classes, --val-split {val.split} {val.num_classes}'
        )


def check_trained_classes(train: Source, val: Source) -> None:
    """Raise UserError where a class of the validation split has no training image, as where an ordered dataset is cut
    in two (`train[:80%]`, `train[80%:]`)."""
    if train.targets is None or val.targets is None:
        return
    if len(missing := np.setdiff1d(val.targets, train.targets)):
        count = int(np.isin(val.targets, missing).sum())
        raise UserError(
            f'--val-split {val.split}: {listed(val, missing)} of it ({count:,} of {len(val):,} images) '
            f'{"has" if len(missing) == 1 else "have"} no image in --train-split {train.split}. '
            'Is the dataset ordered by class? --val-fraction 0.2 takes the same part of each class.'
        )


def classes_without_images(train: Source) -> str:
    """Return a line on the classes that have no training image, or an empty text."""
    if train.targets is None or not len(missing := np.setdiff1d(np.arange(train.num_classes), train.targets)):
        return ''
    counted = '' if train.class_names else '; labels are class indices, counted from 0'
    return (
        f'Note: {len(missing):,} of {train.num_classes:,} classes {"has" if len(missing) == 1 else "have"} no training '
        f'image: {listed(train, missing)}{counted}'
    )


def classes_not_validated(train: Source, val: Source) -> str:
    """Return a line on the classes with training images but no validation image, or an empty text."""
    if train.targets is None or val.targets is None or not len(missing := np.setdiff1d(train.targets, val.targets)):
        return ''
    return (
        f'Note: {len(missing):,} of {train.num_classes:,} classes {"has" if len(missing) == 1 else "have"} no image in '
        f'--val-split {val.split}, so that nothing measures them: {listed(train, missing)}. '
        '--val-fraction 0.2 takes the same part of each class'
    )


def _log_left_out(source: Source, log: Callable[[str], object]) -> None:
    """Print how many rows of a table are not images of their own, and how many images have no label."""
    if repeated := getattr(getattr(source.dataset, 'reader', None), 'repeated', 0):
        log(f'{source.split}: {_count(repeated, "row")} that repeat a file and its label are left out')
    if source.unlabeled:
        left_out = f'{_count(source.unlabeled, "image")} of {source.split} without a label left out'
        log(f'--drop-unlabeled: {left_out}, {len(source):,} are left')


def _count(n: int, what: str) -> str:
    return f'{n:,} {what}{"" if n == 1 else "s"}'


# ---- which splits there are


@dataclass(frozen=True)
class _Known:
    """What is known of the splits of a dataset before one is opened.

    Attributes:
        kind: `sample`, `table`, `folders`, or the prefix of the dataset's name.
        name: for messages, with its flag.
        there: the names of the splits; None where they are not known.
    """

    kind: str
    name: str
    there: list[str] | None
    root: str = ''


def _known(dataset: str | None, data_dir: str | None, table: Table | None) -> _Known:
    if table is not None:
        return _Known('table', f'--labels {table.name}', table.splits())
    if dataset is None and data_dir is None:
        return _Known('sample', 'the sample', ['train', 'test'])
    kind, _, rest = (dataset or '').partition('/')
    kind, name = kind.lower(), f'--dataset {dataset}' if dataset else f'--data-dir {data_dir}'
    if data_dir is not None and os.path.isdir(data_dir):  # else open_split() says what is wrong
        if not kind or (kind == 'torch' and rest.lower() in ('folder', 'image_folder')):
            return _Known('folders', f'--data-dir {data_dir}', split_folders(data_dir), data_dir)
        if kind == 'wds':
            return _Known(kind, name, _names_of_shards(data_dir))
    return _Known(kind, name, None)


def split_folders(root: str) -> list[str]:
    """Return the names of what may be a split in a folder: its folders, and its tars without their ending."""
    there = [p for p in Path(root).iterdir() if not p.name.startswith('.')]
    return sorted({p.name.removesuffix('.tar') for p in there if p.is_dir() or p.suffix == '.tar'})


def _names_of_shards(root: str) -> list[str] | None:
    """Return the names of the splits that an `_info.json` of `wds/` describes."""
    for file in ('_info.json', 'info.json'):
        try:
            return list(json.loads(Path(root, file).read_text(encoding='utf-8'))['splits'])
        except (OSError, ValueError, KeyError, TypeError):
            continue
    return None


def _names_on_hub(dataset: str | None, source: Source | None = None) -> list[str] | None:
    """Return the names of the splits of a dataset of `hfds/` or `hfids/`.

    Args:
        source: one of its splits, if there is one open.
    """
    kind, _, name = (dataset or '').partition('/')
    if kind.lower() not in ('hfds', 'hfids'):
        return None
    reader: Any = getattr(getattr(source, 'dataset', None), 'reader', None)
    made: Any = getattr(reader, 'dataset', None) or getattr(reader, 'builder', None)
    if made is not None and made.info.splits:
        return list(made.info.splits)
    import datasets

    try:
        return list(datasets.get_dataset_split_names(os.path.expanduser(name)))
    except Exception:  # open_split() says what is wrong
        return None


def _open_training(dataset: str | None, split: str | None, known: _Known, cut: bool, **kwargs: Any) -> Source:
    """Open the training split, whether its name was given or not.

    Args:
        cut: whether a part of it is to be held out.
    """
    if split is not None:
        return open_split(dataset, split, **kwargs)
    name = _training_folder(known, cut) if known.kind == 'folders' else first_named(known.there or (), TRAIN_NAMES)
    if name is None and known.kind == 'table' and known.there:
        raise UserError(f'{known.name}: no row of split train (there: {some(known.there)}); name one: --train-split')
    try:
        return open_split(dataset, name or TRAIN_NAMES[0], **kwargs)
    except UserError:
        found = None if name else first_named(_names_on_hub(dataset) or (), TRAIN_NAMES)
        if found in (None, TRAIN_NAMES[0]):
            raise
    return open_split(dataset, found, **kwargs)


def _training_folder(known: _Known, cut: bool) -> str | None:
    """Return the folder or tar of the training split; `.` where the classes lie right in the root and a part of each is
    to be held out."""
    there = known.there or []
    name = first_named(there, TRAIN_NAMES)
    if name is not None and (not cut or _holds_classes(known.root, name) or len(there) == 1):
        return name  # else a class of the name train
    others = [x for x in there if x.lower() in VALIDATION_NAMES and _holds_classes(known.root, x)]
    if cut and there and not others:
        return '.'
    if not there:
        return None  # open_split() says that there is no folder at all
    if others:
        fix = 'name the training split with --train-split'
    else:
        fix = 'if these are the classes, --val-fraction 0.1 holds a part of each out for validation'
    raise UserError(f'{known.name}: no folder train (there: {some(there)}); {fix}')


def _holds_classes(root: str, name: str) -> bool:
    """Whether what lies in a folder is a split and not a class: a tar, or a folder with folders in it."""
    path = Path(root, name)
    return not path.is_dir() or any(p.is_dir() and not p.name.startswith('.') for p in path.iterdir())


def _validation_name(known: _Known, train: Source | None, dataset: str | None) -> str:
    """Return the name of the validation split where none was given, or raise UserError that offers to cut one."""
    there = known.there if known.there is not None else _names_on_hub(dataset, train)
    if name := first_named(there or (), VALIDATION_NAMES):
        return name
    if known.kind == 'table' and not there:
        raise UserError(f'{known.name}: no column {SPLIT_COLUMN!r}, so no validation split; add one, {OFFER}')
    if there is None:
        return VALIDATION_NAMES[0]  # as of torch/; else open_split() says what is wrong
    raise UserError(f'{known.name}: no validation split (there: {some(there)}); name one with --val-split, {OFFER}')
