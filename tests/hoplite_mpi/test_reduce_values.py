"""What a reduce computes on live ranks: halves, functions of the user, and the same bits whatever the arrivals."""

from __future__ import annotations

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

SIZES = [100, 300_001]
COUNT = 6


def _put(store: ObjectStore, name: Name, sources: list[Any], order: list[int] | None = None) -> list[ObjectID]:
    """Put each source on some rank; *order*: one after the other."""
    oids = [name(number) for number in range(len(sources))]
    for number in range(len(sources)) if order is None else order:
        if number % store.size == store.rank:
            store.put(sources[number], oids[number])
        elif order is not None:
            store.wait([oids[number]])
    return oids


def _reduce(store: ObjectStore, name: Name, oids: list[ObjectID], **options: Any) -> Any:
    """All ask for it."""
    return store.get(store.reduce(oids, object_id=name("result"), **options))


@pytest.mark.parametrize("shape", ["chain", "star", "tree_of_chains"])
@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("dtype", [np.float16, ">f2", ml_dtypes.bfloat16])
def test_halves_are_added_in_float32_and_rounded_once(
    store: ObjectStore, name: Name, dtype: Any, size: int, shape: str
) -> None:
    big = 2.0 / float(ml_dtypes.finfo(dtype).eps)  # big + 1 is not a half, big + 6 is
    sources = [np.full(size, value, dtype) for value in [big, 1, 1, 1, 1, 2]]
    got = _reduce(store, name, _put(store, name, sources), shape=shape)
    assert got.dtype == dtype
    np.testing.assert_array_equal(got.astype(float), np.full(size, big + 6))


@pytest.mark.parametrize("count", [1, COUNT])
@pytest.mark.parametrize("size", SIZES)
def test_the_mean_of_halves_does_not_overflow(store: ObjectStore, name: Name, size: int, count: int) -> None:
    oids = _put(store, name, [np.full(size, 60000.0, np.float16)] * count)
    np.testing.assert_array_equal(_reduce(store, name, oids, op=hm.MEAN), np.full(size, 60000.0, np.float16))


@pytest.mark.parametrize("size", SIZES)
def test_functions(store: ObjectStore, name: Name, size: int) -> None:
    sources = [np.random.default_rng(number).integers(1, 100, size) for number in range(COUNT)]
    oids = _put(store, name, sources)
    np.testing.assert_array_equal(_reduce(store, name, oids, op=np.gcd), np.gcd.reduce(sources))


@pytest.mark.parametrize("size", SIZES)
def test_a_function_of_structures(store: ObjectStore, name: Name, size: int) -> None:
    """The largest value and where it was: MPI's MAXLOC."""
    dtype = np.dtype([("value", "f8"), ("source", "i4")])
    assert size * 12 % 4096, "12 bytes divide no chunk"
    sources = []
    for number in range(COUNT):
        one = np.zeros(size, dtype)
        one["value"], one["source"] = np.random.default_rng(number).random(size), number
        sources.append(one)

    def later(a: Any, b: Any) -> Any:
        return np.where(a["value"] >= b["value"], a, b)

    got = _reduce(store, name, _put(store, name, sources), op=later)
    np.testing.assert_array_equal(got["source"], np.argmax([one["value"] for one in sources], axis=0))


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("kind", ["bytes", "datetime64", "big elements"])
def test_functions_of_what_has_no_arithmetic(store: ObjectStore, name: Name, size: int, kind: str) -> None:
    """Bytes are uint8; an element of 100,000 bytes is larger than the chunks of a slow link."""
    rng = np.random.default_rng(size)
    sources = {
        "bytes": lambda: rng.integers(0, 256, size, "u1").tobytes(),
        "datetime64": lambda: rng.integers(0, 10**9, size).astype("M8[us]"),
        "big elements": lambda: rng.integers(0, 256, (min(size // 100, 5), 100_000), "u1").view("V100000").ravel(),
    }[kind]
    parts = [sources() for _ in range(3)]
    if kind == "bytes":
        got = _reduce(store, name, _put(store, name, parts), op=np.maximum)
        assert bytes(got) == np.maximum.reduce([np.frombuffer(one, "u1") for one in parts]).tobytes()
    elif kind == "datetime64":
        got = _reduce(store, name, _put(store, name, parts), op=np.maximum)
        np.testing.assert_array_equal(got, np.maximum.reduce(parts))
    else:
        got = _reduce(store, name, _put(store, name, parts), op=lambda a, b: b, deterministic=True)
        assert got.dtype == "V100000"
        assert got.tobytes() == parts[-1].tobytes()


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("dtype", [ml_dtypes.float8_e4m3fn, "S3", "M8[s]", [("a", "i4")]])
def test_what_has_no_sum_is_an_error_that_says_so(store: ObjectStore, name: Name, size: int, dtype: Any) -> None:
    oids = _put(store, name, [np.zeros(size, dtype)] * 2)
    with pytest.raises(hm.ReduceError, match="sum is not defined for dtype"):
        _reduce(store, name, oids)


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize(
    ("function", "message"),
    [
        (lambda a, b: 1 / 0, "raised ZeroDivisionError: division by zero"),
        (lambda a, b: (a + b)[:1], "element by element"),
        (lambda a, b: (a + b) * 1j, "complex128"),
    ],
)
def test_what_a_function_does_wrong_is_told_to_all(
    store: ObjectStore, name: Name, size: int, function: Any, message: str
) -> None:
    oids = _put(store, name, [np.ones(size)] * 3)
    with pytest.raises(hm.ReduceError, match=message):
        _reduce(store, name, oids, op=function)


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("dtype", [np.float32, np.float16])
def test_deterministic_gives_the_same_bits_whatever_the_arrivals(
    store: ObjectStore, name: Name, size: int, dtype: Any
) -> None:
    rng = np.random.default_rng(1)
    sources = [(rng.standard_normal(size) * 10.0 ** rng.integers(-3, 4)).astype(dtype) for _ in range(COUNT)]
    results = []
    for turn, order in enumerate([list(range(COUNT)), list(range(COUNT))[::-1], [3, 0, 5, 1, 4, 2]]):
        inner = lambda what, turn=turn: name((turn, what))  # noqa: E731
        rid = store.reduce([inner(n) for n in range(COUNT)], object_id=inner("result"), deterministic=True)
        _put(store, inner, sources, order)
        results.append(store.get(rid))
    assert results[0].tobytes() == results[1].tobytes() == results[2].tobytes()


@pytest.mark.parametrize("shape", [None, "chain", "star", "tree_of_chains"])
@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("which", [0, COUNT - 1])
def test_a_deterministic_operation_need_not_commute(
    store: ObjectStore, name: Name, size: int, shape: str | None, which: int
) -> None:
    def first(a: Any, b: Any) -> Any:
        return a

    def last(a: Any, b: Any) -> Any:
        return b

    sources = [np.full(size, number) for number in range(COUNT)]
    oids = _put(store, name, sources, [4, 2, 0, 1, 5, 3])
    got = _reduce(store, name, oids, op=last if which else first, deterministic=True, shape=shape)
    np.testing.assert_array_equal(got, sources[which])


def test_deterministic_takes_all(store: ObjectStore, name: Name) -> None:
    oids = _put(store, name, [np.ones(3)] * 2)
    with pytest.raises(hm.ReduceError, match="num_objects"):
        store.reduce(oids, num_objects=1, deterministic=True)
    with pytest.raises(TypeError, match="no reduce operation"):
        store.reduce(oids, op=3)  # type: ignore[arg-type]
