"""What goes into the object protocol (events) and what comes out of it (instructions).

A driver feeds `Protocol.handle` one event at a time and carries out the instructions in the order given. Three things
tie a data-plane event to what caused it, so that late and doubled ones are harmless: the *version* of the object, the
*attempt* of a transfer and the *generation* of a reduce slot. The driver gives back those that it was given.

Rules for the driver

- Messages of one sender to one receiver arrive in the order sent. Those to oneself never leave the protocol.
- A stream asked for before this rank knows of it (its `StartTransfer` or `StartSlot` is still under way) waits here:
  refuse it only if this rank holds a newer version or generation, or has dropped it.
- What was received of (oid, version) is kept over `AbortTransfer`: the next `StartTransfer` of that version goes on
  behind it, whoever sends. It is freed by `Drop`, or when a newer version starts.
- A stall of a live sender is `TransferFailed`, too: the owner of the directory entry looks for another one.
"""

from __future__ import annotations

from dataclasses import dataclass

from hoplite_mpi.ids import ObjectID
from hoplite_mpi.meta import Meta
from hoplite_mpi.protocol.instructions import (
    AbortTransfer,
    Available,
    Deliver,
    Drop,
    Evicted,
    Fail,
    Instruction,
    Locations,
    MapLocal,
    PullChild,
    ReduceInline,
    Retired,
    Send,
    StartSlot,
    StartTransfer,
    StopSlot,
    Stored,
)
from hoplite_mpi.protocol.links import Links
from hoplite_mpi.protocol.messages import Message
from hoplite_mpi.protocol.view import View

__all__ = [
    "AbortTransfer",
    "AdoptObject",
    "Available",
    "ChildFailed",
    "DeleteRequested",
    "Deliver",
    "Drop",
    "Event",
    "EvictRequested",
    "Evicted",
    "Fail",
    "ForgetObject",
    "GetAbandoned",
    "GetRequested",
    "InlineReduced",
    "Instruction",
    "LinksMeasured",
    "Locations",
    "LocationsRequested",
    "MapLocal",
    "MessageReceived",
    "ObjectSpilled",
    "ObjectStored",
    "PullChild",
    "PutFailed",
    "PutStarted",
    "ReduceInline",
    "ReduceRequested",
    "RetireRequested",
    "Retired",
    "Send",
    "SlotDone",
    "SlotFailed",
    "StartSlot",
    "StartTransfer",
    "StopSlot",
    "Stored",
    "TransferDone",
    "TransferFailed",
    "ViewInstalled",
    "WatchAbandoned",
    "WatchRequested",
]


@dataclass(frozen=True, slots=True)
class ViewInstalled:
    """A newer view holds from now on; views may be skipped. Every rank of it installs it."""

    view: View


@dataclass(frozen=True, slots=True)
class LinksMeasured:
    """What the links can do, as far as is known now: the shapes of reduces that begin depend on it."""

    links: Links


@dataclass(frozen=True, slots=True)
class MessageReceived:
    """*message* came from rank *src*."""

    src: int
    message: Message


@dataclass(frozen=True, slots=True)
class ObjectStored:
    """A local put has its bytes in place. Answered by `Stored`, or by `Fail` with kind ``exists`` or ``deleted``.

    inline: the bytes, if there are at most `Config.inline_limit` of them; digest: 16-byte BLAKE2b of the bytes.
    confirm: whether somebody else may have put under this id, so that the owner must be asked first; without it
    (a random id) `Stored` is immediate.
    """

    oid: ObjectID
    meta: Meta
    digest: bytes
    inline: bytes | None = None
    confirm: bool = True


@dataclass(frozen=True, slots=True)
class PutStarted:
    """A local put is about to write bytes that have this digest: others may receive them while they grow. Fields as of `ObjectStored`.

    Only if `Client.takes` the id. Answered by `Stored` or `Fail`; then followed by `ObjectStored`, answered once more, or `PutFailed`.
    """

    oid: ObjectID
    meta: Meta
    digest: bytes
    confirm: bool = True


@dataclass(frozen=True, slots=True)
class PutFailed:
    """The bytes of a `PutStarted` will not all come."""

    oid: ObjectID


@dataclass(frozen=True, slots=True)
class AdoptObject:
    """A sealed *final* object was found in the node's arena. Harmless if this rank has it already.

    version: 0 for what was put; sources: of a reduced object.
    """

    oid: ObjectID
    meta: Meta
    digest: bytes | None = None
    version: int = 0
    sources: frozenset[ObjectID] | None = None


@dataclass(frozen=True, slots=True)
class ForgetObject:
    """This rank's complete copy is gone, through no fault of anybody's. To make room, use `EvictRequested`."""

    oid: ObjectID


