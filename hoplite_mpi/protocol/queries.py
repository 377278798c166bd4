"""Which objects still have a copy: asked of all owners, and asked again in each view until all have answered."""

from __future__ import annotations

from collections.abc import Iterable

from hoplite_mpi.ids import ObjectID
from hoplite_mpi.protocol import messages as ms
from hoplite_mpi.protocol.events import Locations, LocationsRequested
from hoplite_mpi.protocol.port import Port

__all__ = ["Queries"]


class Queries:
    """The queries of this rank that are not answered."""

    def __init__(self, port: Port) -> None:
        self._port = port
        #: query → ids not answered yet, ids found
        self._open: dict[int, tuple[set[ObjectID], set[ObjectID]]] = {}

    def ask(self, event: LocationsRequested) -> None:
        """Ask the owners."""
        self._open[event.request_id] = (set(event.oids), set())
        for dst, message in self._messages([event.request_id]):
            self._port.send(dst, message)
        self._answer(event.request_id)

    def answered(self, message: ms.LocationsReply) -> None:
        """Take in an owner's answer."""
        if message.request_id in self._open:
            pending, known = self._open[message.request_id]
            pending.difference_update(message.asked)
            known.update(message.found)
            self._answer(message.request_id)

    def requests(self) -> list[tuple[int, ms.Message]]:
        """Return (owner, message) for all that is not answered, in the present view."""
        return self._messages(self._open)

    def _messages(self, request_ids: Iterable[int]) -> list[tuple[int, ms.Message]]:
        found: list[tuple[int, ms.Message]] = []
        if not len(self._port.view):  # asked once there is a view
            return found
        for request_id in request_ids:
            by_owner: dict[int, list[ObjectID]] = {}
            for oid in sorted(self._open[request_id][0]):
                by_owner.setdefault(self._port.owner(oid), []).append(oid)
            for owner, oids in by_owner.items():
                found.append((owner, ms.LocationsQuery(self._port.number, request_id, tuple(oids))))
        return found

    def _answer(self, request_id: int) -> None:
        pending, known = self._open[request_id]
        if not pending:
            del self._open[request_id]
            self._port.emit(Locations(request_id, frozenset(known)))
