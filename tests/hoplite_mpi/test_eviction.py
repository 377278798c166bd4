"""Ranks that stop without dying: the others go on, and they find themselves out."""

from __future__ import annotations

import os
import signal
from typing import Any

import pytest

from hoplite_mpi.testing import run_ranks
from hoplite_mpi.transport import guard

pytestmark = pytest.mark.skipif(not guard.load().loaded, reason=f"the guard is not there: {guard.load().why}")

#: the shortest that a busy machine does not take for silence
ENV = {
    "HOPLITE_KEEPALIVE_TIMEOUT": "2",
    "HOPLITE_JOIN_TIMEOUT": "3",
    "HOPLITE_EVICT_TIMEOUT": "4",
    "HOPLITE_DEFAULT_TIMEOUT": "40",
    "HOPLITE_CLOSE_TIMEOUT": "2",
}


def _stopped(victim: int, size: int) -> Any:
    """The victim stops itself; who is left goes on without it, and wakes it when it is out of the view."""
    import time

    import numpy as np

    import hoplite_mpi as hm

    rank = int(os.environ["HOPLITE_RANK"])
    os.environ["HOPLITE_NODE"] = f"node{rank}"
    store = hm.init()
    pid, data = hm.ObjectID.from_name("pid"), hm.ObjectID.from_name("data")
    others = [r for r in range(size) if r != victim]
    if rank == victim:
        store.put(np.array([os.getpid()]), pid)
        store.put(np.arange(100_000), hm.ObjectID.from_name("of the victim"))
    number = int(store.get(pid)[0])
    future = store.get_async(hm.ObjectID.from_name("never"))
    store.barrier()
    if rank == victim:
        os.kill(os.getpid(), signal.SIGSTOP)
        error = future.exception(30)
        said = []
        for call in (lambda: store.put(b""), lambda: store.get(data), store.barrier):
            with pytest.raises(hm.EvictedError) as raised:
                call()
            said.append(str(raised.value))
        start = time.monotonic()
        store.close()
        return type(error).__name__, said, time.monotonic() - start
    end = time.monotonic() + 30
    while victim in store.ranks and not store.closed:
        assert time.monotonic() < end, "the stopped rank is still a member"
        time.sleep(0.01)
    if rank == others[0]:
        store.put(np.arange(100_000), data)
        os.kill(number, signal.SIGCONT)
    got = store.get(data)
    store.barrier()
    ranks = store.ranks
    store.barrier()
    return bool((got == np.arange(100_000)).all()), ranks


@pytest.mark.parametrize("victim", [0, 2])
def test_a_stopped_rank_is_put_out_and_learns_it(victim: int) -> None:
    result = run_ranks(3, _stopped, (victim, 3), env=ENV, timeout=60)
    assert [result[rank].exitcode for rank in range(3)] == [0, 0, 0], [r.output for r in result.values()]
    others = [rank for rank in range(3) if rank != victim]
    assert all(result[rank].value == (True, others) for rank in others)
    error, said, seconds = result[victim].value
    assert error == "EvictedError"
    assert all("rank" in text and "view" in text for text in said), said
    assert seconds < 5


def _busy() -> Any:
    """A rank that holds the interpreter's lock for longer than the kernel waits for a dead host stays a member."""
    import ctypes

    import hoplite_mpi as hm

    rank = int(os.environ["HOPLITE_RANK"])
    store = hm.init()
    store.barrier()
    if rank == 1:
        ctypes.PyDLL(None).usleep(2_600_000)  # PyDLL: keeps the lock
    store.put(b"", hm.ObjectID.from_name(f"after {rank}"))
    for r in range(2):
        store.get(hm.ObjectID.from_name(f"after {r}"))
    ranks = store.ranks
    store.barrier()
    return ranks


def test_a_busy_rank_is_not_put_out() -> None:
    result = run_ranks(2, _busy, env=ENV, timeout=60)
    assert [result[rank].value for rank in range(2)] == [[0, 1], [0, 1]], [r.output for r in result.values()]


def _out_of_reach(reporter: int, target: int) -> Any:
    """MPI tells one rank that it can't reach another one, which lives: the younger of the two has to leave."""
    import time

    import numpy as np

    import hoplite_mpi as hm

    rank = int(os.environ["HOPLITE_RANK"])
    os.environ["HOPLITE_NODE"] = f"node{rank}"
    store, loser = hm.init(), max(reporter, target)
    data = np.arange(200_000)
    store.put(data, hm.ObjectID.from_name(f"of {rank}"))
    for other in range(store.size):  # so that everybody is connected with everybody
        assert np.array_equal(store.get(hm.ObjectID.from_name(f"of {other}")), data)
    store.barrier()
    if rank == reporter:
        runtime = store.runtime
        runtime.engine.run(lambda: runtime.fabric.failed(runtime.fabric.link((target, 0)), RuntimeError("on purpose")))
    if rank == loser:
        with pytest.raises(hm.EvictedError):
            store.get(hm.ObjectID.from_name("never"))
        return [loser]
    end = time.monotonic() + 30
    while loser in store.ranks:
        assert time.monotonic() < end, "it is still a member"
        time.sleep(0.01)
    store.put(data, hm.ObjectID.from_name(f"later, of {rank}"))
    for other in store.ranks:
        assert np.array_equal(store.get(hm.ObjectID.from_name(f"later, of {other}")), data)
    ranks = store.ranks
    store.barrier()
    return ranks


@pytest.mark.parametrize(("reporter", "target"), [(0, 2), (2, 0), (1, 2)])
def test_a_peer_that_lives_and_that_mpi_does_not_reach_is_put_out(reporter: int, target: int) -> None:
    result = run_ranks(3, _out_of_reach, (reporter, target), env=ENV, timeout=60)
    assert [result[rank].exitcode for rank in range(3)] == [0, 0, 0], [result[rank].output for rank in range(3)]
    assert [result[rank].value for rank in range(3)] == [[0, 1], [0, 1], [2]]
