"""Reduce on live ranks in which nobody dies."""

from __future__ import annotations

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

SMALL, LARGE = 1000, 300_001
OPS = {
    "sum": (hm.SUM, np.add, "i8 f4 f8 c16 u2 g G >f8 >i4 >c8"),
    "prod": (hm.PROD, np.multiply, "i8 f8"),
    "min": (hm.MIN, np.minimum, "i4 f8"),
    "max": (hm.MAX, np.maximum, "u1 f4"),
    "and": (hm.BAND, np.bitwise_and, "u8 ?"),
    "or": (hm.BOR, np.bitwise_or, "i2"),
    "xor": (hm.BXOR, np.bitwise_xor, "u4"),
}
CASES = [(op, dtype, size) for op, (_, _, dtypes) in OPS.items() for dtype in dtypes.split() for size in (SMALL, LARGE)]


def _source(number: int, size: int, dtype: Any = "f8") -> Any:
    """Small whole numbers, so that the order of the additions does not count."""
    return np.random.default_rng(number).integers(1, 4, size).astype(dtype)


def _put_sources(store: ObjectStore, name: Name, count: int, size: int, dtype: Any = "f8") -> list[ObjectID]:
    for number in range(count):
        if number % store.size == store.rank:
            store.put(_source(number, size, dtype), name(number))
    return [name(number) for number in range(count)]


def _reduce(store: ObjectStore, name: Name, oids: list[ObjectID], **options: Any) -> ObjectID:
    """The last rank asks for it, into an id that all know."""
    if store.rank == store.size - 1:
        assert store.reduce(oids, object_id=name("result"), **options) == name("result")
    return name("result")


@pytest.mark.parametrize(("op", "dtype", "size"), CASES)
def test_operations(store: ObjectStore, name: Name, op: str, dtype: str, size: int) -> None:
    sources = _put_sources(store, name, 5, size, dtype)
    rid = _reduce(store, name, sources, op=OPS[op][0])
    got = store.get(rid)
    expected = _source(0, size, dtype)
    for number in range(1, 5):
        expected = OPS[op][1](expected, _source(number, size, dtype))
    assert (got.dtype, got.shape) == (np.dtype(dtype), (size,))
    assert not got.flags.writeable
    np.testing.assert_array_equal(got, expected)
    assert store.reduced_from(rid) == set(sources)


@pytest.mark.parametrize("count", [1, 5])
@pytest.mark.parametrize("dtype", ["f4", "f8", "c16"])
@pytest.mark.parametrize("size", [SMALL, LARGE])
def test_the_mean_is_the_sum_divided_by_the_number_of_sources(
    store: ObjectStore, name: Name, size: int, dtype: str, count: int
) -> None:
    got = store.get(_reduce(store, name, _put_sources(store, name, count, size, dtype), op=hm.MEAN))
    total = sum(_source(number, size, dtype) for number in range(count))
    np.testing.assert_array_equal(got, (total / np.dtype(dtype).type(count)).astype(dtype))


@pytest.mark.parametrize("size", [SMALL, LARGE])
def test_one_source(store: ObjectStore, name: Name, size: int) -> None:
    rid = _reduce(store, name, _put_sources(store, name, 1, size))
    np.testing.assert_array_equal(store.get(rid), _source(0, size))
    assert store.reduced_from(rid) == {name(0)}


@pytest.mark.parametrize("size", [SMALL, LARGE])
@pytest.mark.parametrize("count", [2, 13])
def test_sources_of_any_number_and_all_on_one_rank(store: ObjectStore, name: Name, size: int, count: int) -> None:
    if store.rank == 0:
        for number in range(count):
            store.put(_source(number, size), name(number))
    rid = _reduce(store, name, [name(number) for number in range(count)])
    np.testing.assert_array_equal(store.get(rid), sum(_source(number, size) for number in range(count)))


@pytest.mark.parametrize("more", [-1, 0, 1])
@pytest.mark.parametrize("dtype", ["u1", "G"])
@pytest.mark.parametrize("at", ["inline limit", "chunk", "four chunks"])
def test_sizes_about_those_at_which_something_changes(
    store: ObjectStore, name: Name, at: str, dtype: str, more: int
) -> None:
    nbytes = {"inline limit": store.inline_limit, "chunk": store.runtime.transfers.chunk_size}.get(at)
    size = (nbytes or 4 * store.runtime.transfers.chunk_size) // np.dtype(dtype).itemsize + more
    if store.rank == 0:  # the size of a chunk is measured, by each rank for itself
        store.put(np.array([size]), name("size"))
    size = int(store.get(name("size"))[0])
    rid = _reduce(store, name, _put_sources(store, name, 3, size, dtype))
    np.testing.assert_array_equal(store.get(rid), sum(_source(number, size, dtype) for number in range(3)))


