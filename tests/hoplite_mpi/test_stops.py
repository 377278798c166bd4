"""Ranks that are stopped (SIGSTOP) in the middle of something, for longer than they are waited for and for less, or hold the GIL."""

from __future__ import annotations

import os
import signal
from typing import Any

import pytest

from hoplite_mpi.launch import REPLACE_ME
from hoplite_mpi.testing import run_ranks
from hoplite_mpi.transport import guard

pytestmark = pytest.mark.skipif(not guard.load().loaded, reason=f"the guard is not there: {guard.load().why}")

#: above what MPI copies at once, so that the receives from the one who stops are matched and not over
CHUNK = 256 * 1024
CHUNKS = 32
WINDOW = {"HOPLITE_CHUNK_SIZE": str(CHUNK), "HOPLITE_WINDOW": "4", "HOPLITE_DEFAULT_TIMEOUT": "50"}
#: the shortest that a busy machine does not take for silence
SHORT = WINDOW | {
    "HOPLITE_KEEPALIVE_TIMEOUT": "2",
    "HOPLITE_JOIN_TIMEOUT": "3",
    "HOPLITE_EVICT_TIMEOUT": "4",
    "HOPLITE_CLOSE_TIMEOUT": "2",
}


def _name(what: object) -> Any:
    import hoplite_mpi as hm

    return hm.ObjectID.from_name(str(what))


def _part(rank: int) -> Any:
    import hoplite_mpi as hm

    return hm.ObjectID.from_name("part", (rank, 0))


def _open() -> Any:
    os.environ["HOPLITE_NODE"] = f"node{os.environ['HOPLITE_RANK']}"
    import hoplite_mpi as hm

    return hm.init()


