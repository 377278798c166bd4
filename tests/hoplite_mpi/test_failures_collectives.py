"""Ranks that die in the middle of collectives, and ranks that join: all who live get the same."""

from __future__ import annotations

import os
import signal
from typing import Any

import pytest

from hoplite_mpi.testing import run_ranks
from hoplite_mpi.transport import guard

pytestmark = pytest.mark.skipif(not guard.load().loaded, reason=f"the guard is not there: {guard.load().why}")

KILLED = -signal.SIGKILL
ENV = {"HOPLITE_CHUNK_SIZE": str(64 * 1024), "HOPLITE_WINDOW": "1", "HOPLITE_DEFAULT_TIMEOUT": "40"}
#: elements: inline, a tree, stripes
SIZES = [10, 40_000, 200_000]


def _open() -> Any:
    os.environ["HOPLITE_NODE"] = f"node{os.environ['HOPLITE_RANK']}"
    import hoplite_mpi as hm

    return hm.init()


def _part(rank: int, size: int) -> Any:
    import numpy as np

    return np.full(size, 10.0**rank)


# -- each operation, and a death in it -----------------------------------------------------------------------------------


def _one(what: str, size: int, deterministic: bool) -> Any:
    """Four ranks begin a call, one dies in it, and the rest make another one. Return what they got, by rank of the part."""
    import time

    import numpy as np

    store = _open()
    rank = store.rank
    store.barrier()
    part = _part(rank, size)
    items = [_part(rank, size) + to for to in range(4)]
    results = []
    for number in range(3):
        if number == 2:  # the one who dies does so in the first or the second
            end = time.monotonic() + 30
            while store.size == 4:
                assert time.monotonic() < end, "nobody has died"
                time.sleep(0.005)
        if what in ("allreduce", "reduce_scatter", "reduce_to"):
            options = {"root": 0} if what == "reduce_to" else {}
            got = getattr(store, what)(part, deterministic=deterministic, **options)
            ranks = sorted(store.took_part())
            total = sum(_part(r, size) for r in ranks)
            expected = np.array_split(total, len(ranks))[ranks.index(rank)] if what == "reduce_scatter" else total
        elif what == "alltoall":
            got = store.alltoall(items)
            ranks = sorted(store.took_part())
            expected = np.stack([_part(r, size) + rank for r in ranks])
        else:
            got = getattr(store, what)(part)
            ranks = sorted(store.took_part())
            expected = np.stack([_part(r, size) for r in ranks])
        rooted = what in ("gather", "reduce_to") and rank != 0
        assert got is None if rooted else np.array_equal(got, expected), (what, number, ranks)
        results.append(ranks)
    store.barrier()
    return results


@pytest.mark.parametrize(
    "when", ["transfer.chunk_sent=kill@3", "reduce.chunk=kill@2", "transfer.chunk_received=kill@5"]
)
@pytest.mark.parametrize(
    ("what", "deterministic"),
    [
        ("allreduce", False),
        ("allreduce", True),
        ("reduce_scatter", False),
        ("reduce_to", False),
        ("reduce_to", True),
        ("allgather", False),
        ("gather", False),
        ("alltoall", False),
    ],
)
def test_a_rank_dies_in_a_collective(what: str, deterministic: bool, when: str) -> None:
    if when.startswith("reduce") and what in ("allgather", "gather", "alltoall"):
        pytest.skip("nothing is reduced")
    if what == "gather" and "received" in when:
        pytest.skip("only the root receives")
    if (what, deterministic) == ("reduce_to", False) and "received" in when:
        pytest.skip("in the order of the arrivals a rank may have nothing to receive")
    # patient enough for a busy machine: in stripes each rank has something to reduce and to send, in a tree not
    env = ENV | {"HOPLITE_FAULT": f"2:{when}", "HOPLITE_STRIPE_PATIENCE": "10"}
    result = run_ranks(4, _one, (what, 200_000, deterministic), env=env, timeout=60)
    others = [0, 1, 3]
    assert [result[rank].exitcode for rank in others] == [0, 0, 0], [result[rank].output for rank in others]
    assert result[2].exitcode == KILLED
    values = [result[rank].value for rank in others]
    assert values[0] == values[1] == values[2], values
    assert values[0][2] == others
    assert all(set(others) <= set(ranks) for ranks in values[0])


