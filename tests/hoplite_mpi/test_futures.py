"""Futures of `get_async`, with what the standard library does with futures."""

from __future__ import annotations

import asyncio
import concurrent.futures
import threading
import time
from collections.abc import Callable
from typing import TYPE_CHECKING

import numpy as np
import pytest

import hoplite_mpi as hm
from hoplite_mpi import ObjectID

if TYPE_CHECKING:
    from hoplite_mpi.store import ObjectStore

pytestmark = pytest.mark.mpi

Name = Callable[[object], ObjectID]
LARGE = 300_001


def test_result_waits_and_done_does_not(store: ObjectStore, name: Name) -> None:
    future = store.get_async(name(""))
    assert not future.done()
    store.barrier()
    if store.rank == 0:
        store.put(np.arange(LARGE), name(""))
    assert future.result()[-1] == LARGE - 1
    assert future.done()
    assert future.exception() is None


def test_concurrent_futures_wait_takes_them(store: ObjectStore, name: Name) -> None:
    futures = {i: store.get_async(name(i)) for i in range(4)}
    store.barrier()
    if store.rank == 0:
        for i in (1, 2):
            store.put(np.full((10, LARGE)[i - 1], i), name(i))
    done, pending = concurrent.futures.wait([futures[1], futures[2]], timeout=30)
    assert (len(done), pending) == (2, set())
    assert not futures[0].done() and not futures[3].done()
    store.barrier()
    if store.rank == 0:
        store.put(np.zeros(1), name(0))
        store.put(np.full(1, 3), name(3))
    values = {int(f.result()[0]) for f in concurrent.futures.as_completed(futures.values(), timeout=30)}
    assert values == {0, 1, 2, 3}


def test_they_can_be_awaited(store: ObjectStore, name: Name) -> None:
    async def both() -> list[int]:
        got = await asyncio.gather(store.get_async(name(0)), store.get_async(name(1)))
        return [int(array[-1]) for array in got]

    if store.rank == store.size - 1:
        store.put(np.zeros(10), name(0))
        store.put(np.ones(LARGE), name(1))
    assert asyncio.run(asyncio.wait_for(both(), 30)) == [0, 1]


def test_an_awaited_error_is_raised(store: ObjectStore, name: Name) -> None:
    async def get() -> object:
        return await store.get_async(name(""))

    store.delete(name(""))
    with pytest.raises(hm.ObjectDeletedError):
        asyncio.run(asyncio.wait_for(get(), 30))


def test_callbacks_are_called_and_may_use_the_store(store: ObjectStore, name: Name) -> None:
    called = threading.Event()
    seen: list[object] = []

    def callback(future: concurrent.futures.Future[object]) -> None:
        seen.append(bytes(future.result(0)))  # type: ignore[arg-type]
        seen.append(bytes(store.get(store.put(b"from a callback"), timeout=10)))
        called.set()

    store.get_async(name("")).add_done_callback(callback)
    store.barrier()
    if store.rank == 0:
        store.put(b"value", name(""))
    assert called.wait(30)
    assert seen == [b"value", b"from a callback"]


def test_a_callback_may_wait_for_what_is_put_later(store: ObjectStore, name: Name) -> None:
    called = threading.Event()
    seen: list[object] = []

    def callback(_: object) -> None:
        seen.append(bytes(store.get(name("later"), timeout=20)))
        called.set()

    store.get_async(name("")).add_done_callback(callback)
    store.barrier()
    if store.rank == store.size - 1:
        store.put(b"", name(""))
        time.sleep(0.2)
        store.put(b"later", name("later"))
    assert called.wait(30)
    assert seen == [b"later"]


def test_cancel_gives_up_waiting_and_nothing_else(store: ObjectStore, name: Name) -> None:
    first, second = store.get_async(name("")), store.get_async(name(""))
    assert first.cancel()
    assert first.cancelled() and not second.done()
    with pytest.raises(concurrent.futures.CancelledError):
        first.result(1)
    store.barrier()
    if store.rank == 0:
        store.put(np.arange(LARGE), name(""))
    assert second.result()[-1] == LARGE - 1
    assert not second.cancel()


def test_what_all_have_cancelled_can_still_be_put_and_got(store: ObjectStore, name: Name) -> None:
    for future in [store.get_async(name("")) for _ in range(2)]:
        assert future.cancel()
    store.barrier()
    if store.rank == 0:
        store.put(b"late", name(""))
    assert bytes(store.get(name(""))) == b"late"


@pytest.mark.parametrize("seconds", [0, 0.2])
def test_a_timeout_says_what_was_waited_for(store: ObjectStore, name: Name, seconds: float) -> None:
    oid, start = name(""), time.monotonic()
    with pytest.raises(hm.GetTimeoutError, match=str(oid).split("…")[0][:20].replace("(", r"\(")):
        store.get(oid, timeout=seconds)
    assert seconds <= time.monotonic() - start < 5
    future = store.get_async(oid)
    with pytest.raises(TimeoutError):
        future.result(seconds)
    with pytest.raises(hm.GetTimeoutError):
        future.exception(seconds)
    store.barrier()
    if store.rank == 0:
        store.put(b"it came after all", oid)
    assert bytes(future.result()) == b"it came after all"


