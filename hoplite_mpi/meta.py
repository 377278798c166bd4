"""What an object is: raw bytes or an n-dimensional array."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

__all__ = ["Meta"]


@dataclass(frozen=True, slots=True)
class Meta:
    """Type of an object's bytes, in a form that travels.

    kind: ``"ndarray"`` (C order) or ``"bytes"``; nbytes: size of the data; dtype: a NumPy dtype (None for bytes); shape: of the array.
    """

    kind: str
    nbytes: int
    dtype: np.dtype[Any] | None = None
    shape: tuple[int, ...] = ()

    @classmethod
    def of_array(cls, array: np.ndarray[Any, Any]) -> Meta:
        """Return the meta of an array; TypeError if its dtype holds Python objects."""
        if array.dtype.hasobject:
            raise TypeError(
                f"an array of dtype {array.dtype} holds Python objects: pickle it and put the bytes instead"
            )
        return cls("ndarray", array.nbytes, array.dtype, array.shape)

    @classmethod
    def of_bytes(cls, nbytes: int) -> Meta:
        return cls("bytes", nbytes)

    def view(self, buffer: Any) -> Any:
        """Return *buffer* (nbytes bytes) as what it is: an array, or a memoryview; read-only, without a copy."""
        view = memoryview(buffer).toreadonly()
        if self.dtype is None:
            return view
        if self.nbytes == 0:
            array = np.empty(self.shape, self.dtype)
            array.flags.writeable = False
            return array
        return np.frombuffer(view, self.dtype).reshape(self.shape)

    def to_wire(self) -> list[Any]:
        """Return a msgpack-able form; inverse of `from_wire`."""
        if self.dtype is None:
            return [self.kind, self.nbytes, None, []]
        return [self.kind, self.nbytes, _dtype_to_wire(self.dtype), list(self.shape)]

    @classmethod
    def from_wire(cls, wire: list[Any]) -> Meta:
        kind, nbytes, dtype, shape = wire
        return cls(kind, nbytes, None if dtype is None else _dtype_from_wire(dtype), tuple(shape))


def _dtype_to_wire(dtype: np.dtype[Any]) -> Any:
    if dtype.isbuiltin == 2:  # registered by an extension, such as ml_dtypes' bfloat16: only its name says what it is
        return {"name": dtype.name}
    return np.lib.format.dtype_to_descr(dtype)


def _dtype_from_wire(wire: Any) -> np.dtype[Any]:
    if isinstance(wire, dict):
        import ml_dtypes  # noqa: F401  (registers the names)

        return np.dtype(wire["name"])
    return np.lib.format.descr_to_dtype(_as_descr(wire))


def _as_descr(wire: Any) -> Any:
    """msgpack turns tuples into lists; a structured descr needs its tuples back."""
    if isinstance(wire, str):
        return wire
    if wire and isinstance(wire[0], str) and not isinstance(wire[1], str):  # (base, shape) subarray
        return (_as_descr(wire[0]), tuple(wire[1]))
    return [_as_field(field) for field in wire]


def _as_field(field: Any) -> tuple[Any, ...]:
    name = tuple(field[0]) if isinstance(field[0], list) else field[0]
    rest = (tuple(field[2]),) if len(field) > 2 else ()
    return (name, _as_descr(field[1]), *rest)
