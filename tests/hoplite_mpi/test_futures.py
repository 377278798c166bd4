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