def test_no_timeout_at_all_waits(store: ObjectStore, name: Name) -> None:
    store.put(b"", name(""))
    assert bytes(store.get(name(""), timeout=None)) == b""


@pytest.mark.parametrize("bad", ["soon", [], -1])
def test_a_bad_timeout_is_refused_or_over_at_once(store: ObjectStore, name: Name, bad: object) -> None:
    with pytest.raises(hm.GetTimeoutError if bad == -1 else (TypeError, ValueError)):
        store.get(name(""), timeout=bad)


def test_a_get_from_each_of_many_threads(store: ObjectStore, name: Name) -> None:
    values: list[int] = []
    threads = [threading.Thread(target=lambda: values.append(int(store.get(name(""))[0]))) for _ in range(8)]
    for thread in threads:
        thread.start()
    store.barrier()
    if store.rank == 0:
        store.put(np.full(LARGE, 7), name(""))
    for thread in threads:
        thread.join(30)
    assert values == [7] * 8


def test_wait_for_of_asyncio_gives_up_and_cancels(store: ObjectStore, name: Name) -> None:
    async def run() -> tuple[bool, int]:
        never, there = store.get_async(name("never")), store.get_async(name("there"))
        with pytest.raises(asyncio.TimeoutError):
            await asyncio.wait_for(never, 0.1)
        return never.cancelled(), int((await asyncio.wait_for(there, 30))[-1])

    if store.rank == 0:
        store.put(np.arange(LARGE), name("there"))
    assert asyncio.run(run()) == (True, LARGE - 1)
    assert name("never") not in store._waiting.getters
    store.barrier()
    if store.rank == 0:
        store.put(b"came", name("never"))
    assert bytes(store.get(name("never"))) == b"came"


def test_gather_of_asyncio_with_an_error_among_them(store: ObjectStore, name: Name) -> None:
    async def run() -> list[object]:
        futures = [store.get_async(name(i)) for i in range(4)]
        return await asyncio.wait_for(asyncio.gather(*futures, return_exceptions=True), 30)  # type: ignore[arg-type]

    if store.rank == store.size - 1:
        for i in (3, 0, 1):
            store.put(np.full((10, LARGE)[i % 2], i), name(i))
        store.delete(name(2))
    got = asyncio.run(run())
    assert [int(one[-1]) for one in (got[0], got[1], got[3])] == [0, 1, 3]  # type: ignore[index]
    assert isinstance(got[2], hm.ObjectDeletedError)


def test_a_future_may_end_when_its_loop_is_closed(store: ObjectStore, name: Name) -> None:
    """Whoever awaited it is gone; the store and the other futures are not concerned."""

    async def begin() -> object:
        task = asyncio.ensure_future(asyncio.wait_for(asyncio.shield(asyncio.wrap_future(future)), 0.05))
        with pytest.raises(asyncio.TimeoutError):
            await task
        return None

    future, other = store.get_async(name("")), store.get_async(name(""))
    asyncio.run(begin())
    assert not future.done()
    store.barrier()
    if store.rank == 0:
        store.put(np.arange(LARGE), name(""))
    assert other.result()[-1] == future.result()[-1] == LARGE - 1
    assert bytes(store.get(store.put(b"on it goes"))) == b"on it goes"


def test_a_callback_that_raises_is_logged_and_harms_nobody(
    store: ObjectStore, name: Name, caplog: pytest.LogCaptureFixture
) -> None:
    called, late = threading.Event(), threading.Event()

    def bad(_: object) -> None:
        raise RuntimeError("of the user")

    future = store.get_async(name(""))
    future.add_done_callback(bad)
    future.add_done_callback(lambda _: called.set())
    store.barrier()
    if store.rank == 0:
        store.put(np.ones(LARGE), name(""))
    assert future.result().sum() == LARGE
    assert called.wait(30), "the callbacks after the bad one are called"
    future.add_done_callback(bad)  # at once, in this thread, as in the standard library
    future.add_done_callback(lambda _: late.set())
    assert late.is_set()
    assert sum("of the user" in str(record.exc_info) for record in caplog.records) == 2
    assert store.get(name("")).sum() == LARGE


def test_as_completed_gives_them_in_the_order_in_which_they_come(store: ObjectStore, name: Name) -> None:
    futures = {store.get_async(name(i)): i for i in range(3)}
    seen = []
    for future in concurrent.futures.as_completed(futures, timeout=30) if store.rank else ():
        seen.append(futures[future])
        store.put(b"", name(("seen", store.rank, futures[future])))
    if store.rank == 0:
        for i in (2, 0, 1):
            store.put(np.full((10, LARGE)[i % 2], i), name(i))
            for rank in range(1, store.size):
                store.get(name(("seen", rank, i)))
        concurrent.futures.wait(futures, timeout=30)
    assert seen == ([2, 0, 1] if store.rank else [])
    with pytest.raises(concurrent.futures.TimeoutError):
        next(iter(concurrent.futures.as_completed([store.get_async(name("never"))], timeout=0.05)))
