"""The node's shared-memory arena: one file per object in ``/dev/shm/hoplite-<uid>-<run>/``.

The kernel is the allocator: no process can corrupt it by dying in it, and an unlinked file lives until its last
mapping is gone. A file is named ``tmp.<pid>.<slot>.<generation>.<n>`` while it is filled or free, and
``<oid>[.v<version>]`` while it is sealed; only a rename leads from one to the other, so a reader finds an object
whole or not at all.
"""

from __future__ import annotations

import atexit
import errno
import os
import re
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass

import msgpack

from ..errors import ClosedError, StoreFullError
from ..ids import ObjectID
from ..meta import Meta
from ..testing import fault
from ._allocator import Allocator
from ._keeper import Role, key_of
from ._mapping import HEADER, META_LIMIT, RETIRED, SEALED, Export, HeaderFields, Mapping, rename_new
from ._pool import temporary_owner
from ._roster import Roster
from ._sweep import sweep
from .region import ObjectInfo, Pinned, Region, meta_of

__all__ = ["Arena", "ArenaStatistics", "ObjectInfo", "Pinned", "Region", "arena_directory", "sweep"]


@dataclass(frozen=True)
class ArenaStatistics:
    """Counts of one process. Bytes are those of the data."""

    used: int
    recyclable: int
    quarantined: int
    allocations_fresh: int
    allocations_recycled: int
    mappings: int


def arena_directory(run: str, root: str = "/dev/shm") -> str:
    """Return the directory of a run's arena; ValueError if *run* can't be part of a file name."""
    if not re.fullmatch(r"[A-Za-z0-9_-]{1,64}", run):
        raise ValueError(f"run id {run!r} has to be 1 to 64 letters, digits, - or _")
    return os.path.join(root, f"hoplite-{os.geteuid()}-{run}")


#: what an MPI request may write into until the process exits; the exports keep mapping and pin
_quarantined: list[Export] = []


