"""One mapped file of the arena: its header, its data, and the system calls for both.

``mmap.mmap`` is not used: it keeps a file descriptor per mapping and can't be closed under a buffer. Here a mapping
lives as long as something refers to it, and every buffer handed out does.
"""

from __future__ import annotations

import ctypes
import errno
import os
import struct
from typing import Any

import numpy as np

from ..errors import HopliteError
from ..ids import ObjectID

__all__ = [
    "FILLING",
    "HEADER",
    "META_LIMIT",
    "RETIRED",
    "SEALED",
    "SLOTS",
    "Export",
    "Header",
    "HeaderFields",
    "Mapping",
    "punch_hole",
    "rename_new",
]

#: bytes before the data: one page, so that the data is page-aligned
HEADER = 4096
#: processes that can share an arena: one pin each in every header
SLOTS = 1024
#: being written; under a temporary name
FILLING = 1
#: complete and immutable; under the object's name
SEALED = 2
#: nobody may pin it any more; its bytes stay as they are while a pin stands
RETIRED = 3

_MAGIC = b"HOPLITE\x02"  # the last byte is the version of this layout
_FIXED = struct.Struct(
    "=8s I I 16s Q Q 16s i i I H H I"
)  # magic state provisional | oid version nbytes digest rank incarnation pid slot generation meta_len
_STATE_OFFSET = 8
_PROVISIONAL_OFFSET = 12
_VERSION_OFFSET = 32
_OWNER_OFFSET = 64
_PINS_OFFSET = 2048
META_LIMIT = _PINS_OFFSET - _FIXED.size

_PROT_READ, _PROT_WRITE, _MAP_SHARED = 1, 2, 1
_MADV_POPULATE_WRITE = 23
_PUNCH_HOLE_KEEP_SIZE = 0x02 | 0x01
_RENAME_NOREPLACE = 1
_AT_FDCWD = -100

_libc = ctypes.CDLL(None, use_errno=True)
_libc.mmap.restype = ctypes.c_void_p
_libc.mmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int, ctypes.c_int, ctypes.c_int, ctypes.c_long]
_libc.munmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t]
_libc.mprotect.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
_libc.madvise.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
_libc.fallocate.argtypes = [ctypes.c_int, ctypes.c_int, ctypes.c_long, ctypes.c_long]
_libc.renameat2.argtypes = [ctypes.c_int, ctypes.c_char_p, ctypes.c_int, ctypes.c_char_p, ctypes.c_uint]


def _check(failed: bool, what: str) -> None:
    if failed:
        code = ctypes.get_errno()
        raise OSError(code, f"{what}: {os.strerror(code)}")


def rename_new(source: str, target: str) -> bool:
    """Rename atomically unless *target* exists; return whether it was done."""
    result = _libc.renameat2(_AT_FDCWD, os.fsencode(source), _AT_FDCWD, os.fsencode(target), _RENAME_NOREPLACE)
    if result != 0 and ctypes.get_errno() == errno.EEXIST:
        return False
    _check(result != 0, f"rename {source} to {target}")
    return True


def punch_hole(fd: int, size: int) -> None:
    """Give the memory of the data back although others may still have the file mapped.

    Nobody may look at the data again.
    """
    if size > HEADER:
        _check(_libc.fallocate(fd, _PUNCH_HOLE_KEEP_SIZE, HEADER, size - HEADER) != 0, "punch hole")


class HeaderFields:
    """The fixed fields of a header, copied out of it at one time."""

    __slots__ = (
        "digest",
        "generation",
        "incarnation",
        "meta",
        "nbytes",
        "oid",
        "pid",
        "provisional",
        "rank",
        "slot",
        "state",
        "version",
    )

    def __init__(self, page: bytes | memoryview, path: str) -> None:
        if len(page) < _PINS_OFFSET:
            raise HopliteError(f"{path} is shorter than an arena header: it was not written by this package; remove it")
        (
            magic,
            self.state,
            self.provisional,
            oid,
            self.version,
            self.nbytes,
            self.digest,
            self.rank,
            self.incarnation,
            self.pid,
            self.slot,
            self.generation,
            size,
        ) = _FIXED.unpack_from(page)
        if magic != _MAGIC or size > META_LIMIT:
            raise HopliteError(
                f"{path} has no arena header of this version: another version of the package wrote it; remove it"
            )
        self.oid = ObjectID(oid)
        #: msgpack of Meta.to_wire()
        self.meta = bytes(page[_FIXED.size : _FIXED.size + size])


