"""How objects travel, proven from the traces of the ranks.

Nothing here goes by how long something takes: a rank stops itself (SIGSTOP) at a fault point in the middle of a stream, and is woken when
what has to happen before its end has happened.
"""

from __future__ import annotations

import os
import signal
from collections.abc import Callable
from typing import Any

import pytest

from hoplite_mpi.testing import run_ranks
from hoplite_mpi.trace import TraceEvent, merge
from hoplite_mpi.transport import guard

pytestmark = pytest.mark.skipif(not guard.load().loaded, reason=f"the guard is not there: {guard.load().why}")

CHUNK = 64 * 1024
CHUNKS = 32
NBYTES = CHUNK * CHUNKS
#: chunk of a stream at which a rank stops
MIDDLE = CHUNKS // 2
#: one small chunk on its way at a time; who waits for a stopped rank waits for as long as it takes
ENV = {
    "HOPLITE_TRACE": "1",
    "HOPLITE_CHUNK_SIZE": str(CHUNK),
    "HOPLITE_WINDOW": "1",
    "HOPLITE_STALL_TIMEOUT": "30",
    "HOPLITE_KEEPALIVE_TIMEOUT": "35",
    "HOPLITE_JOIN_TIMEOUT": "40",
    "HOPLITE_DEFAULT_TIMEOUT": "40",
}


class _Rank:
    """This rank, with its store, connected to all others: none of them is in the middle of a join when another stops."""

    def __init__(self, node: str | None = None) -> None:
        import hoplite_mpi as hm

        self.rank = int(os.environ["HOPLITE_RANK"])
        os.environ["HOPLITE_NODE"] = node or f"node{self.rank}"
        self.store = hm.init()
        self.mail = hm.Mailbox(self.store, 1)
        others = [r for r in range(int(os.environ["HOPLITE_SIZE"])) if r != self.rank]
        for other in others:
            self.mail.send(other, str(os.getpid()).encode())
        self.pids = {rank: int(text) for rank, text in (self.mail.receive() for _ in others)}
        self.store.barrier()

    def owned_by(self, rank: int, what: str) -> Any:
        """Return a name whose directory entry is kept by *rank*."""
        import hoplite_mpi as hm

        names = (hm.ObjectID.from_name(f"{what}/{i}") for i in range(1000))
        return next(oid for oid in names if self.store.runtime.view.owner(bytes(oid)) == rank)

    def seen(self, name: str, **fields: Any) -> list[TraceEvent]:
        return _find(self.store.trace(), name, **fields)

    def until_seen(self, name: str, count: int = 1, **fields: Any) -> None:
        self.until(lambda: len(self.seen(name, **fields)) >= count, f"no {name} with {fields}")

    def until(self, condition: Callable[[], bool], what: str) -> None:
        import time

        end = time.monotonic() + 30
        while not condition():
            assert time.monotonic() < end, what
            time.sleep(0.005)

    def until_stopped(self, rank: int) -> None:
        """Wait until that rank has stopped itself."""

        def stopped() -> bool:
            with open(f"/proc/{self.pids[rank]}/stat") as file:
                return file.read().rpartition(")")[2].split()[0] == "T"

        self.until(stopped, f"rank {rank} has not stopped")

    def wake(self, rank: int) -> None:
        """Let a rank go on that has stopped, or is about to."""
        self.until_stopped(rank)
        os.kill(self.pids[rank], signal.SIGCONT)

    def end(self) -> tuple[list[TraceEvent], Any]:
        """Return the trace and the counters of this rank when all have come here."""
        self.store.barrier()
        statistics = self.store.statistics()
        assert statistics.trace_dropped == 0
        assert statistics.transfers == statistics.transfers_completed + statistics.transfers_failed
        return self.store.trace(), statistics