@pytest.mark.parametrize("how", ["backwards", "fortran", "broadcast", "read-only"])
@pytest.mark.parametrize("size", [SMALL, LARGE])
def test_sources_of_any_layout(store: ObjectStore, name: Name, size: int, how: str) -> None:
    def source(number: int) -> Any:
        whole = _source(number, 2 * size)
        if how == "backwards":
            return whole[::-2].reshape(-1, 1)
        if how == "fortran":
            return np.asfortranarray(whole.reshape(2, size))
        if how == "broadcast":
            return np.broadcast_to(whole[:7], (size, 7))
        whole.flags.writeable = False
        return whole

    for number in range(3):
        if number % store.size == store.rank:
            store.put(source(number), name(number))
    got = store.get(_reduce(store, name, [name(number) for number in range(3)]))
    np.testing.assert_array_equal(got, sum(source(number) for number in range(3)))


@pytest.mark.parametrize("shape", [(), (0,), (3, 0), (0, 3), (7, 5, 3)])
def test_shapes_stay(store: ObjectStore, name: Name, shape: tuple[int, ...]) -> None:
    for number in range(3):
        if number % store.size == store.rank:
            store.put(np.full(shape, number + 1), name(number))
    got = store.get(_reduce(store, name, [name(number) for number in range(3)]))
    assert got.shape == shape
    np.testing.assert_array_equal(got, np.full(shape, 6))


@pytest.mark.parametrize("size", [SMALL, LARGE])
def test_a_reduce_may_be_asked_for_before_its_sources_exist(store: ObjectStore, name: Name, size: int) -> None:
    rid = _reduce(store, name, [name(number) for number in range(5)])
    future = store.get_async(rid)
    store.barrier()
    assert not future.done()
    store.barrier()
    _put_sources(store, name, 5, size)
    np.testing.assert_array_equal(future.result(), sum(_source(number, size) for number in range(5)))


@pytest.mark.parametrize("size", [SMALL, LARGE])
def test_num_objects_takes_those_that_are_there(store: ObjectStore, name: Name, size: int) -> None:
    """Every second one comes late, when the result is final already."""
    for number in (0, 2, 4):
        if number % store.size == store.rank:
            store.put(_source(number, size), name(number))
    rid = _reduce(store, name, [name(number) for number in range(6)], num_objects=3)
    expected = sum(_source(number, size) for number in (0, 2, 4))
    np.testing.assert_array_equal(store.get(rid), expected)
    assert store.reduced_from(rid) == {name(0), name(2), name(4)}
    store.barrier()
    for number in (1, 3, 5):
        if number % store.size == store.rank:
            store.put(_source(number, size), name(number))
    store.barrier()
    np.testing.assert_array_equal(store.get(rid), expected)
    assert store.reduced_from(rid) == {name(0), name(2), name(4)}


@pytest.mark.parametrize("size", [SMALL, LARGE])
def test_whatever_num_objects_takes_all_see_the_same(store: ObjectStore, name: Name, size: int) -> None:
    rid = _reduce(store, name, [name(number) for number in range(6)], num_objects=4)
    _put_sources(store, name, 6, size)
    sources, got = store.reduced_from(rid), store.get(rid)
    assert len(sources) == 4
    np.testing.assert_array_equal(got, sum(_source(n, size) for n in range(6) if name(n) in sources))
    store.put(b"".join(sorted(bytes(oid) for oid in sources)), name(("seen", store.rank)))
    assert len({bytes(store.get(name(("seen", rank)))) for rank in range(store.size)}) == 1


@pytest.mark.parametrize("size", [SMALL, LARGE])
def test_a_result_is_a_source_of_the_next(store: ObjectStore, name: Name, size: int) -> None:
    sources = _put_sources(store, name, 4, size)
    if store.rank == 0:
        store.reduce(sources[:2], object_id=name("left"))
        store.reduce(sources[2:], object_id=name("right"))
        store.reduce([name("left"), name("right")], op=hm.MAX, object_id=name("result"))
    expected = np.maximum(_source(0, size) + _source(1, size), _source(2, size) + _source(3, size))
    np.testing.assert_array_equal(store.get(name("result")), expected)
    assert store.reduced_from(name("result")) == {name("left"), name("right")}