def _data(seed: int) -> Any:
    import numpy as np

    return np.random.default_rng(seed).integers(0, 1000, CHUNK * CHUNKS // 8)


def _until(condition: Any, what: str, seconds: float = 40) -> None:
    import time

    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, what
        time.sleep(0.005)


def _state(pid: int) -> str:
    """Return the state of a process of this machine: T is stopped, Z or nothing is over."""
    try:
        with open(f"/proc/{pid}/stat") as file:
            return file.read().rpartition(")")[2].split()[0]
    except (FileNotFoundError, ProcessLookupError):
        return ""


def _owned_by(rank: int, store: Any, what: str) -> Any:
    oids = (_name(f"{what}/{i}") for i in range(1000))
    return next(oid for oid in oids if store.runtime.view.owner(bytes(oid)) == rank)


def _act(store: Any, role: str, victim: int) -> Any:
    """Do what the victim is stopped in; return, for the others, id → whether its bytes are right, of what they hold then."""
    import numpy as np

    import hoplite_mpi as hm
    from hoplite_mpi.testing import fault

    rank, x = store.rank, _name("x")
    stop = {
        "sender": f"transfer.chunk_sent=stop@{CHUNKS // 2}",
        "receiver": f"transfer.chunk_received=stop@{CHUNKS // 2}",
        "inner slot": f"reduce.chunk=stop@{CHUNKS // 2}",
        "root": f"reduce.chunk=stop@{CHUNKS // 2}",
    }.get(role)
    if role == "sender":  # ranks 0 and 1 have it, of which the victim is one
        if rank == 0:
            store.put(_data(0), x)
        if rank <= 1:
            store.get(x)
    store.barrier()
    if rank == victim and stop is not None:
        fault.enable(stop)
    store.barrier()
    if role == "sender":
        if rank > 1:
            return {x: np.array_equal(store.get(x), _data(0))}
        return {}
    if role == "receiver":  # they ask in this order, so it is a chain: 0, the victim, the others
        if rank == 0:
            store.wait([_name(f"asked {r}") for r in range(1, 4)], 3)
            store.put(_data(0), x)
        elif rank != victim:
            store.get(_name(f"asked {victim if rank == 2 else 2}"))
        future = store.get_async(x)
        if rank:
            store.located([x])  # the owner has the request
            store.put(b"", _name(f"asked {rank}"))
        return {x: np.array_equal(future.result(), _data(0))} if rank != victim else {}
    if role in ("inner slot", "root"):
        store.put(_data(rank), _part(rank))
        # of an ordered chain the first is the leaf, which reduces nothing, and the last is the root, whoever comes when
        order = sorted(range(4), key=lambda r: (role == "root" and r == victim, r))
        store.reduce([_part(r) for r in order], object_id=x, shape="chain", deterministic=True, skip_lost=True)
        if rank == victim:
            return {}
        got, used = store.get(x), sorted(oid.origin[0] for oid in store.reduced_from(x))
        return {x: used == [r for r in range(4) if r != victim] and np.array_equal(got, sum(_data(r) for r in used))}
    # the owner of all that is asked for, which is also the coordinator of the membership if it is rank 0
    known, small, later = (_owned_by(victim, store, what) for what in ("known", "small", "later"))
    others = [r for r in range(4) if r != victim]
    if rank == others[0]:
        store.put(_data(1), known)
        store.put(b"small", small)
    future = store.get_async(later)
    store.barrier()
    if rank == victim:
        os.kill(os.getpid(), signal.SIGSTOP)
        return {}
    right = {known: np.array_equal(store.get(known), _data(1)), small: bytes(store.get(small)) == b"small"}
    with pytest.raises(hm.ObjectExistsError):
        store.put(b"other", small)
    if rank == others[-1]:
        store.put(_data(2), later)
    return right | {later: np.array_equal(future.result(), _data(2))}


def _put_out(role: str, victim: int) -> Any:
    """The victim stops; the others finish without it, fill the memory that is free, and wake it; it leaves and is replaced."""
    import hashlib
    import sys

    import numpy as np

    import hoplite_mpi as hm

    rank, newcomer = int(os.environ["HOPLITE_RANK"]), os.environ["HOPLITE_INCARNATION"] != "0"
    others = [r for r in range(4) if r != victim]
    store = _open()
    if newcomer:
        right = [np.array_equal(store.get(_name(f"new {r}")), _data(10 + r)) for r in others]
        store.put(_data(99), _name("of the newcomer"))
        store.reduce([_name(f"new {others[0]}"), _name("of the newcomer")], object_id=_name("sum"))
        right.append(np.array_equal(store.get(_name("sum")), _data(99) + _data(10 + others[0])))
        store.barrier()
        return all(right)
    store.put(np.array([os.getpid()]), _name(f"pid {rank}"))
    pid = int(store.get(_name(f"pid {victim}"))[0])
    done = _act(store, role, victim)
    if rank == victim:
        with pytest.raises(hm.EvictedError):
            store.get(_name("never"))
        for call in (lambda: store.put(b""), store.barrier):
            with pytest.raises(hm.EvictedError):
                call()
        store.close()
        sys.exit(REPLACE_ME)
    _until(lambda: victim not in store.ranks, "the stopped rank is still a member")
    assert _state(pid) == "T", "it was to be stopped"
    # what was given up is free again, unless MPI may still write there: then nobody may be given it
    store.put(_data(10 + rank), _name(f"new {rank}"))
    views = [store.get(_name(f"new {r}")) for r in others] + [store.get(oid) for oid in done]
    views += [store.get(store.put(_data(20 + number))) for number in range(4)]
    before = [hashlib.sha256(view).hexdigest() for view in views]
    store.barrier()
    if rank == others[0]:
        os.kill(pid, signal.SIGCONT)
    _until(lambda: _state(pid) in ("Z", ""), "it did not leave")
    after = [hashlib.sha256(view).hexdigest() for view in views]
    ok = np.array_equal(store.get(_name("of the newcomer")), _data(99))
    members = {(m.rank, m.incarnation) for m in store.runtime.view.members.values()}
    store.barrier()
    return all(done.values()), after == before, ok, sorted(members), store.statistics().peers_lost


@pytest.mark.parametrize(
    ("role", "victim"),
    [("sender", 0), ("sender", 1), ("receiver", 1), ("inner slot", 1), ("root", 2), ("owner", 0), ("owner", 2)],
)
def test_who_is_stopped_for_too_long_does_no_harm_when_it_wakes(role: str, victim: int) -> None:
    result = run_ranks(4, _put_out, (role, victim), env=SHORT, respawn=True, timeout=90)
    assert [result[rank].exitcode for rank in range(4)] == [0] * 4, [r.output for r in result.values()]
    assert result[victim].incarnation == 1
    assert result[victim].value is True
    members = sorted((rank, int(rank == victim)) for rank in range(4))
    for rank in range(4):
        if rank != victim:
            assert result[rank].value == (True, True, True, members, 1)


def _stopped_for_a_while(role: str, victim: int) -> Any:
    """The victim stops for longer than a transfer waits, and the others do not wait for it."""
    import time

    import numpy as np

    store = _open()
    rank = store.rank
    store.put(np.array([os.getpid()]), _name(f"pid {rank}"))
    pid = int(store.get(_name(f"pid {victim}"))[0])
    # what the stopped one keeps the entries of waits for it
    assert store.runtime.view.owner(bytes(_name("x"))) != victim
    done = [_owned_by(0, store, f"done {r}") for r in range(4)]
    right = _act(store, role, victim)
    store.put(b"", done[rank])
    if rank == 0:
        _until(lambda: _state(pid) == "T", "it did not stop")
        # all others get it while one of them is stopped: what that one sends, and what it keeps its sender for, comes from elsewhere
        assert not store.wait([done[r] for r in range(4) if r != victim], 3)[1][1:]
        time.sleep(1.5)  # longer than the stall timeout
        assert _state(pid) == "T"
        os.kill(pid, signal.SIGCONT)
    got = np.array_equal(store.get(_name("x")), _data(0))
    stalled = store.statistics().stalled
    store.barrier()
    return all(right.values()), got, store.ranks, store.statistics().peers_lost, stalled


@pytest.mark.parametrize(("role", "victim"), [("sender", 1), ("receiver", 1)])
def test_who_is_stopped_for_a_while_stays_a_member(role: str, victim: int) -> None:
    result = run_ranks(4, _stopped_for_a_while, (role, victim), env=WINDOW, timeout=90)
    assert [result[rank].exitcode for rank in range(4)] == [0] * 4, [r.output for r in result.values()]
    for rank in range(4):
        assert result[rank].value[:4] == (True, True, [0, 1, 2, 3], 0)
    assert sum(result[rank].value[4] for rank in (2, 3)) >= 1, "nobody has noticed"


def _busy(seconds: float) -> Any:
    """Rank 1 holds the interpreter's lock; meanwhile ranks 0 and 2 put, get and reduce."""
    import ctypes
    import time

    import numpy as np

    store = _open()
    # what rank 1 keeps the entries of has to wait for it
    names = [oid for oid in (_name(f"turn {i}") for i in range(600)) if store.runtime.view.owner(bytes(oid)) != 1]
    store.barrier()
    began, turns = time.monotonic(), 15
    if store.rank == 1:
        ctypes.PyDLL(None).usleep(int(seconds * 1e6))  # PyDLL: keeps the lock
    else:
        for turn in range(turns):
            *sources, total = names[3 * turn : 3 * turn + 3]
            store.put(np.full(20_000, turn), sources[store.rank // 2])
            store.reduce(sources, object_id=total)
            assert store.get(total)[-1] == 2 * turn
    took = time.monotonic() - began
    store.barrier()
    return store.ranks, store.statistics().peers_lost, took


@pytest.mark.parametrize("seconds", [8.0, pytest.param(20.0, marks=pytest.mark.slow)])
def test_who_holds_the_gil_is_not_dead_and_holds_up_nobody_else(seconds: float) -> None:
    result = run_ranks(3, _busy, (seconds,), env={"HOPLITE_DEFAULT_TIMEOUT": "60"}, timeout=90)
    assert [result[rank].exitcode for rank in range(3)] == [0] * 3, [r.output for r in result.values()]
    assert all(result[rank].value[:2] == ([0, 1, 2], 0) for rank in range(3))
    assert result[1].value[2] >= seconds > max(result[rank].value[2] for rank in (0, 2))
