"""The messages of the object protocol; see `hoplite_mpi.protocol.wire` for their bytes.

Each carries the number of the view it was sent in: what is older than the receiver's is dropped, what is newer waits.

*Owner* is the rank that owns the directory shard of an id, `View.owner(bytes(oid))`; the owner of a reduce's id
coordinates the reduce.
"""

from __future__ import annotations

from dataclasses import dataclass

from hoplite_mpi.ids import ObjectID
from hoplite_mpi.meta import Meta
from hoplite_mpi.protocol.records import Delivered, ObjectRecord, ReduceSpec, SlotRecord

__all__ = [
    "Accepted",
    "Announce",
    "Cancel",
    "ChildLost",
    "Completed",
    "Delete",
    "Deleted",
    "Delivered",
    "Evict",
    "EvictRefused",
    "Evicted",
    "Exists",
    "Failed",
    "Final",
    "Forget",
    "Get",
    "Inline",
    "Location",
    "LocationsQuery",
    "LocationsReply",
    "Lost",
    "Message",
    "ObjectRecord",
    "Recall",
    "ReduceRequest",
    "ReduceSpec",
    "Refused",
    "Report",
    "Retire",
    "Retired",
    "RootDone",
    "SlotChild",
    "SlotLost",
    "SlotRecord",
    "SlotStart",
    "SlotStop",
    "Source",
    "SourceGone",
    "SourceWatch",
    "Spilled",
    "Unwatch",
    "Watch",
]


@dataclass(frozen=True, slots=True)
class Message:
    """Root of all messages."""

    #: number of the view in which it was sent
    view: int


# -- member to owner ---------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Report(Message):
    """All that a member knows of a shard, sent once per view to every member.

    *requests* are handled after the rebuilding, as if just sent.
    """

    objects: tuple[ObjectRecord, ...]
    delivered: tuple[Delivered, ...]
    tombstones: tuple[ObjectID, ...]
    slots: tuple[SlotRecord, ...]
    requests: tuple[Message, ...]


@dataclass(frozen=True, slots=True)
class Announce(Message):
    """The sender has a final copy that it did not get by a transfer: complete, or with partial one that it is writing just now.

    Confirm: it wants `Accepted` or `Refused`.
    """

    oid: ObjectID
    version: int
    meta: Meta
    digest: bytes | None
    inline: bytes | None
    sources: frozenset[ObjectID] | None
    origin: bool
    confirm: bool
    partial: bool = False
    #: number of the put at its rank: an answer to an earlier one, which was given up, may still be under way
    attempt: int = 0


@dataclass(frozen=True, slots=True)
class Get(Message):
    """The sender wants a location, for *attempt*.

    This ends every earlier attempt. suspect: the earlier one failed at this sender.
    """

    oid: ObjectID
    attempt: int
    suspect: int | None = None
    #: nobody will put it any more: answer `Lost` if there is no copy to wait for
    last: bool = False


@dataclass(frozen=True, slots=True)
class Cancel(Message):
    """The sender wants no location any more, has ended every attempt, and has no copy."""

    oid: ObjectID


@dataclass(frozen=True, slots=True)
class Completed(Message):
    """The sender has received all of (oid, version) in *attempt*, or in an attempt of an older view."""

    oid: ObjectID
    version: int
    attempt: int


@dataclass(frozen=True, slots=True)
class Forget(Message):
    """The sender's complete copy is gone."""

    oid: ObjectID
    version: int


@dataclass(frozen=True, slots=True)
class Evict(Message):
    """The sender needs memory: may the copy of its node go, since another node has one? `Evicted` or `EvictRefused`."""

    oid: ObjectID
    version: int


@dataclass(frozen=True, slots=True)
class Spilled(Message):
    """The complete copy of the sender's node, which all of its ranks share, has gone to disk, or come back into memory."""

    oid: ObjectID
    version: int
    spilled: bool


@dataclass(frozen=True, slots=True)
class Watch(Message):
    """Answer with `Exists` (or `Deleted`, `Failed`, `Lost`) as soon as a complete and final copy exists. last: as in `Get`."""

    oid: ObjectID
    last: bool = False


@dataclass(frozen=True, slots=True)
class Unwatch(Message):
    """Takes back `Watch`."""

    oid: ObjectID


@dataclass(frozen=True, slots=True)
class Delete(Message):
    """The object and its id are to go."""

    oid: ObjectID


@dataclass(frozen=True, slots=True)
class Retire(Message):
    """Nobody will ever ask for these again: forget them, without a tombstone."""

    oids: tuple[ObjectID, ...]


@dataclass(frozen=True, slots=True)
class LocationsQuery(Message):
    """Which of these have a complete and final copy?"""

    request_id: int
    oids: tuple[ObjectID, ...]


@dataclass(frozen=True, slots=True)
class ReduceRequest(Message):
    """Coordinate this reduce. Asking again is harmless."""

    spec: ReduceSpec


