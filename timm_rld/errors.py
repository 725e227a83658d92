"""The errors a user can cause. Each message names the flag or file, the value, and the fix."""

from __future__ import annotations

import contextlib
import difflib
import errno
import os
import pickle
import signal
import sys
import threading
import traceback
from collections.abc import Callable, Iterable, Iterator


class UserError(ValueError):
    """Something a user can fix: a missing folder, a teacher that does not fit. The program exits with code 1."""

    exit_code = 1


class UsageError(UserError):
    """A wrong flag, YAML key or value. The program exits with code 2."""

    exit_code = 2


class WriteError(UserError):
    """A file or folder that cannot be written: a full disk, no permission."""


class SampleError(UserError):
    """An image, label or cached logit that cannot be read: known to one process (or its worker), which prints it."""


class Stopped(Exception):
    """A run that stops early without an error: it received a signal, or had finished before.

    Args:
        message: how to continue.
        exit_code: 128 and the signal's number, or 0.
    """

    def __init__(self, message: str, exit_code: int) -> None:
        super().__init__(message)
        self.exit_code = exit_code


def did_you_mean(name: str, known: Iterable[str], n: int = 3) -> str:
    """Return ``" (did you mean 'a', 'b'?)"`` for the names nearest to ``name``, or an empty string."""
    near = difflib.get_close_matches(name, list(known), n=n, cutoff=0.6)
    return f' (did you mean {", ".join(repr(x) for x in near)}?)' if near else ''


def is_not_plain(error: Exception) -> bool:
    """Return whether torch did not load a file because it holds more than tensors and plain values. torch's own advice,
    to load it nevertheless, would run whatever code is in it."""
    return isinstance(error, pickle.UnpicklingError) or 'weights_only' in str(error)


@contextlib.contextmanager
def writing(what: object, then: str = '') -> Iterator[None]:
    """Turn errors of the disk in this context into a :class:`WriteError` with the fix.

    Args:
        what: cannot be written: a path, or words that name it.
        then: how to continue after the fix.

    Raises:
        WriteError: `WHAT cannot be written (No space left on device); free some space, then THEN`.
    """
    then = f', then {then}' if then else ''
    try:
        yield
    except WriteError as e:
        raise WriteError(f'{e}{then}') from e
    except OSError as e:
        fix = 'free some space' if e.errno in (errno.ENOSPC, errno.EDQUOT) else 'fix that'
        raise WriteError(f'{what} cannot be written ({e.strerror or e}); {fix}{then}') from e


def check_file(flag: str, path: str | os.PathLike[str]) -> None:
    """Raise UserError where a file could not be written, before the work that it is to hold."""
    path = os.path.expanduser(path)
    folder = os.path.dirname(path) or '.'
    if os.path.isdir(path):
        raise UserError(f'{flag} {path}: is a folder; name a file in it')
    if not os.path.isdir(folder):
        raise UserError(f'{flag} {path}: cannot be written (there is no folder {folder}); name a file in another one')
    if not os.access(folder, os.W_OK):
        raise UserError(f'{flag} {path}: cannot be written (Permission denied); name a file in another folder')


def _ignore_further_workers() -> None:
    """torch raises an error at any point for each loader worker that dies; ignore those after the first."""
    while True:
        try:
            if hasattr(signal, 'SIGCHLD') and threading.current_thread() is threading.main_thread():
                signal.signal(signal.SIGCHLD, signal.SIG_DFL)
            return
        except RuntimeError:
            continue


def _open_streams() -> None:
    """See to it that printing never fails a program: stdout and stderr that were closed lead nowhere, and a character
    that their encoding does not have is escaped."""
    while (descriptor := os.open(os.devnull, os.O_RDWR)) <= 2:  # else a file of ours would get the number, and
        os.set_inheritable(descriptor, True)  # what a library or another program prints
    os.close(descriptor)
    for name in ('stdout', 'stderr'):
        stream = getattr(sys, name)
        if stream is None:
            setattr(sys, name, open(os.devnull, 'w', encoding='utf-8'))  # noqa: SIM115
        elif hasattr(stream, 'reconfigure'):
            stream.reconfigure(errors='backslashreplace')


def run_main(program: Callable[[], object], name: str, debug: bool) -> int:
    """Run a command-line program; turn exceptions into one or two lines on stderr.

    Of several processes the first speaks for all, save for what only one of them can know.

    Returns:
        The exit code: 0; a :class:`UserError`'s own; 1 for any other failure; 130 when interrupted.
    """
    rank = int(os.environ.get('RANK', 0))
    _open_streams()
    try:
        program()
        return 0
    except KeyboardInterrupt:
        print(f'{name}: interrupted', file=sys.stderr)
        return 130
    except BrokenPipeError:  # whoever read us, as `head`, has had enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 141
    except Stopped as e:
        if not rank:
            print(f'{name}: {e}', file=sys.stderr)
        return e.exit_code
    except Exception as e:
        try:
            _ignore_further_workers()
        except RuntimeError:  # one died as it was called
            _ignore_further_workers()
        if debug:
            traceback.print_exc()
        code = e.exit_code if isinstance(e, UserError) else 1
        if isinstance(e, SampleError):  # from a worker it comes with the worker's traceback around it
            message = str(e).strip().splitlines()[-1].rpartition('SampleError: ')[-1]
        elif isinstance(e, UserError):
            message = str(e)
            if rank:
                return code
        else:
            text = str(e).strip()
            lost = any(backend in text for backend in ('gloo', 'Gloo', 'NCCL'))
            if lost and rank and int(os.environ.get('LOCAL_RANK', 0)):
                return code  # the host's first process speaks for it
            if lost:
                text = f'the connection to another process was lost; its own output says why ({text.splitlines()[0]})'
            if text.startswith('DataLoader worker'):
                text += '. A loader worker was killed, perhaps for want of memory: fewer --workers may help'
            if 'Traceback' in text:  # a worker's, around its message
                text = text.splitlines()[-1]
            message = f'{type(e).__name__}: {text} (--debug shows where)'
    prefix = f'[process {rank}] ' if rank else ''
    print(f'{prefix}{name}: error: {message}', file=sys.stderr)
    return code
