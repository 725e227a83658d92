"""From a dataset's name to its images: whatever timm's `create_dataset` reads, with errors that say what to do."""

from __future__ import annotations

import dataclasses
import hashlib
import os
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image, UnidentifiedImageError

from ..errors import SampleError, UserError
from ..offline import hub_in_reach
from .folders import IMAGE_TYPES, FolderReader, TarReader
from .images import decode as decode_image
from .images import reason
from .names import VALIDATION_NAMES, find_named, printable
from .skip_list import leave_out
from .table import Table, open_table, read_table
from .targets import UNLABELED, targets_of

SAMPLE_DIR = Path(__file__).parent / 'sample'
SAMPLE_NOTE = (
    'No --dataset or --data-dir: using the sample that ships with timm_rld '
    '(UCI handwritten digits: 1,797 images, 10 classes, CC BY 4.0).'
)
MOST_CLASSES = 10_000_000  # more are identifiers, not class indices
STREAMED = ('hfids', 'wds', 'tfds')


@dataclass
class Source:
    """One split of a dataset.

    Attributes:
        dataset: as timm made it, without a transform. Indexable, or iterable where ``streamed``.
        split: its name.
        num_classes: how many there are.
        class_names: by index, or None where the dataset does not name them.
        streamed: whether it can only be read in order.
        image_mode: PIL mode that images are converted to.
        shards: of `wds/`, files that its readers share out, none of which is read by two.
        exif: whether images are turned upright by their EXIF orientation.
        left_out: files of class folders or a tar that are no images of the split: path below its root, reason.
        unlisted: lines of the `--skip-list` that name no image of the split.
        part: where the split is a part of the dataset, the places in the dataset of its images; else None.
        unlabeled: images without a label, which were left out.
        whole: the split of which this is a share (:func:`timm_rld.data.splits.take_share`); None where it is none.
    """

    dataset: Any
    split: str
    num_classes: int
    class_names: list[str] | None
    streamed: bool
    image_mode: str
    shards: int | None = None
    exif: bool = True
    left_out: list[tuple[str, str]] = field(default_factory=list)
    unlisted: frozenset[str] = frozenset()
    part: NDArray[np.int64] | None = field(default=None, compare=False)
    unlabeled: int = 0
    whole: Source | None = field(default=None, compare=False, repr=False)

    def __len__(self) -> int:
        """Images of the split; of a streamed one, those that one process reads."""
        return len(self.dataset) if self.part is None else len(self.part)

    def subset(self, indices: Sequence[int] | NDArray[np.int64], split: str | None = None) -> Source:
        """Return a part of this split, with the same classes: the images at some indices, in that order.

        Args:
            split: its name; None for that of the whole.
        """
        assert not self.streamed
        part = np.asarray(indices, dtype=np.int64)
        part = part if self.part is None else self.part[part]
        return dataclasses.replace(self, part=part, split=split or self.split)

    def place(self, index: int) -> int:
        """Return where in the dataset an image of the split lies."""
        return int(index) if self.part is None else int(self.part[index])

    @cached_property
    def targets(self) -> NDArray[np.int64] | None:
        """Class of each image, known without reading one (-1: unlabelled); None for a stream, and where the dataset
        does not say."""
        found = None if self.streamed else targets_of(self.dataset)
        return found if found is None or self.part is None else found[self.part]

    @property
    def _samples(self) -> Any:
        """What a reader of folders or of a tar has of each image, path and class; None of another dataset."""
        reader = getattr(self.dataset, 'reader', None)
        return getattr(self.dataset if reader is None else reader, 'samples', None)

    @property
    def _root(self) -> str:
        return str(getattr(getattr(self.dataset, 'reader', self.dataset), 'root', ''))

    def files(self) -> list[str] | None:
        """Return the path of each image; None where the dataset does not consist of files."""
        samples = self._samples
        if samples is None or not len(samples) or not isinstance(samples[0][0], str) or os.path.isfile(self._root):
            return None
        return [path for path, _ in samples] if self.part is None else [samples[i][0] for i in self.part.tolist()]

    def path(self, index: int) -> Path | None:
        """Return the file of an image; None where it has none of its own."""
        place, samples = self.place(index), self._samples
        if samples is not None and isinstance(samples[place][0], str) and not os.path.isfile(self._root):
            return Path(samples[place][0])
        reader: Any = getattr(self.dataset, 'reader', None)
        columns: Any = getattr(reader, 'dataset', None)
        if hasattr(columns, 'unique'):
            row = columns[place][reader.image_key]
            return Path(row['path']) if row and row['path'] and not row['bytes'] else None
        return None

    def key(self, index: int) -> str:
        """Return what stands for an image, whatever others there are: its path below the root of the split, with
        slashes, or, where it has none, its place in the dataset."""
        place, samples = self.place(index), self._samples
        if samples is None:
            return str(place)
        name = samples[place][0]
        if not isinstance(name, str):  # of a tar: the member, and the tars that it lies in
            return '/'.join(str(getattr(part, 'path', part)) for part in (*samples[place][:0:-1], name) if part)
        return name.removeprefix(os.path.join(self._root, '')).replace(os.sep, '/')

    def keys(self) -> list[str]:
        """Return :meth:`key` of each image."""
        return [self.key(i) for i in range(len(self))]

    @property
    def images(self) -> int:
        """Images of the split, those that a streamed one declares to hold."""
        return len(self) if self.declared is None else self.declared

    @property
    def declared(self) -> int | None:
        """Images that a streamed split declares to hold; None where they can be counted."""
        return self.dataset.reader.num_samples if self.streamed else None

    def digest(self) -> str:
        """A short digest of what the split holds, as far as it is known without reading images: file names and
        labels of folders, labels of Hub datasets, else only the length; and the class names."""
        digest = hashlib.sha256(repr((len(self), self.class_names)).encode())
        reader: Any = getattr(self.dataset, 'reader', None)
        samples = getattr(reader, 'samples', None)
        columns: Any = getattr(reader, 'dataset', None)
        if samples is not None and len(samples) and isinstance(samples[0][0], str):
            root = str(reader.root)
            for path, target in samples if self.part is None else (samples[i] for i in self.part.tolist()):
                digest.update(f'{path.removeprefix(root)}\0{target}\n'.encode('utf-8', 'surrogateescape'))
            return digest.hexdigest()[:12]
        if not self.streamed and hasattr(columns, 'unique') and reader.label_key in columns.column_names:
            digest.update(repr(list(columns[reader.label_key])).encode())
        if self.part is not None:
            digest.update(repr(self.part.tolist()).encode())
        return digest.hexdigest()[:12]

    def sample_digest(self, count: int = 32) -> str:
        """A short digest of some images, evenly spaced, as they lie in their files."""
        digest, reader = hashlib.sha256(), getattr(self.dataset, 'reader', None)
        for index in np.linspace(0, len(self) - 1, min(count, len(self))).astype(int).tolist():
            index = self.place(index)
            try:
                if reader is None:
                    image = self.dataset[index][0]
                    digest.update(repr(image.size).encode() + image.tobytes())
                else:
                    with reader[index][0] as file:
                        digest.update(file.read())
            except Exception:  # reported when the run reads it
                digest.update(b'?')
        return digest.hexdigest()[:12]

    def file_names(self) -> list[str] | None:
        """Return the name of each image's file: :meth:`key`, or of a table the path in it ('' for one without); None
        where no image has one, or they are read as a stream."""
        if self.streamed:
            return None
        reader: Any = getattr(self.dataset, 'reader', None)
        samples = getattr(self.dataset if reader is None else reader, 'samples', None)
        if samples is not None and len(samples):
            return [_readable(self.key(i)) for i in range(len(self))]
        table = getattr(reader, 'dataset', None)
        if not hasattr(table, 'unique') or getattr(table, '_indices', None) is not None:
            return None
        paths = [path or '' for path in _paths(reader)]
        names = [os.path.basename(path) if os.path.isabs(path) else path for path in paths]
        return [_readable(names[self.place(i)]) for i in range(len(self))]

    def read(self, index: int, decode: Callable[[Image.Image], Image.Image] | None = None) -> tuple[Image.Image, int]:
        """Decode one image. timm's own `__getitem__` would put the next image in the place of a broken one.

        Args:
            decode: what to make of the image while its file is open; by default it is decoded into ``image_mode``,
                upright where ``exif`` says so.

        Returns:
            The image, or what ``decode`` made of it, and its class.

        Raises:
            SampleError: where it cannot be read, naming the file or index.
        """
        index = self.place(index)
        reader: Any = getattr(self.dataset, 'reader', None)
        try:
            if reader is None:  # a torchvision dataset
                image, target = self.dataset[index]
                with image:
                    return self._decoded(image, decode), int(target)
            file, target = reader[index]
            with file, Image.open(file) as image:
                return self._decoded(image, decode), int(target)
        except Exception as e:
            try:
                name = reader.filename(index, absolute=True)
            except Exception:
                name = None
            where = f' ({printable(name)})' if name else ''
            raise SampleError(
                f'image {index}{where} of split {self.split!r} cannot be read: {printable(self.why(index, e))}'
            ) from e

    def null_images(self) -> set[int]:
        """Return the images of a table of `hfds/` that are null, without reading any."""
        reader: Any = getattr(self.dataset, 'reader', None)
        if self.streamed or not hasattr(getattr(reader, 'dataset', None), 'unique'):
            return set()
        null = ~np.asarray(_has_image(reader))
        return set(np.flatnonzero(null if self.part is None else null[self.part]).tolist())

    def why(self, place: int, error: Exception) -> str:
        """Return why the image at a place of the dataset cannot be read, in words."""
        reader: Any = getattr(self.dataset, 'reader', None)
        if hasattr(getattr(reader, 'dataset', None), 'unique') and not _has_image(reader)[place].as_py():
            return f'row {place} of the column {reader.image_key!r} is null'
        if isinstance(error, UnidentifiedImageError) and hasattr(reader, 'samples'):
            with reader[place][0] as file:
                if not file.read(1):
                    return 'an empty file'
        return reason(error)

    def _decoded(self, image: Any, decode: Callable[[Image.Image], Image.Image] | None) -> Image.Image:
        return decode(image) if decode else decode_image(image, self.image_mode, self.exif)


