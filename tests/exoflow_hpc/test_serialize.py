from __future__ import annotations

import threading
from typing import Any

import msgpack
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from exoflow_hpc import serialize
from hoplite_mpi.meta import Meta

SIMPLE = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text() | st.binary(max_size=300),
    lambda inner: (
        st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=5), inner, max_size=4) | st.tuples(inner, inner)
    ),
    max_leaves=12,
)
DTYPES = (
    hnp.scalar_dtypes()
    | hnp.array_dtypes(allow_subarrays=True)
    | hnp.byte_string_dtypes()
    | hnp.unicode_string_dtypes(min_len=1)
)
ARRAYS = hnp.arrays(DTYPES, hnp.array_shapes(min_dims=0, max_dims=4, min_side=0, max_side=5))


def through(value: Any) -> Any:
    """Pack into memory that isn't zero, send the meta over msgpack, unpack."""
    plan = serialize.pack(value)
    target = bytearray(b"\xaa" * plan.nbytes)
    plan.write_into(memoryview(target))
    other = bytearray(b"\x55" * plan.nbytes)
    plan.write_into(memoryview(other))
    assert target == other  # not one byte is left as it was
    meta = Meta.from_wire(msgpack.unpackb(msgpack.packb(plan.meta.to_wire())))
    assert meta == plan.meta
    assert meta.nbytes == plan.nbytes
    return serialize.unpack(meta, target)


@given(SIMPLE)
def test_values(value: Any) -> None:
    got = through(value)
    assert got == value
    assert type(got) is type(value)


@settings(deadline=None)
@given(ARRAYS)
def test_arrays(array: np.ndarray[Any, Any]) -> None:
    got = through(array)
    assert type(got) is np.ndarray
    assert got.dtype == array.dtype
    assert got.shape == array.shape
    assert got.tobytes() == array.tobytes()
    assert not got.flags.writeable


@pytest.mark.parametrize(
    "array",
    [
        np.arange(24).reshape(2, 3, 4)[:, ::2, ::-1],
        np.asfortranarray(np.arange(12.0).reshape(3, 4)),
        np.array(3.5),
        np.empty((0, 3)),
        np.zeros(5, ">i4"),
        np.zeros(3, np.dtype([("a", "i1"), ("b", "f8", (2,))], align=True)),
        np.array(["2020-01-01", "NaT"], "M8[D]"),
        np.broadcast_to(np.float32(7), (4, 4)),
    ],
)
def test_unusual_arrays_are_plain(array: np.ndarray[Any, Any]) -> None:
    assert serialize.pack(array).meta.kind == "ndarray"
    assert serialize.pack(array).nbytes == array.nbytes
    np.testing.assert_array_equal(through(array), array)


@pytest.mark.parametrize(
    "value",
    [
        np.array([1, "x", None], object),
        np.ma.array([1, 2, 3], mask=[0, 1, 0]),
        {"a": np.arange(1000), "b": [np.zeros((0,)), np.ones((3, 3), order="F")]},
        np.float64(2.5),
        b"",
        b"x" * 100_000,
        bytearray(b"abc"),
        (),
    ],
)
def test_containers(value: Any) -> None:
    assert serialize.pack(value).meta.kind == "bytes"
    got = through(value)
    assert type(got) is type(value)
    assert repr(got) == repr(value)


class Point:
    def __init__(self, x: int) -> None:
        self.x = x


def test_local_functions_and_classes() -> None:
    shift = 3
    assert through(lambda x: x + shift)(4) == 7
    assert through(Point(5)).x == 5


def test_unpack_copies_nothing() -> None:
    value = {"a": np.arange(1000.0), "b": np.ones(10, np.uint8)}
    plan = serialize.pack(value)
    buffer = np.zeros(plan.nbytes + 64, np.uint8)
    start = -buffer.ctypes.data % 64
    aligned = buffer[start : start + plan.nbytes]
    plan.write_into(memoryview(aligned))
    got = serialize.unpack(plan.meta, aligned)
    for array in got.values():
        assert np.shares_memory(array, aligned)
        assert not array.flags.writeable
        assert array.ctypes.data % 64 == 0
    flat = serialize.pack(value["a"])
    data = bytearray(flat.nbytes)
    flat.write_into(memoryview(data))
    assert np.shares_memory(serialize.unpack(flat.meta, data), np.frombuffer(data, np.uint8))


def test_pack_copies_nothing() -> None:
    array = np.zeros(1000)
    plan = serialize.pack([array])
    array[:] = 7
    target = bytearray(plan.nbytes)
    plan.write_into(memoryview(target))
    assert serialize.unpack(plan.meta, target)[0].sum() == 7000


def test_longer_buffer_is_fine_and_shorter_is_not() -> None:
    plan = serialize.pack([1, 2])
    data = plan.to_bytes()
    assert serialize.unpack(plan.meta, data + b"rest") == [1, 2]
    with pytest.raises(ValueError, match="only"):
        serialize.unpack(plan.meta, data[:-1])
    with pytest.raises(ValueError, match="the target has"):
        plan.write_into(memoryview(bytearray(plan.nbytes + 1)))


@given(st.binary(max_size=100))
def test_other_bytes_are_no_container(data: bytes) -> None:
    assert serialize.parts(data) is None
    with pytest.raises(ValueError, match="aren't a packed value"):
        serialize.unpack(Meta.of_bytes(len(data)), data)


class Holder:
    def __init__(self) -> None:
        self.fine = 1
        self.lock = threading.Lock()


@pytest.mark.parametrize(
    ("value", "path"),
    [
        (threading.Lock(), "value (_thread.lock)"),
        ([1, {"a": (0, threading.Lock())}], "value[1]['a'][1] (_thread.lock)"),
        (Holder(), "value.lock (_thread.lock)"),
        ((x for x in [1]), "value (builtins.generator)"),
    ],
)
def test_what_cant_be_pickled_is_named(value: Any, path: str) -> None:
    with pytest.raises(TypeError) as caught:
        serialize.pack(value)
    assert f"can't pickle {path}:" in str(caught.value)


def test_checksum_covers_meta_and_bytes() -> None:
    data = bytes(8)
    one = serialize.checksum(Meta("ndarray", 8, np.dtype("f8"), (1,)), data)
    assert one == serialize.checksum(Meta("ndarray", 8, np.dtype("f8"), (1,)), bytearray(data))
    assert len(one) == 32
    assert one != serialize.checksum(Meta("ndarray", 8, np.dtype("i8"), (1,)), data)
    assert one != serialize.checksum(Meta("ndarray", 8, np.dtype("f8"), (1,)), bytes(7) + b"\1")


def test_equal_values_give_equal_bytes() -> None:
    value = {"a": np.arange(5), "b": [1, "two"]}
    assert serialize.pack(value).to_bytes() == serialize.pack(value).to_bytes()
