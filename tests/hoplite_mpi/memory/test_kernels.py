"""Reduction kernels."""

from __future__ import annotations

import pickle
import warnings
from functools import reduce
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from hoplite_mpi.errors import ReduceError
from hoplite_mpi.memory import MAX, MEAN, MIN, SUM, finish, op_by_name, reduce_bytes, reduce_into
from hoplite_mpi.meta import Meta

OPS = ["sum", "prod", "min", "max", "and", "or", "xor"]
UFUNCS = dict(
    zip(OPS, [np.add, np.multiply, np.minimum, np.maximum, np.bitwise_and, np.bitwise_or, np.bitwise_xor], strict=True)
)
KINDS = {"sum": "biufc", "prod": "biufc", "min": "biuf", "max": "biuf", "and": "biu", "or": "biu", "xor": "biu"}
DTYPES = ["?", "i1", "u2", "i4", "u8", "f2", "f4", ">f8", "g", "c8", "c16", "S3", "M8[s]", "m8[s]", [("x", "i4")]]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", OPS)
def test_every_op_on_every_dtype_is_numpys_or_an_error(name: str, dtype: Any) -> None:
    dtype = np.dtype(dtype)
    a, b = (
        np.frombuffer(bytes([1, 0, k, 1] * 48), dtype) if dtype.kind != "b" else np.array([k, True]) for k in (0, 1)
    )
    a, b = (x.astype(dtype) if dtype.kind == "b" else x for x in (a, b))
    out = np.empty_like(a)
    if dtype.kind in KINDS[name]:
        reduce_into(name, out, a, b)
        with np.errstate(all="ignore"):
            np.testing.assert_array_equal(out, UFUNCS[name](a, b))
    else:
        with pytest.raises(ReduceError, match=name) as caught:
            reduce_into(name, out, a, b)
        assert str(dtype) in str(caught.value)


@settings(max_examples=50, deadline=None)
@given(st.data(), st.sampled_from(OPS))
def test_target_may_be_an_operand(data: st.DataObject, name: str) -> None:
    arrays = hnp.arrays(np.int16, 7)
    a, b = data.draw(arrays), data.draw(arrays)
    expected = UFUNCS[name](a, b)
    first, second = a.copy(), b.copy()
    reduce_into(op_by_name(name), first, first, b)
    reduce_into(op_by_name(name), second, a, second)
    assert np.array_equal(first, expected)
    assert np.array_equal(second, expected)


def test_integers_wrap_and_floats_overflow_without_a_warning() -> None:
    out = np.array([127], np.int8)
    big = np.array([np.finfo("f4").max], "f4")
    nan = np.array([np.nan], "f4")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        reduce_into(SUM, out, out, np.array([1], np.int8))
        reduce_into("prod", big, big, big)
        reduce_into(MIN, nan, nan, np.array([1], "f4"))
    assert out[0] == -128
    assert np.isinf(big[0])
    assert np.isnan(nan[0])


def test_halves_accumulate_in_float32() -> None:
    ones = np.ones(4, np.float16)
    total = np.zeros(4, np.float32)
    for _ in range(3000):
        reduce_into(SUM, total, total, ones)
    assert total[0] == 3000, "in float16 it would stop at 2048"


def test_bfloat16() -> None:
    dtype = ml_dtypes.bfloat16
    a, b = np.array([1.5, 3.0], dtype), np.array([2.0, -1.0], dtype)
    out, wide = np.empty_like(a), np.empty(2, np.float32)
    reduce_into(SUM, out, a, b)
    reduce_into(MAX, wide, a, b)
    assert out.astype(float).tolist() == [3.5, 2.0]
    assert wide.tolist() == [2.0, 3.0]


@pytest.mark.parametrize(
    ("out", "a", "b", "match"),
    [
        (np.zeros(2), np.zeros(2), np.zeros(3), "shapes"),
        (np.zeros(2), np.zeros(2), np.zeros(2, "f4"), "float32"),
        (np.zeros(2, "i4"), np.zeros(2, "f4"), np.zeros(2, "f4"), "int32"),
        (np.zeros(2, "f8"), np.zeros(2, "f2"), np.zeros(2, "f2"), "float16"),
        (np.frombuffer(bytes(16)), np.zeros(2), np.zeros(2), "read-only"),
    ],
)
def test_operands_that_do_not_fit(out: Any, a: Any, b: Any, match: str) -> None:
    with pytest.raises(ReduceError, match=match):
        reduce_into(SUM, out, a, b)


def test_unknown_op() -> None:
    with pytest.raises(ReduceError, match="'median'"):
        op_by_name("median")


@pytest.mark.parametrize("name", [*OPS, "mean"])
def test_ops_pickle_and_compare_by_name(name: str) -> None:
    op = op_by_name(name)
    assert pickle.loads(pickle.dumps(op)) is op
    assert op != SUM or name == "sum"
    assert len({op, op_by_name(name)}) == 1


@pytest.mark.parametrize("dtype", ["f4", "f8", "g", "c16"])
def test_mean(dtype: str) -> None:
    parts = [np.arange(5).astype(dtype) * k for k in range(1, 8)]
    out = parts[0].copy()
    for part in parts[1:]:
        reduce_into(MEAN, out, out, part)
    finish(MEAN, out, len(parts))
    np.testing.assert_allclose(out, np.mean(parts, axis=0))
    assert out.dtype == np.dtype(dtype)


@pytest.mark.parametrize("dtype", ["i8", "?"])
def test_mean_is_refused_where_it_would_be_inexact(dtype: str) -> None:
    with pytest.raises(ReduceError, match="mean"):
        reduce_into("mean", np.zeros(2, dtype), np.zeros(2, dtype), np.zeros(2, dtype))


def test_finish_changes_only_means() -> None:
    out = np.array([6.0])
    finish("sum", out, 3)
    assert out[0] == 6


@settings(max_examples=30, deadline=None)
@given(st.lists(hnp.arrays(np.int32, (2, 3)), min_size=1, max_size=6), st.sampled_from(OPS))
def test_reduce_bytes(parts: list[Any], name: str) -> None:
    result = reduce_bytes(name, [part.tobytes() for part in parts], Meta.of_array(parts[0]))
    assert result == reduce(UFUNCS[name], parts).tobytes()


def test_reduce_bytes_of_bytes_and_of_nothing() -> None:
    assert reduce_bytes("xor", [b"\x01\x02", b"\x03\x03"], Meta.of_bytes(2)) == b"\x02\x01"
    assert reduce_bytes("sum", [b"", b""], Meta.of_array(np.zeros(0))) == b""
    with pytest.raises(ReduceError, match="bytes"):
        reduce_bytes("sum", [b"1"], Meta.of_bytes(2))
    with pytest.raises(ReduceError, match="bytes"):
        reduce_bytes("sum", [], Meta.of_bytes(2))
