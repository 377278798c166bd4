"""Put and get on live ranks in which nobody dies."""

from __future__ import annotations

import array
import gc
import mmap
import pickle
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import ml_dtypes
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

#: fields with bytes between and after them, out of order and over each other, in dtypes of an extension, with titles, in one another
_LAYOUTS = {
    "aligned": np.dtype([("a", "u1"), ("b", "f8"), ("c", "i2")], align=True),
    "offsets": np.dtype({"names": ["a", "b"], "formats": ["u1", "f8"], "offsets": [3, 16], "itemsize": 40}),
    "out of order": np.dtype({"names": ["b", "a"], "formats": ["u1", "f8"], "offsets": [12, 2], "itemsize": 13}),
    "overlapping": np.dtype({"names": ["all", "low"], "formats": ["<u4", "<u2"], "offsets": [0, 0], "itemsize": 4}),
    "bfloat16 fields": np.dtype([("w", ml_dtypes.bfloat16, (2, 2)), ("n", "i4"), ("s", ml_dtypes.float8_e4m3fn)]),
    "titles": np.dtype([(("the title", "a"), "u1"), ("b", ">f8")]),
    "nested subarrays": np.dtype([("a", [("x", "u1"), ("y", [("z", "f4", (2, 3))], (2,))], (4,)), ("t", "M8[us]")]),
    "12 bytes": np.dtype([("a", "f8"), ("b", "u4")]),
}

_DTYPES = [
    *["?", "b", "B", "h", "H", "i", "I", "l", "L", "q", "Q", "e", "f", "d", "g", "F", "D", "G"],
    *[">i2", ">u8", ">f2", ">f8", ">c16", ">U3", ">M8[us]"],
    *["S5", "U4", "V7", "M8[ns]", "M8[25s]", "m8[D]", "m8"],
    *(ml_dtypes.bfloat16, ml_dtypes.float8_e4m3fn, ml_dtypes.float8_e5m2, ml_dtypes.float8_e8m0fnu, ml_dtypes.int4),
    *_LAYOUTS.values(),
]


def _filled(dtype: Any, shape: tuple[int, ...]) -> Any:
    """Random bytes, those between the fields too, as an array; but for characters and bools, of which not all bytes are one."""
    dtype = np.dtype(dtype)
    count = int(np.prod(shape))
    rng = np.random.default_rng(count)
    if dtype.kind in "bU":
        return rng.integers(0, 2, (*shape, 3)).astype(dtype)[..., 0]
    return np.frombuffer(rng.integers(0, 128, count * dtype.itemsize, "u1").tobytes(), dtype).reshape(shape)


def _read_only(array: Any) -> Any:
    array = array.copy()
    array.flags.writeable = False
    return array


ARRAYS = {
    "0-d": np.array(3.5),
    "0-d, structured": np.zeros((), _STRUCTURED),
    "scalar": np.float32(1.5),
    "empty 0 × 3": np.empty((0, 3), ">f4"),
    "empty structured": np.empty((2, 0), _STRUCTURED),
    "no bytes in an element": np.empty(4, "V0"),
    "read-only": _read_only(np.arange(7)),
    "many chunks, read-only": _read_only(_numbers(LARGE)),
    "many chunks, fortran": np.asfortranarray(_numbers(300_000).reshape(300, 1000)),
    "many chunks, backwards": _numbers(LARGE)[::-1],
    "many chunks, both ways backwards": _numbers(300_000).reshape(300, 1000)[::-2, ::-1],
    "many chunks, transposed": _numbers(300_000, "u1").reshape(10, 300, 100).transpose(2, 0, 1),
    "many chunks of one value": np.broadcast_to(np.float32(7), (500, 1000)),
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
}

