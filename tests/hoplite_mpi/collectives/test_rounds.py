from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import msgpack
import pytest

from hoplite_mpi.collectives.rounds import Rounds
from hoplite_mpi.protocol.view import Member, View


class _Store:
    """What Rounds uses of a store, before its first view."""

    def __init__(self) -> None:
        self.runtime = SimpleNamespace(me=(1, 1))
        self.closed = False
        self.sent: list[tuple[int, Any]] = []

    def channel(self, number: int, receive: Any) -> Any:
        self.receive = receive
        return lambda rank, payload: self.sent.append((rank, msgpack.unpackb(payload)))

    def on_view(self, listener: Any) -> View:
        self.changed = listener
        return View(0)


@pytest.mark.parametrize("kind", range(5))
def test_a_message_before_the_first_view(kind: int) -> None:
    """An elder may install a newcomer's view, and tell it something, before the newcomer does."""
    store = _Store()
    rounds = Rounds(store)  # type: ignore[arg-type]
    elder = Member(0, 0, "node", ("127.0.0.1", 1), 1)
    newcomer = Member(1, 1, "node", ("127.0.0.1", 2), 4)
    store.receive((0, 0), msgpack.packb((kind, {"key": 3})))
    assert rounds.kept == 0
    store.changed(View(4, {0: elder, 1: newcomer}), ())
    store.receive((0, 0), msgpack.packb((0, {"key": 3})))  # the elder's numbers
    assert (0, [1, {"key": 3}]) in store.sent, "it did not say what it begins with"