def _root_dies() -> Any:
    """The root of a broadcast and of a scatter dies before it has given anything, while it does, and when some have it all."""
    import hoplite_mpi as hm

    store = _open()
    store.barrier()
    if store.rank == 1:
        os.kill(os.getpid(), signal.SIGKILL)
    outcomes = []
    for call in (lambda: store.broadcast(None, 1), lambda: store.scatter(None, 1)):
        with pytest.raises(hm.PeerLostError, match="rank 1, the root"):
            call()
        outcomes.append(store.took_part())
    store.barrier()
    return outcomes, sorted(store.took_part())


def test_the_root_of_a_broadcast_is_gone() -> None:
    result = run_ranks(3, _root_dies, env=ENV, timeout=60)
    assert result[0].value == result[2].value == ([{1}, {1}], [0, 2]), [result[rank].output for rank in (0, 2)]


def _root_dies_in_the_middle(size: int) -> Any:
    import numpy as np

    import hoplite_mpi as hm

    store = _open()
    store.barrier()
    try:
        got = store.broadcast(_part(1, size) if store.rank == 1 else None, 1)
        right = bool(np.array_equal(got, _part(1, size)))
    except hm.PeerLostError:
        right = None
    store.barrier()
    return right


@pytest.mark.parametrize("chunk", [1, 24, 25, 26])
def test_the_root_of_a_broadcast_dies_in_the_middle(chunk: int) -> None:
    """Of 25 chunks: if one has them all, all get them; otherwise nobody does."""
    env = ENV | {"HOPLITE_FAULT": f"1:transfer.chunk_sent=kill@{chunk}"}
    result = run_ranks(4, _root_dies_in_the_middle, (200_000,), env=env, timeout=60)
    assert [result[rank].exitcode for rank in (0, 2, 3)] == [0, 0, 0], [result[rank].output for rank in (0, 2, 3)]
    values = [result[rank].value for rank in (0, 2, 3)]
    assert values[0] == values[1] == values[2] and values[0] in ((True, None) if chunk > 24 else (None,))


# -- deaths at any time, and newcomers -------------------------------------------------------------------------------------


def _loop(calls_after: int, victim: int, seconds: float | None) -> Any:
    """Allreduce until all who were started are there, none of them in its first life only; return what was got, by call.

    seconds: after these the victim dies, wherever it is then.
    """
    import threading

    store = _open()
    if seconds is not None and (store.rank, os.environ["HOPLITE_INCARNATION"]) == (victim, "0"):
        threading.Timer(seconds, os.kill, (os.getpid(), signal.SIGKILL)).start()
    rank, size = store.rank, int(os.environ["HOPLITE_SIZE"])
    log: dict[int, Any] = {}
    since = 0
    while True:
        number = store.next_call("loop")
        part = _part(rank, SIZES[number % 3])
        members = store.runtime.view.members.values()
        complete = len(members) == size and any(m.incarnation for m in members)
        since = since + 1 if complete else 0
        part[0] = float(since > calls_after)  # ready to stop; all stop in the same call
        got = store.allreduce(part, key="loop")
        ranks = sorted(store.took_part("loop"))
        assert (got[1:] == sum(10.0**r for r in ranks)).all(), (number, ranks, got[1])
        log[number] = ranks
        if got[0] == len(ranks) == size:
            break
    store.barrier()
    return log


@pytest.mark.parametrize("when", ["transfer.chunk_sent@3", "transfer.chunk_received@30", "reduce.chunk@20", 0.5])
@pytest.mark.parametrize("victim", [0, 2])
def test_a_rank_dies_at_any_time_and_is_replaced(victim: int, when: str | float) -> None:
    # not at a time of `run_ranks`, at which a busy machine has no view yet
    at_point = [(victim, when)] if isinstance(when, str) else []
    seconds = None if isinstance(when, str) else when
    result = run_ranks(4, _loop, (5, victim, seconds), kill=at_point, env=ENV, respawn=True, timeout=60)
    assert [result[rank].exitcode for rank in range(4)] == [0, 0, 0, 0], [r.output for r in result.values()]
    assert result[victim].incarnation == 1
    # a process that was just connecting to the victim may have left with it, and have been replaced as well
    elders = [rank for rank in range(4) if result[rank].incarnation == 0]
    assert len(elders) >= 2
    log = result[elders[0]].value
    assert all(result[rank].value == log for rank in elders)
    newcomer = result[victim].value
    assert len(newcomer) > 5
    assert newcomer == {number: log[number] for number in newcomer}, "it took part in what the others did"
    assert all(victim in ranks for ranks in newcomer.values())
