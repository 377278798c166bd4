"""What the arena hands out: regions being filled, and views of sealed objects."""

from __future__ import annotations

import functools
from typing import TYPE_CHECKING, Any, NamedTuple

import msgpack
import numpy as np

from ..errors import ClosedError
from ..ids import ObjectID
from ..meta import Meta

if TYPE_CHECKING:
    from ._mapping import HeaderFields, Mapping
    from .arena import Arena

__all__ = ["ObjectInfo", "Pinned", "Region", "meta_of"]

Bytes = np.ndarray[Any, np.dtype[np.uint8]]


@functools.lru_cache(maxsize=1024)
def meta_of(wire: bytes) -> Meta:
    """Return the meta of a header; many objects of a run are alike."""
    return Meta.from_wire(msgpack.unpackb(wire))


class ObjectInfo(NamedTuple):
    """A sealed object of this node, as its header tells."""

    oid: ObjectID
    version: int
    meta: Meta
    #: of the process that sealed or adopted it
    rank: int
    incarnation: int
    #: of its bytes; None: not known
    digest: bytes | None
    #: nobody has said that the id stands for these bytes
    provisional: bool

    @classmethod
    def of_header(cls, fields: HeaderFields) -> ObjectInfo:
        """Return what the header of its file says."""
        digest = fields.digest if any(fields.digest) else None
        meta, provisional = meta_of(fields.meta), bool(fields.provisional)
        return cls(fields.oid, fields.version, meta, fields.rank, fields.incarnation, digest, provisional)


class Pinned:
    """A sealed object, mapped read-only. Its bytes stay as they are while this or any view derived from it lives."""

    __slots__ = ("_data", "meta", "oid", "version")

    def __init__(self, oid: ObjectID, version: int, meta: Meta, data: Bytes) -> None:
        self.oid = oid
        self.version = version
        self.meta = meta
        self._data = data

    @property
    def buffer(self) -> memoryview:
        """Return the bytes as a read-only memoryview of ``nbytes`` unsigned bytes."""
        return self._data.data

    def value(self) -> Any:
        """Return the object as what it is: a read-only array, or the `buffer` of raw bytes."""
        return self.buffer if self.meta.dtype is None else self.array()

    def array(self) -> np.ndarray[Any, Any]:
        """Return a read-only array of the object's dtype and shape; raw bytes are uint8, (nbytes,)."""
        if self.meta.dtype is None:
            return self._data
        return np.ndarray(self.meta.shape, self.meta.dtype, buffer=self._data.data)

    def __repr__(self) -> str:
        return f"Pinned({self.oid!r}, version={self.version}, nbytes={self.meta.nbytes})"


class Region:
    """Writable memory of ``nbytes`` bytes. Its memory is not used again while this, or a view of `data`, lives.

    A region that is dropped without `seal` goes back to the arena.
    """

    __slots__ = ("_arena", "_data", "_mapping", "meta", "oid", "version")

    def __init__(
        self, arena: Arena, mapping: Mapping, data: Bytes, oid: ObjectID | None, meta: Meta | None, version: int
    ) -> None:
        self._arena = arena
        self._mapping = mapping
        self._data: Bytes | None = data
        #: None for private memory
        self.oid = oid
        self.meta = meta
        self.version = version

    @property
    def data(self) -> memoryview:
        """Return the bytes, writable, as ``nbytes`` unsigned ones.

        Don't write after `seal`. ClosedError once abandoned.
        """
        if self._data is None:
            raise ClosedError(f"{self!r} was abandoned: allocate a new one")
        return self._data.data

    @property
    def nbytes(self) -> int:
        return int(self.data.nbytes)

    def array(self) -> np.ndarray[Any, Any]:
        """Return a writable array of the object's dtype and shape; of uint8, (nbytes,) if it has none."""
        if self.meta is None or self.meta.dtype is None:
            return np.frombuffer(self.data, np.uint8)
        return np.ndarray(self.meta.shape, self.meta.dtype, buffer=self.data)

    def seal(self, version: int | None = None) -> bool:
        """Publish the object on this node, at once and whole, as *version* (default: the one allocated).

        Return False if the node has the object already: then `Arena.map` finds that one, and this region holds its
        bytes only as long as it lives. ClosedError if the region is not being filled.
        """
        if version is not None:
            self.version = version
        return self._arena._seal(self, self._mapping)

    def abandon(self) -> None:
        """Give the memory back as soon as no view of `data` is left. May be called twice; does nothing once sealed."""
        self._arena._abandon(self._mapping)
        self._data = None

    def quarantine(self) -> None:
        """Keep the memory mapped and unused until this process exits, its name gone at once.

        An MPI request may still write into it.
        """
        self._arena._quarantine(self._mapping)

    def __repr__(self) -> str:
        size = "abandoned" if self._data is None else f"nbytes={self._data.nbytes}"
        return f"Region({self.oid!r}, version={self.version}, {size})"
