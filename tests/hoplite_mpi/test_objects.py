"""Put and get on live ranks in which nobody dies."""

from __future__ import annotations

import array
import gc
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest

import hoplite_mpi as hm
from hoplite_mpi import ObjectID

if TYPE_CHECKING:
    from hoplite_mpi.store import ObjectStore

pytestmark = pytest.mark.mpi

Name = Callable[[object], ObjectID]

#: more than one chunk, and not a whole number of them
LARGE = 300_001


def _numbers(count: int, dtype: Any = "f8") -> Any:
    return np.random.default_rng(count).integers(0, 100, count).astype(dtype)


_STRUCTURED = np.dtype([("id", "<i4"), ("at", "<f8", (2, 3)), ("tag", "S5"), ("in", [("x", "u1"), ("y", ">i2")])])

ARRAYS = {
    "0-d": np.array(3.5),
    "empty": np.empty(0, "i4"),
    "empty-3-d": np.empty((4, 0, 2), "f4"),
    "one": np.array([7], "u1"),
    "2-d": np.arange(12).reshape(3, 4),
    "fortran": np.asfortranarray(np.arange(60.0).reshape(3, 4, 5)),
    "strided": np.arange(100)[::-3],
    "broadcast": np.broadcast_to(np.arange(5), (7, 5)),
    "bool": np.array([True, False]),
    "f16": np.array([1.5, np.nan, -0.0], "f2"),
    "long double": np.array([1, 2, 3], np.longdouble),
    "complex": np.array([1 + 2j], "c8"),
    "big-endian": np.arange(5, dtype=">i8"),
    "text": np.array(["a", "längeres"]),
    "raw": np.array([b"ab\0cd"], "V5"),
    "time": np.array(["2026-01-01", "NaT"], "M8[us]"),
    "structured": np.zeros(3, _STRUCTURED),
    "at the inline limit": np.arange(8192.0),
    "above the inline limit": np.arange(8193.0),
    "many chunks": _numbers(LARGE),
    "many chunks, strided": _numbers(2 * LARGE, "i4")[::2],
    "many chunks, structured": np.zeros(20_000, _STRUCTURED),
    **{code: np.arange(9).astype(code) for code in "bBhHiIlLfd"},
}

BYTES = {
    "nothing": b"",
    "few": b"\0\1\xff",
    "bytearray": bytearray(b"abc"),
    "array.array": array.array("B", b"xyz"),
    "strided memoryview": memoryview(bytes(range(100)))[::7],
    "multi-dimensional memoryview": memoryview(np.arange(12, dtype="i4").reshape(3, 4)),
    "fortran memoryview": memoryview(np.asfortranarray(np.arange(12, dtype="i4").reshape(3, 4))),
    "empty multi-dimensional memoryview": memoryview(np.empty((2, 0), "i4")),
    "many chunks": _numbers(LARGE, "u1").tobytes(),
}


@pytest.mark.parametrize("kind", ARRAYS)
def test_an_array_comes_back_as_it_was_on_every_rank(store: ObjectStore, name: Name, kind: str) -> None:
    array = ARRAYS[kind]
    root = len(kind) % store.size
    if store.rank == root:
        assert store.put(array, name("")) == name("")
    got = store.get(name(""))
    assert type(got) is np.ndarray
    assert (got.dtype, got.shape) == (array.dtype, array.shape)
    np.testing.assert_array_equal(got, array)
    assert not got.flags.writeable
    if array.nbytes:
        with pytest.raises(ValueError, match="WRITEABLE"):
            got.flags.writeable = True


@pytest.mark.parametrize("kind", BYTES)
def test_bytes_come_back_as_a_read_only_view(store: ObjectStore, name: Name, kind: str) -> None:
    data = BYTES[kind]
    if store.rank == len(kind) % store.size:
        store.put(data if kind != "array.array" else memoryview(data), name(""))
    got = store.get(name(""))
    assert isinstance(got, memoryview)
    assert got.readonly
    assert bytes(got) == memoryview(data).tobytes()


def test_any_buffer_is_taken_as_an_array(store: ObjectStore) -> None:
    got = store.get(store.put(array.array("d", [1, 2])))
    assert (got.dtype, got.tolist()) == (np.dtype("d"), [1, 2])


def test_what_only_speaks_dlpack_is_taken(store: ObjectStore) -> None:
    class Tensor:
        """Like an array of another library, which NumPy can't convert by itself."""

        values = np.arange(6.0).reshape(2, 3)

        def __dlpack__(self, **options: Any) -> Any:
            return self.values.__dlpack__(**options)

        def __dlpack_device__(self) -> Any:
            return self.values.__dlpack_device__()

    assert np.array_equal(store.get(store.put(Tensor())), Tensor.values)


def test_every_rank_gets_what_every_rank_put(store: ObjectStore, name: Name) -> None:
    for size in (10, LARGE):
        store.put(_numbers(size) + store.rank, name((size, store.rank)))
    for rank in range(store.size):
        for size in (10, LARGE):
            assert np.array_equal(store.get(name((size, rank))), _numbers(size) + rank)