def open_split(
    dataset: str | None,
    split: str,
    *,
    flag: str,
    labels: str | Table | None = None,
    drop_unlabeled: bool = False,
    no_exif: bool = False,
    skip_list: str | None = None,
    **kwargs: Any,
) -> Source:
    """Open one split of a dataset or of a table of labels, checking all that can be checked before a run.

    Args:
        dataset, split, flag, **kwargs: see :func:`open_dataset`.
        labels: a table of paths and labels (:func:`read_table`), in place of a dataset.
        drop_unlabeled: leave out images without a label; else they are an error.
        no_exif: leave images as they are stored, whatever their EXIF orientation.
        skip_list: a file that names images to leave out, see :func:`leave_out`.

    Returns:
        The split.

    Raises:
        UserError: as :func:`open_dataset`; also for images without a label, and for a table that does not fit.
    """
    if labels is None:
        source = open_dataset(dataset, split, flag=flag, **kwargs)
    else:
        if dataset is not None:
            raise UserError(f'--labels with --dataset {dataset}: name one of the two')
        source = _open_labels(labels, split, flag=flag, **kwargs)
    source.exif = not no_exif
    source = leave_out(source, skip_list, kwargs.get('data_dir'))
    if drop_unlabeled and source.streamed:
        raise UserError(f'--drop-unlabeled: {dataset} is streamed, and its labels are not known before they are read')
    targets = source.targets
    if targets is None or not (without := int((targets == UNLABELED).sum())):
        return source
    if without == len(targets):
        raise UserError(f'{flag} {source.split}: no image has a label (all are None or -1); name another split')
    if not drop_unlabeled:
        raise UserError(
            f'{flag} {source.split}: {without:,} of {len(targets):,} images have no label (None or -1); '
            '--drop-unlabeled leaves them out'
        )
    source = source.subset(np.flatnonzero(targets != UNLABELED))
    source.unlabeled = without
    return source