def test_all_may_ask_for_the_same_reduce(store: ObjectStore, name: Name) -> None:
    sources = _put_sources(store, name, 4, LARGE)
    rid = store.reduce(sources, object_id=name("result"))
    np.testing.assert_array_equal(store.get(rid), sum(_source(n, LARGE) for n in range(4)))


@pytest.mark.parametrize("bad", ["dtype", "shape"])
@pytest.mark.parametrize("size", [SMALL, LARGE])
def test_sources_that_differ_are_an_error_everywhere(store: ObjectStore, name: Name, size: int, bad: str) -> None:
    if store.rank == 0:
        store.put(np.ones(size), name(0))
    if store.rank == store.size - 1:
        store.put(np.ones(size, "f4" if bad == "dtype" else "f8")[: size - (bad == "shape")], name(1))
    rid = _reduce(store, name, [name(0), name(1)])
    with pytest.raises(hm.ReduceError):
        store.get(rid)
    with pytest.raises(hm.ReduceError):
        store.reduced_from(rid)


@pytest.mark.parametrize("size", [SMALL, LARGE])
def test_an_operation_that_the_dtype_has_not_is_an_error(store: ObjectStore, name: Name, size: int) -> None:
    rid = _reduce(store, name, _put_sources(store, name, 2, size, "f8"), op=hm.BAND)
    with pytest.raises(hm.ReduceError, match="and is not defined for dtype float64"):
        store.get(rid)


def test_what_can_not_be_asked_for(store: ObjectStore, name: Name) -> None:
    oid = store.put(np.ones(3))
    for arguments, message in [
        (([],), "at least one"),
        (([oid, oid],), "twice"),
        (([oid], hm.SUM, 2), "num_objects is 2, but 1"),
        (([oid], hm.SUM, 0), "num_objects is 0"),
    ]:
        with pytest.raises(ValueError, match=message):
            store.reduce(*arguments)  # type: ignore[arg-type]
    with pytest.raises(hm.ReduceError, match="no reduce operation is called 'average'"):
        store.reduce([oid], "average")
    with pytest.raises(hm.ReduceError, match="was put, not reduced"):
        store.reduced_from(oid)
    with pytest.raises(ValueError, match="among its sources"):
        store.reduce([oid], object_id=oid)


def test_a_deleted_result_is_deleted(store: ObjectStore, name: Name) -> None:
    rid = _reduce(store, name, _put_sources(store, name, 3, LARGE))
    store.get(rid)
    store.barrier()
    store.delete(rid)
    with pytest.raises(hm.ObjectDeletedError):
        store.get(rid)


def test_a_reduce_is_explained(store: ObjectStore) -> None:
    small, large = store.explain_reduce(8, 64), store.explain_reduce(8, 1 << 30)
    assert 0 < small.predicted_seconds < large.predicted_seconds
    for choice in (small, large):
        assert choice.predicted_seconds == pytest.approx(choice.alternatives[choice.shape])


@pytest.mark.parametrize(
    ("shape", "degree"), [("chain", None), ("star", None), ("tree_of_chains", None), ("d_ary", 2), ("d_ary", 3)]
)
def test_every_shape_gives_the_sum(store: ObjectStore, name: Name, shape: str, degree: int | None) -> None:
    sources = _put_sources(store, name, 9, LARGE)
    if store.rank == 0:
        store.reduce(sources, object_id=name("sum"), shape=shape, degree=degree)
    assert (store.get(name("sum")) == sum(_source(number, LARGE) for number in range(9))).all()


def test_what_is_no_shape_is_refused(store: ObjectStore, name: Name) -> None:
    with pytest.raises(ValueError, match="no reduce has the shape 'ring'"):
        store.reduce([name(0), name(1)], shape="ring")
    with pytest.raises(ValueError, match="only 'd_ary' takes a degree"):
        store.reduce([name(0), name(1)], shape="chain", degree=2)


def test_a_put_under_the_result_s_name_is_refused_and_harms_nothing(store: ObjectStore, name: Name) -> None:
    sources = _put_sources(store, name, 3, LARGE)
    rid = store.reduce(sources, object_id=name("sum"))
    for _ in range(3):
        used = store.runtime.arena.used()
        with pytest.raises(hm.ObjectExistsError):
            store.put(np.zeros(LARGE), rid)
        assert (store.get(rid) == sum(_source(number, LARGE) for number in range(3))).all()
        store.barrier()
    assert store.runtime.arena.used() <= used
