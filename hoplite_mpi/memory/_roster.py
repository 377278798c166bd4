"""Who takes part in an arena: one slot per process, held by a lock that the kernel drops when the process dies."""

from __future__ import annotations

import errno
import fcntl
import os
import stat
import struct
import time
from contextlib import suppress
from io import FileIO

from ..errors import ClosedError, StoreFullError
from ._mapping import SLOTS

__all__ = ["MEMBERS", "Roster", "remove_if_unused", "start_time"]

#: name of the file with the slots' records and locks
MEMBERS = "members"
#: seconds to wait while somebody else removes the directory of a dead run of the same name
_CLAIM_TIMEOUT = 5.0
_RECORD = struct.Struct("=IIQ")  # generation, pid, start time
_LOCK = struct.Struct("hhqqi")  # struct flock


def start_time(pid: int) -> int:
    """Return the start time of a process in clock ticks since boot, 0 if there is none.

    With the pid it names one process for ever.
    """
    try:
        with open(f"/proc/{pid}/stat", "rb") as file:
            return int(file.read().rpartition(b")")[2].split()[19])
    except (FileNotFoundError, ProcessLookupError):
        return 0


def _lock(fd: int, kind: int, start: int, length: int) -> bool:
    # Locks of the open file description: unlike those of the process they are not lost when the file is opened and
    # closed elsewhere in it, two arenas of one process exclude each other, and a query needs no taking.
    try:
        fcntl.fcntl(fd, fcntl.F_OFD_SETLK, _LOCK.pack(kind, os.SEEK_SET, start, length, 0))
    except OSError as error:
        if error.errno in (errno.EAGAIN, errno.EACCES):
            return False
        raise
    return True


def _is_at(fd: int, path: str) -> bool:
    try:
        return os.fstat(fd).st_ino == os.stat(path, follow_symlinks=False).st_ino
    except FileNotFoundError:
        return False


def _clear(directory: str) -> None:
    """Remove everything; the caller has all slots locked.

    The members file goes last: until then no newcomer gets a slot.
    """
    for name in os.listdir(directory):
        if name != MEMBERS:
            with suppress(FileNotFoundError):
                os.unlink(os.path.join(directory, name))
    os.unlink(os.path.join(directory, MEMBERS))
    try:
        os.rmdir(directory)
    except OSError as error:
        if error.errno not in (errno.ENOTEMPTY, errno.ENOENT):  # a newcomer has begun anew in it
            raise


def remove_if_unused(directory: str) -> bool:
    """Remove an arena's directory if no live process has a slot in it; return whether that was done."""
    try:
        # created if missing: a run that was killed between its mkdir and its members file left just the directory
        fd = os.open(os.path.join(directory, MEMBERS), os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
    except FileNotFoundError:
        return False
    with FileIO(fd, "r+"):
        if not _lock(fd, fcntl.F_WRLCK, 0, SLOTS) or not _is_at(fd, os.path.join(directory, MEMBERS)):
            return False
        _clear(directory)
        return True


class Roster:
    """This process's slot in the directory of an arena.

    *create* makes the directory if need be; without it a missing one is a ClosedError.
    """

    def __init__(self, directory: str, *, create: bool = True) -> None:
        self.directory = directory
        self._path = os.path.join(directory, MEMBERS)
        self._file, self.slot = self._claim(create)
        generation, _, _ = self._record(self.slot)
        #: 1..65535, other than that of the slot's last holder: its pins don't become ours
        self.generation = generation % 0xFFFF + 1
        record = _RECORD.pack(self.generation, os.getpid(), start_time(os.getpid()))
        try:
            os.pwrite(self._file.fileno(), record, self.slot * _RECORD.size)
        except OSError:
            self._file.close()
            raise

    def _claim(self, create: bool) -> tuple[FileIO, int]:
        deadline = time.monotonic() + _CLAIM_TIMEOUT
        while True:
            file = self._open(create)
            if file is not None:
                slot = next((k for k in range(SLOTS) if _lock(file.fileno(), fcntl.F_WRLCK, k, 1)), None)
                # A sweeper may have removed the file between our open and our lock: then the lock is worth nothing.
                if slot is not None and _is_at(file.fileno(), self._path):
                    return file, slot
                file.close()
            if time.monotonic() > deadline:
                raise StoreFullError(f"no free slot in {self.directory}: {SLOTS} processes of this node use it already")
            time.sleep(0.001)

    def _open(self, create: bool) -> FileIO | None:
        if create:
            with suppress(FileExistsError):
                os.mkdir(self.directory, 0o700)
        try:
            status = os.lstat(self.directory)
            if not stat.S_ISDIR(status.st_mode) or status.st_uid != os.geteuid() or status.st_mode & 0o077:
                raise PermissionError(
                    f"{self.directory} is not a private directory of this user: somebody else made it; remove it"
                )
            flags = os.O_RDWR | os.O_CLOEXEC | os.O_NOFOLLOW | (os.O_CREAT if create else 0)
            file = FileIO(os.open(self._path, flags, 0o600), "r+")
        except FileNotFoundError:
            if not create:
                raise ClosedError(f"the arena {self.directory} is gone: its run has ended") from None
            return None
        try:
            os.posix_fallocate(file.fileno(), 0, SLOTS * _RECORD.size)
        except OSError:
            file.close()
            raise
        return file

    def _record(self, slot: int) -> tuple[int, int, int]:
        data = os.pread(self._file.fileno(), _RECORD.size, slot * _RECORD.size)
        generation, pid, start = _RECORD.unpack(data)
        return generation, pid, start

    def alive(self, slot: int, generation: int) -> bool:
        """Whether the process that had this slot in this generation lives."""
        if slot == self.slot:  # a query does not see one's own locks
            return generation == self.generation
        if self._record(slot)[0] != generation:
            return False
        query = _LOCK.pack(fcntl.F_WRLCK, os.SEEK_SET, slot, 1, 0)
        kind = _LOCK.unpack(fcntl.fcntl(self._file.fileno(), fcntl.F_OFD_GETLK, query))[0]
        return bool(kind != fcntl.F_UNLCK)

    def remove_if_last(self) -> bool:
        """Remove the directory if no other live process has a slot; return whether that was done."""
        if self._file.closed or not _lock(self._file.fileno(), fcntl.F_WRLCK, 0, SLOTS):
            return False
        if _is_at(self._file.fileno(), self._path):
            _clear(self.directory)
        return True

    def leave(self) -> None:
        """Give the slot up: from now on its pins count for nothing. The last one to leave removes the directory.

        May be called twice.
        """
        if self._file.closed:
            return
        # unlocked first: a forked child may have inherited the descriptor, and with it the lock
        _lock(self._file.fileno(), fcntl.F_UNLCK, 0, SLOTS)
        self._file.close()
        # not before: of two that look at each other while both have a slot, neither is the last
        with suppress(OSError):
            remove_if_unused(self.directory)

    def abandon(self) -> None:
        """Close the descriptor but leave the lock to the process that this one was forked from."""
        self._file.close()