def _open_labels(
    labels: str | Table,
    split: str,
    *,
    flag: str,
    data_dir: str | None = None,
    class_map: str | None = None,
    input_key: str | None = None,
    target_key: str | None = None,
    num_classes: int | None = None,
    in_chans: int = 3,
    **_: Any,  # of other datasets
) -> Source:
    """Open one split of a table of labels."""
    table = labels if isinstance(labels, Table) else read_table(labels, data_dir, input_key, target_key)
    names = None if class_map is None else _read_class_map(class_map, table.root)
    dataset, count = open_table(table, split, flag, names)
    class_names = list(dataset.reader.class_to_idx) or None
    source = Source(dataset, split, count, class_names, False, {1: 'L', 3: 'RGB'}[in_chans])
    _check_number(source, f'--labels {table.name}', num_classes)
    _check_split(source, f'--labels {table.name}', flag)
    return source


def open_dataset(
    dataset: str | None,
    split: str,
    *,
    flag: str,
    data_dir: str | None = None,
    is_training: bool = False,
    num_classes: int | None = None,
    class_map: str | None = None,
    input_key: str | None = None,
    target_key: str | None = None,
    num_samples: int | None = None,
    in_chans: int = 3,
    batch_size: int = 1,
    seed: int = 42,
    dataset_download: bool = False,
) -> Source:
    """Open one split of a dataset; images without a label are in it.

    Args:
        dataset: timm's dataset name (`hfds/…`, `hfids/…`, `wds/…`, `torch/…`); None for folders or tars in
            ``data_dir``, or the sample if that is None too.
        split: the split's name; `.` for ``data_dir`` itself, where the class folders lie right in it.
        flag: the flag that named the split, for messages.
        num_classes: where the dataset does not give it.

    Returns:
        The split.

    Raises:
        UserError: a missing or empty folder, an unknown split, a missing column, labels that are not class indices.
    """
    if dataset is None and data_dir is None:
        dataset = f'hfds/{SAMPLE_DIR}'
    data_dir = None if data_dir is None else os.path.expanduser(data_dir)
    kind, rest = _kind_of(dataset, data_dir)
    image_mode = {1: 'L', 3: 'RGB'}[in_chans]
    kwargs: dict[str, Any] = dict(class_map=class_map, input_key=input_key, target_key=target_key)
    if kind in ('torch', 'hfids', 'tfds'):
        kwargs['download'] = dataset_download
    if kind == 'torch':
        kwargs = dict(download=dataset_download)
    if kind in STREAMED:
        kwargs.update(is_training=is_training, batch_size=batch_size, seed=seed, num_samples=num_samples)
        kwargs.update(input_img_mode=image_mode if kind == 'tfds' else '')  # those of others are converted here
    name, root = dataset or '', data_dir
    of_folders = not kind or (kind == 'torch' and rest.lower() in ('folder', 'image_folder'))
    if of_folders and data_dir is not None:  # _kind_of() sees to it
        root = _find_split(data_dir, split, flag)
    if class_map is not None:
        names = _read_class_map(class_map, root)
        if of_folders:  # as the system names them
            kwargs['class_map'] = {os.fsdecode(name.encode()): i for i, name in enumerate(names)}
    if kind in ('hfds', 'hfids'):
        _quiet_datasets()
        path = os.path.expanduser(rest)
        if os.path.exists(path):
            name = f'{kind}/{path}'
        else:
            hub_in_reach()

    try:
        made = _create(name, root, split, kind, of_folders, kwargs)
    except UserError:
        raise
    except Exception as e:
        raise _explain(e, kind, rest, root, split, flag, dataset_download) from e
    if kind == 'hfds':
        _name_numbers(made.reader)
    source = Source(made, split, 0, None, kind in STREAMED, image_mode)
    source.left_out = list(getattr(getattr(made, 'reader', None), 'left_out', ()))
    if kind == 'wds':
        source.shards = _check_shards(made.reader, split, flag)
    _read_classes(source, str(dataset or data_dir), flag, target_key or 'label', num_classes)
    _check_split(source, str(dataset or data_dir), flag)
    if kind == 'hfds':
        _check_image_column(source, input_key or 'image')
    return source


