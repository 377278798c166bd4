"""The coordinator of a reduce is killed about the moment at which its result becomes final: nobody ever has two versions of it."""

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
CHUNKS = 32
ENV = {"HOPLITE_CHUNK_SIZE": str(CHUNK), "HOPLITE_WINDOW": "2", "HOPLITE_DEFAULT_TIMEOUT": "40"}


def _source(rank: int) -> Any:
    import numpy as np

    return np.full(CHUNK * CHUNKS // 8, 10.0**rank)


def _die_about_final(store: Any, rid: Any, when: str) -> None:
    """Kill this process, the owner of the result, before it makes it final, right after, or when all have been told."""
    directory = store.runtime.protocol.directory
    finalize = directory.finalized

    def finalized(oid: Any, *args: Any) -> None:
        if oid != rid:
            finalize(oid, *args)
        elif when == "before":
            os.kill(os.getpid(), signal.SIGKILL)
        else:
            finalize(oid, *args)
            if when == "as told":  # the messages are posted after this call
                store.runtime.engine.after(0.0, lambda: os.kill(os.getpid(), signal.SIGKILL))
            else:
                os.kill(os.getpid(), signal.SIGKILL)

    directory.finalized = finalized


def _program(when: str, owner: int, as_root: bool) -> Any:
    """Ranks 0 to 2 have sources of which two are wanted; all get the result from the beginning, twice; the owner dies."""
    import time

    import numpy as np

    import hoplite_mpi as hm

    rank = int(os.environ["HOPLITE_RANK"])
    os.environ["HOPLITE_NODE"] = f"node{rank}"
    store = hm.init()
    names = (hm.ObjectID.from_name(f"result/{i}") for i in range(1000))
    rid = next(oid for oid in names if store.runtime.view.owner(bytes(oid)) == owner)
    sources = [hm.ObjectID.from_name(f"source {r}") for r in range(3)]
    future = store.get_async(rid)
    store.barrier()
    if rank == owner:
        _die_about_final(store, rid, when)
    store.barrier()
    if as_root and rank == owner:
        store.reduce(sources, num_objects=2, object_id=rid)
        store.put(b"", hm.ObjectID.from_name("asked"))
    if rank == 1:  # a reduce for which only the dead have asked is forgotten
        if as_root:
            store.get(hm.ObjectID.from_name("asked"))
        store.reduce(sources, num_objects=2, object_id=rid)
        store.put(b"", hm.ObjectID.from_name("both asked"))
    store.get(hm.ObjectID.from_name("both asked"))
    if rank < 3:
        store.put(_source(rank), sources[rank])
    if rank == owner:
        time.sleep(60)
    got = future.result()
    first = got.copy()
    end = time.monotonic() + 30
    while owner in store.ranks:
        assert time.monotonic() < end, "the owner is still a member"
        time.sleep(0.005)
    used = store.reduced_from(rid)
    ranks = [r for r in range(3) if sources[r] in used]
    store.barrier()
    again = store.get(rid)
    same = np.array_equal(again, got) and np.array_equal(got, first)
    right = bool((got == sum(10.0**r for r in ranks)).all())
    store.barrier()
    return ranks, right, same, store.reduced_from(rid) == used


@pytest.mark.parametrize("when", ["before", "as told", "after"])
@pytest.mark.parametrize(("owner", "as_root"), [(3, False), (0, False), (2, True)])
def test_the_owner_dies_when_a_result_becomes_final(owner: int, as_root: bool, when: str) -> None:
    """Rank 0 is also the coordinator of the membership, and as the caller the owner is the root of the reduce, too."""
    result = run_ranks(4, _program, (when, owner, as_root), env=ENV, timeout=60)
    others = [rank for rank in range(4) if rank != owner]
    assert [result[rank].exitcode for rank in others] == [0] * 3, [result[rank].output for rank in others]
    assert result[owner].exitcode == KILLED
    values = [result[rank].value for rank in others]
    assert values[0] == values[1] == values[2], values
    ranks, *truths = values[0]
    assert len(ranks) == 2 and truths == [True, True, True], values
