"""What the store needs of memory.

Host memory is one implementation; device memory is another one, not another store.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any, Protocol, TypeVar, runtime_checkable

if TYPE_CHECKING:
    from ..ids import ObjectID
    from ..meta import Meta
    from .kernels import ReduceOp
    from .region import ObjectInfo, Pinned, Region

__all__ = ["Event", "Memory"]


Made = TypeVar("Made")


@runtime_checkable
class Event(Protocol):
    """Completion of an operation on memory."""

    def done(self) -> bool:
        """Whether the operation is complete. Never blocks."""
        ...

    def wait(self, timeout: float | None = None) -> bool:
        """Block until the operation is complete, or *timeout* seconds; return `done`."""
        ...


@runtime_checkable
class Memory(Protocol):
    """Allocate, map, copy, reduce.

    Buffers are arrays of the implementation's kind, and stay alive while referred to.
    """

    def allocate(
        self, oid: ObjectID, meta: Meta, version: int = 0, digest: bytes | None = None, provisional: bool = False
    ) -> Region:
        """Return writable memory for an object, to be sealed; StoreFullError if there is none.

        digest: 16 bytes, of the object's bytes, for whoever adopts it. provisional: other bytes may yet win its id.
        """
        ...

    def allocate_private(self, nbytes: int) -> Region:
        """Return writable memory for this process only; StoreFullError if there is none."""
        ...

    def with_room(self, nbytes: int, work: Callable[[], Made]) -> Made:
        """Call *work*, which allocates *nbytes* bytes, again and again while it is StoreFullError and something can make room. Blocks."""
        ...

    def map(self, oid: ObjectID, version: int = 0) -> Pinned | None:
        """Return a view of a sealed object of this node, without copying; None if there is none in memory."""
        ...

    def spilled(self, oid: ObjectID, version: int = 0) -> bool:
        """Whether the object is on this node's disk, and `fetch` would find it."""
        ...

    def fetch(self, oid: ObjectID, version: int = 0) -> Pinned | None:
        """Return a view as `map` does, if need be of what is read from disk first. Blocks. StoreFullError if there is no room."""
        ...

    def objects(self) -> Iterator[ObjectInfo]:
        """Iterate over the sealed objects of this node, in memory and on disk."""
        ...

    def delete(self, oid: ObjectID, version: int = 0) -> bool:
        """Take a sealed object away from this node; whoever has it mapped keeps it. Return whether it was there."""
        ...

    def copy(self, target: Any, source: Any) -> Event:
        """Begin to copy *source* to *target*, of the same size and not overlapping.

        Both stay untouched until the event is done.
        """
        ...

    def reduce(self, op: ReduceOp | str | bytes, out: Any, a: Any, b: Any) -> Event:
        """Begin to set *out* to *a* op *b*, element by element; *out* may be *a* or *b*."""
        ...
