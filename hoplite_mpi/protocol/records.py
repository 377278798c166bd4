"""What reports and requests are made of."""

from __future__ import annotations

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
    #: its holder is writing it: the root of a reduce, or a put under way
    producing: bool = False
    #: of a complete copy: it is on the holder's disk, not in its memory
    spilled: bool = False


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
    """A reduce as asked for. sources are distinct; 1 <= num_objects <= len(sources); shape, degree: as `cost.shape_error` has it."""

    rid: ObjectID
    sources: tuple[ObjectID, ...]
    #: see `hoplite_mpi.memory.ReduceOp.token`
    op: str | bytes
    num_objects: int
    shape: str | None
    #: source i takes slot i, whenever it comes
    ordered: bool = False
    #: a source that is lost (its id says which process alone puts it, that is gone, and so is every copy) is left out, and the others are
    #: reduced; without, the reduce fails once too few are left
    skip_lost: bool = False
    degree: int | None = None

    def agrees(self, other: ReduceSpec) -> bool:
        """Whether both ask for one and the same reduce.

        With skip_lost the sources may differ, since those who ask know of different processes: the first request counts.
        """
        if (_name(self.op), self.shape, self.degree) != (_name(other.op), other.shape, other.degree):
            return False
        if (self.ordered, self.skip_lost) != (other.ordered, other.skip_lost):
            return False
        if not self.skip_lost:
            return (self.sources, self.num_objects) == (other.sources, other.num_objects)
        mine, others = set(self.sources), set(other.sources)
        return [oid for oid in self.sources if oid in others] == [oid for oid in other.sources if oid in mine] != []


def _name(op: str | bytes) -> str | bytes:
    """Return what of an operation is the same on all ranks: a function's pickle need not be."""
    return op if isinstance(op, str) else op.split(b"\0", 1)[0]
