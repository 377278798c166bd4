"""Ranks that are killed in the middle of a reduce."""

from __future__ import annotations

import os
import signal
from typing import Any

import pytest

from hoplite_mpi.testing import run_ranks
from hoplite_mpi.transport import guard

pytestmark = pytest.mark.skipif(not guard.load().loaded, reason=f"the guard is not there: {guard.load().why}")

KILLED = -signal.SIGKILL
CHUNK = 64 * 1024
CHUNKS = 48
ENV = {"HOPLITE_CHUNK_SIZE": str(CHUNK), "HOPLITE_WINDOW": "1", "HOPLITE_DEFAULT_TIMEOUT": "40"}


def _source(rank: int) -> Any:
    import numpy as np

    return np.full(CHUNK * CHUNKS // 8, 10.0**rank)


def _await_death(store: Any, size: int) -> None:
    import time

    end = time.monotonic() + 30
    while store.size == size:
        assert time.monotonic() < end, "all are still members"
        time.sleep(0.005)


def _reduce(small: bool, victim: int, owner: int) -> Any:
    """Ranks 0 to 2 have sources, three of four are wanted, and the fourth comes when the victim is dead."""
    import numpy as np

    import hoplite_mpi as hm

    rank = int(os.environ["HOPLITE_RANK"])
    os.environ["HOPLITE_NODE"] = f"node{rank}"
    store = hm.init()
    sources = [hm.ObjectID.from_name(f"source {r}") for r in range(4)]
    names = (hm.ObjectID.from_name(f"result/{i}") for i in range(1000))
    rid = next(oid for oid in names if store.runtime.view.owner(bytes(oid)) == owner)
    data = _source(rank)[: 10 if small else None]
    if rank < 3:
        store.put(data, sources[rank])
    store.barrier()
    if small and rank == victim:
        os.kill(os.getpid(), signal.SIGKILL)
    if rank == 3:
        store.reduce(sources, num_objects=3, object_id=rid)
        _await_death(store, 4)
        store.put(data, sources[3])
    got, used = store.get(rid), store.reduced_from(rid)
    _await_death(store, 4)
    store.barrier()
    assert np.array_equal(store.get(rid), got)
    assert store.reduced_from(rid) == used
    expected = sum(10.0**r for r in range(4) if sources[r] in used)
    store.barrier()
    return bool((got == expected).all()), [r for r in range(4) if sources[r] in used]


def _check(result: Any, victim: int) -> list[int]:
    others = [rank for rank in range(4) if rank != victim]
    assert [result[rank].exitcode for rank in others] == [0, 0, 0], [result[rank].output for rank in others]
    assert result[victim].exitcode == KILLED
    values = [result[rank].value for rank in others]
    assert all(right for right, _ in values), values
    assert values[0][1] == values[1][1] == values[2][1]
    return list(values[0][1])


@pytest.mark.parametrize("chunk", [1, CHUNKS // 2])
@pytest.mark.parametrize("owner", [1, 3])
@pytest.mark.parametrize("victim", [0, 1, 2])
def test_a_participant_dies_and_a_late_source_takes_its_place(victim: int, owner: int, chunk: int) -> None:
    """With owner 1 and victim 1 it is the coordinator of the reduce, too."""
    fault = f"{victim}:transfer.chunk_sent=kill@{chunk};{victim}:reduce.chunk=kill@{chunk}"
    result = run_ranks(4, _reduce, (False, victim, owner), env=ENV | {"HOPLITE_FAULT": fault}, timeout=60)
    assert _check(result, victim) == [rank for rank in range(4) if rank != victim]


@pytest.mark.parametrize("owner", [1, 3])
def test_a_small_reduce_whose_source_dies(owner: int) -> None:
    result = run_ranks(4, _reduce, (True, 1, owner), env=ENV, timeout=60)
    assert len(_check(result, 1)) == 3


def _put_again() -> Any:
    """All sources are needed, and one dies with its rank: the reduce waits until somebody puts it again."""
    import numpy as np

    import hoplite_mpi as hm

    rank = int(os.environ["HOPLITE_RANK"])
    os.environ["HOPLITE_NODE"] = f"node{rank}"
    store = hm.init()
    sources, rid = [hm.ObjectID.from_name(f"source {r}") for r in range(3)], hm.ObjectID.from_name("result")
    store.put(_source(rank), sources[rank])
    if rank == 2:
        store.reduce(sources, object_id=rid)
    future = store.get_async(rid)
    _await_death(store, 3)
    with pytest.raises(hm.GetTimeoutError):
        future.result(0.5)
    store.barrier()
    if rank == 2:
        store.put(_source(1), sources[1])
    got = future.result()
    store.barrier()
    return bool(np.all(got == 111.0)), store.reduced_from(rid) == set(sources)


def test_a_reduce_that_needs_all_waits_for_the_lost_source() -> None:
    env = ENV | {"HOPLITE_FAULT": "1:transfer.chunk_sent=kill@2;1:reduce.chunk=kill@2"}
    result = run_ranks(3, _put_again, env=env, timeout=60)
    assert [result[rank].exitcode for rank in (0, 1, 2)] == [0, KILLED, 0], result[0].output
    assert result[0].value == result[2].value == (True, True)


def _of_members(small: bool, ordered: bool, before: bool) -> Any:
    """The sum of everybody's part; a rank dies in the middle of it, or before it has put its part."""
    import hoplite_mpi as hm

    rank = int(os.environ["HOPLITE_RANK"])
    os.environ["HOPLITE_NODE"] = f"node{rank}"
    store = hm.init()
    store.barrier()
    rid = hm.ObjectID.from_name("result")
    if before and rank == 1:
        os.kill(os.getpid(), signal.SIGKILL)
    if before and rank == 3:  # it asks when one is dead, and the others perhaps before
        _await_death(store, 4)
    store.put(_source(rank)[: 10 if small else None], hm.ObjectID.from_name("source", (rank, 0)))
    sources = [hm.ObjectID.from_name("source", (r, 0)) for r in store.ranks]
    store.reduce(sources, object_id=rid, deterministic=ordered, skip_lost=True)
    got, used = store.get(rid), store.reduced_from(rid)
    _await_death(store, 4)
    with pytest.raises(hm.ObjectLostError):
        store.get(hm.ObjectID.from_name("never put", (1, 0)))
    store.barrier()
    used_ranks = sorted(oid.origin[0] for oid in used)
    return bool((got == sum(10.0**r for r in used_ranks)).all()), used_ranks


@pytest.mark.parametrize("ordered", [False, True])
@pytest.mark.parametrize("small", [False, True])
def test_a_member_that_dies_before_it_has_put_its_part_is_left_out(small: bool, ordered: bool) -> None:
    result = run_ranks(4, _of_members, (small, ordered, True), env=ENV, timeout=60)
    assert _check(result, 1) == [0, 2, 3]


@pytest.mark.parametrize("ordered", [False, True])
@pytest.mark.parametrize("chunk", [1, CHUNKS // 2])
def test_a_member_that_dies_in_the_middle_is_left_out(chunk: int, ordered: bool) -> None:
    fault = f"1:transfer.chunk_sent=kill@{chunk};1:reduce.chunk=kill@{chunk}"
    result = run_ranks(4, _of_members, (False, ordered, False), env=ENV | {"HOPLITE_FAULT": fault}, timeout=60)
    assert _check(result, 1) == [0, 2, 3]


def _lost() -> Any:
    """Rank 1 has the only copy of what it put, and dies; rank 0 gets, watches and reduces it."""
    import numpy as np

    import hoplite_mpi as hm

    rank = int(os.environ["HOPLITE_RANK"])
    os.environ["HOPLITE_NODE"] = f"node{rank}"
    store = hm.init()
    mail = hm.Mailbox(store, 1)
    store.barrier()
    if rank == 1:
        oid, copied = store.put(np.ones(100_000)), store.put(np.full(100_000, 2.0))
        mail.send(0, bytes(oid) + bytes(copied))
        mail.receive()
        os.kill(os.getpid(), signal.SIGKILL)
    if rank == 0:
        _, message = mail.receive()
        oid, copied = hm.ObjectID(message[:16]), hm.ObjectID(message[16:])
        store.get(copied)
        rid = store.reduce([oid, copied])
        mail.send(1, b"die")
        _await_death(store, 3)
        for wait in (store.get, store.reduced_from):
            with pytest.raises(hm.ObjectLostError, match="lost"):
                wait(oid)
        assert store.wait([oid])[0] == [oid]
        with pytest.raises(hm.ReduceError, match="lost"):
            store.get(rid)
        assert store.get(copied)[0] == 2.0
    else:
        _await_death(store, 3)
    store.barrier()
    return True


def test_a_get_of_what_is_lost_says_so() -> None:
    result = run_ranks(3, _lost, env=ENV, timeout=60)
    assert [result[rank].exitcode for rank in (0, 1, 2)] == [0, KILLED, 0], result[0].output


def _root_leaves_its_result(fetched: bool) -> Any:
    """Ranks 0 and 1 share a node; rank 0, the root, dies after the end. What rank 1 has got stays, and what nobody has got goes."""
    import time

    import numpy as np

    import hoplite_mpi as hm

    rank = int(os.environ["HOPLITE_RANK"])
    os.environ["HOPLITE_NODE"] = "shared" if rank < 2 else "other"
    store, size = hm.init(), 100_000
    sources = [hm.ObjectID.from_name(f"source {r}") for r in range(3)]
    rid = hm.ObjectID.from_name("sum")
    store.put(np.full(size, 10.0**rank), sources[rank])
    store.barrier()
    if rank == 0:
        store.reduce(sources, object_id=rid, shape="chain")
        assert (store.get(rid) == 111.0).all()
    store.barrier()
    if rank == 1 and fetched:
        store.get(rid)
    store.barrier()
    if rank == 0:
        os.kill(os.getpid(), signal.SIGKILL)
    while 0 in store.ranks:
        time.sleep(0.005)
    if rank == 1:
        arena, end = store.runtime.arena, time.monotonic() + 30
        store.runtime.engine.run(lambda: None)  # the view is known before all that it brings with it is done
        left = [found for found in arena.objects() if found.version]
        if fetched:
            assert [found.oid for found in left] == [rid]
            assert (left[0].rank, left[0].incarnation) == (1, 0), "it is rank 1's from now on"
            time.sleep(5)
            assert (store.get(rid) == 111.0).all()
            store.delete(rid)
        # the others may have reduced again what rank 0 had asked for: into another version
        while any((found.oid, found.version) == (left[0].oid, left[0].version) for found in arena.objects()):
            assert time.monotonic() < end, "it is still there"
            time.sleep(0.05)
    store.barrier()
    return True


@pytest.mark.parametrize("fetched", [True, False])
def test_what_a_dead_root_leaves_is_taken_over_or_freed(fetched: bool) -> None:
    deadlines = {"HOPLITE_KEEPALIVE_TIMEOUT": "2", "HOPLITE_JOIN_TIMEOUT": "3", "HOPLITE_EVICT_TIMEOUT": "4"}
    result = run_ranks(3, _root_leaves_its_result, (fetched,), env=ENV | deadlines, timeout=60)
    assert [result[rank].exitcode for rank in range(3)] == [-signal.SIGKILL, 0, 0], [r.output for r in result.values()]
