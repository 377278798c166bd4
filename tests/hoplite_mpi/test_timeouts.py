"""Every call that waits: out of time it says so, leaves nothing waiting, and can be made again."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest

import hoplite_mpi as hm
from hoplite_mpi import ObjectID

if TYPE_CHECKING:
    from hoplite_mpi.store import ObjectStore

pytestmark = pytest.mark.mpi

Name = Callable[[object], ObjectID]
LARGE = 300_001
NAN = float("nan")


@pytest.fixture(scope="module")
def _own_store() -> Iterator[ObjectStore]:
    with pytest.MonkeyPatch.context() as patch:
        from mpi4py import MPI

        patch.setenv("HOPLITE_NODE", f"node{MPI.COMM_WORLD.rank}")
        with hm.init(config=hm.Config(default_timeout=40.0)) as store:
            yield store


@pytest.fixture
def own_store(_own_store: ObjectStore) -> Iterator[ObjectStore]:
    """A store that no other test waits on, so that its tables can be looked at: they are empty before and after each test."""
    _settle(_own_store)
    yield _own_store
    _settle(_own_store)


def _left(store: ObjectStore) -> dict[str, list[Any]]:
    """Return what is waiting, here and at the owners of directory entries that this rank keeps."""
    waiting, client = store._waiting, store.runtime.protocol.client
    tables = {
        "getters": waiting.getters,
        "watchers": waiting.watchers,
        "putters": waiting.putters,
        "queries": waiting.queries,
        "wanted": client._wanted,
        "watched": client._watched,
        "attempts": client._attempts,
        "asked": client._queries._open,
    }
    found: dict[str, list[Any]] = {name: list(table) for name, table in tables.items() if table}
    entries = store.runtime.protocol.directory._entries.values()
    if asked := [entry for entry in entries if entry.wanted or entry.watchers]:
        found["entries"] = asked
    return found


def _all_here() -> None:
    """Wait for the other ranks, without the store: in its own barrier somebody waits."""
    from mpi4py import MPI

    request, end = MPI.COMM_WORLD.Ibarrier(), time.monotonic() + 30
    while not request.Test():
        assert time.monotonic() < end, "another rank has not come"
        time.sleep(0.002)


def _settle(store: ObjectStore) -> None:
    """Nothing waits on any rank; what is taken back is on its way to the owners for a moment. All ranks call this."""
    _all_here()
    end = time.monotonic() + 12
    while left := _left(store):
        assert time.monotonic() < end, f"still waiting: {left}"
        time.sleep(0.002)
    _all_here()


def _outcome(call: Callable[[], Any]) -> str:
    try:
        call()
    except Exception as error:
        return type(error).__name__
    return "none"


def _calls(store: ObjectStore, oid: ObjectID) -> dict[str, Callable[[Any], Any]]:
    return {
        "get": lambda seconds: store.get(oid, timeout=seconds),
        "reduced_from": lambda seconds: store.reduced_from(oid, timeout=seconds),
        "result": lambda seconds: _cancelled(store.get_async(oid), seconds),
    }


def _cancelled(future: Any, seconds: Any) -> Any:
    try:
        return future.result(seconds)
    finally:
        future.cancel()


@pytest.mark.parametrize("what", ["get", "reduced_from", "result"])
@pytest.mark.parametrize(
    ("seconds", "error"),
    [
        (0, "GetTimeoutError"),
        (0.05, "GetTimeoutError"),
        (-1, "GetTimeoutError"),
        (-float("inf"), "GetTimeoutError"),
        (NAN, "ValueError"),
        ("soon", "ValueError"),
        ([], "TypeError"),
    ],
)
def test_what_waits_for_one_object(own_store: ObjectStore, name: Name, what: str, seconds: Any, error: str) -> None:
    store, call = own_store, _calls(own_store, name(""))[what]
    start = time.monotonic()
    for _ in range(3):
        assert _outcome(lambda: call(seconds)) == error
        assert not store._waiting.getters and not store._waiting.watchers
    assert time.monotonic() - start < 10
    _settle(store)
    sources = [store.put(np.full(LARGE, 1.0)) for _ in range(2)] if store.rank == 0 else []
    if sources:
        store.reduce(sources, object_id=name(""))
    for limit in (None, float("inf")):
        got = call(limit)
        assert len(got) == (2 if what == "reduced_from" else LARGE)
    if what != "reduced_from":  # which asks the owner
        assert _outcome(lambda: call(0)) == "none", "what is there needs no time"
    store.barrier()


@pytest.mark.parametrize("seconds", [0, 0.05, -1])
def test_wait_and_located_out_of_time(own_store: ObjectStore, name: Name, seconds: float) -> None:
    store, oids = own_store, [name(i) for i in range(3)]
    for _ in range(3):
        assert store.wait(oids, 2, timeout=seconds) == ([], oids)
        assert not store._waiting.watchers
        # an answer may come at once, where this rank keeps the entries itself
        assert _outcome(lambda: store.located(oids, timeout=seconds)) in ("GetTimeoutError", "none")
        assert not store._waiting.queries
    for bad in (NAN, "soon", []):
        for call in (lambda: store.wait(oids, timeout=bad), lambda: store.located(oids, timeout=bad)):
            assert _outcome(call) in ("ValueError", "TypeError")
            assert not store._waiting.watchers and not store._waiting.queries
    store.barrier()
    if store.rank == 0:
        for oid in oids[:2]:
            store.put(b"", oid)
    assert store.wait(oids, 2, timeout=None) == (oids[:2], oids[2:])
    assert store.located(oids, timeout=None) == set(oids[:2])
    store.barrier()


_COLLECTIVES: dict[str, Callable[..., Any]] = {
    "barrier": lambda store, part, **options: store.barrier(**options),
    "broadcast": lambda store, part, **options: store.broadcast(part, store.size - 1, **options),
    "reduce_to": lambda store, part, **options: store.reduce_to(part, 0, **options),
    "allreduce": lambda store, part, **options: store.allreduce(part, **options),
    "allreduce, ordered": lambda store, part, **options: store.allreduce(part, deterministic=True, **options),
    "reduce_scatter": lambda store, part, **options: store.reduce_scatter(part, **options),
    "gather": lambda store, part, **options: store.gather(part, 0, **options),
    "allgather": lambda store, part, **options: store.allgather(part, **options),
    "scatter": lambda store, part, **options: store.scatter([part] * store.size, store.size - 1, **options),
    "alltoall": lambda store, part, **options: store.alltoall([part] * store.size, **options),
}


@pytest.mark.parametrize("size", [10, LARGE])
@pytest.mark.parametrize("what", _COLLECTIVES)
@pytest.mark.parametrize("seconds", [0, 0.1])
def test_collectives(own_store: ObjectStore, name: Name, what: str, size: int, seconds: float) -> None:
    """The last rank comes late to a call, the others are out of time in it; the next call with the key is as if nothing had been."""
    store, call, key = own_store, _COLLECTIVES[what], str(name(""))
    part, late = np.full(size, 1.0), store.rank == store.size - 1
    # who is out of time before it knew who takes part has not given its part: then the others run out of time, too
    in_steps = what == "alltoall" or (size == LARGE and what in ("allreduce", "allreduce, ordered", "reduce_scatter"))
    for bad in (NAN, "soon", []):  # refused before the call is counted
        assert _outcome(lambda: call(store, part, key=key, timeout=bad)) in ("ValueError", "TypeError")
    assert store.next_call(key) == 1
    if store.size > 1:
        if late:
            assert sorted(store.wait([name(r) for r in range(store.size - 1)], store.size - 1)[1]) == []
            outcome = _outcome(lambda: call(store, part, key=key, timeout=0.5 if in_steps else None))
            assert outcome == "none" or (in_steps and outcome == "GetTimeoutError")
        else:
            start = time.monotonic()
            # in these two only the root waits
            waits = store.rank == 0 or what not in ("reduce_to", "gather")
            assert _outcome(lambda: call(store, part, key=key, timeout=seconds)) == (
                "GetTimeoutError" if waits else "none"
            )
            assert time.monotonic() - start < 10
            store.put(b"", name(store.rank))
    for _ in range(2):
        got = call(store, part, key=key, timeout=None)
        assert store.took_part(key) == ({store.size - 1} if what in ("broadcast", "scatter") else set(store.ranks))
        if what.startswith("allreduce"):
            assert (got == store.size).all()
    store.barrier()


def test_who_is_out_of_time_in_a_collective_waits_for_nothing(own_store: ObjectStore, name: Name) -> None:
    store, key = own_store, str(name(""))
    if store.size > 1 and store.rank == 0:
        for call in _COLLECTIVES.values():
            if call is not _COLLECTIVES["broadcast"] and call is not _COLLECTIVES["scatter"]:
                assert _outcome(lambda: call(store, np.ones(LARGE), key=key, timeout=0.05)) == "GetTimeoutError"
                assert not store._waiting.getters and not store._waiting.watchers, store._waiting.getters
    store.put(b"", name(("over", store.rank)))
    store.wait([name(("over", rank)) for rank in range(store.size)], store.size)
    if store.size > 1 and store.rank != 0:
        for what, call in _COLLECTIVES.items():
            if what not in ("broadcast", "scatter"):
                assert _outcome(lambda: call(store, np.ones(LARGE), key=key, timeout=0.5)) in (
                    "none",
                    "GetTimeoutError",
                )
    store.barrier()


@pytest.mark.parametrize("again", [False, True])
def test_all_who_wait_give_up_while_the_bytes_come(own_store: ObjectStore, name: Name, again: bool) -> None:
    """Or some do, and ask anew at once: then the bytes that have come are not sent again."""
    store = own_store
    data = np.arange(4_000_001)
    if store.rank == 0:
        store.put(data, name(""))
    store.barrier()
    before = store.statistics().bytes_received
    futures = [store.get_async(name("")) for _ in range(3)]
    if store.rank:
        end = time.monotonic() + 12
        while store.statistics().bytes_received == before:
            assert time.monotonic() < end, "nothing comes"
    cancelled = [future.cancel() for future in futures]
    assert len(set(cancelled)) == 1  # it may have come in time, on a quick machine; to all of them then
    assert not store._waiting.getters
    if not again:
        _settle(store)
    got = store.get(name(""))
    np.testing.assert_array_equal(got, data)
    received = store.statistics().bytes_received - before
    assert received == (data.nbytes if store.rank else 0)
    store.barrier()


def test_giving_up_while_others_wait_changes_nothing_for_them(own_store: ObjectStore, name: Name) -> None:
    store, seen = own_store, []

    def get() -> None:
        seen.append(store.get(name("")).sum())

    threads = [threading.Thread(target=get) for _ in range(3)]
    for thread in threads:
        thread.start()
    for _ in range(20):
        future = store.get_async(name(""))
        assert future.cancel()
        assert _outcome(lambda: store.get(name(""), timeout=0)) == "GetTimeoutError"
    store.barrier()
    if store.rank == 0:
        store.put(np.ones(LARGE), name(""))
    for thread in threads:
        thread.join(30)
    assert seen == [LARGE] * 3
    store.barrier()


def test_a_mailbox_out_of_time(own_store: ObjectStore) -> None:
    mailbox = hm.Mailbox(own_store, 7)
    for seconds, error in (
        (0, "GetTimeoutError"),
        (0.05, "GetTimeoutError"),
        (-1, "GetTimeoutError"),
        (NAN, "ValueError"),
    ):
        assert _outcome(lambda: mailbox.receive(seconds)) == error
    own_store.barrier()
    mailbox.send((own_store.rank + 1) % own_store.size, b"word")
    assert mailbox.receive(None) == ((own_store.rank - 1) % own_store.size, b"word")
    own_store.barrier()
