"""Reduction operations, and what they do to two buffers."""

from __future__ import annotations

import functools
import pickle
from collections.abc import Callable, Sequence
from typing import Any

import cloudpickle
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
    "as_op",
    "finish",
    "op_by_name",
    "op_of",
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

    def __init__(self, name: str, ufunc: np.ufunc | None, kinds: str, *, by_count: bool = False) -> None:
        self.name = name
        self._ufunc = ufunc
        #: NumPy's dtype kinds that it is defined for
        self._kinds = frozenset(kinds)
        #: whether `finish` divides by the number of objects
        self._by_count = by_count

    def supports(self, dtype: np.dtype[Any]) -> bool:
        """Whether the operation is defined for elements of *dtype*."""
        return dtype.kind in self._kinds or (dtype.name in _EXTENSION_FLOATS and "f" in self._kinds)

    @property
    def token(self) -> str | bytes:
        """What stands for the operation in a message; inverse of `op_of`."""
        return self.name

    def accumulator(self, dtype: np.dtype[Any]) -> np.dtype[Any]:
        """Return the dtype in which elements of *dtype* are combined; the result is rounded to *dtype* once, at the end."""
        exact = self._ufunc in (np.minimum, np.maximum)
        return np.dtype(np.float32) if _is_half(dtype) and not exact else dtype

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
            assert self._ufunc is not None
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

    def __reduce__(self) -> tuple[Any, tuple[str | bytes]]:
        return op_by_name, (self.name,)


class _UserOp(ReduceOp):
    """An operation that a function of the user computes."""

    __slots__ = ("_function", "_pickle")

    def __init__(self, function: Callable[[Any, Any], Any], pickled: bytes | None = None) -> None:
        module, name = getattr(function, "__module__", ""), getattr(function, "__qualname__", type(function).__name__)
        super().__init__(f"{module}.{name}" if module else name, None, "")
        self._function = function
        self._pickle = cloudpickle.dumps(function) if pickled is None else pickled

    @property
    def token(self) -> bytes:
        return self.name.encode() + b"\0" + self._pickle

    def supports(self, dtype: np.dtype[Any]) -> bool:
        return True

    def apply(self, out: np.ndarray[Any, Any], a: np.ndarray[Any, Any], b: np.ndarray[Any, Any]) -> None:
        try:
            with np.errstate(all="ignore"):
                result = np.asarray(self._function(a.astype(out.dtype, copy=False), b.astype(out.dtype, copy=False)))
        except Exception as error:  # the user's: all who wait for the result are told
            raise ReduceError(f"{self.name} raised {type(error).__name__}: {error}") from error
        if result.shape != out.shape:
            raise ReduceError(
                f"{self.name} made shape {result.shape} of two arrays of shape {out.shape}: it has to work element by element"
            )
        try:
            np.copyto(out, result, casting="same_kind")
        except TypeError as error:
            raise ReduceError(f"{self.name} made {result.dtype} of {out.dtype}: {error}") from None

    def __reduce__(self) -> tuple[Any, tuple[str | bytes]]:
        return op_of, (self.token,)


SUM = ReduceOp("sum", np.add, "biufc")
PROD = ReduceOp("prod", np.multiply, "biufc")
MIN = ReduceOp("min", np.minimum, "biuf")
MAX = ReduceOp("max", np.maximum, "biuf")
BAND = ReduceOp("and", np.bitwise_and, "biu")
BOR = ReduceOp("or", np.bitwise_or, "biu")
BXOR = ReduceOp("xor", np.bitwise_xor, "biu")
#: the sum, divided at the end by the number of objects that went in; not of integers
MEAN = ReduceOp("mean", np.add, "fc", by_count=True)

_BY_NAME = {op.name: op for op in (SUM, PROD, MIN, MAX, BAND, BOR, BXOR, MEAN)}


def op_by_name(name: str) -> ReduceOp:
    """Return the operation of that name; ReduceError if there is none."""
    op = _BY_NAME.get(name)
    if op is None:
        raise ReduceError(f"no reduce operation is called {name!r}; there are {', '.join(_BY_NAME)}")
    return op