def _name_numbers(reader: Any) -> None:
    """Let a class map name labels that are numbers, without names in the dataset, by their digits."""
    if reader.remap_class and not reader._source_names:
        names = (str(name) for name in reader.class_to_idx)
        reader._source_names = {int(name): name for name in names if re.fullmatch(r'0|[1-9]\d*', name, re.ASCII)}


def _check_image_column(source: Source, input_key: str) -> None:
    """Raise UserError where none of the first images can be read; a single one, or a null, is reported later."""
    assert source.targets is not None
    whole, error = np.asarray(_has_image(source.dataset.reader)) & (source.targets != UNLABELED), None
    for index in np.flatnonzero(whole)[:5].tolist():
        try:
            source.read(index)
            return
        except SampleError as e:
            error = error or e
    if error is not None:
        raise UserError(f'{error}; is --input-key {input_key} the image column?') from error


def _create(name: str, root: str | None, split: str, kind: str, of_folders: bool, kwargs: dict[str, Any]) -> Any:
    """timm's dataset, of class folders and tars over readers of ours."""
    from timm.data import ImageDataset, create_dataset

    if of_folders:
        assert root is not None
        of_tar, classes = os.path.isfile(root), kwargs.get('class_map')
        reader = TarReader(root, classes) if of_tar else FolderReader(root, classes, first_level=kind == 'torch')
        return ImageDataset(root, reader=reader)
    if kind == 'wds' and kwargs['input_key'] is None:
        kwargs['input_key'] = ';'.join(ending[1:] for ending in IMAGE_TYPES)
    made = create_dataset(name, root=root, split=split, **kwargs)
    if hasattr(made, 'loader'):  # torchvision's own would lose what is transparent
        made.loader = Image.open
    return made


