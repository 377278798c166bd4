"""Freed files of one process, kept for the next objects while they are warm."""

from __future__ import annotations

import fcntl
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress

from ._mapping import FILLING, HEADER, RETIRED, Header, HeaderFields, Mapping, punch_hole
from ._roster import Roster

__all__ = ["Pool", "exclusive", "temporary_owner", "temporary_prefix"]

_PREFIX = "tmp."


def temporary_prefix(roster: Roster) -> str:
    """Return what the temporary names of this process begin with."""
    return f"{_PREFIX}{os.getpid()}.{roster.slot}.{roster.generation}."


def temporary_owner(name: str) -> tuple[int, int, int] | None:
    """Return (pid, slot, generation) of the process that a temporary name belongs to; None for other names."""
    parts = name.split(".")
    if not name.startswith(_PREFIX) or len(parts) != 5 or not all(part.isdigit() for part in parts[1:]):
        return None
    return int(parts[1]), int(parts[2]), int(parts[3])


@contextmanager
def exclusive(path: str) -> Iterator[int | None]:
    """Hold the file's lock, if nobody is pinning it just now; yield its descriptor, or None (busy).

    FileNotFoundError if it is gone. Never waits: whoever holds the lock may be stopped.
    """
    fd = os.open(path, os.O_RDWR | os.O_CLOEXEC | os.O_NOFOLLOW)
    try:
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            yield None
            return
        try:
            yield fd
        finally:
            # explicitly: a child forked by another thread may hold the descriptor until it execs
            fcntl.flock(fd, fcntl.LOCK_UN)
    finally:
        os.close(fd)


class Pool:
    """Retired files. Not thread-safe: the arena's lock is held around every call.

    A file is used again only after its pins have been looked at under its lock, with its name gone and its state
    RETIRED: a reader pins under the same lock and looks at name and state after that, so one of the two sees the
    other.
    """

    def __init__(self, directory: str, roster: Roster, limit: int, forget: Callable[[Mapping], None]) -> None:
        self._directory = directory
        self._roster = roster
        self._limit = limit
        #: lets the owner drop its references, so that the file is unmapped
        self._forget = forget
        #: unpinned when they came in
        self._free: list[Mapping] = []
        #: still pinned by other processes, or busy
        self._aside: list[Mapping] = []

    def nbytes(self) -> int:
        """Return the bytes held for recycling, those that others still pin included."""
        return sum(m.capacity for m in self._free) + sum(m.capacity for m in self._aside)

    def put(self, mapping: Mapping) -> None:
        """Take over a retired file that this process has no views of."""
        room = self.nbytes() + mapping.capacity <= self._limit
        if mapping.path is None:  # never had readers
            self._keep(self._free, mapping) if room else self._forget(mapping)
            return
        try:
            with exclusive(mapping.path) as fd:
                if fd is not None and self._vacant(mapping.header):
                    if room:
                        self._keep(self._free, mapping)
                    else:
                        self._destroy(mapping, fd)
                elif room:
                    self._keep(self._aside, mapping)
                else:  # its memory goes when its readers go
                    os.unlink(mapping.path)
                    self._forget(mapping)
        except FileNotFoundError:  # somebody who needed the room took it
            self._forget(mapping)

    @staticmethod
    def _keep(where: list[Mapping], mapping: Mapping) -> None:
        where.append(mapping)

    def _destroy(self, mapping: Mapping, fd: int) -> None:
        assert mapping.path is not None
        punch_hole(fd, mapping.size)
        with suppress(FileNotFoundError):
            os.unlink(mapping.path)
        self._forget(mapping)

    def pinned(self, header: Header) -> bool:
        """Whether another live process has a view of the file."""
        return any(
            slot != self._roster.slot and self._roster.alive(slot, generation) for slot, generation in header.pins()
        )

    def _vacant(self, header: Header) -> bool:
        return header.state == RETIRED and not self.pinned(header)

    def revisit(self) -> None:
        """Look again at the files that others had pinned."""
        aside, self._aside = self._aside, []
        for mapping in aside:
            self.put(mapping)

    def take(self, capacity: int, *, named: bool) -> Mapping | None:
        """Return a freed file of fitting size, FILLING and writable.

        None if there is none. Unless *named* it has no name.
        """
        self.revisit()
        most = capacity + capacity // 4 + 16 * HEADER
        fitting = [m for m in self._free if capacity <= m.capacity <= most and (m.path is not None or not named)]
        for mapping in sorted(fitting, key=lambda m: (m.path is not None, m.capacity)):
            if mapping.path is None or self._acquire(mapping, named=named):
                self._free.remove(mapping)
                mapping.make_writable()
                return mapping
        return None

    def _acquire(self, mapping: Mapping, *, named: bool) -> bool:
        assert mapping.path is not None
        try:
            with exclusive(mapping.path) as fd:
                if fd is None or not self._vacant(mapping.header):
                    return False
                mapping.header.state = FILLING
                if not named:
                    os.unlink(mapping.path)
                    mapping.path = None
                return True
        except FileNotFoundError:
            self._free.remove(mapping)
            self._forget(mapping)
            return False

    def clear(self) -> None:
        """Give back what is free."""
        free, self._free = self._free, []
        for mapping in free:
            if mapping.path is None:
                self._forget(mapping)
                continue
            with suppress(FileNotFoundError), exclusive(mapping.path) as fd:
                if fd is None or not self._vacant(mapping.header):
                    self._aside.append(mapping)
                    continue
                self._destroy(mapping, fd)
            self._forget(mapping)

    def scavenge(self) -> None:
        """Remove what other processes keep for recycling, or left behind when they died.

        Room in /dev/shm is everybody's: nobody may be refused an object because a neighbour keeps garbage warm.
        """
        for name in os.listdir(self._directory):
            owner = temporary_owner(name)
            if owner is None or owner[1] == self._roster.slot:
                continue
            path = os.path.join(self._directory, name)
            with suppress(FileNotFoundError), exclusive(path) as fd:
                if fd is None:
                    continue
                if not self._roster.alive(*owner[1:]):
                    os.unlink(path)
                elif os.fstat(fd).st_size >= HEADER and self._is_free(fd, path):
                    os.unlink(path)
                    punch_hole(fd, os.fstat(fd).st_size)

    def _is_free(self, fd: int, path: str) -> bool:
        page = os.pread(fd, HEADER, 0)
        if not page.startswith(b"HOPLITE") or HeaderFields(page, path).state != RETIRED:
            return False
        mapping = Mapping(fd, path, writable=False)  # a name of its own: the header is gone with it
        return self._vacant(mapping.header)

    def forget_all(self) -> None:
        """Drop everything; the names are the caller's business."""
        self._free.clear()
        self._aside.clear()
