"""Ranks that come later, and ranks that die while they connect."""

from __future__ import annotations

import os
import signal
from typing import Any

import pytest

from hoplite_mpi.testing import run_ranks
from hoplite_mpi.transport import guard

pytestmark = pytest.mark.skipif(not guard.load().loaded, reason=f"the guard is not there: {guard.load().why}")

LARGE = 100_000
ENV = {"HOPLITE_DEFAULT_TIMEOUT": "40"}


def _open(node: str | None) -> Any:
    os.environ["HOPLITE_NODE"] = node or f"node{os.environ['HOPLITE_RANK']}"
    import hoplite_mpi as hm

    return hm.init()


def _until(condition: Any, what: str, seconds: float = 30) -> None:
    import time

    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, what
        time.sleep(0.005)


def _replaced(victim: int, node: str | None) -> Any:
    """The victim is killed, and what it was to put comes from its replacement, which gets at once what is there."""
    import numpy as np

    import hoplite_mpi as hm

    def name(what: object) -> Any:
        return hm.ObjectID.from_name(f"object {what}")

    rank, incarnation = int(os.environ["HOPLITE_RANK"]), int(os.environ["HOPLITE_INCARNATION"])
    store = _open(node)
    size = int(os.environ["HOPLITE_SIZE"])
    others = [r for r in range(size) if r != victim]
    heard: set[int] = set()
    send = store.channel(90, lambda peer, message: heard.add(peer[0]))
    if incarnation == 0:
        store.put(b"", name(f"begun {rank}"))
        store.wait([name(f"begun {r}") for r in range(size)], size)  # all have opened the channel
    if rank != victim:
        send(victim, b"a word, so that the two are connected: who is connecting to a rank that dies dies with it")
        store.put(np.full(LARGE, rank), name(rank))
        store.put(b"small", name(f"small {rank}"))
    elif incarnation == 0:
        for r in others:
            store.get(name(r))
        _until(lambda: heard == set(others), "not all have connected")
        os.kill(os.getpid(), signal.SIGKILL)
    else:
        for r in others:
            assert (store.get(name(r)) == r).all()
            assert bytes(store.get(name(f"small {r}"))) == b"small"
        store.put(np.full(LARGE, victim), name(victim))
    assert (store.get(name(victim)) == victim).all()
    sources = [name(r) for r in range(size)]
    rid = store.reduce(sources, object_id=name("sum"))
    assert (store.get(rid) == sum(range(size))).all()
    members = {(m.rank, m.incarnation) for m in store.runtime.view.members.values()}
    _until(lambda: store.located([name("sum")]), "the result is nowhere")
    store.barrier()
    return sorted(members)


@pytest.mark.parametrize("node", [None, "shared"])
@pytest.mark.parametrize("victim", [0, 1])
def test_a_replacement_gets_and_puts_at_once(victim: int, node: str | None) -> None:
    result = run_ranks(3, _replaced, (victim, node), env=ENV, respawn=True, timeout=60)
    assert [result[rank].exitcode for rank in range(3)] == [0, 0, 0], [r.output for r in result.values()]
    assert result[victim].incarnation == 1
    expected = sorted((rank, int(rank == victim)) for rank in range(3))
    assert all(result[rank].value == expected for rank in range(3))


def _all_talk(needed: int) -> Any:
    """Everybody gets from everybody who is a member, and from *needed* ranks at least; return from whom."""
    import numpy as np

    import hoplite_mpi as hm

    store, rank, size = _open(None), int(os.environ["HOPLITE_RANK"]), int(os.environ["HOPLITE_SIZE"])
    store.put(np.full(LARGE, rank), hm.ObjectID.from_name(f"of {rank}"))
    got: set[int] = set()

    def all_got() -> bool:
        for r in set(store.ranks) - got:
            try:
                assert (store.get(hm.ObjectID.from_name(f"of {r}"), timeout=0.2) == r).all()
                got.add(r)
            except hm.GetTimeoutError:  # it may have died meanwhile
                return False
        return len(got) >= needed

    _until(all_got, "somebody's object did not come", 45)
    # not a barrier: who joins while others are in it takes part in the next one only
    store.put(b"", hm.ObjectID.from_name(f"over {rank}"))
    _until(
        lambda: len(store.located([hm.ObjectID.from_name(f"over {r}") for r in range(size)])) == size, "not all came"
    )
    store.barrier()
    return sorted(got)


@pytest.mark.parametrize("victim", [1, 2])
def test_who_connects_dies(victim: int) -> None:
    """Of ranks of one age the lower one accepts: it is freed from its accept, and goes on."""
    result = run_ranks(3, _all_talk, (3,), env=ENV, kill=[(victim, "join.before_connect")], respawn=True, timeout=60)
    assert [result[rank].exitcode for rank in range(3)] == [0, 0, 0], [r.output for r in result.values()]
    assert [result[rank].incarnation for rank in range(3)] == [int(rank == victim) for rank in range(3)]


def test_who_accepts_dies() -> None:
    """Its peer is stuck in a connect that MPI does not end, or crashes in it: it is replaced, and the rest go on."""
    result = run_ranks(4, _all_talk, (4,), env=ENV, kill=[(0, "join.before_accept")], respawn=True, timeout=60)
    assert [result[rank].exitcode for rank in range(4)] == [0, 0, 0, 0], [r.output for r in result.values()]
    assert result[0].incarnation >= 1
    assert all(result[rank].value == [0, 1, 2, 3] for rank in range(4))


