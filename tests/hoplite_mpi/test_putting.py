"""Large puts: others receive what is being put before all of it is copied, whatever becomes of the rest."""

from __future__ import annotations

import os
import signal
import threading
import time
from typing import Any

import numpy as np
import pytest

import hoplite_mpi as hm
from hoplite_mpi.testing import run_ranks
from hoplite_mpi.transport import guard

pytestmark = pytest.mark.skipif(not guard.load().loaded, reason=f"the guard is not there: {guard.load().why}")

MIB = 1 << 20
KILLED = -signal.SIGKILL
ENV = {"HOPLITE_DEFAULT_TIMEOUT": "40", "HOPLITE_CHUNK_SIZE": str(256 * 1024)}


def _name(what: str) -> hm.ObjectID:
    return hm.ObjectID.from_name(what)


def _data(seed: int, nbytes: int = 16 * MIB) -> Any:
    return np.random.default_rng(seed).integers(0, 256, nbytes, np.uint8)


def _open() -> Any:
    os.environ["HOPLITE_NODE"] = f"node{os.environ['HOPLITE_RANK']}"
    return hm.init()


def _until(condition: Any, what: str) -> None:
    end = time.monotonic() + 30
    while not condition():
        assert time.monotonic() < end, what
        time.sleep(0.002)


def _slow_copies(store: Any, pieces: int, go: Any) -> None:
    """Let puts of this rank copy so many pieces, then call *go* and copy the rest."""
    memory, copy, done = store.runtime.memory, store.runtime.memory.copy, [0]

    def slow(target: Any, source: Any) -> Any:
        done[0] += 1
        if done[0] == pieces + 1:
            go()
        return copy(target, source)

    memory.copy = slow


def _run(ranks: int, function: Any, *args: Any, **more: Any) -> list[Any]:
    result = run_ranks(ranks, function, args, env=ENV, timeout=60, **more)
    killed = {rank for rank, _ in more.get("kill", ())}
    assert {rank: result[rank].exitcode for rank in range(ranks)} == {
        rank: KILLED if rank in killed else 0 for rank in range(ranks)
    }, "\n".join(result[rank].output for rank in range(ranks))
    return [result[rank].value for rank in range(ranks)]


def _overlaps(name: str) -> Any:
    """Rank 0 copies the last pieces only when rank 2 has got some of the first, by way of rank 1 or not."""
    store, oid = _open(), _name("x") if name else hm.ObjectID.from_name("x", (0, 0))
    if store.rank == 0:
        _slow_copies(store, 3, lambda: [store.get(_name(f"begun {rank}")) for rank in (1, 2)])
        store.barrier()
        store.put(_data(0), oid)
    else:
        future = store.get_async(oid)
        store.barrier()
        _until(lambda: store.statistics().bytes_received >= MIB, "nothing comes while it is being put")
        assert not future.done()
        store.put(b"", _name(f"begun {store.rank}"))
        assert np.array_equal(future.result(), _data(0))
    assert np.array_equal(store.get(oid), _data(0))
    received = store.statistics().bytes_received
    store.barrier()
    return received


@pytest.mark.parametrize("name", ["anybody's", ""])
def test_others_receive_it_before_it_is_all_there(name: str) -> None:
    assert _run(3, _overlaps, name)[1:] == [16 * MIB, 16 * MIB]


def _dies(same: bool) -> Any:
    """Rank 0 dies in the middle of its put, of which rank 1 has a part; rank 2 puts the same bytes, or others."""
    store, oid = _open(), _name("x")
    mine = _data(0 if same else 1)
    if store.rank == 0:
        _slow_copies(store, 3, lambda: store.get(_name("begun")) and os.kill(os.getpid(), signal.SIGKILL))
        store.barrier()
        store.put(_data(0), oid)
    if store.rank == 1:
        future = store.get_async(oid)
        store.barrier()
        _until(lambda: store.statistics().bytes_received >= MIB, "nothing comes")
        store.put(b"!", _name("begun"))
        _until(lambda: 0 not in store.ranks, "rank 0 lives")
        assert not future.done()
        store.put(b"", _name("again"))
        assert np.array_equal(future.result(), mine)
    if store.rank == 2:
        store.barrier()
        store.get(_name("again"))
        store.put(mine, oid)
    received = store.statistics().bytes_received
    store.barrier()
    return received


@pytest.mark.parametrize("same", [True, False])
def test_who_puts_dies_in_the_middle_of_it(same: bool) -> None:
    received = _run(3, _dies, same, kill=[(0, 1e9)])[1]
    assert received <= 16 * MIB + (MIB if same else 8 * MIB)  # the same bytes go on where they had been


