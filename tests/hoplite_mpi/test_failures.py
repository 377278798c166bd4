"""Ranks that are killed while objects travel between them; what is said of each is that nobody hangs."""

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
CHUNKS = 64
#: small chunks, so that a transfer has many, and one on its way at a time, so that a kill is in the middle of it
ENV = {"HOPLITE_CHUNK_SIZE": str(CHUNK), "HOPLITE_WINDOW": "1", "HOPLITE_DEFAULT_TIMEOUT": "40"}


def _open(node: str | None = None) -> Any:
    """Open the store of this rank, on a node of its own if none is named."""
    os.environ["HOPLITE_NODE"] = node or f"node{os.environ['HOPLITE_RANK']}"
    import hoplite_mpi as hm

    return hm.init()


def _until(condition: Any, what: str, seconds: float = 30) -> None:
    import time

    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, what
        time.sleep(0.005)


def _data(seed: int = 0) -> Any:
    import numpy as np

    return np.random.default_rng(seed).integers(0, 1000, CHUNK * CHUNKS // 8)


def _owned_by(rank: int, store: Any, what: str) -> Any:
    """Return a name whose directory entry is kept by *rank*, in the view of now."""
    import hoplite_mpi as hm

    oids = (hm.ObjectID.from_name(f"{what}/{i}") for i in range(1000))
    return next(oid for oid in oids if store.runtime.view.owner(bytes(oid)) == rank)


# -- broadcast ---------------------------------------------------------------------------------------------------------


def _resume() -> Any:
    """Rank 0 puts, rank 1 gets a copy; the rest then get it too, while the first to send is killed in the middle."""
    import numpy as np

    import hoplite_mpi as hm
    from hoplite_mpi.testing import fault

    store, oid, rank = _open(), hm.ObjectID.from_name("x"), int(os.environ["HOPLITE_RANK"])
    if rank == 0:
        store.put(_data(), oid)
        store.get(hm.ObjectID.from_name("there"))
        fault.enable(f"transfer.chunk_sent=kill@{CHUNKS // 2}")
        store.put(b"", hm.ObjectID.from_name("go"))
        _until(lambda: False, "rank 0 was to be killed")
    if rank == 1:
        store.get(oid)
        store.put(b"", hm.ObjectID.from_name("there"))
    store.get(hm.ObjectID.from_name("go"))
    got = store.get(oid)
    assert np.array_equal(got, _data())
    _until(lambda: 0 not in store.ranks, "rank 0 is still a member")
    statistics = store.statistics()
    store.barrier()
    return statistics


def test_receivers_go_on_from_where_their_sender_died() -> None:
    result = run_ranks(4, _resume, env=ENV, timeout=60)
    assert [result[rank].exitcode for rank in range(4)] == [KILLED, 0, 0, 0], result[1].output
    total = CHUNK * CHUNKS
    for rank in (1, 2, 3):
        # what was on its way when the sender died is lost, and nothing else is sent again
        assert total <= result[rank].value.bytes_received <= total + 2 * CHUNK, (rank, result[rank].value)
        assert result[rank].value.peers_lost == 1
    assert any(result[rank].value.transfers > 1 for rank in (2, 3)), "nobody was in the middle of a transfer"


def _sole_source() -> Any:
    """Rank 0 has the only copy and is killed while it sends; rank 2 puts it again."""
    import numpy as np

    import hoplite_mpi as hm

    store, oid, rank = _open(), hm.ObjectID.from_name("x"), int(os.environ["HOPLITE_RANK"])
    if rank == 0:
        store.put(_data(), oid)
        _until(lambda: False, "rank 0 was to be killed")
    if rank == 1:
        future = store.get_async(oid)
        _until(lambda: 0 not in store.ranks, "rank 0 is still a member")
        with pytest.raises(hm.GetTimeoutError):
            future.result(0.5)
        store.put(b"", hm.ObjectID.from_name("again"))
        assert np.array_equal(future.result(), _data())
    if rank == 2:
        store.get(hm.ObjectID.from_name("again"))
        store.put(_data(), oid)
    received = store.statistics().bytes_received
    store.barrier()
    return received


def test_a_get_whose_only_source_died_waits_for_the_next_put() -> None:
    result = run_ranks(3, _sole_source, env=ENV, kill=[(0, f"transfer.chunk_sent@{CHUNKS // 2}")], timeout=60)
    assert [result[rank].exitcode for rank in range(3)] == [KILLED, 0, 0], result[1].output
    assert CHUNK * CHUNKS <= result[1].value <= CHUNK * (CHUNKS + 2)


def _owner_dies(victim: int) -> Any:
    """The rank that keeps the directory entries of all that is asked for is killed while gets wait and after puts."""
    import numpy as np

    import hoplite_mpi as hm

    store, rank = _open(), int(os.environ["HOPLITE_RANK"])
    large, small, later = (_owned_by(victim, store, what) for what in ("large", "small", "later"))
    others = [r for r in range(store.size) if r != victim]
    if rank == others[0]:
        store.put(_data(), large)
        store.put(b"small", small)
    future = store.get_async(later)
    store.barrier()
    if rank == victim:
        os.kill(os.getpid(), signal.SIGKILL)
    assert np.array_equal(store.get(large), _data())
    assert bytes(store.get(small)) == b"small"
    _until(lambda: victim not in store.ranks, "it is still a member")
    with pytest.raises(hm.ObjectExistsError):
        store.put(b"other", small)
    if rank == others[-1]:
        store.put(_data(1), later)
    assert np.array_equal(future.result(), _data(1))
    ranks = store.ranks
    store.barrier()
    return ranks


@pytest.mark.parametrize("victim", [0, 2])
def test_the_directory_survives_whoever_kept_it(victim: int) -> None:
    """Rank 0 is also the coordinator of the membership."""
    result = run_ranks(3, _owner_dies, (victim,), env=ENV, timeout=60)
    others = [rank for rank in range(3) if rank != victim]
    assert [result[rank].exitcode for rank in others] == [0, 0], [result[rank].output for rank in others]
    assert result[victim].exitcode == KILLED
    assert all(result[rank].value == others for rank in others)


def _bytes_outlive() -> Any:
    """Ranks 0 and 1 share a node; rank 0 puts and is killed, and rank 1 serves it to rank 2, on another node."""
    import numpy as np

    import hoplite_mpi as hm

    rank = int(os.environ["HOPLITE_RANK"])
    store, oid = _open("shared" if rank < 2 else "other"), hm.ObjectID.from_name("x")
    if rank == 0:
        store.put(_data(), oid)
    store.barrier()
    if rank == 0:
        os.kill(os.getpid(), signal.SIGKILL)
    _until(lambda: 0 not in store.ranks, "rank 0 is still a member")
    assert np.array_equal(store.get(oid), _data())
    received = store.statistics().bytes_received
    store.barrier()
    return received


def test_bytes_outlive_the_rank_that_put_them() -> None:
    result = run_ranks(3, _bytes_outlive, env=ENV, timeout=60)
    assert [result[rank].exitcode for rank in range(3)] == [KILLED, 0, 0], result[1].output
    assert result[1].value == 0
    assert result[2].value == CHUNK * CHUNKS


def _many_deaths() -> Any:
    """All put and get in all directions while two of five are killed; the rest get all that the rest have put."""
    import numpy as np

    import hoplite_mpi as hm

    store, rank = _open(), int(os.environ["HOPLITE_RANK"])
    store.put(_data(rank), hm.ObjectID.from_name(f"of {rank}"))
    futures = {r: store.get_async(hm.ObjectID.from_name(f"of {r}")) for r in range(5)}
    for r in (0, 2, 4):
        assert np.array_equal(futures[r].result(), _data(r))
    ranks = store.ranks
    store.barrier()
    return ranks


def test_two_deaths_in_the_middle_of_everything() -> None:
    kill = [(1, f"transfer.chunk_sent@{CHUNKS}"), (3, f"transfer.chunk_received@{CHUNKS + 3}")]
    result = run_ranks(5, _many_deaths, env=ENV, kill=kill, timeout=60)
    assert [result[rank].exitcode for rank in range(5)] == [0, KILLED, 0, KILLED, 0], result[0].output
    assert all({0, 2, 4} <= set(result[rank].value) for rank in (0, 2, 4))


def _barrier_and_death() -> float:
    """Rank 2 dies where the others wait for it in a barrier."""
    import time

    store = _open()
    store.barrier()
    if store.rank == 2:
        time.sleep(0.3)
        os.kill(os.getpid(), signal.SIGKILL)
    store.barrier()
    assert 2 not in store.ranks
    noticed = time.monotonic()
    store.barrier()
    return time.monotonic() - noticed


def test_a_barrier_does_not_wait_for_the_dead() -> None:
    result = run_ranks(3, _barrier_and_death, env=ENV, timeout=60)
    assert [result[rank].exitcode for rank in range(3)] == [0, 0, KILLED], result[0].output


def _stopped_sender() -> Any:
    """Rank 0 stops in the middle of a transfer and goes on when rank 1 has routed around it."""
    import numpy as np

    import hoplite_mpi as hm

    store, oid = _open(), hm.ObjectID.from_name("x")
    large = np.ones((48 << 20) // 8)  # allocated in a helper thread
    if store.rank == 0:
        store.put(large, oid)
        store.put(np.array([os.getpid()]), hm.ObjectID.from_name("pid"))
        store.barrier()
    else:
        pid = int(store.get(hm.ObjectID.from_name("pid"))[0])
        store.barrier()
        future = store.get_async(oid)
        _until(lambda: store.statistics().bytes_received > CHUNK, "nothing comes")
        os.kill(pid, signal.SIGSTOP)
        _until(lambda: store.statistics().stalled, "it was not noticed")
        os.kill(pid, signal.SIGCONT)
        assert np.array_equal(future.result(), large)
        # the memory that MPI may have written to is free again when that transfer is drained
        _until(lambda: store.runtime.arena.statistics().recyclable >= large.nbytes, "memory is lost")
        assert store.runtime.arena.statistics().quarantined == 0
        assert store.runtime.arena.used() <= large.nbytes + 4096
    store.barrier()


def test_memory_of_a_stalled_transfer_comes_back() -> None:
    result = run_ranks(2, _stopped_sender, env=ENV, timeout=60)
    assert [result[rank].exitcode for rank in range(2)] == [0, 0], result[1].output


def _dies_in_put(accepted: bool) -> Any:
    """Rank 1 dies with a sealed object under a given id, before or after the owner has said that it counts."""
    import os
    import signal
    import time

    import numpy as np

    import hoplite_mpi as hm

    store = hm.init()
    oid, ours = hm.ObjectID.from_name("given"), np.full(100_000, 1.0)
    store.barrier()
    if store.rank == 1:
        if accepted:
            store.put(np.zeros(100_000), oid)
        else:
            from hoplite_mpi.meta import Meta

            store.runtime.memory.allocate(oid, Meta.of_array(ours), 0, bytes(range(16)), True).seal()
        os.kill(os.getpid(), signal.SIGKILL)
    while store.size == 2:
        time.sleep(0.005)
    if accepted:
        with pytest.raises(hm.ObjectExistsError):
            store.put(ours, oid)
        assert store.get(oid)[0] == 0
        assert store.put(np.zeros(100_000), oid) == oid
    else:
        assert store.put(ours, oid) == oid
        assert store.get(oid)[0] == 1
    return True


@pytest.mark.parametrize("accepted", [False, True])
def test_only_a_put_that_counts_outlives_its_rank(accepted: bool) -> None:
    result = run_ranks(2, _dies_in_put, (accepted,), timeout=60)
    assert result[0].value is True, result[0].output
