"""Class folders, on disk or in a tar: which files are images, of which class, and which are left out and why."""

from __future__ import annotations

import io
import os
import posixpath
import re
import tarfile
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, BinaryIO

from PIL import features

from ..errors import UserError
from .names import printable

_READ = '.jpg .png .webp .jpeg .jpe .jfif .mpo .bmp .tif .tiff .gif .ppm .pgm .pbm .pnm'
_UNREAD = (
    '.heic .heif .hif .avif .jxl .jp2 .j2k .svg .dng .cr2 .cr3 .nef .arw .orf .rw2 .raf .raw .psd .xcf .exr .hdr .tga '
    '.ico .dcm'
)
IMAGE_TYPES = (*_READ.split(), *(['.avif'] if features.check('avif') else []))
# Images that Pillow alone does not read. A class of nothing else is an error, not a folder of other things.
UNREAD_TYPES = frozenset(_UNREAD.split()) - {*IMAGE_TYPES}
BESIDE = 'beside the class folders'
_JUNK = frozenset(('thumbs.db', 'ehthumbs.db', 'desktop.ini', '__macosx', '@eadir', 'icon\r'))
File = tuple[str, str, str, Any]  # folder (relative, '' at the top), name, what to sort by, where it lies


def is_junk(name: str) -> bool:
    """Whether a file or folder is hidden, or one that a system leaves behind: it is passed over without a word."""
    return name.startswith('.') or name.lower() in _JUNK


def leads_back(folder: str, name: str) -> bool:
    """Whether a folder is a link to one that it lies in, whose images would come again and again."""
    path = os.path.join(folder, name)
    target = os.path.join(os.path.realpath(path), '')
    return os.path.islink(path) and os.path.join(os.path.realpath(folder), '').startswith(target)


def natural(text: str) -> list[int | str]:
    """timm's order of classes and files: numbers by their value, letters whatever their case."""
    return [int(part) if i % 2 else part for i, part in enumerate(re.split(r'(\d+)', text.lower()))]


def _why_not(name: str) -> str:
    kind = os.path.splitext(name)[1].lower()
    if kind in UNREAD_TYPES:
        return f'{kind} is not read: convert it to JPEG or PNG'
    return 'not an image' if kind else 'no ending that names a format'


class FileReader:
    """Image files by index, with the interface of timm's readers.

    Args:
        root: folder that names are relative to.
        samples: path and class of each image.
    """

    class_to_idx: dict[str, int]  # where classes have names

    def __init__(self, root: str, samples: Sequence[tuple[str, int]]) -> None:
        self.root, self.samples = root, list(samples)

    def __getitem__(self, index: int) -> tuple[BinaryIO, int]:
        path, target = self.samples[index]
        return open(path, 'rb'), target

    def __len__(self) -> int:
        return len(self.samples)

    def filename(self, index: int, basename: bool = False, absolute: bool = False) -> str:
        """Name of the file of an image: below the root, its last part, or the whole path."""
        path = self.samples[index][0]
        return os.path.basename(path) if basename else path if absolute else os.path.relpath(path, self.root)

    def filenames(self, basename: bool = False, absolute: bool = False) -> list[str]:
        """:meth:`filename` of each image."""
        return [self.filename(i, basename, absolute) for i in range(len(self))]


@dataclass(frozen=True)
class FileDataset:
    """What holds a reader, in the place of timm's dataset."""

    reader: FileReader

    def __len__(self) -> int:
        return len(self.reader)


