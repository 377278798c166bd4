"""A member's copies, and the reports it makes of them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from hoplite_mpi.ids import ObjectID
from hoplite_mpi.meta import Meta
from hoplite_mpi.protocol import messages as ms

if TYPE_CHECKING:
    from hoplite_mpi.protocol.port import Port

__all__ = ["Copy", "reports"]


@dataclass
class Copy:
    """A copy on this rank, complete or not."""

    version: int
    meta: Meta
    digest: bytes | None = None
    complete: bool = False
    final: bool = False
    inline: bytes | None = None
    #: put or adopted here
    origin: bool = False
    #: the owner has accepted it, or needs not be asked; an unconfirmed copy is never delivered
    confirmed: bool = True
    sources: frozenset[ObjectID] | None = None
    #: a reduce's root, or a put, writes it here; never with a sender
    producing: bool = False
    #: complete, but on disk
    spilled: bool = False
    #: (rank, incarnation) it is being received from; always a member of the view
    sender: tuple[int, int] | None = None
    #: of the transfer under way or the last one, or of the put
    attempt: int = 0

    @property
    def usable(self) -> bool:
        """Whether it may be delivered."""
        return self.complete and self.final and self.confirmed

    def same(self, digest: bytes | None) -> bool:
        """Whether bytes of this digest are the same, as far as one can tell."""
        return self.digest is None or digest is None or self.digest == digest

    def record(self, oid: ObjectID) -> ms.ObjectRecord:
        """Return what a report says of it."""
        return ms.ObjectRecord(
            oid,
            self.version,
            self.meta,
            self.digest,
            self.complete,
            self.final,
            self.inline is not None,
            self.origin,
            self.confirmed,
            self.sources,
            None if self.sender is None else self.sender[0],
            self.attempt,
            self.producing,
            self.spilled,
        )


def reports(
    port: Port,
    objects: list[ms.ObjectRecord],
    delivered: list[ms.Delivered],
    tombstones: list[ObjectID],
    slots: list[ms.SlotRecord],
    requests: list[tuple[int, ms.Message]],
) -> dict[int, ms.Report]:
    """Return the report to each member, an empty one included: the parts of its shard. requests: (owner, message)."""
    parts: dict[
        int, tuple[list[ms.ObjectRecord], list[ms.Delivered], list[ObjectID], list[ms.SlotRecord], list[ms.Message]]
    ]
    parts = {rank: ([], [], [], [], []) for rank in port.view.members}
    for record in objects:
        parts[port.owner(record.oid)][0].append(record)
    for bound in delivered:
        parts[port.owner(bound.oid)][1].append(bound)
    for oid in tombstones:
        parts[port.owner(oid)][2].append(oid)
    for slot in slots:
        parts[port.owner(slot.rid)][3].append(slot)
    for owner, message in requests:
        parts[owner][4].append(message)
    return {
        rank: ms.Report(port.number, tuple(o), tuple(d), tuple(t), tuple(s), tuple(r))
        for rank, (o, d, t, s, r) in parts.items()
    }