BYTES = {
    "nothing": b"",
    "few": b"\0\1\xff",
    "bytearray": bytearray(b"abc"),
    "array.array": array.array("B", b"xyz"),
    "strided memoryview": memoryview(bytes(range(100)))[::7],
    "backwards memoryview": memoryview(bytes(range(100)))[::-1],
    "memoryview of structures": memoryview(np.zeros(3, _STRUCTURED)),
    "memoryview of big-endian numbers": memoryview(np.arange(3, dtype=">i4")),
    "0-d memoryview": memoryview(np.array(3)),
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


@pytest.mark.parametrize("how", ["inline", "large", "strided"])
@pytest.mark.parametrize("dtype", _DTYPES, ids=lambda dtype: getattr(dtype, "__name__", str(dtype))[:40])
def test_every_dtype_comes_back_bit_by_bit(store: ObjectStore, name: Name, dtype: Any, how: str) -> None:
    """Inline, in many chunks that no element divides, and as every third element of many, backwards."""
    itemsize = np.dtype(dtype).itemsize
    count = 7 if how == "inline" else 300_007 // itemsize
    whole = _filled(dtype, (count if how != "strided" else 3 * count,))
    array = whole[::-3] if how == "strided" else whole
    # element by element as bytes: neither NaNs nor what is between the fields may change
    expected = array.view(f"V{itemsize}").tobytes()
    for turn in range(2):  # the same array is the same bytes again
        if store.rank == count % store.size:
            store.put(array, name(""))
        got = store.get(name(""))
        assert (got.dtype, got.shape) == (np.dtype(dtype), array.shape), turn
        assert got.dtype.fields == np.dtype(dtype).fields
        assert got.view(f"V{itemsize}").tobytes() == expected, turn


class _Tensor:
    """Like an array of another library, which NumPy can't convert by itself."""

    def __init__(self, values: Any) -> None:
        self.values = values

    def __dlpack__(self, **options: Any) -> Any:
        return self.values.__dlpack__(**options)

    def __dlpack_device__(self) -> Any:
        return self.values.__dlpack_device__()


def _mapped(data: bytes) -> mmap.mmap:
    mapped = mmap.mmap(-1, len(data))
    mapped[:] = data
    return mapped


@pytest.mark.parametrize("count", [5, LARGE])
@pytest.mark.parametrize(
    ("make", "dtype"),
    [
        (lambda values: array.array("d", values.tolist()), "f8"),
        (lambda values: _mapped(values.astype("u1").tobytes()), "u1"),
        (lambda values: _Tensor(values), "f8"),
        (lambda values: _Tensor(values[::-1][::-1]), "f8"),
        (lambda values: values.tolist(), "f8"),
    ],
    ids=["array.array", "mmap", "DLPack only", "DLPack only, strided", "list"],
)
def test_what_is_no_ndarray_is_taken_as_one(store: ObjectStore, name: Name, make: Any, dtype: str, count: int) -> None:
    values = _numbers(count)
    if store.rank == 0:
        store.put(make(values), name(""))
    got = store.get(name(""))
    assert got.dtype == np.dtype(dtype)
    np.testing.assert_array_equal(got, values)


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


@pytest.mark.parametrize(
    "bad",
    [
        object(),
        None,
        10**30,
        [1, "a", None],
        np.array([{}], dtype=object),
        np.zeros(2, [("a", "i4"), ("b", "O")]),
        np.ma.masked_array([1, 2], [True, False]),
    ],
    ids=["object", "None", "a large int", "mixed", "dtype object", "object field", "masked"],
)
def test_what_would_lose_something_is_refused(store: ObjectStore, name: Name, bad: Any) -> None:
    for call in (lambda: store.put(bad), lambda: store.put(bad, name("")), lambda: store.allreduce(bad, key=str(bad))):
        with pytest.raises(TypeError, match=r"pickle|object|mask"):
            call()
    assert not store.located([name("")])


def test_ids_travel_and_are_equal_everywhere(store: ObjectStore, name: Name) -> None:
    """An id that `put` chose reaches the others pickled, and is the key of a dict there; names give the same ids on all ranks."""
    if store.rank == 0:
        chosen = {what: store.put(np.full(size, size)) for what, size in {"small": 3, "large": LARGE}.items()}
        store.put(pickle.dumps({oid: what for what, oid in chosen.items()}), name("ids"))
    table = pickle.loads(store.get(name("ids")))
    assert sorted(table.values()) == ["large", "small"]
    for oid, what in table.items():
        size = 3 if what == "small" else LARGE
        assert (store.get(oid) == np.full(size, size)).all()
        assert table[ObjectID(bytes(oid))] == table[ObjectID.from_hex(oid.hex())] == what
        assert oid.origin == (0, 0)
    ours = [ObjectID.from_name("a name"), ObjectID.from_name("a name", (3, 1)), name("x")]
    store.put(pickle.dumps(ours), name(("ours", store.rank)))
    for rank in range(store.size):
        theirs = pickle.loads(store.get(name(("ours", rank))))
        assert theirs == ours
        assert len({*theirs, *ours}) == 3
    assert sorted(ours) == sorted(ours, key=bytes)


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
