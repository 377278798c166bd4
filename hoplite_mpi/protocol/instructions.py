"""What comes out of the object protocol; import it from `hoplite_mpi.protocol.events`, where its rules stand."""

from __future__ import annotations

from dataclasses import dataclass

from hoplite_mpi.ids import ObjectID
from hoplite_mpi.meta import Meta
from hoplite_mpi.protocol.messages import Message

__all__ = [
    "AbortTransfer",
    "Available",
    "Deliver",
    "Drop",
    "Evicted",
    "Fail",
    "Instruction",
    "Locations",
    "MapLocal",
    "PullChild",
    "ReduceInline",
    "Retired",
    "Send",
    "StartSlot",
    "StartTransfer",
    "StopSlot",
    "Stored",
]


@dataclass(frozen=True, slots=True)
class Send:
    """Send *message* to rank *dst*, which is never this rank."""

    dst: int
    message: Message


@dataclass(frozen=True, slots=True)
class Stored:
    """The put of *oid* is accepted: its copy here counts. May come more than once."""

    oid: ObjectID


@dataclass(frozen=True, slots=True)
class StartTransfer:
    """Receive (oid, version) from *sender*, going on behind what is here of that version already."""

    oid: ObjectID
    version: int
    attempt: int
    meta: Meta
    sender: int
    sender_incarnation: int


@dataclass(frozen=True, slots=True)
class MapLocal:
    """Map the complete copy of (oid, version) that *holder* has in this node's arena."""

    oid: ObjectID
    version: int
    attempt: int
    meta: Meta
    holder: int


@dataclass(frozen=True, slots=True)
class AbortTransfer:
    """End the transfer or mapping *attempt*; keep the bytes that came."""

    oid: ObjectID
    version: int
    attempt: int


@dataclass(frozen=True, slots=True)
class Deliver:
    """The object is here, complete and final: wake all who wait for its bytes. sources: of a reduced object."""

    oid: ObjectID
    version: int
    meta: Meta
    inline: bytes | None
    sources: frozenset[ObjectID] | None


@dataclass(frozen=True, slots=True)
class Available:
    """The object exists, complete and final, somewhere.

    Wake all who wait for its existence. sources: of a reduced object.
    """

    oid: ObjectID
    meta: Meta
    sources: frozenset[ObjectID] | None


@dataclass(frozen=True, slots=True)
class Fail:
    """Those here who have to do with *oid* get an error.

    kind: ``deleted``, ``lost`` and ``reduce``: all who wait for it, and its putter; ``exists``: its putter, or the caller of a
    reduce into a known id; those who wait for its bytes or existence go on waiting.
    """

    oid: ObjectID
    kind: str
    text: str


@dataclass(frozen=True, slots=True)
class Drop:
    """Free this rank's copy of (oid, version), complete or not, and refuse its streams."""

    oid: ObjectID
    version: int


@dataclass(frozen=True, slots=True)
class Evicted:
    """Answer to `EvictRequested`: whether the copy may go. If so, it has been dropped.

    May come unasked, for the copy that this rank shares with another one of its node.
    """

    oid: ObjectID
    version: int
    granted: bool


@dataclass(frozen=True, slots=True)
class Locations:
    """Answer to `LocationsRequested`: those of its ids that have a complete and final copy."""

    request_id: int
    oids: frozenset[ObjectID]


@dataclass(frozen=True, slots=True)
class StartSlot:
    """Begin reduce slot (rid, slot, generation): output = own source *op* the outputs of *num_children* children.

    Children are named by `PullChild`, one by one, in any order. The own source is pinned, and the output kept and
    served as stream (rid, slot, generation), until `StopSlot`: a parent that starts again asks for it from the
    beginning. With *is_root* the output is also the object (rid, generation), which getters stream as `StartTransfer`
    of version = generation. `StopSlot` leaves that object: it goes by `Drop` only.
    """

    rid: ObjectID
    slot: int
    generation: int
    op: str | bytes
    source: ObjectID
    meta: Meta
    num_children: int
    #: number of sources that go into the whole result (a mean divides by it at the root)
    num_objects: int
    is_root: bool


@dataclass(frozen=True, slots=True)
class PullChild:
    """Pull stream (rid, child_slot, child_generation) from *rank* into the slot.

    One that is being pulled goes on undisturbed.
    """

    rid: ObjectID
    slot: int
    generation: int
    child_slot: int
    child_generation: int
    rank: int
    incarnation: int
    #: it flows in the source's own dtype, not in that in which the operation accumulates
    leaf: bool = False


@dataclass(frozen=True, slots=True)
class Retired:
    """Forget all about the object: its copy here, and that it was dropped."""

    oid: ObjectID


@dataclass(frozen=True, slots=True)
class StopSlot:
    """End a reduce slot, free its output stream, and refuse it. The root's object goes by `Drop` only."""

    rid: ObjectID
    slot: int
    generation: int


@dataclass(frozen=True, slots=True)
class ReduceInline:
    """Reduce *inputs*, in this order, and answer with `InlineReduced`."""

    rid: ObjectID
    version: int
    op: str | bytes
    inputs: tuple[bytes, ...]
    meta: Meta


Instruction = (
    Send
    | Stored
    | StartTransfer
    | MapLocal
    | AbortTransfer
    | Deliver
    | Available
    | Fail
    | Drop
    | Evicted
    | Locations
    | StartSlot
    | PullChild
    | StopSlot
    | ReduceInline
    | Retired
)
