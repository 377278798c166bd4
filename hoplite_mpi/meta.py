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
    if dtype.names is not None:
        # not `descr`: it has no word for fields that overlap or are out of order, and forgets what ml_dtypes' fields are
        fields = [[name, _dtype_to_wire(known[0]), *known[1:]] for name, known in _fields(dtype)]
        return {"fields": fields, "itemsize": dtype.itemsize, "align": dtype.isalignedstruct}
    if dtype.subdtype is not None:
        base, shape = dtype.subdtype
        return {"base": _dtype_to_wire(base), "shape": list(shape)}
    if dtype.isbuiltin == 2:  # registered by an extension, such as ml_dtypes' bfloat16: only its name says what it is
        return {"name": dtype.name}
    return dtype.str


def _fields(dtype: np.dtype[Any]) -> list[tuple[str, Any]]:
    """Return the fields, in order: name and (dtype, offset) or (dtype, offset, title)."""
    known: Any = dtype.fields  # by name and by title
    return [(name, known[name]) for name in dtype.names or ()]


def _dtype_from_wire(wire: Any) -> np.dtype[Any]:
    if isinstance(wire, str):
        return np.dtype(wire)
    if "fields" in wire:
        fields = wire["fields"]
        spec = {
            "names": [field[0] for field in fields],
            "formats": [_dtype_from_wire(field[1]) for field in fields],
            "offsets": [field[2] for field in fields],
            "titles": [field[3] if len(field) > 3 else None for field in fields],
            "itemsize": wire["itemsize"],
        }
        return np.dtype(spec, align=wire["align"])  # type: ignore[call-overload]
    if "base" in wire:
        return np.dtype((_dtype_from_wire(wire["base"]), tuple(wire["shape"])))
    import ml_dtypes  # noqa: F401  (registers the names)

    return np.dtype(wire["name"])