def _data(seed: int = 0) -> Any:
    import numpy as np

    return np.random.default_rng(seed).integers(0, 1000, NBYTES // 8)


def _right(got: Any, expected: Any) -> None:
    import numpy as np

    assert np.array_equal(got, expected)


def _find(events: list[TraceEvent], name: str, **fields: Any) -> list[TraceEvent]:
    """Return the events of that name with these fields."""
    return [e for e in events if e.name == name and all(e.get(key) == value for key, value in fields.items())]


def _run(n: int, function: Callable[..., Any], *args: Any, fault: str = "") -> tuple[list[TraceEvent], Any]:
    """Run it on *n* ranks; return the events of all, in their order, of the one object, and its id."""
    result = run_ranks(n, function, args, env=ENV | {"HOPLITE_FAULT": fault}, timeout=90)
    assert [result[rank].exitcode for rank in range(n)] == [0] * n, [one.output for one in result.values()]
    oid = result[0].value[0]
    events = merge((result[rank].value[1][0] for rank in range(n)), one_machine=True)
    events = [event for event in events if event.get("oid") == oid]
    _check_serves(events)
    return events, oid


def _check_serves(events: list[TraceEvent]) -> None:
    """No sender has two receivers of one stream at a time (H8)."""
    receivers: dict[Any, int] = {}
    served = 0
    for event in events:
        stream = (event.rank, event.get("oid"), event.get("slot"), event.get("generation", event.get("version")))
        if event.name == "serve.begin":
            assert stream not in receivers, f"rank {event.rank} sends to {receivers[stream]} and {event['peer']}"
            receivers[stream] = event["peer"]
            served += 1
        elif event.name == "serve.end":
            assert receivers.pop(stream) == event["peer"]
    assert not receivers
    assert served, "nothing was sent"


def _one(events: list[TraceEvent], name: str, **fields: Any) -> TraceEvent:
    found = _find(events, name, **fields)
    assert len(found) == 1, (name, fields, found)
    return found[0]


# -- broadcast -------------------------------------------------------------------------------------------------------------


def _partial() -> Any:
    """Rank 0 stops while it sends to rank 1; rank 2 comes then, and wakes it when it has got something."""
    me = _Rank()
    oid = me.owned_by(2, "x")
    if me.rank == 0:
        me.store.put(_data(), oid)
    me.store.barrier()
    if me.rank == 1:
        future = me.store.get_async(oid)
        me.until_seen("transfer.first", oid=oid)
        me.mail.send(2, b"come")
        _right(future.result(), _data())
    if me.rank == 2:
        me.mail.receive()
        future = me.store.get_async(oid)
        me.until_seen("transfer.first", oid=oid)
        me.wake(0)
        _right(future.result(), _data())
    return oid, me.end()


def test_a_partial_copy_serves_before_it_is_complete() -> None:
    events, _ = _run(3, _partial, fault=f"0:transfer.chunk_sent=stop@{MIDDLE}")
    serve = _one(events, "serve.begin", peer=2)
    assert serve.rank == 1
    assert not serve["complete"]
    assert 0 < serve["had"] < NBYTES
    first = _one([e for e in events if e.rank == 2], "transfer.first")
    end = _one([e for e in events if e.rank == 1], "transfer.end")
    assert end["why"] == "complete"
    assert first.time < end.time
    location = _one(events, "location", to=2)
    assert (location["sender"], location["complete"], location["mapped"]) == (1, False, False)


def _many(staggered: bool) -> Any:
    """All but rank 0 get its object, together or one after the other; it goes on when all are in the middle of it."""
    me = _Rank()
    oid, last = me.owned_by(1, "x"), me.store.size - 1
    if me.rank == 0:
        me.store.put(_data(), oid)
    me.store.barrier()
    if me.rank > 0:
        if staggered and me.rank > 1:
            me.mail.receive()
        future = me.store.get_async(oid)
        if staggered:
            me.until_seen("transfer.first", oid=oid)
            if me.rank < last:
                me.mail.send(me.rank + 1, b"come")
            else:
                me.wake(0)
        elif me.rank == 1:
            me.until_seen("location", count=last, oid=oid)
            me.wake(0)
        _right(future.result(), _data())
    return oid, me.end()


@pytest.mark.parametrize("staggered", [False, True])
def test_the_source_serves_one_of_many_getters(staggered: bool) -> None:
    stop = MIDDLE if staggered else 2
    events, _ = _run(6, _many, staggered, fault=f"0:transfer.chunk_sent=stop@{stop}")
    serves = _find(events, "serve.begin")
    assert sorted(event.rank for event in serves if event["offset"] == 0).count(0) == 1
    assert len(serves) == 5
    assert len({event.rank for event in serves}) == 5, "it is a chain: each sends it once"
    assert {event["peer"] for event in serves} == {1, 2, 3, 4, 5}
    assert [event["why"] for event in _find(events, "transfer.end")] == ["complete"] * 5


def _one_by_one() -> Any:
    """Each rank gets the object when the one before has all of it."""
    me = _Rank()
    oid = me.owned_by(1, "x")
    if me.rank == 0:
        me.store.put(_data(), oid)
    for rank in range(1, me.store.size):
        me.store.barrier()
        if rank == me.rank:
            _right(me.store.get(oid), _data())
    return oid, me.end()


def test_getters_that_come_one_by_one_find_complete_copies() -> None:
    events, _ = _run(4, _one_by_one)
    assert [event["complete"] for event in _find(events, "location")] == [True] * 3
    assert [(event["complete"], event["had"]) for event in _find(events, "serve.begin")] == [(True, NBYTES)] * 3


def _complete_first() -> Any:
    """Ranks 0 and 1 have it, rank 2 stops while it receives it, rank 3 comes then."""
    me = _Rank()
    oid = me.owned_by(1, "x")
    if me.rank == 0:
        me.store.put(_data(), oid)
    me.store.barrier()
    if me.rank == 1:
        _right(me.store.get(oid), _data())
    me.store.barrier()
    if me.rank == 2:
        _right(me.store.get(oid), _data())
    if me.rank == 3:
        me.until_stopped(2)
        _right(me.store.get(oid), _data())
        me.wake(2)
    return oid, me.end()


def test_a_complete_copy_is_preferred_to_a_partial_one() -> None:
    events, _ = _run(4, _complete_first, fault=f"2:transfer.chunk_received=stop@{MIDDLE}")
    location = _one(events, "location", to=3)
    assert location["complete"]
    serve = _one(events, "serve.begin", peer=3)
    assert serve.rank == location["sender"]
    assert serve["had"] == NBYTES
    receiving = [e for e in events if e.rank == 2]
    assert _one(receiving, "transfer.first").time < location.time < _one(receiving, "transfer.end").time


def _same_node_first(partial: bool) -> Any:
    """Rank 0 puts; of the ranks on another node the first receives it, and the second maps what that has; partial: when it has."""
    rank = int(os.environ["HOPLITE_RANK"])
    me = _Rank("source" if rank == 0 else "other")
    oid = me.owned_by(2, "x")
    if me.rank == 0:
        me.store.put(_data(), oid)
    me.store.barrier()
    if me.rank == 1:
        future = me.store.get_async(oid)
        if partial:
            me.until_seen("transfer.first", oid=oid)
            me.mail.send(2, b"come")
        _right(future.result(), _data())
    if not partial:
        me.store.barrier()
    if me.rank == 2:
        if partial:
            me.mail.receive()
        future = me.store.get_async(oid)
        if partial:
            me.until_seen("get", oid=oid)
            me.wake(0)
        _right(future.result(), _data())
    return oid, me.end()


@pytest.mark.parametrize("partial", [False, True])
def test_a_copy_on_the_same_node_is_preferred_to_a_remote_one(partial: bool) -> None:
    fault = f"0:transfer.chunk_sent=stop@{MIDDLE}" if partial else ""
    events, _ = _run(3, _same_node_first, partial, fault=fault)
    location = _one(events, "location", to=2)
    assert (location["sender"], location["same_node"], location["mapped"], location["complete"]) == (
        1,
        True,
        True,
        True,
    )
    mapped = _one(events, "map")
    assert (mapped.rank, mapped["holder"], mapped["found"]) == (2, 1, True)
    assert [event["peer"] for event in _find(events, "serve.begin")] == [1]
    assert {event.rank: event["how"] for event in _find(events, "get.delivered")} == {1: "received", 2: "mapped"}


# -- reduce ------------------------------------------------------------------------------------------------------------------


def _result_streams() -> Any:
    """A chain 0 → 1 → 2; rank 0 stops in the middle, and is woken by rank 3 when that has got some of the result."""
    me = _Rank()
    rid = me.owned_by(3, "result")
    sources = [me.owned_by(3, f"source {rank}") for rank in range(3)]
    if me.rank < 3:
        me.store.put(_data(me.rank), sources[me.rank])
    me.store.barrier()
    if me.rank == 3:
        me.store.reduce(sources, object_id=rid, deterministic=True, shape="chain")
        future = me.store.get_async(rid)
        me.until_seen("transfer.first", oid=rid)
        me.wake(0)
        _right(future.result(), _data(0) + _data(1) + _data(2))
    return rid, me.end()


def test_the_result_of_a_reduce_streams_while_it_is_reduced() -> None:
    events, _ = _run(4, _result_streams, fault=f"0:transfer.chunk_sent=stop@{MIDDLE}")
    root = _one(events, "slot.start", root=True)
    assert (root.rank, root["children"]) == (2, 1)
    done = _one(events, "slot.done")
    assert (done.rank, done["slot"]) == (2, root["slot"])
    first = _one([e for e in events if e.rank == 3], "transfer.first")
    final = _one([e for e in events if e.rank == 2], "reduce.final")
    assert first.time < done.time < final.time
    assert (final["version"], final["sources"]) == (root["generation"], 3)
    serve = _one([e for e in events if e.rank == 2], "serve.begin")
    assert (serve["peer"], serve["complete"]) == (3, False)
    assert _one(events, "get.delivered").time > done.time, "it is given out when it is final, not before"


def _early() -> Any:
    """Rank 2 puts the last source when rank 1 has begun to reduce the first two."""
    me = _Rank()
    rid = me.owned_by(3, "result")
    sources = [me.owned_by(3, f"source {rank}") for rank in range(3)]
    if me.rank == 3:
        me.store.reduce(sources, object_id=rid, shape="chain")
    for rank in range(2):
        me.store.barrier()
        if rank == me.rank:
            me.store.put(_data(rank), sources[rank])
    if me.rank == 1:
        me.until_seen("slot.first", oid=rid)
        me.mail.send(2, b"come")
    if me.rank == 2:
        me.mail.receive()
        assert not me.store.located([sources[2]])
        me.store.put(_data(2), sources[2])
    if me.rank == 3:
        _right(me.store.get(rid), _data(0) + _data(1) + _data(2))
    return rid, me.end()


def test_a_reduce_streams_before_all_its_sources_exist() -> None:
    events, _ = _run(4, _early)
    first = _one([e for e in events if e.rank == 1], "slot.first")
    started = _find(events, "slot.start")
    assert [event.rank for event in started] == [0, 1, 2]
    assert first.time < started[2].time, "the slot of the last source begins when the first two are being reduced"
    assert [event["why"] for event in _find(events, "transfer.end")] == ["complete"] * 3