def _check_split(source: Source, name: str, flag: str) -> None:
    if getattr(source.dataset, 'train', None) is False and source.split not in VALIDATION_NAMES:
        # timm opens the test images of torch/ for any name but that of the training split
        raise UserError(f'{flag} {source.split}: no such split in {name} (there: train, validation)')
    if not source.streamed and not len(source):
        raise UserError(f'{flag} {source.split}: holds no images')
    if source.num_classes < 2:
        raise UserError(f'{flag} {source.split}: {name} has {source.num_classes} class; at least 2 are needed')


def _kind_of(dataset: str | None, data_dir: str | None) -> tuple[str, str]:
    """Return the prefix of a dataset's name (empty for folders) and the rest of it, or raise UserError."""
    kind, sep, rest = (dataset or '').partition('/')
    kind = kind.lower() if sep else ''
    if dataset and kind not in ('hfds', 'torch', *STREAMED):
        hint = f'hfds/{dataset}' if sep else f'--data-dir {dataset}'
        raise UserError(
            f'--dataset {dataset}: expected hfds/…, hfids/…, wds/… or torch/…; did you mean {hint}? '
            f'(folders of images: --data-dir alone)'
        )
    if data_dir is None and kind in ('', 'torch', 'wds'):
        raise UserError(f'--dataset {dataset or repr(dataset)}: needs --data-dir, the folder that holds it')
    if data_dir is not None and kind in ('', 'wds') and not os.path.exists(data_dir):
        raise UserError(f'--data-dir {data_dir}: no such folder')
    return kind, rest


def _quiet_datasets() -> None:
    """Spare a run the progress bars of reading its own cache."""
    import datasets

    datasets.disable_progress_bars()


