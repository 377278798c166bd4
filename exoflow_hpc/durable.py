"""Write files so that a kill or a power cut at any moment leaves the old content or the new, never a part."""

from __future__ import annotations

import contextlib
import errno
import os
import secrets
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from exoflow_hpc.errors import StorageError

__all__ = ["fsync_ancestors", "fsync_directory", "storage_errors", "write_all", "write_atomically", "write_new"]

_HINTS = {
    errno.ENOSPC: "the disk is full: free some space, then resume",
    errno.EDQUOT: "your disk quota is used up: free some space, then resume",
    errno.EROFS: "the file system is read-only: choose another storage",
    errno.EACCES: "permission denied: choose another storage or change its permissions",
    errno.EIO: "the device reports an I/O error: resume once the storage works again",
}


@contextlib.contextmanager
def storage_errors(
    action: str, path: str | os.PathLike[str], kind: type[StorageError] = StorageError
) -> Iterator[None]:
    """Turn an OSError of the body into a *kind* whose message says that *action* failed on *path*, and why."""
    try:
        yield
    except StorageError:
        raise
    except OSError as error:
        why = _HINTS.get(error.errno or 0) or error.strerror or str(error)
        raise kind(f"can't {action} {os.fspath(path)}: {why}", error.errno, os.fspath(path)) from error


def fsync_directory(path: str | os.PathLike[str]) -> None:
    """Make the names in a directory durable; blocks. OSError."""
    fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def fsync_ancestors(path: str | os.PathLike[str]) -> None:
    """Make the names that lead to *path* durable, up to the top of its file system; blocks. OSError.

    Whoever made them may not have: a user's ``mkdir`` doesn't, nor does a process that was killed just after its own.
    """
    parents = Path(os.path.realpath(path)).parents
    device = os.stat(parents[0]).st_dev
    for directory in parents:
        if os.stat(directory).st_dev != device:
            break
        with contextlib.suppress(PermissionError):  # not to be read by us, so not made by us
            fsync_directory(directory)


def write_all(fd: int, data: Any, offset: int | None = None) -> int:
    """Write all of *data* (a buffer) to *fd*, at *offset* if given; return its size. A short write goes on. OSError."""
    view = memoryview(data)
    view = view if view.format == "B" and view.ndim == 1 else view.cast("B")
    done = 0
    while done < len(view):
        rest = view[done : done + (1 << 30)]  # one write moves at most 2 GiB on Linux
        count = os.write(fd, rest) if offset is None else os.pwrite(fd, rest, offset + done)
        if count == 0:
            raise OSError(errno.EIO, "write() wrote nothing")
        done += count
    return done


def write_new(path: str | os.PathLike[str], *parts: bytes) -> None:
    """Create a file that doesn't exist yet and fsync it (not its directory). OSError, nothing left behind then."""
    fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o666)
    try:
        try:
            for part in parts:
                write_all(fd, part)
            os.fsync(fd)
        finally:
            os.close(fd)
    except BaseException:
        with contextlib.suppress(OSError):
            os.unlink(path)
        raise


def write_atomically(path: Path, *parts: bytes, before_rename: Callable[[], None] | None = None) -> None:
    """Replace the content of *path* (temporary file, fsync, rename, fsync of the directory); blocks. OSError."""
    temporary = path.with_name(f".tmp-{path.name}-{secrets.token_hex(4)}")
    write_new(temporary, *parts)
    try:
        if before_rename is not None:
            before_rename()
        os.rename(temporary, path)
    except BaseException:
        with contextlib.suppress(OSError):
            os.unlink(temporary)
        raise
    fsync_directory(path.parent)
