"""The rest of the store's calls on live ranks in which nobody dies."""

from __future__ import annotations

import dataclasses
import threading
import time
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest

import hoplite_mpi as hm
from hoplite_mpi import ObjectID

if TYPE_CHECKING:
    from hoplite_mpi.store import ObjectStore

pytestmark = pytest.mark.mpi

Name = Callable[[object], ObjectID]
OpenStore = Callable[..., "ObjectStore"]

LARGE = 300_001


def test_ranks_and_size_are_those_of_the_world(store: ObjectStore) -> None:
    from mpi4py import MPI

    assert (store.rank, store.size) == (MPI.COMM_WORLD.rank, MPI.COMM_WORLD.size)
    assert store.ranks == list(range(store.size))
    assert not store.closed


# -- delete ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [10, LARGE])
def test_a_deleted_object_is_deleted_everywhere(store: ObjectStore, name: Name, size: int) -> None:
    if store.rank == 0:
        store.put(np.ones(size), name(""))
    view = store.get(name(""))
    store.barrier()
    if store.rank == store.size - 1:
        store.delete(name(""))
        store.put(b"", name("gone"))
    store.get(name("gone"))
    with pytest.raises(hm.ObjectDeletedError):
        for _ in range(1000):  # the news may still be on its way: until then the own copy is served
            store.get(name(""), timeout=10)
            store.located([name("")])
    with pytest.raises(hm.ObjectDeletedError, match="was deleted"):
        store.put(np.ones(size), name(""))
    assert store.located([name("")]) == frozenset()
    assert (view == 1).all()


def test_a_delete_ends_the_waits_for_what_never_came(store: ObjectStore, name: Name) -> None:
    futures = [store.get_async(name("")) for _ in range(2)]
    store.barrier()
    if store.rank == 0:
        store.delete(name(""))
    for future in futures:
        assert isinstance(future.exception(), hm.ObjectDeletedError)


@pytest.mark.parametrize("apart", [False, True])
def test_delete_frees_the_memory_on_all_ranks(open_store: OpenStore, apart: bool) -> None:
    with open_store(apart) as store:  # nothing of earlier tests is still to go
        oids = [ObjectID.from_name(f"of {i}") for i in range(store.size)]
        for i, oid in enumerate(oids):
            if store.rank == i:
                store.put(np.ones(LARGE), oid)
            store.get(oid)
        assert all(store.local(oid) for oid in oids)
        assert store.statistics().memory_used >= LARGE * 8 * (store.size if apart else 1)
        store.barrier()
        store.delete(oids[store.rank])
        end = time.monotonic() + 20
        while any(store.local(oid) for oid in oids) and time.monotonic() < end:
            store.located(oids)  # a round trip to the owners
        assert not any(store.local(oid) for oid in oids)
        assert store.statistics().memory_used == 0
        store.barrier()


# -- wait --------------------------------------------------------------------------------------------------------------


def test_wait_says_what_is_there_in_the_order_given(store: ObjectStore, name: Name) -> None:
    oids = [name(i) for i in range(6)]
    if store.rank == 0:
        for i in (4, 1):
            store.put(np.full((10, LARGE)[i == 4], i), oids[i])
    store.barrier()
    before = store.statistics().transfers
    assert store.wait(oids, num_returns=2) == ([oids[1], oids[4]], [oids[0], oids[2], oids[3], oids[5]])
    assert store.wait(oids, num_returns=3, timeout=0.2)[0] == [oids[1], oids[4]]
    assert store.statistics().transfers == before  # nothing is fetched
    store.barrier()
    if store.rank == store.size - 1:
        for i in (0, 2, 3, 5):
            store.put(b"", oids[i])
    assert store.wait(oids, num_returns=6) == (oids, [])


def test_wait_counts_the_deleted_as_ready(store: ObjectStore, name: Name) -> None:
    if store.rank == 0:
        store.delete(name(""))
    assert store.wait([name("")]) == ([name("")], [])


def test_wait_takes_an_id_twice_and_none_at_all(store: ObjectStore, name: Name) -> None:
    store.put(b"", name(""))
    assert store.wait([name(""), name("")], num_returns=2) == ([name("")] * 2, [])
    assert store.wait([], num_returns=0) == ([], [])
    with pytest.raises(ValueError, match="num_returns is 2, but 1"):
        store.wait([name("")], num_returns=2)


def test_wait_ends_in_time(store: ObjectStore, name: Name) -> None:
    start = time.monotonic()
    assert store.wait([name("never")], timeout=0.3) == ([], [name("never")])
    assert 0.3 <= time.monotonic() - start < 5


def test_located_says_what_has_a_copy(store: ObjectStore, name: Name) -> None:
    if store.rank == 0:
        store.put(b"", name("small"))
        store.put(np.ones(LARGE), name("large"))
    store.barrier()
    assert store.located([name("small"), name("none"), name("large")]) == {name("small"), name("large")}
    assert store.located([]) == frozenset()


# -- barrier and threads -----------------------------------------------------------------------------------------------


def test_nobody_leaves_a_barrier_before_all_have_come(store: ObjectStore, name: Name) -> None:
    for turn in range(3):
        if store.rank == turn % store.size:
            # what is put just before the barrier is there after it
            store.put(b"", name(turn))
        store.barrier()
        assert store.located([name(turn)]) == {name(turn)}


def test_a_barrier_that_not_all_come_to_ends_in_time(store: ObjectStore, name: Name) -> None:
    if store.size == 1:
        pytest.skip("takes two ranks")
    if store.rank == 0:
        with pytest.raises(hm.GetTimeoutError, match="have not come"):
            store.barrier(timeout=0.3)
        store.put(b"", name("over"))
        store.barrier()
    else:
        store.get(name("over"))
        store.barrier()
        store.barrier()


