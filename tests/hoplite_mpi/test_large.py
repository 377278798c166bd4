"""Objects of more than 2 GiB, and of more than 2^31 elements."""

from __future__ import annotations

import os
from typing import Any

import pytest

from hoplite_mpi.testing import run_ranks
from hoplite_mpi.transport import guard

pytestmark = [
    pytest.mark.slow,
    pytest.mark.timeout(300),
    pytest.mark.skipif(not guard.load().loaded, reason=f"the guard is not there: {guard.load().why}"),
]

ENV = {"HOPLITE_DEFAULT_TIMEOUT": "200", "HOPLITE_RECYCLE_LIMIT": "0"}
#: bytes of memory that the tests need, shared memory included
NEEDED = 10 << 30


def _free() -> int:
    """Return bytes that are free in memory, or in /dev/shm if that is less."""
    with open("/proc/meminfo") as file:
        available = next(int(line.split()[1]) << 10 for line in file if line.startswith("MemAvailable"))
    shm = os.statvfs("/dev/shm")
    return min(available, shm.f_bavail * shm.f_frsize)


def _open() -> Any:
    os.environ["HOPLITE_NODE"] = f"node{os.environ['HOPLITE_RANK']}"
    import hoplite_mpi as hm

    return hm.init()


def _repeated(pattern: Any, count: int) -> Any:
    """Like `numpy.resize`, which takes twice the memory."""
    import numpy as np

    array = np.empty(count, pattern.dtype)
    for start in range(0, count, len(pattern)):
        array[start : start + len(pattern)] = pattern[: count - start]
    return array


def _bytes_cross() -> Any:
    """Rank 0 puts 2^31 + 12,345 elements, rank 1 gets them over MPI, and looks at each."""
    import numpy as np

    import hoplite_mpi as hm

    store, oid, count = _open(), hm.ObjectID.from_name("large"), (1 << 31) + 12_345
    pattern = np.random.default_rng(0).integers(0, 256, 1_000_003, "u1")
    if store.rank == 0:
        store.put(_repeated(pattern, count), oid)
    got = store.get(oid)
    right = got.shape == (count,)
    for start in range(0, count, len(pattern)):
        part = got[start : start + len(pattern)]
        right = right and bool(np.array_equal(part, pattern[: len(part)]))
    del got, part
    received = store.statistics().bytes_received
    store.barrier()
    return right, received


def _floats_are_reduced() -> Any:
    """Both ranks put 2^29 + 3 numbers of 4 bytes; all of the result is looked at."""
    import numpy as np

    import hoplite_mpi as hm

    store, count = _open(), (1 << 29) + 3
    sources = [hm.ObjectID.from_name(f"part {r}") for r in range(2)]
    pattern = np.arange(1_000_003, dtype="f4")
    store.put(_repeated(pattern, count), sources[store.rank])
    store.barrier()
    rid = store.reduce(sources, object_id=hm.ObjectID.from_name("sum"))
    right = True
    if store.rank == 0:  # one of them is enough for the memory of a small machine
        got = store.get(rid)
        right = got.nbytes > 1 << 31
        for start in range(0, count, len(pattern)):
            part = got[start : start + len(pattern)]
            right = right and bool(np.array_equal(part, 2 * pattern[: len(part)]))
        del got, part
    store.barrier()
    return right, store.reduced_from(rid) == set(sources)


@pytest.mark.skipif(_free() < NEEDED, reason=f"takes {NEEDED >> 30} GiB of memory and of /dev/shm")
def test_more_than_two_to_the_31_elements_cross_ranks() -> None:
    result = run_ranks(2, _bytes_cross, env=ENV, timeout=200)
    assert [result[rank].exitcode for rank in range(2)] == [0, 0], [r.output for r in result.values()]
    assert result[0].value[0] and result[1].value == (True, (1 << 31) + 12_345)


@pytest.mark.skipif(_free() < NEEDED, reason=f"takes {NEEDED >> 30} GiB of memory and of /dev/shm")
def test_more_than_two_gib_are_reduced() -> None:
    result = run_ranks(2, _floats_are_reduced, env=ENV, timeout=200)
    assert [result[rank].exitcode for rank in range(2)] == [0, 0], [r.output for r in result.values()]
    assert [result[rank].value for rank in range(2)] == [(True, True)] * 2