def _find_split(root: str, split: str, flag: str) -> str:
    """The folder or .tar of a split below ``root``, under timm's synonyms. timm itself would fall back to ``root``,
    and train and validate on the same images."""
    if os.path.isfile(root):
        raise UserError(f'--data-dir {root}: one file holds one split; name a folder with train.tar and validation.tar')
    if split == '.':
        return root
    paths = {p.name: p for p in Path(root).iterdir() if p.is_dir() or p.suffix == '.tar'}
    there = sorted({name.removesuffix('.tar') for name in paths})
    if split and (found := find_named(there, split)):
        candidate = str(paths.get(found) or paths[f'{found}.tar'])
        if not os.path.samefile(candidate, root):
            return candidate
    if not there and (count := sum(p.suffix.lower() in IMAGE_TYPES for p in Path(root).iterdir())):
        raise UserError(
            f'--data-dir {root}: {count:,} image{"" if count == 1 else "s"}, but no class folders; put the images of '
            'each class into a folder of its name, or give a table of their labels: --labels FILE'
        )
    listed = ', '.join(there[:8]) + (', …' if len(there) > 8 else '') if there else 'no folder at all'
    raise UserError(f'{flag} {split!r}: no such folder in --data-dir {root} (there: {listed})')


def _read_class_map(path: str, root: str | None) -> list[str]:
    """A name a line, as timm reads it; a blank or repeated line would move the indices of the others."""
    file = path if os.path.exists(path) else os.path.join(root or '', path)
    if not os.path.isfile(file) or not path.endswith('.txt'):
        raise UserError(f'--class-map {path}: expected a .txt file with a class name a line')
    try:
        names = [line.strip() for line in Path(file).read_text(encoding='utf-8').splitlines()]
    except UnicodeDecodeError as e:
        raise UserError(f'--class-map {path}: is not UTF-8; save it as UTF-8') from e
    if names and names[0].startswith('\ufeff'):  # timm would take it for a letter of the first name
        raise UserError(f'--class-map {path}: begins with a byte order mark; save it as UTF-8 without one')
    for i, name in enumerate(names):
        if not name or name in names[:i]:
            raise UserError(f'--class-map {path}: line {i + 1} is {"written twice" if name else "blank"}')
    return names


def _check_shards(reader: Any, split: str, flag: str) -> int:
    """How many shards there are. webdataset passes over those that are not there, and reads the others again in their
    place."""
    names = reader.split_info.filenames
    if missing := [name for name in names if not os.path.exists(os.path.join(reader.root, name))]:
        listed = ', '.join(missing[:3]) + (', …' if len(missing) > 3 else '')
        raise UserError(
            f'{flag} {split}: {len(missing)} of {len(names)} shards are not in --data-dir {reader.root}: {listed}'
        )
    if not reader.num_samples:
        raise _no_length(split, flag)
    return len(names)


def _no_length(split: str, flag: str) -> UserError:
    return UserError(
        f'{flag} {split}: how many images it holds is not known; give {flag.replace("split", "num-samples")} N'
    )


def _explain(e: Exception, kind: str, name: str, root: str | None, split: str, flag: str, download: bool) -> UserError:
    """What a user needs to know of an exception from timm's ``create_dataset``."""
    text = ' '.join(str(e).split()) or type(e).__name__
    if kind in ('hfds', 'hfids'):
        import datasets

        dataset = f'--dataset {kind}/{name}'
        if isinstance(e, OSError) and e.filename and not os.path.exists(e.filename):
            return UserError(f'{dataset}: {e.strerror}: {e.filename}; is the cache (HF_HOME) a folder to write to?')
        if 'num_samples' in text:
            return UserError(f'{dataset}: its length is not known; give --train-num-samples and --val-num-samples')
        try:
            splits = datasets.get_dataset_split_names(name)
        except Exception:
            if os.path.exists(name):
                return UserError(f'{dataset}: no dataset in this folder ({text})')
            why = '' if hub_in_reach() else '; the Hub is out of reach'
            return UserError(f'{dataset}: not found, neither as a folder nor on the Hub{why} ({text})')
        if split.split('[')[0] not in splits:
            return UserError(f'{flag} {split}: no such split in {dataset} (there: {", ".join(splits)})')
        return UserError(f'{dataset}: {text}')
    if kind == 'wds':
        if 'install webdataset' in text:
            return UserError(f"--dataset wds/{name}: needs webdataset: pip install 'timm-rld[wds]'")
        if isinstance(e, KeyError):
            return UserError(f'{flag} {split}: the _info.json of --data-dir {root} lacks {text} for it')
        if 'num_samples' in text:
            return _no_length(split, flag)
        if 'not found in info' in text:
            return UserError(
                f'{flag} {split}: no such split in an _info.json of --data-dir {root}; '
                f"it can be named by its shards: '{split}-{{0000..0009}}.tar|IMAGES'"
            )
    if kind == 'torch':
        hint = '' if download or isinstance(e, AssertionError) else '; --dataset-download fetches it'
        return UserError(f'--dataset {kind}/{name} in --data-dir {root}: {text}{hint}')
    return UserError(f'--dataset {kind}/{name}: {text}' if kind else f'--data-dir {root}: {text}')


