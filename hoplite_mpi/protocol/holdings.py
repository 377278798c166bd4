"""What a rank has, wants and remembers: the state of the member side, and what every change of it has to tell."""

from __future__ import annotations

from hoplite_mpi.ids import ObjectID
from hoplite_mpi.protocol import events as ev
from hoplite_mpi.protocol import messages as ms
from hoplite_mpi.protocol.copies import Copy
from hoplite_mpi.protocol.port import Port

__all__ = ["Holdings"]


class Holdings:
    """The copies of a rank and its requests.

    An *attempt* is one `Get`, or one put: its number is this rank's own and only rises.

    The owner ends an attempt to get only when this rank has said that it is over (a newer `Get`, `Cancel`, `Completed`,
    `Announce`), and this rank takes a `Location` only for the attempt in force. So an owner's idea of who receives from
    whom always covers what really goes on.
    """

    def __init__(self, port: Port) -> None:
        self._port = port
        self._copies: dict[ObjectID, Copy] = {}
        #: somebody here waits for the bytes
        self._wanted: set[ObjectID] = set()
        #: the attempt in force; of every wanted id, and of what is being received for nobody any longer
        self._attempts: dict[ObjectID, int] = {}
        self._tombstones: set[ObjectID] = set()
        #: reduced objects that were complete and final here: they bind all later owners
        self._delivered: dict[ObjectID, ms.Delivered] = {}
        #: reduces asked for here whose result has not been here yet: a later owner starts them again
        self._specs: dict[ObjectID, ms.ReduceSpec] = {}
        self._last_attempt = 0

    def holds(self, oid: ObjectID) -> bool:
        """Whether a complete and final copy is here."""
        copy = self._copies.get(oid)
        return copy is not None and copy.usable

    def _has(self, oid: ObjectID, version: int) -> bool:
        """Whether a complete and final copy of that version is here, and accepted."""
        return self.holds(oid) and self._copies[oid].version == version

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
