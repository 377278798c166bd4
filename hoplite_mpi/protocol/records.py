"""What reports and requests are made of."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from hoplite_mpi.ids import ObjectID
from hoplite_mpi.meta import Meta

__all__ = ["Delivered", "ObjectRecord", "ReduceSpec", "SlotRecord"]


@dataclass(frozen=True, slots=True)
class ObjectRecord:
    """One copy, as its holder knows it."""

    oid: ObjectID
    version: int
    meta: Meta
    digest: bytes | None
    complete: bool
    final: bool
    #: the bytes are in the holder's hands as inline bytes (they are not in the record)
    inline: bool
    #: it was put here (or adopted), not received
    origin: bool
    #: the owner has accepted the put; of two puts that contradict each other a confirmed one stays
    confirmed: bool
    sources: frozenset[ObjectID] | None
    #: of a partial copy: the live rank it is being received from, and the attempt
    sender: int | None
    attempt: int


@dataclass(frozen=True, slots=True)
class Delivered:
    """A reduced object that was delivered: no other version may ever be final."""

    oid: ObjectID
    version: int
    sources: frozenset[ObjectID]


@dataclass(frozen=True, slots=True)
class SlotRecord:
    """A reduce slot that its holder has started."""

    rid: ObjectID
    slot: int
    generation: int


@dataclass(frozen=True, slots=True)
class ReduceSpec:
    """A reduce as asked for. sources are distinct; 1 <= num_objects <= len(sources)."""

    rid: ObjectID
    sources: tuple[ObjectID, ...]
    #: see `hoplite_mpi.memory.ReduceOp.token`
    op: str | bytes
    num_objects: int
    shape: str | None
    #: source i takes slot i, whenever it comes
    ordered: bool = False
    #: (rank, incarnation) of the process that alone puts each source; empty: whoever may. A source that can't come any more is
    #: left out then, and the others are reduced; without, the reduce fails once too few are left.
    members: tuple[tuple[int, int], ...] = ()

    def member(self, source: ObjectID) -> tuple[int, int] | None:
        """Return the process that alone puts a source; None: not known."""
        return self.members[self.sources.index(source)] if self.members else source.origin

    def agrees(self, other: ReduceSpec, alive: Callable[[int, int], bool]) -> bool:
        """Whether both ask for one and the same reduce.

        With members they may differ in sources whose process is not alive: one asked before it died, the other after.
        """
        if _name(self.op) != _name(other.op) or (self.shape, self.ordered) != (other.shape, other.ordered):
            return False
        if not self.members or not other.members:
            return (self.sources, self.num_objects, self.members) == (other.sources, other.num_objects, other.members)
        mine, others = (
            [pair for pair in zip(spec.sources, spec.members, strict=True) if alive(*pair[1])] for spec in (self, other)
        )
        return mine == others


def _name(op: str | bytes) -> str | bytes:
    """Return what of an operation is the same on all ranks: a function's pickle need not be."""
    return op if isinstance(op, str) else op.split(b"\0", 1)[0]
