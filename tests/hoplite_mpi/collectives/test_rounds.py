from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import msgpack
import pytest

from hoplite_mpi.collectives.rounds import Rounds
from hoplite_mpi.protocol.view import Member, View
from hoplite_mpi.transport.primitives import Waiter


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


def test_a_call_counts_as_finished_only_with_all_before_it() -> None:
    """What a call waits for after it has returned may end later than the next call: until then nobody may forget its objects."""
    store = _Store()
    rounds = Rounds(store)  # type: ignore[arg-type]
    store.changed(View(1, {rank: Member(rank, 1, "node", ("127.0.0.1", 1), 1) for rank in (0, 1)}), ())
    store.runtime.check = lambda: None
    store.runtime.engine = SimpleNamespace(waiter=lambda: Waiter(), wait=lambda done, block, seconds: done())
    first, second = rounds.begin("key", 1.0), rounds.begin("key", 1.0)
    first.urgent = second.urgent = True

    def told() -> list[int]:
        return [table.get("key", 0) for _, (kind, table) in store.sent if kind == 2]

    rounds.finish(second)
    assert told() == [0]
    rounds.finish(first)
    assert told() == [0, 2]
