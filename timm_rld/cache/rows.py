"""Rows of numbers in a safetensors file, written as they come and read by index."""

from __future__ import annotations

import errno
import json
import os
import struct
import zlib
from pathlib import Path
from typing import TYPE_CHECKING, BinaryIO

import numpy as np
import torch
from torch import Tensor

from ..errors import SampleError, UserError

if TYPE_CHECKING:
    from typing_extensions import Buffer

try:
    import fcntl
except ImportError:  # Windows has none
    fcntl = None  # type: ignore[assignment]

DTYPES = {'float16': torch.float16, 'bfloat16': torch.bfloat16, 'float32': torch.float32}
_NAMES = {torch.float16: 'F16', torch.bfloat16: 'BF16', torch.float32: 'F32'}


class Rows:
    """A tensor `logits` `[N, C]` in a safetensors file, and a checksum for each row that is there.

    A row counts as there once its CRC-32, which is written after it, fits it: what a killed process or a full disk left
    half done is detected when it is read, and written again. Several processes may write at once, each its own rows.
    Reading takes a time that does not depend on N.

    Args:
        path: of a file that :meth:`create` made.

    Raises:
        UserError: where it is not such a file, or is cut off.
    """

    def __init__(self, path: Path) -> None:
        self.path = Path(path)
        self._reader = self._writer = -1
        try:
            # not a memory map: where a file is cut off or a disk fails, that kills the process without a word
            self._reader = os.open(self.path, os.O_RDONLY)
            (size,) = struct.unpack('<Q', os.pread(self._reader, 8, 0))
            header = json.loads(os.pread(self._reader, size, 8)) if size < 2**20 else {}
            self.length, self.width = header['logits']['shape']
            self.dtype = {name: dtype for dtype, name in _NAMES.items()}[header['logits']['dtype']]
            begin, end = header['logits']['data_offsets']
            crc_begin = header['crc32']['data_offsets'][0]
            if end - begin != self.length * self.width * self.dtype.itemsize or crc_begin + 4 * self.length > begin:
                raise ValueError
        except OSError as e:
            raise UserError(f'{self.path}: cannot be read ({e.strerror})') from e
        except (KeyError, ValueError, TypeError, struct.error) as e:
            raise UserError(f'{self.path}: not a file of cached logits; delete it to have it computed again') from e
        self.row_bytes = (end - begin) // max(self.length, 1)
        self.start, self.crc_start, self.size = 8 + size + begin, 8 + size + crc_begin, 8 + size + end
        self._check_size()
        self._seen = np.zeros(self.length, '<u4')  # checksums as last read: most need not be read again

    @staticmethod
    def create(path: Path, length: int, width: int, dtype: torch.dtype) -> Rows:
        """Make a file without rows, its space reserved, unless it is there already.

        Returns:
            Its rows, opened.

        Raises:
            UserError: where it cannot be written, or the disk has no room.
        """
        path = Path(path)
        if not path.exists():
            row_bytes = width * dtype.itemsize
            sums = -(-4 * length // 8) * 8
            offsets = [sums, sums + length * row_bytes]
            header = {
                'crc32': {'dtype': 'U32', 'shape': [sums // 4], 'data_offsets': [0, sums]},
                'logits': {'dtype': _NAMES[dtype], 'shape': [length, width], 'data_offsets': offsets},
            }
            text = json.dumps(header).encode()
            text += b' ' * (-len(text) % 8)
            part = path.with_name(f'.{path.name}.{os.getpid()}')
            try:
                with part.open('wb') as f:
                    f.write(struct.pack('<Q', len(text)) + text)
                    f.flush()
                    total = 8 + len(text) + offsets[1]
                    _reserve(f, total)
                _put(part, path)
            except OSError as e:
                raise UserError(f'--teacher-cache: {path} cannot be written ({e.strerror})') from e
            finally:
                part.unlink(missing_ok=True)
        return Rows(path)

    def filled(self) -> np.ndarray:
        """Which rows have been written, `[N]`, without looking whether they are whole."""
        (sums,) = self._pread(4 * self.length, [self.crc_start])
        self._seen = np.frombuffer(bytearray(sums), '<u4')
        return self._seen != 0

    def damaged(self) -> list[int]:
        """Rows that are there and do not fit their checksum. Reads the whole file."""
        return [i for i in np.flatnonzero(self.filled()).tolist() if _crc(self._rows([i])[0]) != self._seen[i]]

    def read(self, indices: np.ndarray) -> Tensor | None:
        """Rows `[B, C]`, in the file's dtype, or None where one of them is not there.

        Raises:
            SampleError: where the file cannot be read, or has been cut off meanwhile.
        """
        rows = self._rows(indices.tolist())
        for index, row, seen in zip(indices.tolist(), rows, self._seen[indices].tolist()):
            crc = _crc(row)
            if crc != seen:  # perhaps it was written since
                self._seen[index] = self._checksum(index)
                if crc != self._seen[index]:
                    return None
        raw = np.frombuffer(bytearray().join(rows), np.uint8).reshape(len(rows), self.row_bytes)
        return torch.from_numpy(raw).view(self.dtype)

    def present(self, indices: np.ndarray) -> np.ndarray:
        """Which of some rows are there, `[B]`. Raises as :meth:`read`."""
        return np.array([self.read(indices[i : i + 1]) is not None for i in range(len(indices))], dtype=bool)

    def _rows(self, indices: list[int]) -> list[bytes]:
        return self._pread(self.row_bytes, [self.start + index * self.row_bytes for index in indices])

    def _checksum(self, index: int) -> int:
        return int.from_bytes(self._pread(4, [self.crc_start + 4 * index])[0], 'little')

    def _pread(self, count: int, starts: list[int]) -> list[bytes]:
        """So many bytes at each place."""
        try:
            found = [os.pread(self._reader, count, start) for start in starts]
        except OSError as e:
            raise SampleError(f'{self.path}: cannot be read ({e.strerror})') from e
        if any(len(data) < count for data in found):
            self._check_size(SampleError)
        return found

    def _check_size(self, kind: type[UserError] = UserError) -> None:
        there = os.fstat(self._reader).st_size
        if there != self.size:
            raise kind(
                f'{self.path}: is cut off or damaged ({there:,} bytes, {self.size:,} expected); delete it to have it '
                'computed again'
            )

    def write(self, indices: np.ndarray, rows: Tensor) -> None:
        """Write rows `[B, C]`; those that are there, and whole, stay as they are.

        Raises:
            SampleError: where they are not finite in the file's dtype, or the file cannot be written or was cut off:
                perhaps on one process alone.
        """
        if not torch.isfinite(rows).all():
            raise SampleError(
                f'--teacher-cache: a logit of the teacher is NaN, infinite or too large for {str(rows.dtype)[6:]}; '
                'try --teacher-cache-dtype float32'
            )
        raw = rows.contiguous().view(torch.uint8).numpy()
        try:
            if self._writer < 0:
                self._writer = os.open(self.path, os.O_WRONLY)
            if fcntl is not None:  # two runs with other batches may have other last bits: no row is of both
                fcntl.lockf(self._writer, fcntl.LOCK_EX)
            self._check_size(SampleError)  # writing would make a file that was cut off long again
            for index, row in zip(indices.tolist(), raw):
                if (crc := self._checksum(index)) and _crc(self._rows([index])[0]) == crc:
                    continue
                os.pwrite(self._writer, row, self.start + index * self.row_bytes)
                os.pwrite(self._writer, struct.pack('<I', _crc(row)), self.crc_start + 4 * index)
        except OSError as e:
            raise SampleError(f'--teacher-cache: {self.path} cannot be written ({e.strerror})') from e
        finally:
            if fcntl is not None and self._writer >= 0:
                fcntl.lockf(self._writer, fcntl.LOCK_UN)

    def __del__(self) -> None:
        for descriptor in (self._reader, self._writer):
            if descriptor >= 0:
                os.close(descriptor)


def _reserve(file: BinaryIO, size: int) -> None:
    """Make a file that long, with room on the disk where the file system can promise it."""
    try:
        os.posix_fallocate(file.fileno(), 0, size)
    except (AttributeError, OSError) as e:
        if getattr(e, 'errno', None) in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
            raise
        file.truncate(size)


def _put(part: Path, path: Path) -> None:
    """Give a whole file its name, unless another process was first: its file may have rows already."""
    try:
        os.link(part, path)
    except FileExistsError:
        pass
    except OSError:  # a file system without hard links
        if not path.exists():
            part.replace(path)


def _crc(row: Buffer) -> int:
    return zlib.crc32(row) or 1  # 0 stands for a row that is not there


def rounded(logits: Tensor, target: Tensor, dtype: torch.dtype) -> Tensor:
    """Round logits, keeping each class on its side of the true one: where z_j ≠ z_y round to the same number, z_j goes
    to the next number below or above it. So what RLD masks (z_j ≥ z_y) stays masked, and nothing else.

    Args:
        logits: `[B, C]`, float32.
        target: true classes `[B]`.
        dtype: float16, bfloat16, or float32, which rounds nothing.

    Returns:
        `[B, C]` in that dtype, off by half a unit in the last place, beside a near-tie by up to one and a half.
    """
    if dtype == torch.float32:
        return logits.float()
    own = logits.gather(1, target[:, None])
    stored = logits.to(dtype)
    own_stored = stored.gather(1, target[:, None])
    side = torch.where(stored == own_stored, (logits - own).sign(), 0).to(torch.int32)
    bits = own_stored.view(torch.int16).to(torch.int32)
    place = torch.where(bits < 0, -(bits & 0x7FFF), bits) + side  # in the order of the numbers
    beside = torch.where(place < 0, -place - 0x8000, place).to(torch.int16).view(dtype)
    return torch.where(side == 0, stored, beside)
