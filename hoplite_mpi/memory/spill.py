"""Objects of a node on its disk: written there when shared memory is short, read back when somebody asks for them.

A spilled object has the same name as in the arena, so every process of the node finds it in the one place or the other. Nothing here
is durable: a spill directory ends with its run.
"""

from __future__ import annotations

import atexit
import fcntl
import gc
import itertools
import logging
import os
import re
import shutil
import socket
import struct
import tempfile
import zlib
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from ..errors import StoreFullError
from ..ids import ObjectID
from ..testing import fault
from ._keeper import Key, key_of, name_of
from ._mapping import HEADER, HeaderFields
from .arena import Arena
from .region import ObjectInfo, Pinned, Region

__all__ = ["Spill", "SpillStatistics", "spill_directory", "sweep_spilled"]

_log = logging.getLogger(__name__)

_SUFFIX = ".spill"
#: held, shared, by every process that has looked into the directory: a sweeper that gets it alone may remove all
_LOCK = "lock"
_CRC = struct.Struct("<I")
#: bytes written, read and summed at once
_PIECE = 4 << 20
#: file systems that are memory, too
_IN_MEMORY = {"tmpfs", "ramfs", "devtmpfs"}


@dataclass(frozen=True)
class SpillStatistics:
    """What one process has moved between memory and disk."""

    spilled: int = 0
    spilled_bytes: int = 0
    restored: int = 0
    restored_bytes: int = 0


def spill_directory(arena: str, parent: str | None) -> str | None:
    """Return where the arena of that path spills to; None: nowhere. parent: a directory, "" for one of this node's disks, None: none.

    Of the node's own: its host's name is in it, so that *parent* may be shared by several.
    """
    if parent == "":
        parent = next((one for one in (tempfile.gettempdir(), "/var/tmp") if _is_on_disk(one)), None)
    return (
        None if parent is None else os.path.join(parent, f"{os.path.basename(arena)}.{socket.gethostname()}{_SUFFIX}")
    )


def _is_on_disk(path: str) -> bool:
    """Whether a directory can be written to and is not memory itself."""
    if not os.access(path, os.W_OK):
        return False
    real, kind, longest = os.path.realpath(path), "", -1
    with open("/proc/self/mounts", errors="surrogateescape") as file:
        for line in file:
            _, mount, file_system, *_ = line.split()
            if f"{real}/".startswith(f"{mount.rstrip('/')}/") and len(mount) >= longest:
                kind, longest = file_system, len(mount)
    return kind not in _IN_MEMORY


def sweep_spilled(parent: str | None, root: str = "/dev/shm") -> list[str]:
    """Remove this node's spill directories in *parent* (as for `spill_directory`) whose run is over; return their names."""
    example = spill_directory("hoplite", parent)
    if example is None:
        return []
    removed, host = [], re.escape(socket.gethostname())
    for path in Path(example).parent.glob(f"hoplite-{os.geteuid()}-*{_SUFFIX}"):
        match = re.fullmatch(rf"(hoplite-\d+-[A-Za-z0-9_-]+)\.{host}{re.escape(_SUFFIX)}", path.name)
        if match is not None and not os.path.exists(os.path.join(root, match[1])) and _remove_if_unused(path):
            removed.append(path.name)
    return removed


def _remove_if_unused(path: Path) -> bool:
    try:
        if path.stat().st_uid != os.geteuid():
            return False
        with open(path / _LOCK, "a") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            shutil.rmtree(path)
    except (OSError, BlockingIOError) as error:
        if not isinstance(error, (BlockingIOError, FileNotFoundError)):
            _log.warning("could not remove %s: %s", path, error)
        return False
    return True


