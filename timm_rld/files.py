"""What we ask of the operating system: whole files, digests, locks, the number of cores."""

from __future__ import annotations

import hashlib
import os
import platform
from pathlib import Path

try:
    import fcntl
except ImportError:  # Windows has none
    fcntl = None  # type: ignore[assignment]


def write_atomic(path: Path, data: str | bytes) -> None:
    """Write a file whole or not at all, whenever the process or the machine stops. Text is written as UTF-8; bytes of a
    file's name that are not text are escaped, as JSON reads them."""
    part = path.with_name(f'.{path.name}.{os.getpid()}.tmp')
    try:
        write_synced(part, data)
        os.replace(part, path)
    finally:
        part.unlink(missing_ok=True)


def write_synced(path: Path, data: str | bytes) -> None:
    """Write a file, and wait until it is on the disk."""
    with path.open('wb') as f:
        f.write(data.encode('utf-8', 'backslashreplace') if isinstance(data, str) else data)
        f.flush()
        os.fsync(f.fileno())


def sync_folder(folder: Path) -> None:
    """Wait until the names in a folder are on the disk."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def sha256_of(path: Path) -> str:
    """Return the SHA-256 of a file."""
    digest = hashlib.sha256()
    with path.open('rb') as f:
        while block := f.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


class LockedError(OSError):
    """A file that another process has locked; the message is what that process wrote into it."""


def lock(path: Path) -> int:
    """Lock a file for as long as this process lives: it stays open, and the kernel closes it, however the process ends.

    (Not filelock's: it empties the file in which the owner's name stands.)

    Returns:
        Its descriptor; -1 where the system, or the file system, has no locks.

    Raises:
        LockedError: where another process has it.
    """
    if fcntl is None:
        return -1
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
    try:
        fcntl.lockf(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except (BlockingIOError, PermissionError) as e:  # EAGAIN, EACCES
        owner = os.read(descriptor, 1000).decode(errors='replace').strip()
        os.close(descriptor)
        raise LockedError(owner or 'another process') from e
    except OSError:  # ENOSYS, ENOLCK: Lustre or NFS, mounted without locks
        os.close(descriptor)
        return -1
    os.ftruncate(descriptor, 0)
    os.pwrite(descriptor, f'process {os.getpid()} on {platform.node()}\n'.encode(), 0)
    return descriptor


def cores() -> int:
    """Return the number of CPU cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, 'sched_getaffinity') else os.cpu_count() or 1
