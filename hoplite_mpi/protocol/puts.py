"""Puts on the member side, whole and in pieces, and the owner's answers to them."""

from __future__ import annotations

from hoplite_mpi.ids import ObjectID
from hoplite_mpi.protocol import events as ev
from hoplite_mpi.protocol import messages as ms
from hoplite_mpi.protocol.copies import Copy
from hoplite_mpi.protocol.holdings import Holdings

__all__ = ["Puts"]


class Puts(Holdings):
    """The puts of a rank. A copy that the owner has not accepted is never delivered."""

    def takes(self, oid: ObjectID) -> bool:
        """Whether bytes that are put under that id now would become this rank's copy."""
        copy = self._copies.get(oid)
        free = copy is None or (copy.version == 0 and not copy.complete and not copy.producing)
        return free and oid not in self._tombstones and oid not in self._specs

    def writes(self, oid: ObjectID) -> bool:
        """Whether a put that has started is still going to become this rank's copy."""
        copy = self._copies.get(oid)
        return copy is not None and copy.producing and copy.version == 0

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

    def _accepted(self, oid: ObjectID, attempt: int) -> None:
        copy = self._copies.get(oid)
        if copy is not None and copy.origin and not copy.confirmed and copy.attempt == attempt:
            copy.confirmed = True
            self._port.emit(ev.Stored(oid))
            if copy.complete:
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