def as_op(op: ReduceOp | str | Callable[[Any, Any], Any]) -> ReduceOp:
    """Return what the user gave as an operation: one of this module, its name, or a function of two arrays.

    The function gets two arrays of equal dtype and shape, parts of the objects in one dimension, and returns an array like them; it
    has to be associative, to work element by element, and to be picklable by cloudpickle. ReduceError, TypeError.
    """
    if isinstance(op, ReduceOp):
        return op
    if isinstance(op, str):
        return op_by_name(op)
    if not callable(op):
        raise TypeError(
            f"{op!r} is no reduce operation: give hm.SUM or another one, its name, or a function of two arrays"
        )
    return _UserOp(op)


def op_of(token: str | bytes) -> ReduceOp:
    """Return the operation of a message; ReduceError if it can't be had here."""
    return op_by_name(token) if isinstance(token, str) else _user_op(token)


@functools.lru_cache(maxsize=64)
def _user_op(token: bytes) -> ReduceOp:
    name, _, pickled = token.partition(b"\0")
    try:
        return _UserOp(pickle.loads(pickled), pickled)
    except Exception as error:
        raise ReduceError(f"the operation {name.decode()} can't be unpickled on this rank: {error}") from error


def _is_half(dtype: np.dtype[Any]) -> bool:
    return (dtype.kind, dtype.itemsize) == ("f", 2) or dtype.name in _EXTENSION_FLOATS  # of either byte order


def reduce_into(
    op: ReduceOp | str | bytes, out: np.ndarray[Any, Any], a: np.ndarray[Any, Any], b: np.ndarray[Any, Any]
) -> None:
    """Set *out* to *a* op *b*, element by element; *out* may be *a* or *b*.

    All of one shape and dtype, but float16 and bfloat16 go into a float32 *out* too, so that many of them are
    accumulated and rounded once; into their own dtype each step computes in float32 and rounds. ReduceError
    otherwise.
    """
    op = op if isinstance(op, ReduceOp) else op_of(op)
    op.check(out.dtype)
    if not a.shape == b.shape == out.shape:
        raise ReduceError(f"{op.name}: shapes {a.shape} and {b.shape} into {out.shape} differ")
    for operand in (a, b):
        if operand.dtype != out.dtype and not (out.dtype == np.float32 and _is_half(operand.dtype)):
            raise ReduceError(f"{op.name}: dtypes {a.dtype} and {b.dtype} can't be reduced into {out.dtype}")
    if not out.flags.writeable:
        raise ReduceError(f"{op.name}: the target is read-only; allocate one (Memory.allocate_private)")
    op.apply(out, a, b)


def finish(
    op: ReduceOp | str | bytes, values: np.ndarray[Any, Any], count: int, out: np.ndarray[Any, Any] | None = None
) -> None:
    """Turn *values*, into which *count* objects went, into the result, in *out* (default: in place), rounded to its dtype.

    To be called once for each part of an object.
    """
    (op if isinstance(op, ReduceOp) else op_of(op)).finish(values, count)
    if out is not None and out is not values:
        with np.errstate(all="ignore"):
            np.copyto(out, values, casting="unsafe")


def reduce_bytes(op: ReduceOp | str | bytes, inputs: Sequence[bytes], meta: Meta) -> bytes:
    """Return the reduction of *inputs*, small objects of *meta*, in their order; halves are added up in float32. ReduceError."""
    dtype = np.dtype(np.uint8) if meta.dtype is None else meta.dtype
    op = op if isinstance(op, ReduceOp) else op_of(op)
    op.check(dtype)
    if not inputs or any(len(one) != meta.nbytes for one in inputs):
        raise ReduceError(
            f"{op.name}: inputs of {[len(one) for one in inputs]} bytes where {meta.nbytes} were expected"
        )
    out = np.frombuffer(inputs[0], dtype).astype(op.accumulator(dtype))
    for one in inputs[1:]:
        reduce_into(op, out, out, np.frombuffer(one, dtype))
    op.finish(out, len(inputs))
    return out.astype(dtype, copy=False).tobytes()