def _ghost() -> Any:
    """A process asks rank 1 to be let in and is gone. Rank 0, which lets it in, never had a connection to it."""
    import hoplite_mpi as hm
    from hoplite_mpi.config import Config
    from hoplite_mpi.protocol import membership_messages as mm
    from hoplite_mpi.protocol.view import Member
    from hoplite_mpi.transport.engine import Engine
    from hoplite_mpi.transport.sidechannel import SideChannel

    store = _open(None)
    views: list[list[int]] = []
    store.on_view(lambda view, lost: views.append(view.ranks))
    store.barrier()
    if store.rank == 1:
        runtime, engine, me = store.runtime, Engine(Config()), (2, 0)

        def ask(peer: Any) -> None:
            side.send(peer, 20, mm.Join(Member(*me, "elsewhere", side.address)).to_wire())
            engine.after(0, side.close)

        secret = runtime.place.secret
        side = SideChannel(engine, me, secret, on_up=ask, on_down=lambda *_: None, on_message=lambda *_: None)
        engine.start()
        engine.run(lambda: side.connect((1, 0), runtime.side.address))
    _until(lambda: [0, 1, 2] in views, "it was not let in")
    _until(lambda: views[-1] == [0, 1], "it is still a member")
    store.put(b"", hm.ObjectID.from_name(f"over {store.rank}"))
    store.barrier()
    return views


def test_who_dies_after_it_has_asked_to_be_let_in_is_put_out() -> None:
    result = run_ranks(2, _ghost, env=ENV, timeout=60)
    assert [result[rank].value for rank in range(2)] == [[[0, 1, 2], [0, 1]]] * 2, [r.output for r in result.values()]


def _joins_what_is_under_way() -> Any:
    """Ranks 0 and 1 have begun a reduce of three sources, and wait for it; the third comes from the replacement of rank 2."""
    import numpy as np

    import hoplite_mpi as hm

    store, rank = _open(None), int(os.environ["HOPLITE_RANK"])
    sources = [hm.ObjectID.from_name(f"source {r}") for r in range(4)]
    rid, begun = hm.ObjectID.from_name("sum"), hm.ObjectID.from_name("begun")
    data = np.full(LARGE, 10.0**rank)
    if os.environ["HOPLITE_INCARNATION"] == "0":
        store.barrier()
        if rank == 2:
            os.kill(os.getpid(), signal.SIGKILL)
        _until(lambda: 2 not in store.ranks or store.runtime.view.members[2].incarnation, "rank 2 was to be killed")
        store.put(data, sources[rank])
        if rank == 0:
            store.reduce(sources, num_objects=3, object_id=rid)
        future = store.get_async(rid)
        if rank == 0:
            # it is in its tree: the slots of the first two have begun
            _until(lambda: store.runtime.slots._slots or store.runtime.slots._starting, "no slot has begun")
            assert not future.done()
            store.put(b"", begun)
    else:
        store.get(begun)
        future = store.get_async(rid)
        assert not store.wait([rid], timeout=0.1)[0]
        store.put(data, sources[2])
    got, used = future.result(), store.reduced_from(rid)
    store.barrier()
    return bool((got == 111.0).all()), used == set(sources[:3])


def test_a_newcomer_takes_part_in_a_reduce_that_has_begun() -> None:
    result = run_ranks(3, _joins_what_is_under_way, env=ENV, respawn=True, timeout=60)
    assert [result[rank].exitcode for rank in range(3)] == [0, 0, 0], [r.output for r in result.values()]
    assert [result[rank].incarnation for rank in range(3)] == [0, 0, 1]
    assert all(result[rank].value == (True, True) for rank in range(3))


def _stops_before_it_is_joined() -> Any:
    """Rank 1 stops when rank 0 tells it to connect. Rank 2, which is to be joined to rank 0 after that, is joined meanwhile."""
    import json

    import hoplite_mpi as hm
    from hoplite_mpi.transport import joining

    rank = int(os.environ["HOPLITE_RANK"])
    take, want = joining.Joiner.on_side_message, joining.Joiner.want

    def stop_at_go(self: Any, peer: Any, kind: int, body: Any) -> None:
        if rank == 1 and kind == joining.GO and peer == (0, 0):
            os.kill(os.getpid(), signal.SIGSTOP)
        take(self, peer, kind, body)

    def first_rank_1(self: Any, peer: Any) -> None:
        first = {0: (1, 0), 1: (0, 0)}.get(
            rank
        )  # and rank 1 does not tell rank 2 to connect, which would be stuck in MPI then
        if peer == (2, 0) and first is not None and first not in self._jobs and first not in self._joined:
            self._engine.after(0.005, lambda: self.want(peer))
        else:
            want(self, peer)

    joining.Joiner.on_side_message, joining.Joiner.want = stop_at_go, first_rank_1  # type: ignore[method-assign]
    store = _open(None)
    if rank == 2:
        contact = os.path.join(os.environ["HOPLITE_RENDEZVOUS"], "rank.1.0.json")
        with open(contact) as file:
            pid = json.load(file)["pid"]
        _until(lambda: store.runtime.fabric.link((0, 0)).comm is not None, "rank 0 waits for rank 1", 20)
        with open(f"/proc/{pid}/stat") as file:
            assert file.read().rpartition(")")[2].split()[0] == "T", "rank 1 went on before"
        os.kill(pid, signal.SIGCONT)
    store.put(b"", hm.ObjectID.from_name(f"of {rank}"))
    for other in range(3):
        store.get(hm.ObjectID.from_name(f"of {other}"))
    store.barrier()
    return store.ranks


def test_one_that_stops_before_it_is_joined_holds_up_nobody_else() -> None:
    result = run_ranks(3, _stops_before_it_is_joined, env=ENV, timeout=60)
    assert [result[rank].value for rank in range(3)] == [[0, 1, 2]] * 3, [r.output for r in result.values()]
