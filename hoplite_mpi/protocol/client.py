"""The member side of the object protocol: the copies this rank has, what it waits for, and what it remembers."""

from __future__ import annotations

from hoplite_mpi.ids import ObjectID
from hoplite_mpi.meta import Meta
from hoplite_mpi.protocol import events as ev
from hoplite_mpi.protocol import messages as ms
from hoplite_mpi.protocol.copies import Copy, reports
from hoplite_mpi.protocol.cost import shape_error
from hoplite_mpi.protocol.participant import Participant
from hoplite_mpi.protocol.port import Port
from hoplite_mpi.protocol.puts import Puts
from hoplite_mpi.protocol.queries import Queries

__all__ = ["Client"]


class Client(Puts):
    """The member side."""

    def __init__(self, port: Port, participant: Participant) -> None:
        super().__init__(port)
        self._participant = participant
        self._watched: set[ObjectID] = set()
        self._queries = Queries(port)

    # -- asked by the rest of the rank ---------------------------------------------------------------------------------

    def root_started(self, rid: ObjectID, version: int, meta: Meta) -> None:
        """A reduce's root begins to write (rid, version) here."""
        self._discard(rid)
        self._copies[rid] = Copy(version, meta, producing=True)

    def root_done(self, rid: ObjectID, version: int) -> None:
        """A reduce's root has written all of (rid, version) here."""
        copy = self._copies.get(rid)
        if copy is not None and copy.producing and copy.version == version:
            copy.producing, copy.complete = False, True

    def root_stopped(self, rid: ObjectID, version: int) -> None:
        """A slot ended: if it was the root of what is here and this is not final, it is void."""
        copy = self._copies.get(rid)
        if copy is not None and copy.version == version and not copy.final and copy.sender is None:
            self._discard(rid)

    # -- events --------------------------------------------------------------------------------------------------------

    def handle_event(self, event: ev.Event) -> None:
        """Take in an event of the store or of the data plane."""
        match event:
            case ev.ObjectStored():
                self._stored(event)
            case ev.AdoptObject():
                self._adopt(event)
            case ev.PutStarted():
                self._put_started(event)
            case ev.PutFailed(oid):
                self._put_failed(oid)
            case ev.ForgetObject(oid):
                self._forget(oid)
            case ev.EvictRequested(oid, version):
                if self._has(oid, version):
                    self._to_owner(oid, ms.Evict(self._port.number, oid, version))
                else:
                    self._port.emit(ev.Evicted(oid, version, False))
            case ev.ObjectSpilled(oid, version, spilled):
                if self._has(oid, version):
                    self._copies[oid].spilled = spilled
                self._to_owner(oid, ms.Spilled(self._port.number, oid, version, spilled))
            case ev.GetRequested(oid):
                self._get(oid)
            case ev.GetAbandoned(oid):
                self._abandon(oid)
            case ev.WatchRequested(oid):
                self._watch(oid)
            case ev.WatchAbandoned(oid):
                if oid in self._watched:
                    self._watched.discard(oid)
                    self._to_owner(oid, ms.Unwatch(self._port.number, oid))
            case ev.DeleteRequested(oid):
                self._bury(oid)
                self._to_owner(oid, ms.Delete(self._port.number, oid))
            case ev.ReduceRequested():
                self._reduce(event)
            case ev.RetireRequested():
                self._retire(event)
            case ev.LocationsRequested():
                self._queries.ask(event)
            case ev.TransferDone():
                self._transfer_done(event)
            case ev.TransferFailed():
                self._transfer_failed(event)
            case _:
                raise TypeError(f"{event!r} is not an event of the object protocol")

    def _adopt(self, event: ev.AdoptObject) -> None:
        oid, copy = event.oid, self._copies.get(event.oid)
        if copy is not None and copy.complete and copy.final:
            return
        if oid in self._tombstones:
            self._port.emit(ev.Drop(oid, event.version))
            return
        if copy is not None and copy.version == event.version and copy.sender is not None:
            self._port.emit(ev.AbortTransfer(oid, copy.version, copy.attempt))
        elif copy is not None and copy.version != event.version:
            self._discard(oid)
        self._copies[oid] = Copy(
            event.version, event.meta, event.digest, True, True, origin=True, sources=event.sources
        )
        self._announce(oid)
        self._finish(oid)

    def _forget(self, oid: ObjectID) -> None:
        copy = self._copies.get(oid)
        if copy is None or not copy.complete:
            return
        del self._copies[oid]
        self._to_owner(oid, ms.Forget(self._port.number, oid, copy.version))
        if oid in self._wanted:
            self._request(oid)

    def _get(self, oid: ObjectID) -> None:
        if oid in self._tombstones:
            self._port.emit(ev.Fail(oid, "deleted", f"{oid!r} was deleted"))
            return
        self._wanted.add(oid)
        if self.holds(oid):
            self._finish(oid)
        elif oid not in self._attempts:
            self._request(oid)

    def _abandon(self, oid: ObjectID) -> None:
        self._wanted.discard(oid)
        copy = self._copies.get(oid)
        if oid in self._attempts and (copy is None or copy.sender is None):
            self._cancel(oid)

    def _watch(self, oid: ObjectID) -> None:
        if oid in self._tombstones:
            self._port.emit(ev.Fail(oid, "deleted", f"{oid!r} was deleted"))
        elif self.holds(oid):
            self._port.emit(ev.Available(oid, self._copies[oid].meta, self._copies[oid].sources))
        else:
            self._watched.add(oid)
            self._to_owner(oid, ms.Watch(self._port.number, oid, self._last(oid)))

    def _reduce(self, event: ev.ReduceRequested) -> None:
        rid, sources = event.rid, tuple(dict.fromkeys(event.sources))
        n = len(sources) if event.num_objects is None else event.num_objects
        spec = ms.ReduceSpec(rid, sources, event.op, n, event.shape, event.ordered, event.skip_lost, event.degree)
        known, copy = self._specs.get(rid), self._copies.get(rid)
        if rid in self._tombstones:
            self._port.emit(ev.Fail(rid, "deleted", f"{rid!r} was deleted; its id can't be used again"))
        elif not 1 <= n <= len(sources) or rid in sources:
            text = (
                f"can't reduce {n} of {len(sources)} different sources"
                if rid not in sources
                else "is among its sources"
            )
            self._port.emit(ev.Fail(rid, "reduce", f"{rid!r}: {text}"))
        elif (wrong := shape_error(event.shape, event.degree)) is not None:
            self._port.emit(ev.Fail(rid, "reduce", f"{rid!r}: {wrong}"))
        elif (known is not None and not known.agrees(spec)) or (copy is not None and copy.version == 0):
            self._port.emit(ev.Fail(rid, "exists", f"{rid!r} is known as something else; reduce into a new id"))
        elif rid not in self._delivered:
            spec = self._specs.setdefault(rid, spec)
            self._to_owner(rid, ms.ReduceRequest(self._port.number, spec))

    def _retire(self, event: ev.RetireRequested) -> None:
        owners: dict[int, list[ObjectID]] = {}
        for oid in event.tell:
            owners.setdefault(self._port.owner(oid), []).append(oid)
        for owner, oids in owners.items():
            self._port.send(owner, ms.Retire(self._port.number, tuple(oids)))
        for oid in event.oids:
            self._forget_all(oid)

    def _forget_all(self, oid: ObjectID) -> None:
        self._discard(oid)
        self._participant.stop_all(oid)
        self._wanted.discard(oid)
        self._watched.discard(oid)
        self._attempts.pop(oid, None)
        self._specs.pop(oid, None)
        self._delivered.pop(oid, None)
        self._port.emit(ev.Retired(oid))

    def _transfer_done(self, event: ev.TransferDone) -> None:
        oid, copy = event.oid, self._copies.get(event.oid)
        if copy is None or copy.sender is None or (copy.version, copy.attempt) != (event.version, event.attempt):
            return
        copy.complete, copy.sender = True, None
        self._to_owner(oid, ms.Completed(self._port.number, oid, copy.version, copy.attempt))
        if copy.final:
            self._finish(oid)
        elif oid not in self._wanted:
            self._cancel(oid)

    def _transfer_failed(self, event: ev.TransferFailed) -> None:
        oid, copy = event.oid, self._copies.get(event.oid)
        if copy is None or copy.sender is None or (copy.version, copy.attempt) != (event.version, event.attempt):
            return
        suspect, copy.sender = copy.sender[0], None
        if oid in self._wanted:
            self._request(oid, suspect)
        else:
            self._cancel(oid)

    # -- messages ------------------------------------------------------------------------------------------------------

    def handle(self, message: ms.Message) -> None:
        """Take in a message of an owner."""
        match message:
            case ms.Location():
                self._location(message)
            case ms.Inline():
                self._inline(message)
            case ms.Final(_, oid, version, sources):
                copy = self._copies.get(oid)
                if copy is not None and copy.version == version and not copy.final:
                    copy.final, copy.sources = True, sources
                    if copy.complete:
                        self._finish(oid)
            case ms.Accepted(_, oid, attempt):
                self._accepted(oid, attempt)
            case ms.Refused(_, oid, text, attempt):
                self._refused(oid, text, attempt)
            case ms.Retired(_, oids):
                for oid in oids:
                    self._forget_all(oid)
            case ms.Evicted(_, oid, version):
                granted = self._has(oid, version)
                if granted:
                    self._discard(oid)
                self._port.emit(ev.Evicted(oid, version, granted))
            case ms.EvictRefused(_, oid, version):
                self._port.emit(ev.Evicted(oid, version, False))
            case ms.Deleted(_, oid):
                self._bury(oid)
            case ms.Failed(_, oid, text):
                self._failed(oid, "reduce", text)
            case ms.Lost(_, oid, text):
                self._lost(oid, text)
            case ms.Exists(_, oid, meta, sources):
                if oid in self._watched:
                    self._watched.discard(oid)
                    self._port.emit(ev.Available(oid, meta, sources))
            case ms.LocationsReply():
                self._queries.answered(message)
            case ms.Recall(_, oid):
                copy = self._copies.get(oid)
                if copy is not None and copy.usable and copy.inline is not None:
                    self._announce(oid)
            case _:
                raise TypeError(f"{message!r} is not a message to a member")

    def _location(self, message: ms.Location) -> None:
        oid, copy = message.oid, self._copies.get(message.oid)
        if self._attempts.get(oid) != message.attempt or (copy is not None and copy.complete and copy.final):
            return
        if (
            copy is not None
            and (copy.version, copy.meta) == (message.version, message.meta)
            and copy.same(message.digest)
        ):
            if copy.complete or copy.producing:
                return
            if copy.sender is not None:
                self._port.emit(ev.AbortTransfer(oid, copy.version, copy.attempt))
        else:  # what is here are bytes of something else
            self._discard(oid)
            copy = self._copies[oid] = Copy(message.version, message.meta, message.digest)
        copy.sender, copy.attempt = (message.sender, message.sender_incarnation), message.attempt
        copy.final, copy.sources = message.final, message.sources
        if message.mapped:
            self._port.emit(ev.MapLocal(oid, copy.version, copy.attempt, copy.meta, message.sender))
        else:
            self._port.emit(ev.StartTransfer(oid, copy.version, copy.attempt, copy.meta, *copy.sender))

    def _inline(self, message: ms.Inline) -> None:
        oid, copy = message.oid, self._copies.get(message.oid)
        if oid in self._tombstones or (copy is not None and copy.complete and copy.final):
            return
        self._discard(oid)
        self._copies[oid] = Copy(
            message.version, message.meta, message.digest, True, True, message.data, sources=message.sources
        )
        self._finish(oid)

    def _failed(self, oid: ObjectID, kind: str, text: str) -> None:
        self._discard(oid)
        self._attempts.pop(oid, None)
        concerned = oid in self._wanted or oid in self._watched or oid in self._specs
        self._wanted.discard(oid)
        self._watched.discard(oid)
        self._specs.pop(oid, None)
        if concerned:
            self._port.emit(ev.Fail(oid, kind, text))

    def _lost(self, oid: ObjectID, text: str) -> None:
        copy = self._copies.get(oid)
        if copy is None or (not copy.complete and not copy.producing):  # else it has been put here meanwhile
            self._failed(oid, "lost", text)
            self._to_owner(oid, ms.Cancel(self._port.number, oid))

    # -- views ---------------------------------------------------------------------------------------------------------

    def install(self) -> dict[int, ms.Report]:
        """Leave what hung on the dead, and return the report to each member, this rank included."""
        port, view = self._port, self._port.view
        for oid, copy in list(self._copies.items()):
            if copy.sender is not None and not view.has(*copy.sender):
                port.emit(ev.AbortTransfer(oid, copy.version, copy.attempt))
                copy.sender = None
                if oid in self._wanted:
                    self._attempts[oid] = self._next_attempt()
                else:
                    self._discard(oid)
                    self._attempts.pop(oid, None)
        return reports(
            port,
            [copy.record(oid) for oid, copy in self._copies.items()],
            list(self._delivered.values()),
            sorted(self._tombstones),
            self._participant.records(),
            self._requests(),
        )

    def _requests(self) -> list[tuple[int, ms.Message]]:
        """Return all that is asked for and not answered."""
        port, number = self._port, self._port.number
        found: list[tuple[int, ms.Message]] = []
        found += [(port.owner(rid), ms.ReduceRequest(number, spec)) for rid, spec in self._specs.items()]
        found += [
            (port.owner(oid), ms.Get(number, oid, attempt, None, self._last(oid)))
            for oid, attempt in self._attempts.items()
        ]
        found += [(port.owner(oid), ms.Watch(number, oid, self._last(oid))) for oid in self._watched]
        found += [(port.owner(rid), message) for rid, message in self._participant.requests()]
        return found + self._queries.requests()

    def _bury(self, oid: ObjectID) -> None:
        copy = self._copies.get(oid)
        concerned = oid in self._wanted or oid in self._watched or (copy is not None and not copy.confirmed)
        self._tombstones.add(oid)
        self._discard(oid)
        self._participant.stop_all(oid)
        self._wanted.discard(oid)
        self._watched.discard(oid)
        self._attempts.pop(oid, None)
        self._specs.pop(oid, None)
        self._delivered.pop(oid, None)
        if concerned:
            self._port.emit(ev.Fail(oid, "deleted", f"{oid!r} was deleted"))
