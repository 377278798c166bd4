"""Stores that hold more than their memory does: what nobody uses goes to disk, or away where another node has it, and comes back."""

from __future__ import annotations

import os
import signal
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import hoplite_mpi as hm
from hoplite_mpi.testing import run_ranks
from hoplite_mpi.transport import guard

pytestmark = pytest.mark.skipif(not guard.load().loaded, reason=f"the guard is not there: {guard.load().why}")

MIB = 1 << 20
KILLED = -signal.SIGKILL


def _name(what: object) -> hm.ObjectID:
    return hm.ObjectID.from_name(str(what))


def _data(i: int, nbytes: int = MIB) -> Any:
    return np.random.default_rng(i).integers(0, 256, nbytes, np.uint8)


def _open(apart: bool, limit: int = 4 * MIB) -> Any:
    """Open a store with room for four objects of 1 MiB; apart: each rank on a node of its own."""
    if apart:
        os.environ["HOPLITE_NODE"] = f"node{os.environ['HOPLITE_RANK']}"
    return hm.init(memory_limit=limit)


def _run(tmp_path: Path, ranks: int, function: Any, *args: Any, **more: Any) -> list[Any]:
    """Return what the ranks that were not to die return; nothing is left of what they have spilled."""
    env = {"HOPLITE_SPILL_DIRECTORY": str(tmp_path), "HOPLITE_DEFAULT_TIMEOUT": "40", **more.pop("env", {})}
    result = run_ranks(ranks, function, args, env=env, timeout=60, **more)
    killed = {rank for rank, _ in more.get("kill", ())}
    assert {rank: result[rank].exitcode for rank in range(ranks)} == {
        rank: KILLED if rank in killed else 0 for rank in range(ranks)
    }, "\n".join(result[rank].output for rank in range(ranks))
    hm.cleanup(hm.Config(spill_directory=str(tmp_path)))
    assert list(tmp_path.iterdir()) == []
    return [result[rank].value for rank in range(ranks)]


def _more_than_fits(apart: bool) -> Any:
    store = _open(apart)
    for i in range(8):
        store.put(_data(10 * store.rank + i), _name(f"{store.rank}/{i}"))
    before = store.statistics()
    for rank in range(store.size):
        for i in range(8):
            assert np.array_equal(store.get(_name(f"{rank}/{i}")), _data(10 * rank + i))
    after = store.statistics()
    store.barrier()
    return before, after


@pytest.mark.parametrize("apart", [False, True])
@pytest.mark.parametrize("ranks", [1, 3])
def test_a_store_holds_more_than_its_memory(tmp_path: Path, ranks: int, apart: bool) -> None:
    for before, after in _run(tmp_path, ranks, _more_than_fits, apart):
        assert before.spilled >= 4 and before.spilled_bytes == before.spilled * MIB
        assert before.memory_used <= 4 * MIB and after.memory_used <= 4 * MIB
        assert after.restored >= (4 if ranks == 1 else 1)


def _what_another_node_has() -> Any:
    """Rank 1 fetches more than fits in: what it has fetched goes without being written, since rank 0 has it, and comes again."""
    store = _open(True, 16 * MIB if os.environ["HOPLITE_RANK"] == "0" else 4 * MIB)
    if store.rank == 0:
        for i in range(8):
            store.put(_data(i), _name(i))
        store.barrier()
        store.barrier()
        return store.statistics()
    store.barrier()
    for _ in range(2):
        for i in range(8):
            assert np.array_equal(store.get(_name(i)), _data(i))
    after = store.statistics()
    store.barrier()
    return after


def test_what_another_node_has_is_dropped_and_not_written(tmp_path: Path) -> None:
    served, after = _run(tmp_path, 2, _what_another_node_has)
    assert after.evicted >= 8 and after.spilled == 0, after
    assert after.bytes_received >= 12 * MIB
    assert served.evicted == served.spilled == 0


def _both_let_go() -> Any:
    """Both ranks have all objects and need room for others at once."""
    store = _open(True, 6 * MIB)
    if store.rank == 0:
        for i in range(4):
            store.put(_data(i), _name(i))
    for i in range(4):
        store.get(_name(i))
    store.barrier()
    for i in range(6):
        store.put(_data(10 * store.rank + 100 + i), _name(f"more/{store.rank}/{i}"))
    after = store.statistics()
    store.barrier()
    for i in range(4):
        assert np.array_equal(store.get(_name(i)), _data(i))
    for rank in range(2):
        for i in range(6):
            assert np.array_equal(store.get(_name(f"more/{rank}/{i}")), _data(10 * rank + 100 + i))
    store.barrier()
    return after


def test_of_two_who_need_room_one_keeps_its_copy(tmp_path: Path) -> None:
    found = _run(tmp_path, 2, _both_let_go)
    assert found[0].evicted == 0, "who has put it keeps it"
    assert found[1].evicted >= 1
    assert sum(one.spilled for one in found) >= 4


