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
from hoplite_mpi.protocol.queries import Queries

__all__ = ["Client"]


class Client:
    """The member side. An *attempt* is one `Get`: its number is this rank's own and only rises.

    The owner ends an attempt only when this rank has said that it is over (a newer `Get`, `Cancel`, `Completed`,
    `Announce`), and this rank takes a `Location` only for the attempt in force. So an owner's idea of who receives from
    whom always covers what really goes on.
    """

    def __init__(self, port: Port, participant: Participant) -> None:
        self._port = port
        self._participant = participant
        self._copies: dict[ObjectID, Copy] = {}
        #: somebody here waits for the bytes
        self._wanted: set[ObjectID] = set()
        #: the attempt in force; of every wanted id, and of what is being received for nobody any longer
        self._attempts: dict[ObjectID, int] = {}
        self._watched: set[ObjectID] = set()
        self._tombstones: set[ObjectID] = set()
        #: reduced objects that were complete and final here: they bind all later owners
        self._delivered: dict[ObjectID, ms.Delivered] = {}
        #: reduces asked for here whose result has not been here yet: a later owner starts them again
        self._specs: dict[ObjectID, ms.ReduceSpec] = {}
        self._queries = Queries(port)
        self._last_attempt = 0

    # -- asked by the rest of the rank ---------------------------------------------------------------------------------

    def holds(self, oid: ObjectID) -> bool:
        """Whether a complete and final copy is here."""
        copy = self._copies.get(oid)
        return copy is not None and copy.usable

    def takes(self, oid: ObjectID) -> bool:
        """Whether bytes that are put under that id now would become this rank's copy."""
        copy = self._copies.get(oid)
        free = copy is None or (copy.version == 0 and not copy.complete and not copy.producing)
        return free and oid not in self._tombstones and oid not in self._specs

    def writes(self, oid: ObjectID) -> bool:
        """Whether a put that has started is still going to become this rank's copy."""
        copy = self._copies.get(oid)
        return copy is not None and copy.producing and copy.version == 0

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

    def _stored(self, event: ev.ObjectStored) -> None:
        oid, copy = event.oid, self._copies.get(event.oid)
        if oid in self._tombstones:
            self._port.emit(ev.Drop(oid, 0))
            self._port.emit(ev.Fail(oid, "deleted", f"{oid!r} was deleted; its id can't be used again"))
            return
        if oid in self._specs or (copy is not None and copy.version > 0):
            self._port.emit(ev.Fail(oid, "exists", f"{oid!r} is the result of a reduce; put under another id"))
            return
        if copy is not None and copy.complete:
            if copy.digest not in (None, event.digest):
                self._port.emit(
                    ev.Fail(oid, "exists", f"other bytes were put as {oid!r}; objects are immutable: use a new id")
                )
            elif copy.confirmed:
                self._port.emit(ev.Stored(oid))
            return
        if copy is not None and copy.producing and not copy.same(event.digest):
            self._port.emit(
                ev.Fail(oid, "exists", f"other bytes are being put as {oid!r}; objects are immutable: use a new id")
            )
            return
        if copy is not None and copy.sender is not None:
            self._port.emit(ev.AbortTransfer(oid, copy.version, copy.attempt))
        started = copy if copy is not None and copy.producing else None
        confirmed = not event.confirm or (started is not None and started.confirmed)
        attempt = self._next_attempt() if started is None else started.attempt
        self._copies[oid] = Copy(
            0, event.meta, event.digest, True, True, event.inline, origin=True, confirmed=confirmed, attempt=attempt
        )
        self._announce(oid)
        if confirmed:
            self._port.emit(ev.Stored(oid))
            self._finish(oid)

    def _put_started(self, event: ev.PutStarted) -> None:
        oid, copy = event.oid, self._copies.get(event.oid)
        if copy is not None and copy.sender is not None:
            self._port.emit(ev.AbortTransfer(oid, copy.version, copy.attempt))
        confirmed, attempt = not event.confirm, self._next_attempt()
        self._copies[oid] = Copy(
            0, event.meta, event.digest, False, True, origin=True, confirmed=confirmed, producing=True, attempt=attempt
        )
        self._announce(oid)
        if not event.confirm:
            self._port.emit(ev.Stored(oid))

    def _put_failed(self, oid: ObjectID) -> None:
        copy = self._copies.get(oid)
        if copy is None or not copy.producing or copy.version != 0:
            return
        self._discard(oid)
        self._to_owner(oid, ms.Forget(self._port.number, oid, 0))
        if oid in self._wanted:
            self._request(oid)

    def _has(self, oid: ObjectID, version: int) -> bool:
        """Whether a complete and final copy of that version is here, and accepted."""
        return self.holds(oid) and self._copies[oid].version == version

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
                copy = self._copies.get(oid)
                if copy is not None and copy.origin and not copy.confirmed and copy.attempt == attempt:
                    copy.confirmed = True
                    self._port.emit(ev.Stored(oid))
                    if copy.complete:
                        self._finish(oid)
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

    def _refused(self, oid: ObjectID, text: str, attempt: int | None) -> None:
        copy = self._copies.get(oid)
        if attempt is not None and (copy is None or not copy.origin or copy.attempt != attempt):
            return  # an earlier put's, which was given up
        if copy is not None and copy.origin:
            self._discard(oid)
            self._port.emit(ev.Fail(oid, "exists", text))
            if oid in self._wanted:
                self._request(oid)  # the earlier attempt's location may have been passed over for the sake of the put
            else:
                self._cancel(oid)
        elif self._specs.pop(oid, None) is not None:
            self._port.emit(ev.Fail(oid, "exists", text))

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

    # -- helpers -------------------------------------------------------------------------------------------------------

    def _to_owner(self, oid: ObjectID, message: ms.Message) -> None:
        if len(self._port.view):  # before the first view the report says it all
            self._port.send(self._port.owner(oid), message)

    def _next_attempt(self) -> int:
        self._last_attempt += 1
        return self._last_attempt

    def _request(self, oid: ObjectID, suspect: int | None = None) -> None:
        self._attempts[oid] = self._next_attempt()
        self._to_owner(oid, ms.Get(self._port.number, oid, self._last_attempt, suspect, self._last(oid)))

    def _last(self, oid: ObjectID) -> bool:
        """Whether nobody will put it any more: the only process that could has left the view."""
        return oid.origin is not None and len(self._port.view) > 0 and not self._port.view.has(*oid.origin)

    def _cancel(self, oid: ObjectID) -> None:
        """End the attempt in force.

        A copy that is neither complete and final nor being written here is of no use then.
        """
        copy = self._copies.get(oid)
        if copy is not None and not (copy.complete and copy.final) and not copy.producing:
            self._discard(oid)
        self._attempts.pop(oid, None)
        self._to_owner(oid, ms.Cancel(self._port.number, oid))

    def _announce(self, oid: ObjectID) -> None:
        c = self._copies[oid]
        message = ms.Announce(
            self._port.number,
            oid,
            c.version,
            c.meta,
            c.digest,
            c.inline,
            c.sources,
            c.origin,
            not c.confirmed,
            c.producing,
            c.attempt,
        )
        self._to_owner(oid, message)

    def _finish(self, oid: ObjectID) -> None:
        """The copy is usable: wake those who wait, and remember a reduced one."""
        copy = self._copies[oid]
        self._attempts.pop(oid, None)
        if copy.sources is not None:
            self._delivered[oid] = ms.Delivered(oid, copy.version, copy.sources)
            self._specs.pop(oid, None)
        if oid in self._wanted:
            self._wanted.discard(oid)
            self._port.emit(ev.Deliver(oid, copy.version, copy.meta, copy.inline, copy.sources))

    def _discard(self, oid: ObjectID) -> None:
        copy = self._copies.pop(oid, None)
        if copy is None:
            return
        if copy.sender is not None:
            self._port.emit(ev.AbortTransfer(oid, copy.version, copy.attempt))
        self._port.emit(ev.Drop(oid, copy.version))

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
