"""Lifetimes in one process's part of the arena.

Which files are mapped, which of them are pinned, and what becomes of them after that.
"""

from __future__ import annotations

import enum
import fcntl
import os
import re
import threading
import time
import weakref
from collections import OrderedDict, deque
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np

from ..errors import ClosedError
from ..ids import ObjectID
from ._mapping import RETIRED, SEALED, Export, Mapping
from ._pool import Pool
from ._roster import Roster

__all__ = ["Keeper", "Key", "Role", "key_of", "name_of"]

#: mappings without a view that are kept for the next `map`
_CACHE_LIMIT = 1024
#: seconds to wait for the lock of a published file: only somebody who took it for a freed one can hold it, for
#: microseconds
_PIN_TIMEOUT = 0.25

Key = tuple[ObjectID, int]


def name_of(key: Key) -> str:
    """Return the name of a sealed object's file."""
    return key[0].hex() if key[1] == 0 else f"{key[0].hex()}.v{key[1]}"


def key_of(name: str) -> Key | None:
    """Return the object whose file has that name; None for other files."""
    match = re.fullmatch(r"([0-9a-f]{32})(?:\.v([0-9]+))?", name)
    return None if match is None else (ObjectID.from_hex(match[1]), int(match[2] or 0))


class Role(enum.Enum):
    """What a mapped file is to this process. Final: QUARANTINED."""

    FILLING = "being filled"
    PUBLISHED = "published by us"
    FOREIGN = "read only"
    RETIRED = "retired by us"
    QUARANTINED = "quarantined"


#: every live keeper of this process, for the child of a fork
_keepers: weakref.WeakSet[Keeper] = weakref.WeakSet()