class Arena(Allocator):
    """One process's part in the arena of its node. Thread-safe.

    memory_limit: bytes this process may have allocated and not deleted (None: as much as the file system has);
    recycle_limit: bytes of freed files kept warm; root: a tmpfs; create: make the directory (a worker, which must
    not outlive its run, doesn't).
    """

    def __init__(
        self,
        run: str,
        rank: int,
        incarnation: int,
        *,
        memory_limit: int | None = None,
        recycle_limit: int = 1 << 30,
        root: str = "/dev/shm",
        create: bool = True,
    ) -> None:
        directory = arena_directory(run, root)
        try:
            roster = Roster(directory, create=create)
        except OSError as error:
            if error.errno != errno.ENOSPC:
                raise
            raise StoreFullError(
                f"{root} is full: no room to start an arena; delete something or mount it larger"
            ) from error
        super().__init__(directory, roster, memory_limit, recycle_limit)
        self.rank = rank
        self.incarnation = incarnation
        self._quarantined_bytes = 0

    @classmethod
    def attach(
        cls, run: str, rank: int, incarnation: int, *, memory_limit: int | None = None, root: str = "/dev/shm"
    ) -> Arena:
        """Join the arena of a live run from a process that is no rank, such as a worker.

        ClosedError if the run is gone. It recycles nothing: what it allocates, its rank adopts or reaps.
        """
        return cls(run, rank, incarnation, memory_limit=memory_limit, recycle_limit=0, root=root, create=False)

    # -- allocating

    def allocate(
        self, oid: ObjectID, meta: Meta, version: int = 0, digest: bytes | None = None, provisional: bool = False
    ) -> Region:
        """Return memory for an object, reserved; StoreFullError if there is no room, and then nothing has changed.

        digest: 16 bytes, of the object's bytes, for whoever adopts it. provisional: other bytes may yet win its id; see `confirm`.
        Takes about 0.5 s per GiB that can't be recycled, without the GIL. ValueError if the dtype's description
        exceeds the header.
        """
        wire: bytes = msgpack.packb(meta.to_wire())
        if len(wire) > META_LIMIT:
            raise ValueError(
                f"{oid!r}: dtype and shape take {len(wire)} bytes, {META_LIMIT} fit: use a dtype with fewer fields"
            )
        mapping = self._obtain(meta.nbytes, f"{oid!r}", named=True)
        roster = self._roster
        mapping.header.write(
            bytes(oid),
            version,
            meta.nbytes,
            digest or bytes(16),
            provisional,
            self.rank,
            self.incarnation,
            roster.slot,
            roster.generation,
            wire,
        )
        with self._locked():
            return Region(self, mapping, self._export(mapping, meta.nbytes, writable=True), oid, meta, version)

    def allocate_private(self, nbytes: int) -> Region:
        """Return memory that no other process sees and that is gone with this one. Errors as `allocate`."""
        mapping = self._obtain(nbytes, "a private region", named=False)
        with self._locked():
            return Region(self, mapping, self._export(mapping, nbytes, writable=True), None, None, 0)

    def warm(self, nbytes: int) -> None:
        """Make the next allocation of this size a recycled one, as far as recycle_limit goes. Errors as `allocate`."""
        mapping = self._obtain(nbytes, "recycling", named=True, fresh=True)
        with self._locked():
            self._retire(mapping)

    # -- the life of a region; called by Region

    def _seal(self, region: Region, mapping: Mapping) -> bool:
        if region.oid is None:
            raise ClosedError("a private region can't be sealed: allocate it under an ObjectID")
        key = (region.oid, region.version)
        with self._locked():
            self._check_open()
            if mapping.role is not Role.FILLING or mapping.path is None:
                raise ClosedError(f"{region!r} can't be sealed: it is {mapping.role.value}")
            mapping.header.set_version(region.version)
            mapping.header.state = SEALED
            fault.point("arena.before_rename")
            if not rename_new(mapping.path, self._path(key)):
                self._retire(mapping)
                return False
            fault.point("arena.after_rename")
            mapping.path = None
            mapping.role = Role.PUBLISHED
            self._bind(mapping, key)
            self._own[key] = mapping
            return True

    def _abandon(self, mapping: Mapping) -> None:
        with self._locked():
            if mapping.role is Role.FILLING:
                self._retire(mapping)

    def _quarantine(self, mapping: Mapping) -> None:
        with self._locked():
            if mapping.role is Role.QUARANTINED:
                return
            # Counted on: the memory is in use. A pin of its own: another process may have renamed the file into its
            # pool already.
            charge, mapping.charge = mapping.charge, 0
            names = [mapping.path] if mapping.path is not None else []
            if mapping.role is Role.PUBLISHED and mapping.key is not None:
                names.append(self._path(mapping.key))
            mapping.exports += 1
            self._exported += 1
            mapping.header.pin(self._roster.slot, self._roster.generation)
            _quarantined.append(Export(self, mapping, 0, writable=False))
            for name in names:
                with suppress(FileNotFoundError):
                    if os.stat(name).st_ino == mapping.inode:
                        os.unlink(name)
            mapping.header.state = RETIRED
            mapping.role = Role.QUARANTINED
            mapping.path = None
            self._forget(mapping)
            mapping.charge = charge
            self._quarantined_bytes += mapping.capacity

    # -- sealed objects of anyone on the node

    def map(self, oid: ObjectID, version: int = 0) -> Pinned | None:
        """Return a read-only view of a sealed object, without copying; None if this node has none."""
        key = (oid, version)
        with self._locked():
            self._check_open()
            mapping = self._by_key.get(key)
            if mapping is None or not mapping.exports or mapping.header.state != SEALED:
                mapping = self._pin(key)
                if mapping is None:
                    return None
            fields = mapping.header.fields(self._path(key))
            data = self._export(mapping, fields.nbytes, writable=False)
            return Pinned(oid, version, meta_of(fields.meta), data)

    def delete(self, oid: ObjectID, version: int = 0) -> bool:
        """Remove an object from the node; return whether it was there. Views of it, on any process, keep its bytes."""
        key = (oid, version)
        temporary = self._temporary()
        with self._locked():
            self._check_open()
            own = self._own.get(key)
            try:
                # The rename decides who of several deleters has the file from now on.
                os.rename(self._path(key), temporary)
            except FileNotFoundError:
                if own is not None:
                    self._forget(own)
                return False
            fault.point("delete.renamed")
            fd = os.open(temporary, os.O_RDWR | os.O_CLOEXEC | os.O_NOFOLLOW)
            try:
                mapping = self._mappings.get(os.fstat(fd).st_ino) or Mapping(fd, temporary, writable=True)
            finally:
                os.close(fd)
            if own is not None and own is not mapping:
                self._forget(own)
            self._unbind(mapping)
            self._mappings[mapping.inode] = mapping
            mapping.path = temporary
            self._retire(mapping)
            return True

    def adopt(self, oid: ObjectID, version: int = 0) -> bool:
        """Make this process the object's owner, as its header tells and for memory_limit.

        Return False if it is not on the node.
        """
        pinned = self.map(oid, version)
        if pinned is None:
            return False
        with self._locked():
            mapping = self._by_key.get((oid, version))
            if mapping is None or mapping.header.state != SEALED:
                return False
            mapping.header.set_owner(self.rank, self.incarnation, self._roster.slot, self._roster.generation)
            if (oid, version) not in self._own:
                self._own[oid, version] = mapping
                mapping.role = Role.PUBLISHED
                mapping.charge = mapping.capacity
                self._used += mapping.charge
            return True

    def confirm(self, oid: ObjectID, version: int = 0) -> None:
        """Mark a sealed object that was provisional as what its id stands for: whoever adopts it may serve it."""
        with self._locked():
            mapping = self._by_key.get((oid, version))
            if mapping is not None:
                mapping.header.confirm()

    def file(self, oid: ObjectID, version: int = 0) -> tuple[str, int]:
        """Return the path of a sealed object's file and the offset of its data, for a process that only reads it."""
        return self._path((oid, version)), HEADER

    def exists(self, oid: ObjectID, version: int = 0) -> bool:
        """Whether the node has the object, sealed."""
        fields = self._read(self._path((oid, version)))
        return fields is not None and fields.state == SEALED

    def objects(self) -> Iterator[ObjectInfo]:
        """Iterate over the sealed objects of the node."""
        for name in os.listdir(self.directory):
            key = key_of(name)
            fields = None if key is None else self._read(os.path.join(self.directory, name))
            if key is not None and fields is not None and fields.state == SEALED:
                yield ObjectInfo.of_header(fields)

    @staticmethod
    def _read(path: str) -> HeaderFields | None:
        try:
            fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW)
        except FileNotFoundError:
            return None
        try:
            return HeaderFields(os.pread(fd, HEADER, 0), path)
        finally:
            os.close(fd)

    # -- housekeeping

    def used(self) -> int:
        """Return the bytes that this process allocated or adopted, and has neither deleted nor given back.

        Quarantined ones count.
        """
        return self._used

    def statistics(self) -> ArenaStatistics:
        """Return the counts of this process."""
        with self._locked():
            return ArenaStatistics(
                self._used,
                self._pool.nbytes(),
                self._quarantined_bytes,
                self._fresh,
                self._recycled,
                len(self._mappings),
            )

    def trim(self) -> None:
        """Unmap what others deleted, and recycle what is no longer pinned; for idle times."""
        with self._locked():
            self._check_open()
            self._drop_deleted()
            self._trim_cache(len(self._mappings))
            self._pool.revisit()

    def reap(self, pid: int | None = None) -> int:
        """Remove what a dead process (default.

        Any) had not sealed; return the number of files. Its pins count for nothing anyway.
        """
        removed = 0
        for name in os.listdir(self.directory):
            owner = temporary_owner(name)
            if owner is not None and pid in (None, owner[0]) and not self._roster.alive(*owner[1:]):
                with suppress(FileNotFoundError):
                    os.unlink(os.path.join(self.directory, name))
                    removed += 1
        return removed

    def close(self) -> None:
        """Leave the arena: unsealed regions are gone, sealed objects stay for the others.

        The last one removes the directory. Views stay valid, and pin, until they die. May be called twice; never waits
        for another process.
        """
        with self._locked():
            if self._closed:
                return
            self._closed = True
            self._pool.forget_all()
            with suppress(FileNotFoundError):  # the directory, or a file of it, may have been removed under us
                for name in os.listdir(self.directory):
                    if name.startswith(self._prefix):
                        os.unlink(os.path.join(self.directory, name))
            self._mappings.clear()
            self._by_key.clear()
            self._own.clear()
            if self._roster.remove_if_last():
                self._roster.leave()
                return
            self._leave_if_unpinned()
            if self._exported:
                atexit.register(self.release)

    def release(self) -> None:
        """Let go of the arena although there are views: the process ends. They stay valid until then, but pin no longer."""
        self._roster.remove_if_last()
        self._roster.leave()

    def __enter__(self) -> Arena:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()
