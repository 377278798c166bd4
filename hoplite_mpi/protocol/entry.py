"""What an owner knows of one object, and which location it gives to a getter."""

from __future__ import annotations

from dataclasses import dataclass, field

from hoplite_mpi.ids import ObjectID
from hoplite_mpi.meta import Meta

__all__ = ["Entry", "Place"]


@dataclass
class Place:
    """A copy of the entry's version at one rank."""

    complete: bool = False
    #: the root of a reduce, or a put, is writing it; neither complete nor with a sender
    producing: bool = False
    #: complete, but on its rank's disk
    spilled: bool = False
    origin: bool = False
    #: rank that it is being received from: that rank is checked out, unless mapped
    sender: int | None = None
    mapped: bool = False
    #: the receiver's attempt, as long as there is a sender
    attempt: int = 0
    #: receivers that gave up on it since one last succeeded; it is the last choice then, but stays one
    failures: int = 0
    #: one that waited for it got nothing, and it has said nothing since: its sender is free for others, who end its transfer by theirs
    stalled: bool = False
    #: receivers it was given to
    served: int = 0


@dataclass
class Entry:
    """One object of the shard. Edges receiver → sender form a forest in which each sender has at most one receiver that is not stalled.

    An edge ends only when its receiver has said so: what this rank takes to be free is free. A getter is only
    attached to a place that is *fed*: complete, being produced, or receiving from a fed one. A getter that needs a
    sender is not fed itself, nor is what hangs on it, so no cycle can form, whoever dies. And as the receivers of a
    complete copy form a chain whose tail is free, a getter waits only while there is no complete copy at all.
    """

    oid: ObjectID
    #: None: nothing is known of it but who asks
    version: int | None = None
    meta: Meta | None = None
    digest: bytes | None = None
    #: at most `Config.inline_limit` bytes: travels in replies
    is_inline: bool = False
    #: its bytes; None with is_inline: to be recalled from a place
    inline: bytes | None = None
    recalled: bool = False
    final: bool = False
    sources: frozenset[ObjectID] | None = None
    #: copies of this version only
    places: dict[int, Place] = field(default_factory=dict)
    #: rank → attempt of those that want the bytes and don't have them, complete and final, in the order they asked
    wanted: dict[int, int] = field(default_factory=dict)
    #: rank → its newest attempt in this view: an older `Get`, or the same again, says nothing
    seen: dict[int, int] = field(default_factory=dict)
    watchers: set[int] = field(default_factory=set)
    #: coordinators of reduces that have it as a source
    subscribers: set[int] = field(default_factory=set)
    deleted: bool = False
    #: why the reduce that was to make it can't
    error: str | None = None

    @property
    def holder(self) -> int | None:
        """A rank with a complete and final copy, the one that put it if it is there."""
        if not self.final:
            return None
        complete = [rank for rank, place in self.places.items() if place.complete]
        return min(complete, key=lambda rank: not self.places[rank].origin, default=None)

    @property
    def bound(self) -> bool:
        """Whether the id stands for these bytes: there they are, or are being put."""
        return self.final and any(place.complete or place.producing for place in self.places.values())

    @property
    def coming(self) -> bool:
        """Whether there is a copy that those who wait will get, if nobody dies: complete, or being made."""
        return any(self.fed(rank) for rank in self.places)

    def lost(self, last: bool) -> bool:
        """Whether it can't be had any more; last: nobody will put it. A final reduced object is never made again."""
        return (last or (self.final and bool(self.version))) and not self.coming

    def same(self, meta: Meta, digest: bytes | None) -> bool:
        """Whether a copy with these holds the same bytes, as far as one can tell."""
        return meta == self.meta and (digest is None or self.digest is None or digest == self.digest)

    def void(self) -> None:
        """Forget version and copies; those who ask stay."""
        self.version = self.meta = self.digest = self.inline = self.sources = None
        self.final = self.is_inline = self.recalled = False
        self.places = {}

    def fed(self, rank: int) -> bool:
        """Whether all bytes will come to that place, if nobody dies."""
        place = self.places.get(rank)
        while place is not None and not place.complete and not place.producing:
            place = None if place.sender is None else self.places.get(place.sender)
        return place is not None

    def depth(self, rank: int) -> int:
        """Number of hops to the head of the chain."""
        hops, place = 0, self.places.get(rank)
        while place is not None and place.sender is not None:
            hops, place = hops + 1, self.places.get(place.sender)
        return hops

    def busy(self) -> set[int]:
        """Return the ranks that are checked out."""
        return {p.sender for p in self.places.values() if p.sender is not None and not p.mapped and not p.stalled}

    def locate(self, rank: int, nodes: dict[int, str]) -> tuple[int, bool] | None:
        """Return (sender, whether to map its copy) for a getter without sender; None: let it wait.

        nodes: rank → machine. A getter waits, too, while somebody else on its node is receiving the object: it will
        map that copy.
        """
        mates = [r for r in self.places if r != rank and nodes[r] == nodes[rank]]
        for mate in mates:
            if self.places[mate].complete and not self.places[mate].failures:
                return mate, True
        for mate in mates:
            place = self.places[mate]
            if not place.complete and not place.mapped and self.fed(mate):
                return None
        busy = self.busy()
        free = [r for r in self.places if r != rank and r not in busy and self.fed(r)]
        if not free:
            return None
        return min(free, key=lambda r: self._order(r, r in mates)), False

    def _order(self, rank: int, mate: bool) -> tuple[int, bool, bool, bool, int, int]:
        place = self.places[rank]
        # those who come one by one are sent on to the copies of those before: the source serves few of them
        return place.failures, not place.complete, place.spilled, not mate, self.depth(rank), place.served

    def evictable(self, rank: int, nodes: dict[int, str]) -> list[int]:
        """Return the ranks whose copies can go together with that of *rank*, those of its node; none if they have to stay.

        They stay if no other node has a complete copy, and while one of them is being received or mapped. What was put stays with the
        process that put it, and what was reduced with all who have it: nobody's death but its own takes it from who has made it.
        """
        mates = [r for r in self.places if nodes[r] == nodes[rank]]
        if self.version != 0 or any(self.places[r].origin for r in mates):
            return []
        used = any(place.sender in mates for place in self.places.values())
        whole = all(self.places[r].complete for r in mates)
        elsewhere = any(place.complete for r, place in self.places.items() if r not in mates)
        return mates if self.final and rank in mates and whole and elsewhere and not used else []