def _has_image(reader: Any) -> Any:
    """Of each row of a table of `hfds/`, whether it has an image, without reading any: a pyarrow array."""
    import pyarrow.compute as pc

    column = reader.dataset.data.column(reader.image_key)
    return pc.or_(*(pc.is_valid(pc.struct_field(column, part)) for part in ('bytes', 'path')))


def _paths(reader: Any) -> list[str | None]:
    """The path that a table of `hfds/` has of each image, without reading any."""
    import pyarrow.compute as pc

    return pc.struct_field(reader.dataset.data.column(reader.image_key), 'path').to_pylist()


def _readable(name: str) -> str:
    """A folder's name as text. Where the locale knows ASCII alone, Python gives its bytes in place of other letters."""
    return name.encode('utf-8', 'surrogateescape').decode('utf-8', 'backslashreplace')


def _read_classes(source: Source, name: str, flag: str, target_key: str, num_classes: int | None) -> None:
    """Fill in the class names and their number, and check the labels where that costs nothing."""
    reader: Any = getattr(source.dataset, 'reader', None)
    mapping = getattr(reader, 'class_to_idx', None) or getattr(reader, 'class_name_to_idx', None) or {}
    labels = None
    columns: Any = getattr(reader, 'dataset', None)
    if hasattr(columns, 'unique'):
        # timm's reader casts the image column, which adds one of nulls where there is no such column
        no_image = len(columns) > 0 and _has_image(reader).index(True).as_py() < 0
        shown = ', '.join(c for c in columns.column_names if not (no_image and c == reader.image_key))
        if no_image:
            raise UserError(f'--input-key {reader.image_key}: no such image column in {name} (columns: {shown})')
        if target_key not in columns.column_names:
            raise UserError(f'--target-key {target_key}: no such label column in {name} (columns: {shown})')
        try:
            targets = source.targets
        except UserError as e:
            raise UserError(f'{e} of {name}' if '--class-map: no line' in str(e) else str(e)) from e
        if targets is not None and not getattr(reader, 'remap_class', False):
            labels = np.unique(targets[targets != UNLABELED]).tolist()
    if mapping:
        source.num_classes = max(mapping.values()) + 1
        by_index = {i: _readable(str(n)) for n, i in mapping.items()}
        if len(by_index) == source.num_classes:
            source.class_names = [by_index[i] for i in range(source.num_classes)]
    elif getattr(source.dataset, 'classes', None):
        source.class_names = [str(c) for c in source.dataset.classes]
        source.num_classes = len(source.class_names)
    elif labels is not None:
        source.num_classes = max(labels, default=1) + 1  # where none has a label, that is the error
        if source.num_classes > MOST_CLASSES:
            raise UserError(
                f'--target-key {target_key}: label {max(labels)} found, but classes are counted from 0; is it the '
                'label column? A --class-map FILE (one label per line) gives each label an index'
            )
    elif num_classes is None:
        raise UserError(f'{name} does not give its number of classes; give --num-classes N')
    if labels and source.class_names and max(labels) >= source.num_classes:
        raise UserError(f'{flag} {source.split}: label {max(labels)} with {source.num_classes} classes')
    _check_number(source, name, num_classes)


def _check_number(source: Source, name: str, num_classes: int | None) -> None:
    """Set the number of classes to one that was given, if there can be so many."""
    if num_classes is not None:
        if num_classes < source.num_classes or (source.class_names and num_classes != source.num_classes):
            raise UserError(f'--num-classes {num_classes}: {name} ({source.split}) has {source.num_classes}')
        source.num_classes = num_classes
