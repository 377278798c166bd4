"""How an owner builds its shard from the reports of all members."""

from __future__ import annotations

from dataclasses import dataclass, field

from hoplite_mpi.ids import ObjectID
from hoplite_mpi.protocol import messages as ms
from hoplite_mpi.protocol.entry import Entry, Place

__all__ = ["Shard", "place_of", "rebuild"]


@dataclass
class Shard:
    """Entries of all ids that are stored or deleted, and what holders have to be told about it."""

    entries: dict[ObjectID, Entry] = field(default_factory=dict)
    deleted: list[tuple[int, ObjectID]] = field(default_factory=list)
    #: (rank, id, attempt) of puts
    accepted: list[tuple[int, ObjectID, int]] = field(default_factory=list)
    refused: list[tuple[int, ObjectID, int]] = field(default_factory=list)
    #: holders of a version that don't know yet that it is final
    final: list[tuple[int, ObjectID, int, frozenset[ObjectID]]] = field(default_factory=list)

    def messages(self, number: int) -> list[tuple[int, ms.Message]]:
        """Return (receiver, message) for all that holders have to be told; number: of the view."""
        text = "other bytes were put under this id; objects are immutable: use a new id"
        found: list[tuple[int, ms.Message]] = []
        found += [(rank, ms.Deleted(number, oid)) for rank, oid in self.deleted]
        found += [(rank, ms.Accepted(number, oid, attempt)) for rank, oid, attempt in self.accepted]
        found += [(rank, ms.Refused(number, oid, f"{oid!r}: {text}", attempt)) for rank, oid, attempt in self.refused]
        found += [(rank, ms.Final(number, oid, version, sources)) for rank, oid, version, sources in self.final]
        return found


def rebuild(reports: dict[int, ms.Report]) -> Shard:
    """Return the shard that the members' reports (rank → report) tell of.

    Versions that may not be final are left out.
    """
    shard = Shard()
    records: dict[ObjectID, list[tuple[int, ms.ObjectRecord]]] = {}
    delivered: dict[ObjectID, ms.Delivered] = {}
    for rank in sorted(reports):
        for oid in reports[rank].tombstones:
            shard.entries[oid] = Entry(oid, deleted=True)
        for known in reports[rank].delivered:
            delivered[known.oid] = known
        for record in reports[rank].objects:
            records.setdefault(record.oid, []).append((rank, record))
    for oid in sorted(records.keys() | delivered.keys()):
        if oid in shard.entries:
            shard.deleted += [(rank, oid) for rank, _ in records.get(oid, [])]
        else:
            _object(shard, oid, records.get(oid, []), delivered.get(oid))
    return shard


def _object(
    shard: Shard, oid: ObjectID, records: list[tuple[int, ms.ObjectRecord]], bound: ms.Delivered | None
) -> None:
    version = _final_version(records, bound)
    if version is None:
        return
    entry = shard.entries[oid] = Entry(oid, version=version, final=True)
    entry.sources = bound.sources if bound is not None else None
    of_version = [(rank, r) for rank, r in records if r.version == version]
    if not of_version:
        return
    # Of puts that contradict each other one that has, or gets, its bytes stays, and of these an accepted one.
    _, best = min(
        of_version,
        key=lambda item: (
            not (item[1].complete or item[1].producing),
            not item[1].confirmed,
            item[1].digest is None,
            item[0],
        ),
    )
    entry.meta, entry.digest = best.meta, best.digest
    for _, record in of_version:
        entry.sources = entry.sources or record.sources
    for rank, record in of_version:
        if not entry.same(record.meta, record.digest):
            if (record.complete or record.producing) and record.origin:
                shard.refused.append((rank, oid, record.attempt))
            continue
        entry.places[rank] = place_of(record)
        entry.is_inline = entry.is_inline or (record.complete and record.inline)
        if (record.complete or record.producing) and not record.confirmed:
            shard.accepted.append((rank, oid, record.attempt))
        if not record.final and entry.sources is not None:
            shard.final.append((rank, oid, version, entry.sources))


def _final_version(records: list[tuple[int, ms.ObjectRecord]], bound: ms.Delivered | None) -> int | None:
    """Return the version that stays final; None if there is none.

    That a reduced version was made final binds only if somebody alive has had all of it. Otherwise nobody has seen
    it, and as its bytes are gone it is better made again than waited for.
    """
    if bound is not None:
        return bound.version
    final = {r.version for _, r in records if r.final}
    complete = {r.version for _, r in records if r.complete}
    if final & complete:
        return max(final & complete)
    return 0 if 0 in final else None


def place_of(record: ms.ObjectRecord) -> Place:
    """Return the place that a record tells of."""
    return Place(
        complete=record.complete,
        producing=record.producing,
        origin=record.origin,
        spilled=record.spilled,
        sender=record.sender,
        attempt=record.attempt,
    )
