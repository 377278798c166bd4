"""Getting a file for an object: a recycled one, or a new one that is reserved before it is touched."""

from __future__ import annotations

import errno
import itertools
import os
from collections.abc import Callable
from contextlib import suppress

from ..errors import StoreFullError
from ..testing import fault
from ._keeper import Keeper, Key, Role, key_of
from ._mapping import HEADER, RETIRED, SEALED, Mapping
from ._pool import exclusive, temporary_prefix
from ._room import room
from ._roster import Roster

__all__ = ["Allocator"]

#: fresh memory of at least this many bytes is populated in one system call
_POPULATE_MIN = 256 * 1024
#: fresh memory of at least this many bytes is compared with what there is before it is reserved; that costs some 50 us
_CHECK_MIN = 1 << 20
#: the file system, the address space (vm.max_map_count too), or the size of a file (RLIMIT_FSIZE) is at its limit
_FULL = (errno.ENOSPC, errno.ENOMEM, errno.EFBIG)
#: bytes reserved by one system call: a signal makes tmpfs start the call again
_RESERVE_STEP = 64 << 20


class Allocator(Keeper):
    """Allocation within the limits of the process, the file system and the machine."""

    def __init__(self, directory: str, roster: Roster, memory_limit: int | None, recycle_limit: int) -> None:
        super().__init__(directory, roster, recycle_limit)
        #: bytes that may be charged at once; None: what there is
        self.memory_limit = memory_limit
        self._prefix = temporary_prefix(roster)
        self._counter = itertools.count()
        #: allocations that took new memory, and freed memory
        self._fresh = 0
        self._recycled = 0

    def _obtain(self, nbytes: int, what: str, *, named: bool, fresh: bool = False) -> Mapping:
        capacity = -(-nbytes // HEADER) * HEADER
        with self._locked():
            self._check_open()
            if self.memory_limit is not None and self._used + capacity > self.memory_limit:
                self._drop_deleted()
                if self._used + capacity > self.memory_limit:
                    raise StoreFullError(
                        f"{what} needs {capacity} bytes; this process holds {self._used} of its memory_limit "
                        f"of {self.memory_limit}: delete objects or raise memory_limit"
                    )
            self._used += capacity
            mapping = None if fresh else self._pool.take(capacity, named=named)
            if mapping is not None:
                self._recycled += 1
        try:
            if mapping is None:
                mapping = self._create(capacity, what, named=named)
        except BaseException:
            with self._locked():
                self._used -= capacity
            raise
        mapping.charge = capacity
        mapping.role = Role.FILLING
        with self._locked():
            if named:
                self._mappings[mapping.inode] = mapping
        return mapping

    def _create(self, capacity: int, what: str, *, named: bool) -> Mapping:
        if capacity >= _CHECK_MIN and room(self.directory)[0] < capacity:
            self._make_room()
            free, limit = room(self.directory)
            if free < capacity:
                raise StoreFullError(f"{what} needs {capacity} bytes; there are {free} {limit}: delete objects")
        try:
            return self._reserve(HEADER + capacity, named=named)
        except OSError as error:
            if error.errno not in _FULL:
                raise
        self._make_room()
        try:
            return self._reserve(HEADER + capacity, named=named)
        except OSError as error:
            if error.errno not in _FULL:
                raise
            free, limit = room(self.directory)
            raise StoreFullError(
                f"{what} needs {capacity} bytes; there are {free} {limit} ({error.strerror}): delete objects"
            ) from error

    def _reserve(self, size: int, *, named: bool) -> Mapping:
        path = self._temporary()
        fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
        try:
            # Reserved before it is mapped: writing to a hole of a full tmpfs is a SIGBUS.
            for start in range(0, size, _RESERVE_STEP):
                os.posix_fallocate(fd, start, min(_RESERVE_STEP, size - start))
            mapping = Mapping(fd, path, writable=True)
            if not named:
                os.unlink(path)
        except BaseException:
            with suppress(FileNotFoundError):
                os.unlink(path)
            raise
        finally:
            os.close(fd)
        mapping.path = path if named else None
        if mapping.capacity >= _POPULATE_MIN:
            mapping.populate()
        self._fresh += 1
        return mapping

    def _make_room(self) -> None:
        """Give up everything on this node that nobody uses, the neighbours' spare files too."""
        with self._locked():
            self._trim_cache(0)
            self._pool.revisit()
            self._pool.clear()
            self._pool.scavenge()

    def _drop_deleted(self) -> None:
        """Stop counting what other processes deleted."""
        for mapping in [m for m in self._own.values() if m.header.state == RETIRED]:
            self._forget(mapping)

    # -- idle objects: what could be moved out of memory

    def idle(self, nbytes: int) -> list[Key]:
        """Return sealed objects that no view of this process uses, the one used longest ago first.

        Those of this process; of the whole node, if memory_limit is not what keeps *nbytes* bytes out.
        """
        with self._locked():
            self._check_open()
            own = [m.key for m in self._mappings.values() if m.key in self._own and self._is_idle(m)]
            limited = self.memory_limit is not None and self._used + nbytes > self.memory_limit
            used = {m.key for m in self._mappings.values() if m.exports}
        keys = [key for key in own if key is not None]
        if limited:
            return keys
        found = {key for name in os.listdir(self.directory) if (key := key_of(name)) is not None}
        return keys + sorted(found - set(keys) - used)

    def _is_idle(self, mapping: Mapping) -> bool:
        header = mapping.header
        sealed = header.state == SEALED and not header.provisional
        return sealed and not mapping.exports and not self._pool.pinned(header)

    def header(self, key: Key) -> bytes | None:
        """Return the header page of a sealed object for a copy elsewhere; None if it is gone, or its id not confirmed."""
        with self._locked():
            mapping = self._by_key.get(key)
            if mapping is None or mapping.header.state != SEALED or mapping.header.provisional:
                return None
            return mapping.header.copy()

    def vacate(self, key: Key, publish: Callable[[], None]) -> bool:
        """Take a sealed object out of memory unless somebody on the node has a view of it; return whether that was done.

        publish: gives the copy elsewhere its name, while the object can neither be deleted nor come into use.
        """
        path, temporary = self._path(key), self._temporary()
        with self._locked():
            mapping = self._by_key.get(key)
            if mapping is None:
                return False
            try:
                with exclusive(path) as fd:
                    if fd is None or os.fstat(fd).st_ino != mapping.inode or not self._is_idle(mapping):
                        return False
                    publish()
                    fault.point("spill.renamed")
                    os.rename(path, temporary)
            except FileNotFoundError:
                return False
            fault.point("spill.unnamed")
            self._unbind(mapping)
            self._mappings[mapping.inode] = mapping
            mapping.path = temporary
            self._retire(mapping)
            return True

    def if_sealed(self, key: Key, work: Callable[[], object]) -> None:
        """Call *work* if the object is in memory, while it can't be taken out of it; not if somebody is just doing that."""
        path = self._path(key)
        with suppress(FileNotFoundError), exclusive(path) as fd:
            if fd is not None and os.path.exists(path) and os.stat(path).st_ino == os.fstat(fd).st_ino:
                work()

    def _temporary(self) -> str:
        return os.path.join(self.directory, f"{self._prefix}{next(self._counter)}")