def _reduce_of_spilled() -> Any:
    store = _open(True)
    for i in range(6):  # the sources are spilled when they are needed
        store.put(np.full(MIB // 8, store.rank + i), _name(f"source/{store.rank}/{i}"))
    store.barrier()
    for i in range(6):
        sources = [_name(f"source/{rank}/{i}") for rank in range(3)]
        total = store.reduce(sources, object_id=_name(f"sum/{i}"))
        got = store.get(total)
        assert (got == sum(rank + i for rank in range(3))).all()
        del got
    store.barrier()
    return store.statistics()


def test_sources_of_a_reduce_are_read_back(tmp_path: Path) -> None:
    for after in _run(tmp_path, 3, _reduce_of_spilled):
        assert after.spilled >= 2 and after.restored >= 1, after


def _views_stay() -> Any:
    store = _open(False)
    views = [store.get(store.put(_data(i))) for i in range(4)]
    with pytest.raises(hm.StoreFullError):
        store.put(_data(4))
    assert all(np.array_equal(view, _data(i)) for i, view in enumerate(views))
    del views[:2]
    for i in range(8):
        store.put(_data(4 + i))
    assert all(np.array_equal(view, _data(i + 2)) for i, view in enumerate(views))
    assert len(os.listdir(store.runtime.spill.directory)) > 1
    last = store.put(_data(99), _name("last"))
    for _ in range(4):
        store.put(_data(1))
    store.delete(last)
    with pytest.raises(hm.ObjectDeletedError):
        store.get(last)
    return True


def test_what_is_viewed_stays_and_what_is_deleted_goes(tmp_path: Path) -> None:
    assert _run(tmp_path, 1, _views_stay) == [True]


def _outlives() -> Any:
    """Ranks 0 and 1 share a node; rank 0 has spilled what it put when it dies; rank 1 serves it to rank 2."""
    os.environ["HOPLITE_NODE"] = "shared" if os.environ["HOPLITE_RANK"] in "01" else "other"
    store = hm.init(memory_limit=4 * MIB if os.environ["HOPLITE_RANK"] == "0" else 64 * MIB)
    if store.rank == 0:
        for i in range(8):
            store.put(_data(i), _name(i))
        assert store.statistics().spilled >= 4
    store.barrier()
    if store.rank == 0:
        os.kill(os.getpid(), signal.SIGKILL)
    end = time.monotonic() + 30
    while 0 in store.ranks:
        assert time.monotonic() < end
        time.sleep(0.005)
    for i in range(8):
        assert np.array_equal(store.get(_name(i)), _data(i))
    store.barrier()
    return store.statistics()


def test_spilled_bytes_outlive_the_rank_that_put_them(tmp_path: Path) -> None:
    found = _run(tmp_path, 3, _outlives, env={}, kill=[(0, 1e9)])
    assert found[1].restored >= 4


def _killed_while_spilling() -> Any:
    """Rank 0 dies while it makes room; the others get what it had put, or are told that it is lost, and never other bytes."""
    store = _open(False) if os.environ["HOPLITE_RANK"] == "0" else _open(False, 64 * MIB)
    if store.rank == 0:
        for i in range(8):
            store.put(_data(i), _name(i))
        raise AssertionError("rank 0 was to be killed")
    end = time.monotonic() + 30
    while 0 in store.ranks:
        assert time.monotonic() < end
        time.sleep(0.005)
    found = [i for i in range(8) if _name(i) in store.located([_name(i) for i in range(8)])]
    assert found == list(range(len(found))) and len(found) >= 4
    for i in found:
        assert np.array_equal(store.get(_name(i)), _data(i))
    store.barrier()
    return len(found)


@pytest.mark.parametrize("point", ["spill.written", "spill.renamed", "spill.vacated"])
def test_killed_while_spilling(tmp_path: Path, point: str) -> None:
    assert _run(tmp_path, 2, _killed_while_spilling, kill=[(0, point)])[1] == 4


def _damaged() -> Any:
    """What rank 1 has spilled is damaged on its disk: it asks rank 0."""
    store = _open(True, 64 * MIB if os.environ["HOPLITE_RANK"] == "0" else 4 * MIB)
    if store.rank == 0:
        for i in range(4):
            store.put(_data(i), _name(i))
    if store.rank == 1:
        store.runtime.spill.give_up = lambda key: False  # written, although another node has it
        for i in range(4):
            store.get(_name(i))
        for i in range(4):
            store.put(_data(50 + i))
        directory = Path(store.runtime.spill.directory)
        for i in range(4):
            file = directory / _name(i).hex()
            file.write_bytes(file.read_bytes()[:-9] + b"rotten!!!")
            assert np.array_equal(store.get(_name(i)), _data(i))
        assert store.statistics().bytes_received == 8 * MIB
    store.barrier()


def test_what_is_damaged_on_disk_comes_from_elsewhere(tmp_path: Path) -> None:
    _run(tmp_path, 2, _damaged)