def _fails() -> Any:
    """The bytes of a put can't be read to their end: it raises, and nothing has been put."""
    store, oid = _open(), _name("x")
    if store.rank == 0:

        def fail() -> None:
            store.get(_name("begun"))
            raise RuntimeError("a page can't be read")

        _slow_copies(store, 3, fail)
        with pytest.raises(RuntimeError, match="can't be read"):
            store.put(_data(0), oid)
        store.put(_data(1), oid)
    else:
        future = store.get_async(oid)
        _until(lambda: store.statistics().bytes_received >= MIB, "nothing comes")
        store.put(b"", _name("begun"))
        assert np.array_equal(future.result(), _data(1))
    assert np.array_equal(store.get(oid), _data(1))
    store.barrier()
    return store.statistics().memory_used


def test_a_put_that_raises_has_put_nothing() -> None:
    assert max(_run(2, _fails)) <= 16 * MIB + 4096


def _deleted() -> Any:
    store, oid = _open(), _name("x")
    if store.rank == 0:
        _slow_copies(store, 3, lambda: store.get(_name("gone")))
        with pytest.raises(hm.ObjectDeletedError):
            store.put(_data(0), oid)
    else:
        future = store.get_async(oid)
        _until(lambda: store.statistics().bytes_received >= MIB, "nothing comes")
        store.delete(oid)
        store.put(b"", _name("gone"))
        with pytest.raises(hm.ObjectDeletedError):
            future.result()
    store.barrier()
    _until(lambda: store.statistics().memory_used == 0, "memory is lost")
    store.barrier()


def test_deleted_while_it_is_being_put() -> None:
    _run(2, _deleted)


def _race(shared: bool) -> Any:
    """All put other bytes under one id at once: one of them wins, and all get its bytes."""
    if not shared:
        os.environ["HOPLITE_NODE"] = f"node{os.environ['HOPLITE_RANK']}"
    store, won = hm.init(), []
    for i in range(5):
        oid = _name(f"x{i}")
        store.barrier()
        try:
            store.put(_data(store.rank, 4 * MIB), oid)
        except hm.ObjectExistsError:
            pass
        else:
            won.append(i)
        assert any(np.array_equal(store.get(oid), _data(rank, 4 * MIB)) for rank in range(3))
    store.barrier()
    return won


@pytest.mark.parametrize("shared", [True, False])
def test_of_those_who_put_other_bytes_at_once_one_wins(shared: bool) -> None:
    won = _run(3, _race, shared)
    assert sorted(i for one in won for i in one) == list(range(5)), won


def _threads(sizes: tuple[int, ...], same: bool) -> Any:
    """Threads of one rank put one id, the same bytes or others: each is told what became of its own."""
    store = _open()
    if store.rank == 0:
        for n in range(6):
            oid = next(o for i in range(100) if store.runtime.view.owner(bytes(o := _name(f"{n}/{i}"))) == n % 2)
            won: list[int] = []

            def put(i: int, oid: Any = oid, won: list[int] = won) -> None:
                try:
                    store.put(_data(0 if same else i, sizes[i % len(sizes)]), oid)
                except hm.ObjectExistsError:
                    return
                won.append(i)

            threads = [threading.Thread(target=put, args=(i,)) for i in range(4)]
            for thread in threads:
                thread.start()
            for thread in threads:
                thread.join()
            assert len(won) == (4 if same else 1), won
            assert np.array_equal(store.get(oid), _data(0 if same else won[0], sizes[won[0] % len(sizes)]))
    store.barrier()


@pytest.mark.parametrize(
    ("sizes", "same"),
    [((4 * MIB,), True), ((4 * MIB,), False), ((1000,), False), ((100_000,), False), ((5 * MIB, 1000, 100_000), False)],
)
def test_threads_that_put_one_id(sizes: tuple[int, ...], same: bool) -> None:
    _run(2, _threads, sizes, same)


def _owner_stops() -> Any:
    """The owner of the id does not answer in time: the put says so, nothing is left waiting, and it can be put again."""
    store = _open()
    mine = [oid for i in range(100) if store.runtime.view.owner(bytes(oid := _name(f"x{i}"))) == 1]
    if store.rank == 0:
        store.barrier()
        pid = int(store.get(_name("pid"))[0])
        os.kill(pid, signal.SIGSTOP)
        for oid, nbytes in zip(mine, (1000, MIB, 16 * MIB), strict=False):
            with pytest.raises(hm.GetTimeoutError, match="put of"):
                store.put(_data(0, nbytes), oid)
        assert not store._waiting.putters
        os.kill(pid, signal.SIGCONT)
        for oid, nbytes in zip(mine, (1000, MIB, 16 * MIB), strict=False):
            store.put(_data(0, nbytes), oid)
    else:
        store.put(np.array([os.getpid()]), _name("pid"))
        store.barrier()
    for oid, nbytes in zip(mine, (1000, MIB, 16 * MIB), strict=False):
        assert np.array_equal(store.get(oid, timeout=40), _data(0, nbytes))
    store.barrier(timeout=40)


def test_an_owner_that_does_not_answer_in_time() -> None:
    env = ENV | {"HOPLITE_DEFAULT_TIMEOUT": "3"}
    result = run_ranks(2, _owner_stops, env=env, timeout=60)
    assert [result[rank].exitcode for rank in range(2)] == [0, 0], "\n".join(one.output for one in result.values())
