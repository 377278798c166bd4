"""How an owner answers: what goes out once something about an entry has changed."""

from __future__ import annotations

from hoplite_mpi.protocol import messages as ms
from hoplite_mpi.protocol.entry import Entry, Place
from hoplite_mpi.protocol.port import Port

__all__ = ["Answers"]


class Answers:
    """Answers those who wait at an entry. Only for an owner that has all reports."""

    def __init__(self, port: Port) -> None:
        self._port = port

    def settle(self, entry: Entry) -> None:
        """Answer all that can be answered now."""
        if entry.deleted or entry.error is not None:
            self._settle_without(entry)
            return
        if entry.is_inline and entry.inline is None:
            holder = entry.holder
            if holder is not None and not entry.recalled:
                entry.recalled = True
                self._port.send(holder, ms.Recall(self._port.number, entry.oid))
            return
        for rank in list(entry.wanted):
            if entry.inline is not None:
                self.send_inline(entry, rank)
            else:
                self._locate(entry, rank)
        holder = entry.holder
        if holder is None or entry.meta is None:
            return
        member = self._port.view.members[holder]
        for rank in sorted(entry.subscribers):
            self._port.send(
                rank, ms.Source(self._port.number, entry.oid, entry.meta, member.rank, member.incarnation, entry.inline)
            )
        for rank in sorted(entry.watchers):
            self._port.send(rank, ms.Exists(self._port.number, entry.oid, entry.meta, entry.sources))
        entry.subscribers.clear()
        entry.watchers.clear()

    def _settle_without(self, entry: Entry) -> None:
        number, oid = self._port.number, entry.oid
        text = entry.error or f"{oid!r} was deleted"
        for rank in sorted({*entry.wanted, *entry.watchers}):
            self._port.send(rank, ms.Deleted(number, oid) if entry.deleted else ms.Failed(number, oid, text))
        for rank in sorted(entry.subscribers):
            self._port.send(rank, ms.SourceGone(number, oid, text))
        entry.wanted.clear()
        entry.watchers.clear()
        entry.subscribers.clear()

    def send_inline(self, entry: Entry, rank: int) -> None:
        """Send the bytes themselves; the receiver is a holder from now on."""
        assert entry.version is not None and entry.meta is not None and entry.inline is not None
        entry.wanted.pop(rank, None)
        entry.places[rank] = Place(complete=True)
        message = ms.Inline(
            self._port.number, entry.oid, entry.version, entry.meta, entry.digest, entry.inline, entry.sources
        )
        self._port.send(rank, message)

    def send_lost(self, entry: Entry, rank: int) -> None:
        """Tell a rank that the object will not come."""
        entry.wanted.pop(rank, None)
        entry.watchers.discard(rank)
        text = f"every copy of {entry.oid!r} is lost, and nobody is left who will put it again"
        self._port.send(rank, ms.Lost(self._port.number, entry.oid, text))

    def _locate(self, entry: Entry, rank: int) -> None:
        place = entry.places.get(rank)
        if place is not None and (place.complete or place.producing or place.sender is not None):
            return
        members = self._port.view.members
        found = entry.locate(rank, {r: member.node for r, member in members.items()})
        if found is None or entry.version is None or entry.meta is None:
            return
        sender, mapped = found
        attempt = entry.wanted[rank]
        entry.places[sender].served += not mapped
        failures = 0 if place is None else place.failures
        served = 0 if place is None else place.served
        entry.places[rank] = Place(sender=sender, mapped=mapped, attempt=attempt, failures=failures, served=served)
        self._port.send(
            rank,
            ms.Location(
                self._port.number,
                entry.oid,
                entry.version,
                entry.meta,
                entry.digest,
                attempt,
                sender,
                members[sender].incarnation,
                mapped,
                entry.final,
                entry.sources,
            ),
        )
