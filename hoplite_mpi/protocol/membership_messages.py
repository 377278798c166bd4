"""What goes in and out of `Membership`: messages between processes, events from the driver, instructions to it."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from hoplite_mpi.protocol.view import Member, View

__all__ = [
    "NOBODY",
    "Accepted",
    "Alive",
    "Ballot",
    "Decided",
    "Decree",
    "Event",
    "Evicted",
    "Install",
    "Instruction",
    "Join",
    "JoinRequested",
    "Leave",
    "LeaveRequested",
    "Left",
    "Message",
    "MessageReceived",
    "Peer",
    "PeerDown",
    "PeerUp",
    "Prepare",
    "Probe",
    "Promise",
    "Proof",
    "Propose",
    "Reject",
    "Report",
    "Send",
    "SilenceLasts",
    "StartFailed",
    "StartTimeout",
]

#: (rank, incarnation)
Peer = tuple[int, int]
#: (round, rank): round 0 is the view's coordinator's, higher ones are those of successors
Ballot = tuple[int, int]
Proof = Literal["reset", "silence"]

#: lower than any ballot
NOBODY: Ballot = (0, -1)


@dataclass(frozen=True)
class Decree:
    """A view as it is agreed on."""

    view: View
    #: rank → newest incarnation that was ever a member; those up to it never come back
    known: Mapping[int, int]
    #: who left cleanly in the change to this view
    left: frozenset[Peer]

    def to_wire(self) -> list[Any]:
        return [self.view.to_wire(), sorted(self.known.items()), sorted(self.left)]

    @classmethod
    def from_wire(cls, wire: list[Any]) -> Decree:
        view, known, left = wire
        return cls(View.from_wire(view), dict(known), frozenset((rank, incarnation) for rank, incarnation in left))


# -- messages ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Message:
    """Root of the membership's messages."""

    def to_wire(self) -> list[Any]:
        """Return a msgpack-able form; inverse of `Message.from_wire`."""
        return [type(self).__name__, *(_pack(getattr(self, f.name)) for f in dataclasses.fields(self))]

    @staticmethod
    def from_wire(wire: Any) -> Message:
        """Return the message; ValueError if *wire* isn't one."""
        try:
            name, *values = wire
            return _CLASSES[name](*map(_unpack, values))
        except (KeyError, TypeError, IndexError) as error:
            raise ValueError(f"not a message of the membership: {str(wire)[:80]}") from error


@dataclass(frozen=True)
class Join(Message):
    """Let this process in."""

    member: Member


@dataclass(frozen=True)
class Leave(Message):
    """Take this process out; it leaves cleanly."""

    peer: Peer


@dataclass(frozen=True)
class Report(Message):
    """*reporter* sees *target* as down."""

    reporter: Peer
    target: Peer
    proof: Proof


@dataclass(frozen=True)
class Probe(Message):
    """Somebody sees you as silent: say that you are alive."""


@dataclass(frozen=True)
class Alive(Message):
    """The answer to `Probe`."""


@dataclass(frozen=True)
class Prepare(Message):
    """A successor's question, in the view *base*: follow this ballot, and say what you accepted."""

    base: Decree
    ballot: Ballot


@dataclass(frozen=True)
class Promise(Message):
    """The answer to `Prepare`: no lower ballot will be followed in view number *base*."""

    base: int
    ballot: Ballot
    accepted_ballot: Ballot
    accepted: Decree | None


@dataclass(frozen=True)
class Propose(Message):
    """Accept *value* as the next after *base*."""

    base: Decree
    ballot: Ballot
    value: Decree


@dataclass(frozen=True)
class Accepted(Message):
    """The answer to `Propose`."""

    base: int
    ballot: Ballot


@dataclass(frozen=True)
class Reject(Message):
    """The other answer to `Prepare` and `Propose`: a higher ballot was promised."""

    base: int
    ballot: Ballot
    promised: Ballot


@dataclass(frozen=True)
class Decided(Message):
    """This is a decided view."""

    decree: Decree


_CLASSES: dict[str, type[Any]] = {cls.__name__: cls for cls in Message.__subclasses__()}


def _pack(value: Any) -> Any:
    if isinstance(value, Member):
        return {"member": value.to_wire()}
    if isinstance(value, Decree):
        return {"decree": value.to_wire()}
    return list(value) if isinstance(value, tuple) else value


def _unpack(value: Any) -> Any:
    if isinstance(value, dict):
        return Member.from_wire(value["member"]) if "member" in value else Decree.from_wire(value["decree"])
    return tuple(value) if isinstance(value, list) else value


# -- events ------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class PeerUp:
    """The side channel to this process is connected (again)."""

    rank: int
    incarnation: int


@dataclass(frozen=True)
class PeerDown:
    """The side channel to this process is gone or can't be had; `membership` says what proves a reset."""

    rank: int
    incarnation: int
    proof: Proof


@dataclass(frozen=True)
class SilenceLasts:
    """`Config.cut_margin` after `PeerDown`, and without a `PeerUp` since: where the network is cut, the smaller part has closed by now.

    Comes again and again, until a `PeerUp` or a view without the peer.
    """

    rank: int
    incarnation: int


@dataclass(frozen=True)
class MessageReceived:
    """A membership message came from *src*."""

    src: Peer
    message: Message


@dataclass(frozen=True)
class JoinRequested:
    """A process asks to be let in. Any member may be told, again and again."""

    member: Member


@dataclass(frozen=True)
class LeaveRequested:
    """This process wants to leave cleanly; `Left` follows."""


@dataclass(frozen=True)
class StartTimeout:
    """The time for all founders to be there is over. Harmless once there is a view."""


Event = PeerUp | PeerDown | SilenceLasts | MessageReceived | JoinRequested | LeaveRequested | StartTimeout


# -- instructions ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Send:
    """Send *message* to *dst* over its side channel."""

    dst: Peer
    message: Message


@dataclass(frozen=True)
class Install:
    """This view is decided. *lost* and *left*: members of the view installed here before that are not in it.

    dead: those of the lost of whose death this process has proof; the others may be cut off, and live.
    """

    view: View
    lost: tuple[Member, ...] = ()
    left: tuple[Member, ...] = ()
    dead: frozenset[Peer] = frozenset()


@dataclass(frozen=True)
class Evicted:
    """The others go on without this process, or may. Final."""

    reason: str


@dataclass(frozen=True)
class Left:
    """This process has left cleanly. Final."""


@dataclass(frozen=True)
class StartFailed:
    """No first view in time. *missing*: ranks that didn't come (known to rank 0 only). Final."""

    missing: tuple[int, ...]
    reason: str


Instruction = Send | Install | Evicted | Left | StartFailed