@pytest.mark.parametrize("size", [10, LARGE])
def test_a_change_of_the_original_changes_nothing(store: ObjectStore, size: int) -> None:
    original = np.ones(size)
    oid = store.put(original)
    original[:] = 2
    assert (store.get(oid) == 1).all()


@pytest.mark.parametrize("size", [10, LARGE])
def test_a_view_outlives_the_object(store: ObjectStore, size: int) -> None:
    oid = store.put(_numbers(size))
    got = store.get(oid)
    part = got[5:8]
    del got
    store.delete(oid)
    for _ in range(3):  # would take the memory of the first, were it free
        store.delete(store.put(np.full(size, -1.0)))
    gc.collect()
    assert np.array_equal(part, _numbers(size)[5:8])


@pytest.mark.parametrize("size", [10, LARGE])
def test_get_before_put_waits(store: ObjectStore, name: Name, size: int) -> None:
    futures = [store.get_async(name(i)) for i in range(3)]
    store.barrier()
    assert not any(future.done() for future in futures)
    store.barrier()
    if store.rank == 0:
        for i in (2, 0, 1):
            store.put(np.full(size, i), name(i))
    assert [future.result()[-1] for future in futures] == [0, 1, 2]


@pytest.mark.parametrize("size", [10, LARGE])
def test_the_same_bytes_under_a_known_id_are_fine(store: ObjectStore, name: Name, size: int) -> None:
    store.put(_numbers(size), name(""))
    store.put(_numbers(size), name(""))
    assert np.array_equal(store.get(name("")), _numbers(size))


@pytest.mark.parametrize("size", [10, LARGE])
def test_other_bytes_under_a_known_id_are_refused(store: ObjectStore, name: Name, size: int) -> None:
    if store.rank == 0:
        store.put(_numbers(size), name(""))
    store.barrier()
    with pytest.raises(hm.ObjectExistsError, match="use a new id"):
        store.put(_numbers(size) + 1, name(""))
    assert np.array_equal(store.get(name("")), _numbers(size))


@pytest.mark.parametrize("size", [10, LARGE])
def test_one_of_those_who_put_different_bytes_at_once_wins(store: ObjectStore, name: Name, size: int) -> None:
    won = True
    try:
        store.put(np.full(size, store.rank), name(""))
    except hm.ObjectExistsError:
        won = False
    store.put(np.array([won]), name(("won", store.rank)))
    winners = [rank for rank in range(store.size) if store.get(name(("won", rank)))[0]]
    assert len(winners) == 1
    assert (store.get(name("")) == winners[0]).all()


def test_the_same_bytes_as_another_type_are_other_bytes(store: ObjectStore) -> None:
    for size in (16, 8 * LARGE):
        oid = store.put(np.zeros(size // 8))
        with pytest.raises(hm.ObjectExistsError):
            store.put(np.zeros(size // 4, "f4"), oid)
        with pytest.raises(hm.ObjectExistsError):
            store.put(bytes(size), oid)


@pytest.mark.parametrize("bad", [object(), [1, "a", None], np.array([{}], dtype=object)])
def test_python_objects_are_refused(store: ObjectStore, bad: Any) -> None:
    with pytest.raises(TypeError, match=r"pickle|object"):
        store.put(bad)


@pytest.mark.parametrize("bad", ["name", b"0" * 16, 7, None])
def test_an_id_has_to_be_one(store: ObjectStore, bad: Any) -> None:
    calls: list[Callable[[], Any]] = [
        lambda: store.get(bad),
        lambda: store.get_async(bad),
        lambda: store.delete(bad),
        lambda: store.wait([bad]),
        lambda: store.reduce([bad]),
        lambda: store.reduced_from(bad),
    ]
    for call in calls if bad is None else [*calls, lambda: store.put(b"", bad)]:
        with pytest.raises(TypeError, match="an object id is needed"):
            call()


def test_on_one_node_nothing_is_copied(shared_store: ObjectStore, name: Name) -> None:
    """All ranks see the same file of the node's memory, and MPI carries none of it."""
    store = shared_store
    before = store.statistics().bytes_received
    if store.rank == 0:
        store.put(_numbers(LARGE), name(""))
    store.get(name(""))
    ready = store.local(name(""))
    assert ready is not None
    path, offset = store.arena_file(name(""), ready.version)
    store.put(f"{path} {offset}".encode(), name(store.rank))
    assert len({bytes(store.get(name(rank))) for rank in range(store.size)}) == 1
    assert store.statistics().bytes_received == before


def test_across_nodes_the_bytes_travel_once_to_each(apart_store: ObjectStore, name: Name) -> None:
    store = apart_store
    if store.rank == 0:
        store.put(_numbers(LARGE), name(""))
    before = store.statistics()
    for _ in range(2):
        store.get(name(""))
    after = store.statistics()
    expected = 0 if store.rank == 0 else 8 * LARGE
    assert after.bytes_received - before.bytes_received == expected
    assert after.transfers - before.transfers == (store.rank != 0)


def test_a_small_object_comes_with_the_directorys_answer(apart_store: ObjectStore, name: Name) -> None:
    store = apart_store
    before = store.statistics().transfers
    if store.rank == 0:
        store.put(np.arange(100), name(""))
    assert store.get(name("")).sum() == 4950
    assert store.statistics().transfers == before
