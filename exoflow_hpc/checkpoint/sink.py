"""Writes bytes to their places in a file as fast as the disk takes them. Runs in the writer process."""

from __future__ import annotations

import errno
import os
from pathlib import Path
from types import TracebackType

import numpy as np

from exoflow_hpc.checkpoint.layout import ALIGNMENT
from exoflow_hpc.durable import write_all

__all__ = ["Sink"]

#: bytes of one direct write: large, since the next one begins only when the device has them all
_DIRECT_CHUNK = 64 << 20
#: bytes of one buffered write, after which the device is told to begin with them
_CHUNK = 16 << 20
#: what a file system says that has no direct I/O, or not as we do it
_REFUSED = (errno.EINVAL, errno.EOPNOTSUPP, errno.ENOTSUP)


class Sink:
    """A file being written. Arrays of at least *direct_from* bytes (0: none) go by direct I/O where the file system has it."""

    def __init__(self, path: Path, direct_from: int) -> None:
        self._path = path
        self._direct_from = direct_from
        self._fd = os.open(path, os.O_RDWR | os.O_CLOEXEC)
        #: opened at the first use; None: not yet, -1: there is none
        self._direct: int | None = None

    def __enter__(self) -> Sink:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        os.close(self._fd)
        if self._direct is not None and self._direct >= 0:
            os.close(self._direct)

    def write(self, view: memoryview, position: int) -> None:
        """Write all of *view* at *position*, which has been reserved in the file. OSError."""
        done = 0
        # Memory that isn't aligned, as buffers of containers aren't, would have to be copied first: with the write-back
        # begun early, the page cache is faster than that.
        if 0 < self._direct_from <= len(view) and position % ALIGNMENT == 0 and _is_aligned(view):
            done = self._write_direct(view[: len(view) // ALIGNMENT * ALIGNMENT], position)
        while done < len(view):
            part = view[done : done + _CHUNK]
            write_all(self._fd, part, position + done)
            if len(part) == _CHUNK:
                # Starts the write-back of these pages now, not when all is in memory; clean ones are dropped, and nobody
                # wants them: what has just been made is in the store.
                os.posix_fadvise(self._fd, position + done, len(part), os.POSIX_FADV_DONTNEED)
            done += len(part)

    def truncate(self) -> None:
        """Free the file's space. OSError."""
        os.ftruncate(self._fd, 0)

    def sync(self) -> None:
        """Make what was written durable, by either way. OSError."""
        os.fsync(self._fd)

    def _write_direct(self, view: memoryview, position: int) -> int:
        """Write *view* without the page cache; return how much of it was: 0 if the file system can't."""
        if self._direct is None:
            try:
                self._direct = os.open(self._path, os.O_WRONLY | os.O_DIRECT | os.O_CLOEXEC)
            except OSError as error:
                if error.errno not in _REFUSED:
                    raise
                self._direct = -1
        if self._direct < 0:
            return 0
        done = 0
        while done < len(view):
            part = view[done : done + _DIRECT_CHUNK]
            try:
                count = os.pwrite(self._direct, part, position + done)
            except OSError as error:
                if error.errno not in _REFUSED:
                    raise
                break
            done += count
            if count < len(part):  # the rest goes the other way, from a place that may not be aligned
                break
        return done


def _is_aligned(view: memoryview) -> bool:
    return bool(np.frombuffer(view, np.uint8).ctypes.data % ALIGNMENT == 0)