def test_many_threads_use_one_store(store: ObjectStore, name: Name) -> None:
    wrong: list[object] = []

    def work(thread: int) -> None:
        try:
            for i in range(10):
                size = (10, 20_000)[i % 2]
                store.put(np.full(size, 100 * thread + i), name((store.rank, thread, i)))
                peer = (store.rank + 1) % store.size
                if store.get(name((peer, thread, i)), timeout=30)[-1] != 100 * thread + i:
                    wrong.append((thread, i))
        except Exception as error:
            wrong.append(error)

    threads = [threading.Thread(target=work, args=(t,)) for t in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert not any(thread.is_alive() for thread in threads)
    assert wrong == []


# -- statistics --------------------------------------------------------------------------------------------------------


def test_statistics_count_what_was_done(apart_store: ObjectStore, name: Name) -> None:
    store = apart_store
    store.barrier()
    before = store.statistics()
    store.put(np.ones(LARGE), name(store.rank))
    for rank in range(store.size):
        store.get(name(rank))
    store.barrier()
    after = store.statistics()
    assert dataclasses.is_dataclass(after)
    assert after.bytes_received - before.bytes_received == 8 * LARGE * (store.size - 1)
    assert after.memory_used - before.memory_used >= 8 * LARGE * store.size
    assert (after.rank, after.members, after.view, after.peers_lost) == (store.rank, store.size, 1, 0)
    sent = np.array([after.bytes_sent - before.bytes_sent])
    store.put(sent, name(("sent", store.rank)))
    total = sum(int(store.get(name(("sent", rank)))[0]) for rank in range(store.size))
    assert total == 8 * LARGE * (store.size - 1) * store.size


# -- no memory ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("apart", [False, True])
def test_a_full_store_says_so_and_loses_nothing(open_store: OpenStore, apart: bool) -> None:
    with open_store(apart, memory_limit=3 << 20, spill_directory=None) as store:
        mine = ObjectID.from_name(f"mine/{store.rank}")
        store.put(np.ones(2 << 17), mine)  # 2 MiB
        with pytest.raises(hm.StoreFullError):
            store.put(np.ones(2 << 17))
        assert store.statistics().objects == 0  # nobody got one yet
        assert (store.get(mine) == 1).all()
        store.barrier()
        theirs = ObjectID.from_name(f"mine/{(store.rank + 1) % store.size}")
        if apart and store.size > 1:
            with pytest.raises(hm.StoreFullError):
                store.get(theirs)
        else:
            assert (store.get(theirs) == 1).all()
        store.barrier()
        store.delete(mine)
        with pytest.raises(hm.ObjectDeletedError):
            while True:
                store.get(theirs, timeout=10)
        again = store.put(np.full(2 << 17, 2.0))
        assert (store.get(again) == 2).all()
        store.barrier()


# -- close -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("apart", [False, True])
def test_a_closed_store_says_so(open_store: OpenStore, apart: bool) -> None:
    store = open_store(apart)
    oid = store.put(np.arange(LARGE))
    small = store.put(b"small")
    view, never = store.get(oid), store.get_async(ObjectID.random())
    store.barrier()
    start = time.monotonic()
    store.close()
    store.close()
    assert time.monotonic() - start < 10
    assert store.closed
    assert view[-1] == LARGE - 1
    assert isinstance(never.exception(5), hm.ClosedError)
    calls: list[Callable[[], object]] = [
        lambda: store.put(b""),
        lambda: store.get(small),
        lambda: store.get(oid),
        lambda: store.get_async(oid),
        lambda: store.delete(oid),
        lambda: store.wait([oid]),
        lambda: store.located([oid]),
        lambda: store.reduce([oid]),
        lambda: store.reduced_from(oid),
        lambda: store.barrier(),
    ]
    for call in calls:
        with pytest.raises(hm.ClosedError):
            call()


def test_the_others_go_on_when_one_has_closed(open_store: OpenStore) -> None:
    store = open_store(True)
    if store.size > 1:
        name = ObjectID.from_name("of the first to leave")
        if store.rank == 0:
            store.put(b"here", name)
        assert bytes(store.get(name)) == b"here"
        store.barrier()
        if store.rank == 0:
            store.close()
        else:
            while 0 in store.ranks:
                store.barrier()
            assert bytes(store.get(name)) == b"here"
            store.barrier()
            assert store.statistics().peers_lost == 0
    store.close()


@pytest.mark.parametrize(
    "settings",
    [
        {"chunk_size": 0},
        {"stall_timeout": 100.0},
        {"latency": -1.0},
        {"bandwidth": 0.0},
        {"reduce_shape": "ring"},
        {"reduce_degree": 2},
    ],
)
def test_bad_settings_are_refused(settings: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=next(iter(settings))):
        hm.Config(**settings)


def test_settings_come_from_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, text in {"latency": "2e-5", "chunk_size": "4096", "reduce_shape": "d_ary", "reduce_degree": "3"}.items():
        monkeypatch.setenv(f"HOPLITE_{name.upper()}", text)
    monkeypatch.setenv("HOPLITE_BANDWIDTH", "none")
    config = hm.Config.from_environment(hm.Config(bandwidth=1.0))
    assert (config.latency, config.bandwidth, config.chunk_size) == (2e-5, None, 4096)
    assert (config.reduce_shape, config.reduce_degree) == ("d_ary", 3)