# -- owner to member ---------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Location(Message):
    """Answer to `Get`: receive from *sender*, or map its copy (mapped), if the attempt is still yours."""

    oid: ObjectID
    version: int
    meta: Meta
    digest: bytes | None
    attempt: int
    sender: int
    sender_incarnation: int
    mapped: bool
    final: bool
    sources: frozenset[ObjectID] | None


@dataclass(frozen=True, slots=True)
class Inline(Message):
    """The object itself, final."""

    oid: ObjectID
    version: int
    meta: Meta
    digest: bytes | None
    data: bytes
    sources: frozenset[ObjectID] | None


@dataclass(frozen=True, slots=True)
class Recall(Message):
    """The owner has no bytes of this inline object: announce it again."""

    oid: ObjectID


@dataclass(frozen=True, slots=True)
class Final(Message):
    """This version of a reduced object is the final one."""

    oid: ObjectID
    version: int
    sources: frozenset[ObjectID]


@dataclass(frozen=True, slots=True)
class Accepted(Message):
    """The put counts. attempt: of its `Announce`; of another one this says nothing."""

    oid: ObjectID
    attempt: int


@dataclass(frozen=True, slots=True)
class Refused(Message):
    """The put does not count: the id has other bytes already. attempt: as in `Accepted`; None: so it is with a reduce request."""

    oid: ObjectID
    text: str
    attempt: int | None = None


@dataclass(frozen=True, slots=True)
class Deleted(Message):
    """The object and its id are gone. Remember it."""

    oid: ObjectID


@dataclass(frozen=True, slots=True)
class Retired(Message):
    """As `Retire`, to those that hold one."""

    oids: tuple[ObjectID, ...]


@dataclass(frozen=True, slots=True)
class Failed(Message):
    """The reduce that was to make this object can't be carried out."""

    oid: ObjectID
    text: str


@dataclass(frozen=True, slots=True)
class Lost(Message):
    """Every copy of the object is gone, and none is coming."""

    oid: ObjectID
    text: str


@dataclass(frozen=True, slots=True)
class Evicted(Message):
    """The copy of the receiver's node counts no longer, since another node has one: forget it. To all ranks of that node that had it."""

    oid: ObjectID
    version: int


@dataclass(frozen=True, slots=True)
class EvictRefused(Message):
    """Answer to `Evict`: the copy has to stay."""

    oid: ObjectID
    version: int


@dataclass(frozen=True, slots=True)
class Exists(Message):
    """Answer to `Watch`."""

    oid: ObjectID
    meta: Meta
    sources: frozenset[ObjectID] | None


@dataclass(frozen=True, slots=True)
class LocationsReply(Message):
    """Answer to `LocationsQuery`: asked is the query's list, found those with a copy."""

    request_id: int
    asked: tuple[ObjectID, ...]
    found: tuple[ObjectID, ...]


# -- reduce: coordinator and the owners of its sources -----------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class SourceWatch(Message):
    """From a coordinator: answer once with `Source` or `SourceGone`. last: as in `Get`."""

    oid: ObjectID
    last: bool = False


@dataclass(frozen=True, slots=True)
class Source(Message):
    """A complete and final copy of a source is at *rank*, or in *inline*."""

    oid: ObjectID
    meta: Meta
    rank: int
    incarnation: int
    inline: bytes | None


@dataclass(frozen=True, slots=True)
class SourceGone(Message):
    """The source will never be there: it was deleted, its last copy is gone, or the reduce that makes it failed."""

    oid: ObjectID
    text: str


# -- reduce: coordinator and participants ------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class SlotStart(Message):
    """Start this slot; one of an older generation ends."""

    rid: ObjectID
    slot: int
    generation: int
    op: str | bytes
    source: ObjectID
    meta: Meta
    num_children: int
    num_objects: int
    is_root: bool


@dataclass(frozen=True, slots=True)
class SlotChild(Message):
    """The slot has this child: pull it, again if it was reported as lost."""

    rid: ObjectID
    slot: int
    generation: int
    child_slot: int
    child_generation: int
    rank: int
    incarnation: int
    #: the child has no children: its stream is its source as it is
    leaf: bool


@dataclass(frozen=True, slots=True)
class SlotStop(Message):
    """End the slot if its generation is at most this."""

    rid: ObjectID
    slot: int
    generation: int


@dataclass(frozen=True, slots=True)
class RootDone(Message):
    """The root's output is complete."""

    rid: ObjectID
    slot: int
    generation: int


@dataclass(frozen=True, slots=True)
class SlotLost(Message):
    """The slot can't be had at the sender; see `hoplite_mpi.protocol.events.SlotFailed`."""

    rid: ObjectID
    slot: int
    generation: int
    kind: str
    text: str


@dataclass(frozen=True, slots=True)
class ChildLost(Message):
    """The slot can't get the stream of this child."""

    rid: ObjectID
    slot: int
    generation: int
    child_slot: int
    child_generation: int