class Keeper:
    """The mappings of one process, by file and by object, and the pins that its views hold."""

    def __init__(self, directory: str, roster: Roster, recycle_limit: int) -> None:
        self.directory = directory
        self._roster = roster
        self._lock = threading.Lock()
        self._pool = Pool(directory, roster, recycle_limit, self._forget)
        #: sum of the mappings' charges
        self._used = 0
        #: live exports of all mappings
        self._exported = 0
        #: inode → mapping, least recently used first; every mapped file that has, or had, a name
        self._mappings: OrderedDict[int, Mapping] = OrderedDict()
        #: the mapping last seen under this key; to be trusted only while it is pinned
        self._by_key: dict[Key, Mapping] = {}
        #: what this process published or adopted, and nobody deleted through it
        self._own: dict[Key, Mapping] = {}
        #: mappings whose export died; filled from any thread and from within garbage collection, so without the lock
        self._dead: deque[Mapping] = deque()
        self._closed = False
        self._forked = False
        _keepers.add(self)

    @contextmanager
    def _locked(self) -> Iterator[None]:
        with self._lock:
            yield
        self._drain()

    def _drain(self) -> None:
        """Act on dead exports. Never waits.

        It may run in a garbage collection inside of `_locked`, whose exit then does the work.
        """
        while self._dead and self._lock.acquire(blocking=False):
            try:
                while self._dead:
                    self._export_died(self._dead.popleft())
            finally:
                self._lock.release()

    def _export(self, mapping: Mapping, nbytes: int, *, writable: bool) -> np.ndarray[Any, np.dtype[np.uint8]]:
        """Return an array over the data that holds a pin."""
        export = Export(self, mapping, nbytes, writable=writable)
        # The reference to the reference lies in the mapping, which the export holds: so the callback always comes.
        mapping.watchers.add(weakref.ref(export, lambda watcher: self._watch(mapping, watcher)))
        mapping.exports += 1
        self._exported += 1
        mapping.header.pin(self._roster.slot, self._roster.generation)
        return np.asarray(export)

    def _watch(self, mapping: Mapping, watcher: weakref.ref[Export]) -> None:
        if self._forked:  # the pin is the parent's
            return
        mapping.watchers.discard(watcher)
        self._dead.append(mapping)
        self._drain()

    def _export_died(self, mapping: Mapping) -> None:
        mapping.exports -= 1
        self._exported -= 1
        if mapping.exports:
            return
        mapping.header.unpin(self._roster.slot)
        if mapping.role is Role.FILLING:  # its region was dropped
            self._retire(mapping)
        elif mapping.role is Role.RETIRED:
            self._settle(mapping)
        elif mapping.header.state == RETIRED:  # deleted by another process
            self._forget(mapping)
        if self._closed:
            self._leave_if_unpinned()

    def _retire(self, mapping: Mapping) -> None:
        """Take note that nobody may pin the file any more; its name is temporary, or gone."""
        mapping.header.state = RETIRED
        mapping.role = Role.RETIRED
        self._uncharge(mapping)
        if not mapping.exports:
            self._settle(mapping)

    def _settle(self, mapping: Mapping) -> None:
        if self._closed:  # its name went then
            self._forget(mapping)
        else:
            self._pool.put(mapping)

    def _uncharge(self, mapping: Mapping) -> None:
        self._used -= mapping.charge
        mapping.charge = 0

    def _forget(self, mapping: Mapping) -> None:
        """Drop every reference to the mapping, which unmaps it unless views live."""
        if self._mappings.get(mapping.inode) is mapping:
            del self._mappings[mapping.inode]
        self._unbind(mapping)

    def _unbind(self, mapping: Mapping) -> None:
        key, mapping.key = mapping.key, None
        if key is not None:
            if self._by_key.get(key) is mapping:
                del self._by_key[key]
            if self._own.get(key) is mapping:
                del self._own[key]
                self._uncharge(mapping)

    def _bind(self, mapping: Mapping, key: Key) -> None:
        if mapping.key != key:
            self._unbind(mapping)
            mapping.key = key
        self._by_key[key] = mapping

    def _check_open(self) -> None:
        if self._closed:
            raise ClosedError(f"the arena {self.directory} was closed in this process")

    def _path(self, key: Key) -> str:
        return os.path.join(self.directory, name_of(key))

    def _pin(self, key: Key) -> Mapping | None:
        path = self._path(key)
        deadline = time.monotonic() + _PIN_TIMEOUT
        while True:
            try:
                fd = os.open(path, os.O_RDWR | os.O_CLOEXEC | os.O_NOFOLLOW)
            except FileNotFoundError:
                return None
            try:
                fcntl.flock(fd, fcntl.LOCK_SH | fcntl.LOCK_NB)
                try:
                    return self._pin_locked(fd, path, key)
                finally:
                    fcntl.flock(fd, fcntl.LOCK_UN)
            except BlockingIOError:
                if time.monotonic() > deadline:
                    return None
            finally:
                os.close(fd)
            time.sleep(0.0001)

    def _pin_locked(self, fd: int, path: str, key: Key) -> Mapping | None:
        """Pin under the file's shared lock, and only then look whether the object is still there, see `Pool`."""
        inode = os.fstat(fd).st_ino
        mapping = self._mappings.get(inode)
        if mapping is None:
            if len(self._mappings) - len(self._own) > _CACHE_LIMIT:
                self._trim_cache(_CACHE_LIMIT // 2)
            mapping = Mapping(fd, path, writable=False)
            mapping.header.fields(path)
            mapping.role = Role.FOREIGN
        mapping.header.pin(self._roster.slot, self._roster.generation)
        try:
            current = os.stat(path).st_ino == inode
        except FileNotFoundError:
            current = False
        if not current or mapping.header.state != SEALED:
            if not mapping.exports:
                mapping.header.unpin(self._roster.slot)
            return None
        if mapping.key != key:  # recycled by another process since we published it
            mapping.role = Role.FOREIGN
        self._mappings[inode] = mapping
        self._mappings.move_to_end(inode)
        self._bind(mapping, key)
        return mapping

    def _trim_cache(self, limit: int) -> None:
        """Unmap files of others that were deleted, and the longest unused ones of the rest until *limit* are left."""
        idle = [m for m in self._mappings.values() if m.role is Role.FOREIGN and not m.exports]
        for count, mapping in enumerate(idle):
            if len(idle) - count > limit or mapping.header.state == RETIRED:
                self._forget(mapping)

    def _leave_if_unpinned(self) -> None:
        if not self._exported:
            self._roster.remove_if_last()
            self._roster.leave()

    def _after_fork_in_child(self) -> None:
        # Pins, locks and names are the parent's; a lock may have been held by a thread that does not exist here.
        self._lock = threading.Lock()
        self._forked = self._closed = True
        self._roster.abandon()


def _after_fork_in_child() -> None:
    for keeper in list(_keepers):
        keeper._after_fork_in_child()


os.register_at_fork(after_in_child=_after_fork_in_child)