class FolderReader(FileReader):
    """Images of class folders, by index: a reader for timm's `ImageDataset`, with the classes and order of timm's own.

    Args:
        root: the folder that holds the class folders.
        class_to_idx: index by class; None for those that are there.
        first_level: a class is a folder right in ``root`` with all below it, as in torchvision's ImageFolder. Else it
            is the folder that holds the images, by its own name, as in timm.

    Attributes:
        samples: path and class of each image.
        class_to_idx: index by class.
        left_out: what is no image of a class, and why: path below ``root``, reason.

    Raises:
        UserError: no images, no classes; two folders that would be one class, or a class within another; a class of
            which no file can be read, or that ``class_to_idx`` lacks.
    """

    def __init__(self, root: str, class_to_idx: dict[str, int] | None = None, first_level: bool = False) -> None:
        self.root, self.first_level = root, first_level
        self.left_out: list[tuple[str, str]] = []
        images: list[File] = []
        others: list[File] = []
        for file in self._files():
            kind = os.path.splitext(file[1])[1].lower()
            (images if kind in IMAGE_TYPES and file[0] else others).append(file)
        self._note(others)
        folders = {folder for folder, *_ in images}
        self._check_unread(others, folders)
        if not images:
            raise UserError(self._nothing(others))
        classes = self._classes(folders)
        names = set(classes.values())
        if class_to_idx is None:
            ordered = sorted(names, key=lambda name: name if first_level else (natural(name), name))
            class_to_idx = {name: i for i, name in enumerate(ordered)}
        elif lost := sorted(names - class_to_idx.keys()):
            raise UserError(f'--class-map: no line for the class {", ".join(map(repr, lost[:5]))} of {root}')
        self.class_to_idx = class_to_idx
        # torchvision's order is plain
        images.sort(key=lambda f: (classes[f[0]], *f[:2]) if first_level else (natural(f[2]), f[2]))
        super().__init__(root, [(os.path.join(root, *f[:2]), class_to_idx[classes[f[0]]]) for f in images])
        self.places = [place for *_, place in images]

    def _files(self) -> Iterator[File]:
        """All files that are not junk."""

        def unreadable(error: OSError) -> None:
            raise UserError(f'--data-dir {error.filename}: cannot be read ({error.strerror})') from error

        for path, folders, files in os.walk(self.root, followlinks=True, onerror=unreadable):
            folders[:] = sorted(name for name in folders if not is_junk(name))
            folder = os.path.relpath(path, self.root) if path != self.root else ''
            for name in [name for name in folders if os.path.islink(os.path.join(path, name))]:
                if leads_back(path, name):
                    folders.remove(name)
                    self.left_out.append((os.path.join(folder, name), 'a link to a folder that it lies in'))
            files = [name for name in files if not is_junk(name)]
            if not files and not folders and folder:
                self.left_out.append((folder, 'an empty folder'))
            for name in files:
                yield folder, name, os.path.join(folder, name), None

    def _note(self, others: Iterable[File]) -> None:
        for folder, name, *_ in others:
            self.left_out.append((os.path.join(folder, name), _why_not(name) if folder else BESIDE))
        self.left_out.sort()

    def _check_unread(self, others: Iterable[File], folders: set[str]) -> None:
        """A folder that has images, but none that is read, is a class that would be missing."""
        around = {parent for folder in folders for parent in _with_parents(folder)}
        lost: dict[str, Counter[str]] = {}
        for folder, name, *_ in others:
            kind = os.path.splitext(name)[1].lower()
            if not folder or folder in around or kind not in ('', *UNREAD_TYPES):
                continue
            if not any(parent in folders for parent in _with_parents(folder)):
                lost.setdefault(folder, Counter())[kind or 'files without an ending'] += 1
        if lost:
            folder, kinds = next(iter(lost.items()))
            listed = ', '.join(f'{count} {kind}' for kind, count in kinds.most_common(3))
            more = f' (and {len(lost) - 1} more such folders)' if len(lost) > 1 else ''
            raise UserError(
                f'--data-dir {self.root}: no image of the class {folder!r} is of a format that is read: '
                f'{listed}{more}; convert them to JPEG or PNG, or remove the folder'
            )

    def _nothing(self, others: list[File]) -> str:
        beside = [f for f in others if not f[0] and os.path.splitext(f[1])[1].lower() in IMAGE_TYPES]
        if beside:
            return (
                f'--data-dir {self.root}: {len(beside)} images, but no class folders; put the images of each class '
                'into a folder of its name, or give a table of their labels: --labels FILE'
            )
        kinds = Counter(os.path.splitext(f[1])[1].lower() or 'files without an ending' for f in others)
        listed = ', '.join(f'{count} {kind}' for kind, count in kinds.most_common(3)) or 'no files'
        return f'--data-dir {self.root}: found no images in class folders (there: {listed})'

    def _classes(self, folders: set[str]) -> dict[str, str]:
        """The class of each folder that holds images."""
        if self.first_level:
            return {folder: folder.split(os.sep)[0] for folder in folders}
        classes: dict[str, str] = {}
        of: dict[str, str] = {}
        way_out = (
            'put the images of a class right into one folder of its name, or take the folders at the top as classes, '
            'with all below them: --dataset torch/folder'
        )
        for folder in sorted(folders):
            inside = next((parent for parent in _with_parents(folder)[1:] if parent in folders), None)
            if inside is not None:
                raise UserError(
                    f'--data-dir {self.root}: {inside} holds images, and so does {folder} in it: one class or two? '
                    f'{way_out[0].upper()}{way_out[1:]}'
                )
            leaf = os.path.basename(folder)
            if leaf in of:
                raise UserError(
                    f'--data-dir {self.root}: {of[leaf]} and {folder} would be one class, {leaf!r}; {way_out}'
                )
            of[leaf] = folder
            classes[folder] = leaf
        return classes


