"""Collectives on live ranks of which none dies: the same results as MPI's."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import ml_dtypes
import numpy as np
import pytest

import hoplite_mpi as hm

if TYPE_CHECKING:
    from hoplite_mpi.store import ObjectStore

pytestmark = pytest.mark.mpi

Key = Callable[[object], hm.ObjectID]

#: inline, a tree, and stripes
SHAPES = [(), (0,), (7,), (300, 100), (400_003,)]


def _part(rank: int, shape: tuple[int, ...], dtype: Any = "f8") -> Any:
    """Whole numbers, so that the order of the additions does not count."""
    return np.random.default_rng(rank).integers(1, 4, shape).astype(dtype)


@pytest.fixture
def key(request: pytest.FixtureRequest) -> str:
    return str(request.node.nodeid)


@pytest.mark.parametrize("shape", SHAPES)
def test_broadcast(store: ObjectStore, key: str, shape: tuple[int, ...]) -> None:
    for root in range(store.size):
        mine = _part(root, shape) if store.rank == root else None
        got = store.broadcast(mine, root, key=key)
        assert (got.shape, got.dtype) == (shape, np.dtype("f8"))
        np.testing.assert_array_equal(got, _part(root, shape))
        assert store.took_part(key) == {root}


def test_broadcast_of_bytes_and_into_a_buffer(store: ObjectStore, key: str) -> None:
    assert bytes(store.broadcast(b"some bytes", key=key)) == b"some bytes"
    strided = np.arange(40_000).reshape(200, 200)[::2, ::3]
    out = np.zeros_like(strided)
    assert store.broadcast(strided if store.rank == 0 else None, out=out, key=key) is out
    np.testing.assert_array_equal(out, strided)


@pytest.mark.parametrize("deterministic", [False, True])
@pytest.mark.parametrize("shape", SHAPES)
def test_allreduce(store: ObjectStore, key: str, shape: tuple[int, ...], deterministic: bool) -> None:
    part, expected = _part(store.rank, shape), sum(_part(rank, shape) for rank in range(store.size))
    for _ in range(3):
        got = store.allreduce(part, key=key, deterministic=deterministic)
        assert (got.shape, got.dtype) == (shape, np.dtype("f8"))
        np.testing.assert_array_equal(got, expected)
        assert store.took_part(key) == set(range(store.size))
    out = np.zeros(shape)
    assert store.allreduce(part, out=out, key=key) is out
    np.testing.assert_array_equal(out, expected)


@pytest.mark.parametrize("dtype", ["i4", "u1", "f4", "c16", np.float16, ml_dtypes.bfloat16])
@pytest.mark.parametrize(("op", "function"), [(hm.SUM, np.add), (np.maximum, np.maximum), ("prod", np.multiply)])
def test_allreduce_of_dtypes(store: ObjectStore, key: str, dtype: Any, op: Any, function: Any) -> None:
    parts = [_part(rank, (600_000,), dtype) for rank in range(store.size)]
    got = store.allreduce(parts[store.rank], op, key=key)
    assert got.dtype == parts[0].dtype
    expected = parts[0]
    for part in parts[1:]:
        expected = function(expected, part)
    np.testing.assert_array_equal(got, expected)


@pytest.mark.parametrize("how", ["backwards", "fortran", "broadcast", "read-only"])
@pytest.mark.parametrize(("rows", "dtype"), [(3, "G"), (3, ">i8"), (1500, "G")])
def test_arrays_of_any_layout(store: ObjectStore, key: str, dtype: str, rows: int, how: str) -> None:
    """Inline, and in stripes that no element divides; and the buffers that are filled may have any layout, too."""

    def part(rank: int) -> Any:
        whole = _part(rank, (2 * rows, 101), dtype)
        if how == "backwards":
            return whole[::-2, ::-1]
        if how == "fortran":
            return np.asfortranarray(whole[:rows])
        if how == "broadcast":
            return np.broadcast_to(whole[0], (rows, 101))
        whole.flags.writeable = False
        return whole[:rows]

    mine = part(store.rank)
    total = sum(part(rank) for rank in range(store.size))
    out = np.zeros((2 * rows, 101), dtype)[::-2] if how == "backwards" else np.zeros((rows, 101), dtype, order="F")
    got = store.allreduce(mine, key=key, out=out)
    assert got is out
    np.testing.assert_array_equal(out, total)
    assert got.dtype == dtype
    np.testing.assert_array_equal(store.reduce_scatter(mine, key=key), np.array_split(total, store.size)[store.rank])
    np.testing.assert_array_equal(store.allgather(mine, key=key), [part(rank) for rank in range(store.size)])
    np.testing.assert_array_equal(store.broadcast(mine, store.size - 1, key=key), part(store.size - 1))
    np.testing.assert_array_equal(
        store.alltoall([mine] * store.size, key=key), [part(rank) for rank in range(store.size)]
    )


@pytest.mark.parametrize("count", [0, 3, 40_001])
def test_structures_and_bytes_go_through_collectives(store: ObjectStore, key: str, count: int) -> None:
    dtype = np.dtype([("value", "f8"), ("rank", "i4"), ("half", ml_dtypes.bfloat16)])

    def part(rank: int) -> Any:
        one = np.zeros(count, dtype)
        one["value"], one["rank"] = _part(rank, (count,)), rank
        return one

    def larger(a: Any, b: Any) -> Any:
        return np.where(a["value"] >= b["value"], a, b)

    got = store.allreduce(part(store.rank), larger, key=key)
    values = np.stack([_part(rank, (count,)) for rank in range(store.size)])
    assert got.dtype == dtype
    np.testing.assert_array_equal(got["value"], values.max(axis=0, initial=0))
    np.testing.assert_array_equal(store.allgather(part(store.rank), key=key), [part(r) for r in range(store.size)])
    np.testing.assert_array_equal(store.broadcast(part(store.rank) if store.rank == 0 else None, key=key), part(0))
    raw = bytes([store.rank]) * count
    assert [bytes(one) for one in store.alltoall([raw] * store.size, key=key)] == [
        bytes([rank]) * count for rank in range(store.size)
    ]


@pytest.mark.parametrize("shape", SHAPES)
def test_reduce_to(store: ObjectStore, key: str, shape: tuple[int, ...]) -> None:
    for root in range(store.size):
        got = store.reduce_to(_part(store.rank, shape), root, key=key)
        if store.rank == root:
            np.testing.assert_array_equal(got, sum(_part(rank, shape) for rank in range(store.size)))
        else:
            assert got is None
        assert store.took_part(key) == set(range(store.size))


@pytest.mark.parametrize("shape", SHAPES)
def test_gather_and_allgather(store: ObjectStore, key: str, shape: tuple[int, ...]) -> None:
    expected = np.stack([_part(rank, shape) for rank in range(store.size)])
    np.testing.assert_array_equal(store.allgather(_part(store.rank, shape), key=key), expected)
    out = np.zeros_like(expected)
    got = store.allgather(_part(store.rank, shape), key=key, out=out)
    assert np.shares_memory(got, out) or not out.size
    np.testing.assert_array_equal(out, expected)
    for root in range(store.size):
        rooted = store.gather(_part(store.rank, shape), root, key=key)
        assert (rooted is None) == (store.rank != root)
        if rooted is not None:
            np.testing.assert_array_equal(rooted, expected)
        assert store.took_part(key) == set(range(store.size))


def test_gather_of_what_differs(store: ObjectStore, key: str) -> None:
    got = store.allgather(np.arange(store.rank + 1), key=key)
    assert [len(one) for one in got] == [rank + 1 for rank in range(store.size)] or store.size == 1
    got = store.allgather(bytes([store.rank]), key=key)
    assert [bytes(one) for one in got] == [bytes([rank]) for rank in range(store.size)]


@pytest.mark.parametrize("shape", SHAPES)
def test_scatter(store: ObjectStore, key: str, shape: tuple[int, ...]) -> None:
    for root in range(store.size):
        items = [_part(rank, shape) for rank in range(store.size)]
        got = store.scatter((np.stack(items) if root % 2 else items) if store.rank == root else None, root, key=key)
        np.testing.assert_array_equal(got, _part(store.rank, shape))
        assert store.took_part(key) == {root}


@pytest.mark.parametrize("shape", SHAPES)
def test_alltoall(store: ObjectStore, key: str, shape: tuple[int, ...]) -> None:
    got = store.alltoall([_part(100 * store.rank + to, shape) for to in range(store.size)], key=key)
    np.testing.assert_array_equal(got, [_part(100 * source + store.rank, shape) for source in range(store.size)])
    assert store.took_part(key) == set(range(store.size))


@pytest.mark.parametrize("shape", [(0, 3), (7,), (300, 100), (400_003,), (3, 200_000)])
def test_reduce_scatter(store: ObjectStore, key: str, shape: tuple[int, ...]) -> None:
    total = sum(_part(rank, shape) for rank in range(store.size))
    got = store.reduce_scatter(_part(store.rank, shape), key=key)
    np.testing.assert_array_equal(got, np.array_split(total, store.size)[store.rank])
    assert store.took_part(key) == set(range(store.size))


def test_calls_with_different_keys_do_not_meet(store: ObjectStore, key: str) -> None:
    order = [f"{key}{which}" for which in ("a", "b")][:: 1 if store.rank % 2 else -1]
    import threading

    got = {}

    def call(one: str) -> None:
        got[one] = float(store.allreduce(np.float64(store.rank + (100 if one.endswith("a") else 0)), key=one))

    threads = [threading.Thread(target=call, args=(one,)) for one in order]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    ranks = sum(range(store.size))
    assert got == {f"{key}a": ranks + 100 * store.size, f"{key}b": ranks}


def test_nothing_is_left_of_a_thousand_calls(apart_store: ObjectStore, key: str) -> None:
    store = apart_store
    for _ in range(20):
        store.barrier(key=key)
    start = store.statistics()
    for number in range(1000):
        if number % 50 == 0:
            store.allgather(np.zeros(20_000), key=key)
        else:
            store.allreduce(np.float64(1), key=key)
    for _ in range(40):
        store.barrier(key=key)
    end = store.statistics()
    client, directory = store.runtime.protocol.client, store.runtime.protocol.directory
    left = (len(client._copies), len(client._tombstones), len(client._delivered), len(client._specs))
    known = (len(directory._entries), len(directory._specs), len(store.runtime.objects._dropped))
    assert store.rounds.kept <= 40
    # beside what other tests have left there are those of the last calls
    assert end.objects <= start.objects + 200, (start.objects, end.objects, left, known)
    assert end.memory_used <= start.memory_used + 8 * store.size * 160_000
    assert sum(left) + sum(known) <= 7 * (start.objects + 400), (left, known)


def test_large_results_go_soon_where_they_are_only_received(apart_store: ObjectStore, key: str) -> None:
    """Who has put nothing large itself tells the others as soon that it is done."""
    store, data = apart_store, np.zeros(500_000)
    start = store.statistics().memory_used
    for _ in range(12):
        store.broadcast(data if store.rank == 0 else None, key=key)
        store.barrier(key=f"{key} barrier")
    end = time.monotonic() + 20
    while (used := store.statistics().memory_used - start) > 2 * data.nbytes:  # the last report is on its way
        assert time.monotonic() < end, f"{used} bytes of {12 * data.nbytes} are still here"
        time.sleep(0.01)


def test_bad_input_is_refused_before_anything_is_counted(store: ObjectStore, key: str) -> None:
    with pytest.raises(ValueError, match="root is a rank"):
        store.broadcast(1, -1, key=key)
    with pytest.raises(ValueError, match="float32 of shape"):
        store.allreduce(np.zeros(3), out=np.zeros(3, "f4"), key=key)
    with pytest.raises(TypeError, match="key is a str"):
        store.barrier(key=3)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="without axes"):
        store.reduce_scatter(np.float64(1), key=key)
    with pytest.raises(KeyError, match="no collective call"):
        store.took_part(key)
    if store.rank == 0:
        with pytest.raises(ValueError, match="has to give an array"):
            store.broadcast(None, key=key)
    with pytest.raises(hm.PeerLostError, match="rank 1000"):
        store.broadcast(None, 1000, key=key)
    assert store.allreduce(np.float64(1), key=key) == store.size


def test_what_the_ranks_give_has_to_agree(store: ObjectStore, key: str) -> None:
    if store.size > 1:
        with pytest.raises(hm.ReduceError, match="sources differ"):
            store.allreduce(np.zeros(3 + store.rank), key=key)
    store.barrier(key=key)


def test_a_call_out_of_time_says_who_is_missing(store: ObjectStore, key: str) -> None:
    last = store.size - 1
    if store.size > 1 and store.rank != last:
        with pytest.raises(hm.GetTimeoutError, match=rf"allreduce, call 1 with key .* ranks \[{last}\] have not come"):
            store.allreduce(np.zeros(3), key=key, timeout=0.2)
    store.barrier(key=f"{key} barrier")
