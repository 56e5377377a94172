"""Files that are whole or not there: places checked before any work, and atomic writing."""

from __future__ import annotations

import errno
import os
import stat
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from safetensors import SafetensorError

from vitlr.errors import InputError, RunError

try:
    import fcntl
except ImportError:  # Windows: nothing tells there whether a writer is alive, so nothing is cleaned up
    fcntl = None  # type: ignore[assignment]

_FULL = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO}
_SUFFIX, _LOCK = ".part", ".lock"


def _failure(path: Path, cause: BaseException) -> Exception:
    full = getattr(cause, "errno", None) in _FULL
    if full or not isinstance(cause, OSError):
        return RunError(f"could not write {path}: {cause}; nothing was left there, free some space and run again")
    return InputError(f"cannot write {path}: {cause.strerror or cause}; choose a writable place")


def is_file(path: Path) -> bool:
    """Whether a regular file is there; False for names that no file can have."""
    try:
        return path.is_file()
    except (OSError, ValueError):
        return False


def check_writable(path: str | os.PathLike[str]) -> Path:
    """Refuse a destination that cannot be written, before any work is spent on it (`InputError`)."""
    path = Path(path)
    with atomic_path(path, commit=False):
        return path


def _check_place(path: Path) -> None:
    try:
        mode = path.stat().st_mode
    except FileNotFoundError:
        if path.is_symlink():
            raise InputError(f"cannot write {path}: it is a link to nothing; name another file") from None
        return
    except (OSError, ValueError) as cause:
        raise InputError(f"cannot write {path}: {getattr(cause, 'strerror', None) or cause}") from cause
    if stat.S_ISDIR(mode):
        raise InputError(f"cannot write {path}: it is a folder; name a file in it")
    if not stat.S_ISREG(mode):  # a rename would put a file in the place of a pipe or a device
        raise InputError(f"cannot write {path}: it is no regular file but a device, pipe or socket; name a file")
    if not mode & 0o222:  # a rename would replace it all the same
        raise InputError(f"cannot write {path}: the file is read-only; name another one")


@contextmanager
def atomic_path(path: str | os.PathLike[str], *, commit: bool = True) -> Iterator[Path]:
    """Yield a temporary path beside `path`; rename it to `path` on success, remove it on any failure.

    What killed processes left of earlier tries goes first. Raises `InputError` where the place is not writable or
    holds anything but a regular file, and `RunError` where the disk is full.
    """
    path = Path(path)
    _check_place(path)
    try:
        handle, temporary = _begin(path)
    except (OSError, ValueError) as cause:
        raise _failure(path, cause) if isinstance(cause, OSError) else InputError(f"cannot write {path}") from cause
    try:
        yield temporary
        if commit:
            _match_umask(temporary)
            _sync(temporary)
            os.replace(temporary, path)
    except (OSError, SafetensorError) as cause:
        raise _failure(path, cause) from cause
    finally:
        for left in (temporary, temporary.with_suffix(_LOCK)):
            left.unlink(missing_ok=True)
        os.close(handle)


def _begin(path: Path) -> tuple[int, Path]:
    """A name beside `path`, and a lock that holds it for as long as its descriptor is open: who dies lets go of it.

    The lock is a file of its own: safetensors puts another file in the place of the one that it was given.
    """
    prefix = f".{path.name}."
    with suppress(OSError):
        _clean(path.parent, prefix)
    while True:
        handle, name = tempfile.mkstemp(prefix=prefix, suffix=_LOCK, dir=path.parent)
        temporary = Path(name).with_suffix(_SUFFIX)
        if fcntl is None:
            return handle, temporary
        try:
            with suppress(OSError):  # a file system without locks
                fcntl.flock(handle, fcntl.LOCK_EX)
            if os.fstat(handle).st_nlink:  # else another process took it for a dead one's before it was locked
                return handle, temporary
        except BaseException:
            os.close(handle)
            raise
        os.close(handle)


def _clean(folder: Path, prefix: str) -> None:
    """Remove temporary files of this destination that no living process holds."""
    if fcntl is None:
        return
    for entry in os.scandir(folder):
        lock = Path(entry.path).with_suffix(_LOCK)
        ours = entry.name.startswith(prefix) and entry.name.endswith((_LOCK, _SUFFIX))
        if not ours or not entry.is_file(follow_symlinks=False) or (entry.path != str(lock) and lock.exists()):
            continue
        with suppress(OSError):  # held by its writer, or gone already
            handle = os.open(entry.path, os.O_RDWR)
            try:
                fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
                lock.with_suffix(_SUFFIX).unlink(missing_ok=True)
                os.unlink(entry.path)
            finally:
                os.close(handle)


def _match_umask(path: Path) -> None:
    """Give the file the mode that `open` would have given it; `mkstemp` makes it private."""
    mask = os.umask(0)
    os.umask(mask)
    path.chmod(0o666 & ~mask)


def _sync(path: Path) -> None:
    with path.open("r+b") as file:  # Windows syncs only what may be written
        os.fsync(file.fileno())