class TarReader(FolderReader):
    """The same for a tar, by the same rules. A tar within it counts as a folder of its name.

    An image is read by its place in the file, each time anew: nothing is shared between processes.
    """

    def __getitem__(self, index: int) -> tuple[BinaryIO, int]:
        start, size = self.places[index]
        with open(self.root, 'rb') as file:
            file.seek(start)
            content = file.read(size)
        if len(content) < size:
            raise OSError('the tar ends within it')
        return io.BytesIO(content), self.samples[index][1]

    def _files(self) -> Iterator[File]:
        try:
            with tarfile.open(self.root, 'r:') as tar:
                yield from self._members(tar, '', 0)
        except (tarfile.TarError, EOFError) as e:
            raise UserError(f'--data-dir {self.root}: cannot be read ({e})') from e

    def _members(self, tar: tarfile.TarFile, below: str, start: int) -> Iterator[File]:
        for member in tar:
            path = posixpath.normpath(member.path).lstrip('/')
            folder, name = posixpath.split(posixpath.join(below, path))
            if member.isdir() or any(map(is_junk, path.split('/'))):
                continue
            if not member.isfile() or member.issparse():
                self.left_out.append((posixpath.join(folder, name), 'a link or special file'))
            elif name.lower().endswith('.tar'):
                inner = posixpath.join(folder, name[: -len('.tar')])
                with tarfile.open(fileobj=tar.extractfile(member), mode='r:') as child:
                    yield from self._members(child, inner, start + member.offset_data)
            else:
                yield folder, name, member.path, (start + member.offset_data, member.size)
        with open(self.root, 'rb') as file:  # tarfile takes a damaged header for the end
            file.seek(start + tar.offset)
            if file.read(tarfile.BLOCKSIZE).strip(b'\0'):
                raise tarfile.ReadError(f'damaged or cut off at byte {start + tar.offset}')


def _with_parents(folder: str) -> list[str]:
    """A folder and those that it lies in, below the root."""
    parts = folder.split(os.sep)
    return [os.sep.join(parts[:i]) for i in range(len(parts), 0, -1)]


def note_left_out(left_out: list[tuple[str, str]], shown: int = 3) -> str:
    """What is left out and why, in a line: the count for each reason, with the first names; empty where it is none."""
    reasons: dict[str, list[str]] = {}
    for path, reason in left_out:
        reasons.setdefault(reason, []).append(path)
    parts = []
    for reason, paths in sorted(reasons.items(), key=lambda item: -len(item[1])):
        names = ', '.join(map(printable, paths[:shown])) + (', …' if len(paths) > shown else '')
        parts.append(f'{len(paths)} {reason} ({names})')
    return '; '.join(parts)
