"""One shard of the directory, at its owner, and the reduces whose results are in it."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING

from hoplite_mpi.protocol import messages as ms
from hoplite_mpi.protocol.answers import Answers
from hoplite_mpi.protocol.entry import Entry, Place
from hoplite_mpi.protocol.rebuild import place_of, rebuild
from hoplite_mpi.protocol.reduce import Reduction

if TYPE_CHECKING:
    from hoplite_mpi.ids import ObjectID
    from hoplite_mpi.meta import Meta
    from hoplite_mpi.protocol.events import InlineReduced
    from hoplite_mpi.protocol.port import Port

__all__ = ["Directory"]


class Directory:
    """Soft state: built anew from the reports of all members in each view.

    Until the last report it is not `ready` and gets no other message.

    A reduce goes on over a change of view if its coordinator stays; otherwise the new one starts a new version.
    """

    reduction_class: type[Reduction] = Reduction

    def __init__(self, port: Port) -> None:
        self._port = port
        self._answers = Answers(port)
        self._entries: dict[ObjectID, Entry] = {}
        #: reduces that are not final, by the id of the result
        self._reductions: dict[ObjectID, Reduction] = {}
        #: all reduces asked for, as long as this rank owns them: a final version that is lost before anybody has seen
        #: it is made again
        self._specs: dict[ObjectID, ms.ReduceSpec] = {}
        self._errors: dict[ObjectID, str] = {}
        self._reports: dict[int, ms.Report] = {}
        self._ready = False
        #: reduces begun so far, those that began anew included
        self.reduces = 0

    @property
    def ready(self) -> bool:
        """Whether all members have reported in this view."""
        return self._ready

    def entry(self, oid: ObjectID) -> Entry:
        """Return the entry of *oid*, made if there is none."""
        found = self._entries.get(oid)
        if found is None:
            found = self._entries[oid] = Entry(oid, error=self._errors.get(oid))
        return found

    # -- views ---------------------------------------------------------------------------------------------------------

    def install(self) -> None:
        """A new view: forget all but what only this rank knows of the reduces it still coordinates."""
        mine = self._port.rank
        for table in (self._reductions, self._specs, self._errors):
            for oid in [oid for oid in table if self._port.owner(oid) != mine]:
                del table[oid]
        self._entries = {}
        self._reports = {}
        self._ready = False

    def report(self, src: int, message: ms.Report) -> None:
        """A member has reported; with the last one the shard is there."""
        if self._ready or src not in self._port.view:
            return
        self._reports[src] = message
        if not self._complete():
            return
        reports, self._reports = self._reports, {}
        self._ready = True
        self._install_reports(reports)
        for rank in sorted(reports):
            for request in reports[rank].requests:
                self.handle(rank, request)
        for entry in list(self._entries.values()):
            self._answers.settle(entry)

    def _complete(self) -> bool:
        return len(self._reports) == len(self._port.view)

    def _install_reports(self, reports: dict[int, ms.Report]) -> None:
        shard = rebuild(reports)
        self._entries = shard.entries
        for oid, text in self._errors.items():
            self.entry(oid).error = text
        for dst, message in shard.messages(self._port.number):
            self._port.send(dst, message)
        slots: dict[ObjectID, set[tuple[int, int, int]]] = {}
        for rank, report in reports.items():
            for record in report.slots:
                slots.setdefault(record.rid, set()).add((rank, record.slot, record.generation))
        for rid, started in slots.items():
            if rid not in self._reductions or self._settled(rid):
                for rank, slot, generation in started:
                    self._port.send(rank, ms.SlotStop(self._port.number, rid, slot, generation))
        for rid in [rid for rid in self._specs if self.entry(rid).deleted]:
            del self._specs[rid]
        for rid in [rid for rid in self._reductions if self._settled(rid)]:
            self._reductions.pop(rid).cancel()
        for rid, reduction in list(self._reductions.items()):
            reduction.install(self._port.view, slots.get(rid, set()))
            self._resume(rid, reduction, reports)
        for spec in list(self._specs.values()):
            self._begin(spec)

    def _settled(self, rid: ObjectID) -> bool:
        entry = self._entries.get(rid)
        return entry is not None and (entry.final or entry.deleted)

    def _resume(self, rid: ObjectID, reduction: Reduction, reports: dict[int, ms.Report]) -> None:
        """Find the copies of the version that goes on."""
        entry = self.entry(rid)
        shown = reduction.streaming
        if shown is None:
            return
        version, meta, root = shown
        if entry.version != version:
            entry.void()
            entry.version, entry.meta = version, meta
            entry.places = {root: Place(producing=True)}
        for rank, report in reports.items():
            for record in report.objects:
                if record.oid == rid and record.version == version and rank != root:
                    entry.places[rank] = place_of(record)

    # -- messages ------------------------------------------------------------------------------------------------------

    def handle(self, src: int, message: ms.Message) -> None:
        """Take in a message to the owner; `ready` must hold."""
        match message:
            case ms.Announce():
                self._announce(src, message)
            case ms.Get():
                self._get(src, message)
            case ms.Cancel(_, oid):
                self._cancel(src, self.entry(oid))
            case ms.Completed():
                self._completed(src, message)
            case ms.Forget(_, oid, version):
                entry = self.entry(oid)
                if entry.version == version and entry.places.pop(src, None) is not None:
                    entry.recalled = False  # it may have been asked for inline bytes, and have had none
                    self._answers.settle(entry)
            case ms.Evict(_, oid, version):
                self._evict(src, oid, version)
            case ms.Spilled(_, oid, version, spilled):
                if oid in self._entries and self._entries[oid].version == version:
                    members = self._port.view.members
                    for rank, place in self._entries[oid].places.items():
                        if members[rank].node == members[src].node:
                            place.spilled = spilled
            case ms.Watch(_, oid, last):
                entry = self.entry(oid)
                entry.watchers.add(src)
                self._answers.settle(entry)
                if src in entry.watchers and entry.lost(last):
                    self._answers.send_lost(entry, src)
            case ms.Unwatch(_, oid):
                self.entry(oid).watchers.discard(src)
            case ms.Delete(_, oid):
                self._delete(src, self.entry(oid))
            case ms.Retire(_, oids):
                self._retire(src, oids)
            case ms.LocationsQuery(number, request_id, oids):
                found = tuple(oid for oid in oids if oid in self._entries and self._entries[oid].holder is not None)
                self._port.send(src, ms.LocationsReply(number, request_id, oids, found))
            case ms.ReduceRequest(_, spec):
                self._reduce(src, spec)
            case ms.SourceWatch(_, oid, last):
                entry = self.entry(oid)
                entry.subscribers.add(src)
                self._answers.settle(entry)
                if src in entry.subscribers and entry.lost(last):
                    entry.subscribers.discard(src)
                    self._port.send(src, ms.SourceGone(self._port.number, oid, f"every copy of {oid!r} is lost"))
            case ms.Source(_, oid):
                for reduction in self._that_await(oid):
                    reduction.arrived(message)
            case ms.SourceGone(_, oid, text):
                for reduction in self._that_await(oid):
                    reduction.gone(oid, text)
            case ms.RootDone() | ms.SlotLost() | ms.ChildLost():
                self._of_slot(message)
            case _:
                raise TypeError(f"{message!r} is not a message to an owner")

    def handle_event(self, event: InlineReduced) -> None:
        """The driver has reduced inline objects; if a view has come since, the new owner has asked for its own."""
        reduction = self._reductions.get(event.rid)
        if reduction is not None:
            reduction.computed(event)

    def _announce(self, src: int, message: ms.Announce) -> None:
        entry, number, oid = self.entry(message.oid), self._port.number, message.oid
        if entry.deleted:
            self._port.send(src, ms.Deleted(number, oid))
            return
        if message.version == 0 and (oid in self._specs or entry.error is not None):
            self._port.send(
                src,
                ms.Refused(number, oid, f"{oid!r} is the result of a reduce; put under another id", message.attempt),
            )
            return
        if (entry.bound or (entry.final and message.version > 0)) and not (
            entry.version == message.version and (entry.meta is None or entry.same(message.meta, message.digest))
        ):
            self._port.send(
                src,
                ms.Refused(
                    number,
                    oid,
                    f"other bytes were put as {oid!r}; objects are immutable: use a new id",
                    message.attempt,
                ),
            )
            return
        if not (entry.final and entry.version == message.version and entry.same(message.meta, message.digest)):
            entry.void()
            if oid in self._reductions:  # adopted from the arena: an older version had been final
                self._reductions.pop(oid).cancel()
        entry.version, entry.meta, entry.final, entry.sources = message.version, message.meta, True, message.sources
        entry.digest = entry.digest or message.digest
        entry.places[src] = Place(complete=not message.partial, producing=message.partial, origin=message.origin)
        if not message.partial:
            entry.wanted.pop(src, None)
        if message.inline is not None:
            self._hold_inline(entry, message.inline)
        if message.confirm:
            self._port.send(src, ms.Accepted(number, oid, message.attempt))
        self._answers.settle(entry)

    def _hold_inline(self, entry: Entry, data: bytes) -> None:
        """Take inline bytes into the entry, and into this rank's own copies.

        Those it reports when another rank becomes the owner.
        """
        entry.is_inline, entry.inline = True, data
        if self._port.rank not in entry.places:
            self._answers.send_inline(entry, self._port.rank)

    def _evict(self, src: int, oid: ObjectID, version: int) -> None:
        """Let the copies of a node go if another node has one. A rank asks once more before it lets go: of two nodes one keeps its copy."""
        number, entry = self._port.number, self.entry(oid)
        nodes = {rank: member.node for rank, member in self._port.view.members.items()}
        gone = entry.evictable(src, nodes) if entry.version == version else []
        for rank in gone:
            del entry.places[rank]
            self._port.send(rank, ms.Evicted(number, oid, version))
        if not gone:
            self._port.send(src, ms.EvictRefused(number, oid, version))

    def _get(self, src: int, message: ms.Get) -> None:
        entry, attempt = self.entry(message.oid), message.attempt
        place = entry.places.get(src)
        if not self._is_new(entry, src, attempt):
            return
        entry.seen[src] = attempt
        if place is not None and place.sender is not None and self._ends(place, attempt):
            if message.suspect == place.sender and message.suspect in entry.places:
                suspect = entry.places[message.suspect]
                suspect.failures += 1
                suspect.stalled = suspect.sender is not None
            place.sender = None
        if place is not None:
            place.stalled = False
        if not (place is not None and place.complete and entry.final):
            entry.wanted[src] = attempt
        self._answers.settle(entry)
        if src in entry.wanted and entry.lost(message.last):
            self._answers.send_lost(entry, src)

    def _is_new(self, entry: Entry, src: int, attempt: int) -> bool:
        """Whether this attempt was not heard of before in this view."""
        return attempt > entry.seen.get(src, 0)

    def _ends(self, place: Place, attempt: int) -> bool:
        """Whether a `Get` with this number says that the transfer under way is over."""
        return attempt > place.attempt

    def _cancel(self, src: int, entry: Entry) -> None:
        entry.wanted.pop(src, None)
        place = entry.places.get(src)
        if place is not None and not place.producing and not (place.complete and entry.final):
            del entry.places[src]
        self._answers.settle(entry)

    def _completed(self, src: int, message: ms.Completed) -> None:
        entry = self.entry(message.oid)
        place = entry.places.get(src)
        if (
            entry.version != message.version
            or place is None
            or place.sender is None
            or place.attempt != message.attempt
        ):
            return
        if place.sender in entry.places:
            entry.places[place.sender].failures = 0
        place.complete, place.sender, place.stalled = True, None, False
        if entry.final:
            entry.wanted.pop(src, None)
        self._answers.settle(entry)

    def _delete(self, src: int, entry: Entry) -> None:
        """Tell all who have to do with it; the tombstones of this rank and of the deleter are enough to remember it."""
        number, oid = self._port.number, entry.oid
        concerned = {self._port.rank, src, *entry.places, *entry.wanted, *entry.watchers}
        for rank in sorted(concerned):
            self._port.send(rank, ms.Deleted(number, oid))
        for rank in sorted(entry.subscribers):
            self._port.send(rank, ms.SourceGone(number, oid, f"{oid!r} was deleted"))
        if oid in self._reductions:
            self._reductions.pop(oid).cancel()
        self._specs.pop(oid, None)
        self._errors.pop(oid, None)
        self._entries[oid] = Entry(oid, deleted=True)

    def _retire(self, src: int, oids: tuple[ObjectID, ...]) -> None:
        """Forget them here, and tell those who hold inline bytes: a former owner may not know that it does."""
        holders: dict[int, list[ObjectID]] = {self._port.rank: list(oids)}
        for oid in oids:
            entry = self._entries.pop(oid, None)
            for rank in () if entry is None or not entry.is_inline else entry.places:
                if rank not in (src, self._port.rank):
                    holders.setdefault(rank, []).append(oid)
            self._specs.pop(oid, None)
            self._errors.pop(oid, None)
            if oid in self._reductions:
                self._reductions.pop(oid).cancel()
        for rank, held in holders.items():
            self._port.send(rank, ms.Retired(self._port.number, tuple(held)))

    # -- reduces -------------------------------------------------------------------------------------------------------

    def _reduce(self, src: int, spec: ms.ReduceSpec) -> None:
        entry, number = self.entry(spec.rid), self._port.number
        known = self._specs.get(spec.rid)
        if entry.deleted:
            self._port.send(src, ms.Deleted(number, spec.rid))
        elif entry.error is not None:
            self._port.send(src, ms.Failed(number, spec.rid, entry.error))
        elif (known is not None and not known.agrees(spec)) or (entry.final and entry.version == 0):
            self._port.send(
                src, ms.Refused(number, spec.rid, f"{spec.rid!r} is known as something else; reduce into a new id")
            )
        else:
            self._begin(self._specs.setdefault(spec.rid, spec), src)

    def _begin(self, spec: ms.ReduceSpec, caller: int | None = None) -> None:
        entry = self.entry(spec.rid)
        if spec.rid in self._reductions or entry.final or entry.error is not None:
            return
        entry.void()
        reduction = self._reductions[spec.rid] = self.reduction_class(self._port, self, spec)
        reduction.caller = caller
        self.reduces += 1
        reduction.begin()

    def _that_await(self, oid: ObjectID) -> Iterable[Reduction]:
        return [reduction for reduction in self._reductions.values() if reduction.awaits(oid)]

    def _of_slot(self, message: ms.RootDone | ms.SlotLost | ms.ChildLost) -> None:
        reduction = self._reductions.get(message.rid)
        if reduction is None:
            return
        if isinstance(message, ms.RootDone):
            reduction.root_done(message)
        elif isinstance(message, ms.SlotLost):
            reduction.slot_lost(message)
        else:
            reduction.child_lost(message)

    def streaming(self, rid: ObjectID, version: int, meta: Meta, root: int) -> None:
        """See `Host`."""
        entry = self.entry(rid)
        entry.void()
        entry.version, entry.meta = version, meta
        entry.places = {root: Place(producing=True)}
        self._answers.settle(entry)

    def voided(self, rid: ObjectID) -> None:
        """See `Host`."""
        self.entry(rid).void()

    def finalized(self, rid: ObjectID, version: int, sources: frozenset[ObjectID]) -> None:
        """See `Host`."""
        self._reductions.pop(rid, None)
        entry = self.entry(rid)
        entry.final, entry.sources = True, sources
        for place in entry.places.values():
            if place.producing:
                place.producing, place.complete = False, True
        for rank in sorted({*entry.places, *entry.wanted}):
            self._port.send(rank, ms.Final(self._port.number, rid, version, sources))
        for rank, place in entry.places.items():
            if place.complete:
                entry.wanted.pop(rank, None)
        self._answers.settle(entry)

    def finalized_inline(
        self, rid: ObjectID, version: int, meta: Meta, data: bytes, sources: frozenset[ObjectID]
    ) -> None:
        """See `Host`."""
        self._reductions.pop(rid, None)
        entry = self.entry(rid)
        entry.void()
        entry.version, entry.meta, entry.final, entry.sources = version, meta, True, sources
        self._hold_inline(entry, data)
        self._answers.settle(entry)

    def failed(self, rid: ObjectID, text: str) -> None:
        """See `Host`."""
        self._reductions.pop(rid, None)
        self._specs.pop(rid, None)
        self._errors[rid] = text
        entry = self.entry(rid)
        holders = {*entry.places, *entry.wanted, *entry.watchers}
        entry.void()
        entry.wanted.clear()
        entry.watchers.clear()
        entry.error = text
        for rank in sorted(holders):
            self._port.send(rank, ms.Failed(self._port.number, rid, text))
        self._answers.settle(entry)
