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
    op: str
    num_objects: int
    shape: str | None
