"""Reduction operations, and what they do to two buffers."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from ..errors import ReduceError
from ..meta import Meta

__all__ = [
    "BAND",
    "BOR",
    "BXOR",
    "MAX",
    "MEAN",
    "MIN",
    "PROD",
    "SUM",
    "ReduceOp",
    "finish",
    "op_by_name",
    "reduce_bytes",
    "reduce_into",
]

#: dtypes of the ml_dtypes package that reduce like floats; known by name, so that the package is not needed
_EXTENSION_FLOATS = frozenset({"bfloat16"})


class ReduceOp:
    """An associative and commutative operation of two arrays, element by element. Equal by name; pickles by name.

    Semantics are NumPy's: integers wrap around, a NaN wins in min and max, the sum of bools is *or*, their product
    *and*.
    """

    __slots__ = ("_by_count", "_kinds", "_ufunc", "name")

    def __init__(self, name: str, ufunc: np.ufunc, kinds: str, *, by_count: bool = False) -> None:
        self.name = name
        self._ufunc = ufunc
        #: NumPy's dtype kinds that it is defined for
        self._kinds = frozenset(kinds)
        #: whether `finish` divides by the number of objects
        self._by_count = by_count

    def supports(self, dtype: np.dtype[Any]) -> bool:
        """Whether the operation is defined for elements of *dtype*."""
        if self._by_count and _is_half(dtype):  # the sum, which comes first, would lose what the mean could hold
            return False
        return dtype.kind in self._kinds or (dtype.name in _EXTENSION_FLOATS and "f" in self._kinds)

    def check(self, dtype: np.dtype[Any]) -> None:
        """Raise ReduceError unless the operation is defined for *dtype*."""
        if not self.supports(dtype):
            raise ReduceError(f"{self.name} is not defined for dtype {dtype}; it takes {', '.join(self.domain())}")

    def domain(self) -> list[str]:
        """Return the names of the kinds of elements that it takes."""
        names = {"b": "bool", "i": "int", "u": "unsigned int", "f": "float", "c": "complex"}
        return [name for kind, name in names.items() if kind in self._kinds]

    def apply(self, out: np.ndarray[Any, Any], a: np.ndarray[Any, Any], b: np.ndarray[Any, Any]) -> None:
        """Set *out* to *a* op *b*; shapes and dtypes have been checked."""
        # Overflow and NaN are values here, not incidents; one chunk of many must not warn.
        with np.errstate(all="ignore"):
            self._ufunc(a, b, out=out, dtype=out.dtype.type)

    def finish(self, out: np.ndarray[Any, Any], count: int) -> None:
        """Turn the combination of *count* objects into the result."""
        if self._by_count:
            with np.errstate(all="ignore"):
                np.divide(out, out.dtype.type(count), out=out)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, ReduceOp) and self.name == other.name

    def __hash__(self) -> int:
        return hash(self.name)

    def __repr__(self) -> str:
        return f"ReduceOp({self.name!r})"

    def __reduce__(self) -> tuple[Any, tuple[str]]:
        return op_by_name, (self.name,)


SUM = ReduceOp("sum", np.add, "biufc")
PROD = ReduceOp("prod", np.multiply, "biufc")
MIN = ReduceOp("min", np.minimum, "biuf")
MAX = ReduceOp("max", np.maximum, "biuf")
BAND = ReduceOp("and", np.bitwise_and, "biu")
BOR = ReduceOp("or", np.bitwise_or, "biu")
BXOR = ReduceOp("xor", np.bitwise_xor, "biu")
#: the sum, divided at the end by the number of objects that went in; not of halves, and not of integers
MEAN = ReduceOp("mean", np.add, "fc", by_count=True)

_BY_NAME = {op.name: op for op in (SUM, PROD, MIN, MAX, BAND, BOR, BXOR, MEAN)}


def op_by_name(name: str) -> ReduceOp:
    """Return the operation of that name; ReduceError if there is none."""
    op = _BY_NAME.get(name)
    if op is None:
        raise ReduceError(f"no reduce operation is called {name!r}; there are {', '.join(_BY_NAME)}")
    return op


def _is_half(dtype: np.dtype[Any]) -> bool:
    return dtype == np.float16 or dtype.name in _EXTENSION_FLOATS


def reduce_into(
    op: ReduceOp | str, out: np.ndarray[Any, Any], a: np.ndarray[Any, Any], b: np.ndarray[Any, Any]
) -> None:
    """Set *out* to *a* op *b*, element by element; *out* may be *a* or *b*.

    All of one shape and dtype, but float16 and bfloat16 go into a float32 *out* too, so that many of them are
    accumulated and rounded once; into their own dtype each step computes in float32 and rounds. ReduceError
    otherwise.
    """
    if isinstance(op, str):
        op = op_by_name(op)
    op.check(out.dtype)
    if not a.shape == b.shape == out.shape:
        raise ReduceError(f"{op.name}: shapes {a.shape} and {b.shape} into {out.shape} differ")
    for operand in (a, b):
        if operand.dtype != out.dtype and not (out.dtype == np.float32 and _is_half(operand.dtype)):
            raise ReduceError(f"{op.name}: dtypes {a.dtype} and {b.dtype} can't be reduced into {out.dtype}")
    if not out.flags.writeable:
        raise ReduceError(f"{op.name}: the target is read-only; allocate one (Memory.allocate_private)")
    op.apply(out, a, b)


def finish(op: ReduceOp | str, out: np.ndarray[Any, Any], count: int) -> None:
    """Turn *out*, into which *count* objects went, into the result; once for each part of it."""
    (op_by_name(op) if isinstance(op, str) else op).finish(out, count)


def reduce_bytes(op: ReduceOp | str, inputs: Sequence[bytes], meta: Meta) -> bytes:
    """Return the reduction of *inputs*, small objects of *meta*, in their order; halves are added up in float32. ReduceError."""
    dtype = np.dtype(np.uint8) if meta.dtype is None else meta.dtype
    op = op_by_name(op) if isinstance(op, str) else op
    op.check(dtype)
    if not inputs or any(len(one) != meta.nbytes for one in inputs):
        raise ReduceError(
            f"{op.name}: inputs of {[len(one) for one in inputs]} bytes where {meta.nbytes} were expected"
        )
    wide = np.dtype(np.float32) if _is_half(dtype) else dtype
    out = np.frombuffer(inputs[0], dtype).astype(wide)
    for one in inputs[1:]:
        reduce_into(op, out, out, np.frombuffer(one, dtype))
    op.finish(out, len(inputs))
    return out.astype(dtype, copy=False).tobytes()