class Spill:
    """One process's part in the spilling of its node. Thread-safe; what touches the disk blocks, so not for the engine's thread.

    arena: of this process; directory: see `spill_directory`; give_up: asked for an object of this process that nobody here
    uses, whether its copy can simply go since another node has one; it has done that then.
    """

    def __init__(self, arena: Arena, directory: str, give_up: Callable[[Key], bool] = lambda key: False) -> None:
        self._arena = arena
        self.directory = directory
        self.give_up = give_up
        #: told of each object that this process has moved, and whether it is on disk only now
        self.on_moved: Callable[[Key, bool], None] = lambda key, spilled: None
        self._lock_file: int | None = None
        self._numbers = itertools.count()
        self._counts = [0, 0, 0, 0]

    def statistics(self) -> SpillStatistics:
        """Return the counts of this process."""
        return SpillStatistics(*self._counts)

    # -- making room

    def make_room(self, nbytes: int) -> bool:
        """Move one idle object out of memory, so that *nbytes* may fit in; return whether there was one.

        The object that was used longest ago, of this process's own; of the whole node's where it is the node that is short of memory.
        StoreFullError if the disk is full, too.
        """
        if self._move_one(nbytes):
            return True
        gc.collect()  # views that lie in reference cycles, a caught exception's for one, keep what they show in use
        return self._move_one(nbytes)

    def _move_one(self, nbytes: int) -> bool:
        return any(self.give_up(key) or self._spill(key) for key in self._arena.idle(nbytes))

    def _spill(self, key: Key) -> bool:
        pinned = self._arena.map(*key)
        if pinned is None:
            return False
        size, page = pinned.meta.nbytes, self._arena.header(key)
        if page is None:
            return False
        try:
            written = self._write(page, pinned.buffer)
            del pinned
            fault.point("spill.written")
            try:
                # a file that is there already is of an earlier life of this object: it is replaced
                if not self._arena.vacate(key, lambda: os.rename(written, self._path(key))):
                    return False  # it was deleted, or somebody has begun to use it
            finally:
                with suppress(FileNotFoundError):
                    os.unlink(written)
        except OSError as error:
            raise StoreFullError(
                f"no room in memory, and {key[0]} ({size} bytes) could not be written to {self.directory}: {error.strerror}: "
                "delete objects, or set Config.spill_directory to a larger disk"
            ) from error
        fault.point("spill.vacated")
        self._counts[0] += 1
        self._counts[1] += size
        _log.info("%s (%d bytes) was spilled to %s", key[0], size, self.directory)
        self.on_moved(key, True)
        return True

    def _write(self, page: bytes, data: memoryview) -> str:
        """Write a copy under a temporary name; return its path."""
        self._open(create=True)
        path = os.path.join(self.directory, f"tmp.{os.getpid()}.{next(self._numbers)}")
        fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
        try:
            crc = 0
            with open(fd, "wb", buffering=0) as file:
                _write_all(file.fileno(), memoryview(page))
                for start in range(0, len(data), _PIECE):
                    piece = data[start : start + _PIECE]
                    crc = zlib.crc32(piece, crc)
                    _write_all(file.fileno(), piece)
                _write_all(file.fileno(), memoryview(_CRC.pack(crc)))
        except BaseException:
            with suppress(FileNotFoundError):
                os.unlink(path)
            raise
        return path

    # -- reading back

    def has(self, key: Key) -> bool:
        """Whether the object is on this node's disk."""
        return os.path.exists(self._path(key))

    def restore(self, oid: ObjectID, version: int) -> Pinned | None:
        """Read an object back into memory; None if it isn't here, or no longer what was written. StoreFullError if there is no room."""
        key = (oid, version)
        try:
            file = open(self._path(key), "rb", buffering=0)  # noqa: SIM115
        except FileNotFoundError:
            return None
        with file:
            info = _info(file.read(HEADER), self._path(key))
            while (region := self._allocate(info)) is None:
                if not self.make_room(info.meta.nbytes):
                    raise StoreFullError(
                        f"no room in memory to read {oid} ({info.meta.nbytes} bytes) back into: all that is there is in use"
                    )
            try:
                if not _read_all(file.fileno(), region.data):
                    _log.error("%s was damaged in %s, and is given up", oid, self.directory)
                    self.remove(key)
                    region.abandon()
                    return None
                region.seal()
            except BaseException:
                region.abandon()
                raise
        pinned = self._arena.map(oid, version)  # another process's, if it was quicker
        if pinned is not None:
            # what is in memory is not on disk as well: another object may have the id one day
            self._arena.if_sealed(key, lambda: self.remove(key))
            self._counts[2] += 1
            self._counts[3] += info.meta.nbytes
            self.on_moved(key, False)
        return pinned

    def _allocate(self, info: ObjectInfo) -> Region | None:
        try:
            return self._arena.allocate(info.oid, info.meta, info.version, info.digest)
        except StoreFullError:
            return None

    def objects(self) -> Iterator[ObjectInfo]:
        """Iterate over the spilled objects of the node, those that are in memory as well included."""
        with suppress(FileNotFoundError):
            for name in os.listdir(self.directory):
                if key_of(name) is not None:
                    with suppress(FileNotFoundError), open(os.path.join(self.directory, name), "rb") as file:
                        yield _info(file.read(HEADER), name)

    def remove(self, key: Key) -> bool:
        """Remove an object from the disk; return whether it was there."""
        try:
            os.unlink(self._path(key))
        except FileNotFoundError:
            return False
        return True

    def close(self) -> None:
        """Let go of the directory; the last process of the node's run removes it."""
        if self._lock_file is not None:
            os.close(self._lock_file)
            self._lock_file = None
        if os.path.exists(self._arena.directory):  # another process's, or this one's, since there are views
            atexit.register(self._end)
        else:
            _remove_if_unused(Path(self.directory))

    def _end(self) -> None:
        self._arena.release()
        if not os.path.exists(self._arena.directory):
            _remove_if_unused(Path(self.directory))

    def _path(self, key: Key) -> str:
        return os.path.join(self.directory, name_of(key))

    def _open(self, create: bool) -> None:
        if self._lock_file is not None:
            return
        if create:
            os.makedirs(os.path.dirname(self.directory), exist_ok=True)
            with suppress(FileExistsError):
                os.mkdir(self.directory, 0o700)
        fd = os.open(os.path.join(self.directory, _LOCK), os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        fcntl.flock(fd, fcntl.LOCK_SH)
        self._lock_file = fd


def _info(page: bytes, path: str) -> ObjectInfo:
    fields = HeaderFields(page, path)
    return ObjectInfo.of_header(fields)


def _write_all(fd: int, data: memoryview) -> None:
    while len(data):
        data = data[os.write(fd, data) :]


def _read_all(fd: int, data: memoryview) -> bool:
    """Fill *data* from the file; return whether it is what was written."""
    crc = 0
    for start in range(0, len(data), _PIECE):
        piece, done = data[start : start + _PIECE], 0
        while done < len(piece):
            count = os.readv(fd, [piece[done:]])
            if count == 0:
                return False
            done += count
        crc = zlib.crc32(piece, crc)
    end = os.read(fd, _CRC.size)
    return len(end) == _CRC.size and _CRC.unpack(end)[0] == crc