class Header:
    """The first page of a mapped file. Valid only while its `Mapping` is."""

    __slots__ = ("_page", "_pins", "_state")

    def __init__(self, address: int) -> None:
        self._page = memoryview((ctypes.c_ubyte * HEADER).from_address(address)).cast("B")
        #: one aligned word, so that it changes at once for everybody
        self._state = np.frombuffer(self._page, np.uint32, 1, _STATE_OFFSET)
        #: pins[slot] is written by the process that has the slot only: its generation while it has a view, else 0
        self._pins = np.frombuffer(self._page, np.uint16, SLOTS, _PINS_OFFSET)

    @property
    def state(self) -> int:
        return int(self._state[0])

    @state.setter
    def state(self, value: int) -> None:
        self._state[0] = value

    @property
    def provisional(self) -> bool:
        """Whether other bytes may yet win the object's id."""
        return bool(struct.unpack_from("=I", self._page, _PROVISIONAL_OFFSET)[0])

    def fields(self, path: str) -> HeaderFields:
        """Return a copy of the fields; HopliteError if this is no header."""
        return HeaderFields(self._page, path)

    def write(
        self,
        oid: bytes,
        version: int,
        nbytes: int,
        digest: bytes,
        provisional: bool,
        rank: int,
        incarnation: int,
        slot: int,
        generation: int,
        meta: bytes,
    ) -> None:
        """Describe a file that is FILLING. Pins stay as they are: those of others are theirs."""
        pid = os.getpid()
        _FIXED.pack_into(
            self._page,
            0,
            _MAGIC,
            FILLING,
            provisional,
            oid,
            version,
            nbytes,
            digest,
            rank,
            incarnation,
            pid,
            slot,
            generation,
            len(meta),
        )
        self._page[_FIXED.size : _FIXED.size + len(meta)] = meta

    def copy(self) -> bytes:
        """Return the page as it is to be written to a file of its own: without pins."""
        return bytes(self._page[:_PINS_OFFSET]) + bytes(HEADER - _PINS_OFFSET)

    def set_version(self, version: int) -> None:
        struct.pack_into("=Q", self._page, _VERSION_OFFSET, version)

    def confirm(self) -> None:
        """The object is what its id stands for in the whole run."""
        struct.pack_into("=I", self._page, _PROVISIONAL_OFFSET, 0)

    def set_owner(self, rank: int, incarnation: int, slot: int, generation: int) -> None:
        """Name another live process as the owner."""
        struct.pack_into("=iiIHH", self._page, _OWNER_OFFSET, rank, incarnation, os.getpid(), slot, generation)

    def pin(self, slot: int, generation: int) -> None:
        self._pins[slot] = generation

    def unpin(self, slot: int) -> None:
        self._pins[slot] = 0

    def pins(self) -> list[tuple[int, int]]:
        """Return (slot, generation) of all pins, of dead processes too."""
        pins = self._pins.copy()  # they change while we look
        return [(int(slot), int(pins[slot])) for slot in np.flatnonzero(pins)]


class Mapping:
    """A file of the arena, mapped shared. Unmapped when the last reference goes; every `Export` is one."""

    __slots__ = (
        "__weakref__",
        "_writable",
        "address",
        "charge",
        "exports",
        "header",
        "inode",
        "key",
        "path",
        "role",
        "size",
        "watchers",
    )

    def __init__(self, fd: int, path: str, *, writable: bool) -> None:
        status = os.fstat(fd)
        #: of the whole file, header included
        self.size = status.st_size
        self.inode = status.st_ino
        if self.size < HEADER:
            raise HopliteError(f"{path} is shorter than an arena header: it was not written by this package; remove it")
        address = _libc.mmap(None, self.size, _PROT_READ | _PROT_WRITE, _MAP_SHARED, fd, 0)
        _check(address in (None, ctypes.c_void_p(-1).value), f"map {self.size} bytes of {path}")
        self.address: int = address
        self._writable = True
        self.header = Header(address)
        #: live buffers over the data; the process's pin stands while this is above 0
        self.exports = 0
        #: weak references to the exports, here only so that they outlive them
        self.watchers: set[Any] = set()
        #: what the file is to this process, see arena.Role
        self.role: Any = None
        #: (ObjectID, version) under which it is published
        self.key: tuple[ObjectID, int] | None = None
        #: temporary name, while it has one
        self.path: str | None = None
        #: bytes it counts for in memory_limit
        self.charge = 0
        if not writable and self.size > HEADER:
            # a reader that writes through a raw pointer crashes itself instead of changing the object under the others
            _check(_libc.mprotect(address + HEADER, self.size - HEADER, _PROT_READ) != 0, f"protect {path}")
            self._writable = False

    @property
    def capacity(self) -> int:
        return self.size - HEADER

    def make_writable(self) -> None:
        """Allow writing to data that was mapped for reading."""
        if not self._writable:
            _check(_libc.mprotect(self.address + HEADER, self.capacity, _PROT_READ | _PROT_WRITE) != 0, "protect")
            self._writable = True

    def populate(self) -> None:
        """Touch all pages in one system call, without the GIL."""
        # A failure costs page faults later and nothing else: kernels before 5.14 don't know it, and the space is
        # reserved already.
        _libc.madvise(self.address + HEADER, self.capacity, _MADV_POPULATE_WRITE)

    def __del__(self) -> None:
        address = getattr(self, "address", None)
        if address is not None and _libc is not None:
            _libc.munmap(address, self.size)


class Export:
    """What arrays over a mapping's data are based on.

    Alive exactly as long as one of them, or a view derived from it, is.
    """

    __slots__ = ("__array_interface__", "__weakref__", "arena", "mapping")

    def __init__(self, arena: Any, mapping: Mapping, nbytes: int, *, writable: bool) -> None:
        #: an arena that nobody refers to any more has to keep its slot while views live
        self.arena = arena
        self.mapping = mapping
        self.__array_interface__ = {
            "version": 3,
            "typestr": "|u1",
            "shape": (nbytes,),
            "data": (mapping.address + HEADER, not writable),
        }