@dataclass(frozen=True, slots=True)
class EvictRequested:
    """This node needs memory: may the complete copy go? Answered by `Evicted`; not at all if a new view comes first."""

    oid: ObjectID
    version: int


@dataclass(frozen=True, slots=True)
class ObjectSpilled:
    """This node's complete copy has gone to disk, or come back into memory: others prefer copies that are in memory."""

    oid: ObjectID
    version: int
    spilled: bool


@dataclass(frozen=True, slots=True)
class GetRequested:
    """Somebody here waits for the bytes. Answered by `Deliver` or `Fail`, however often it was asked."""

    oid: ObjectID


@dataclass(frozen=True, slots=True)
class GetAbandoned:
    """Nobody here waits for the bytes any longer.

    A transfer under way is finished all the same: others may hang on it.
    """

    oid: ObjectID


@dataclass(frozen=True, slots=True)
class WatchRequested:
    """Somebody here waits for the object to exist. Answered once, by `Available` or `Fail`."""

    oid: ObjectID


@dataclass(frozen=True, slots=True)
class WatchAbandoned:
    """Nobody here waits for the existence any longer."""

    oid: ObjectID


@dataclass(frozen=True, slots=True)
class DeleteRequested:
    """The object and its id are to go, everywhere."""

    oid: ObjectID


@dataclass(frozen=True, slots=True)
class RetireRequested:
    """Nobody in the whole run will ever ask for these again: forget them, without a tombstone. Answered by `Retired`.

    Every rank that has to do with them is asked to. tell: those of them whose owners are told by this rank.
    """

    oids: tuple[ObjectID, ...]
    tell: tuple[ObjectID, ...]


@dataclass(frozen=True, slots=True)
class ReduceRequested:
    """Reduce *sources* into *rid*. Nothing is answered: whoever wants the result gets or watches *rid*.

    num_objects: how many of the sources, the first to arrive (None: all); shape, degree: see `hoplite_mpi.protocol.cost`,
    None: let it choose; ordered, skip_lost: see `ReduceSpec`. An impossible request is a `Fail` of *rid* with kind ``reduce``.
    """

    rid: ObjectID
    sources: tuple[ObjectID, ...]
    op: str | bytes
    num_objects: int | None = None
    shape: str | None = None
    ordered: bool = False
    skip_lost: bool = False
    degree: int | None = None


@dataclass(frozen=True, slots=True)
class LocationsRequested:
    """Which of *oids* has a complete and final copy on a live rank? Answered by `Locations`."""

    request_id: int
    oids: tuple[ObjectID, ...]


@dataclass(frozen=True, slots=True)
class TransferDone:
    """All bytes of a `StartTransfer` are here, or a `MapLocal` is mapped."""

    oid: ObjectID
    version: int
    attempt: int


@dataclass(frozen=True, slots=True)
class TransferFailed:
    """A `StartTransfer` got stuck or its sender refused, or the copy of a `MapLocal` is gone."""

    oid: ObjectID
    version: int
    attempt: int


@dataclass(frozen=True, slots=True)
class SlotDone:
    """The output of a reduce slot is complete here. Needed of roots only."""

    rid: ObjectID
    slot: int
    generation: int


@dataclass(frozen=True, slots=True)
class SlotFailed:
    """A reduce slot can't go on here, through no fault of a child.

    kind: ``source``: its source is not here (any longer), so another slot-holder is to be found;
    ``reduce``: the operation failed or there is no memory, so the whole reduce fails with *text*.
    """

    rid: ObjectID
    slot: int
    generation: int
    kind: str
    text: str


@dataclass(frozen=True, slots=True)
class ChildFailed:
    """The stream of a child of a reduce slot got stuck or was refused.

    Answered by another `PullChild` or by `StopSlot`.
    """

    rid: ObjectID
    slot: int
    generation: int
    child_slot: int
    child_generation: int


@dataclass(frozen=True, slots=True)
class InlineReduced:
    """Answer to `ReduceInline`: the bytes of the result and their meta, or *error*."""

    rid: ObjectID
    version: int
    data: bytes
    meta: Meta
    error: str | None = None


Event = (
    ViewInstalled
    | MessageReceived
    | ObjectStored
    | PutStarted
    | PutFailed
    | AdoptObject
    | ForgetObject
    | EvictRequested
    | ObjectSpilled
    | GetRequested
    | GetAbandoned
    | WatchRequested
    | WatchAbandoned
    | DeleteRequested
    | ReduceRequested
    | RetireRequested
    | LocationsRequested
    | TransferDone
    | TransferFailed
    | SlotDone
    | SlotFailed
    | ChildFailed
    | InlineReduced
    | LinksMeasured
)
