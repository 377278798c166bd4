"""What users put: anything whose bytes NumPy or the buffer protocol can show."""

from __future__ import annotations

from typing import Any

import numpy as np

from hoplite_mpi.meta import Meta

__all__ = ["as_bytes", "equal"]


def equal(one: memoryview, other: memoryview) -> bool:
    """Whether two buffers hold the same bytes."""
    return np.array_equal(np.frombuffer(one, np.uint8), np.frombuffer(other, np.uint8))


def as_bytes(value: Any) -> tuple[Meta, memoryview]:
    """Return what *value* is and its bytes in C order, without a copy where it is contiguous."""
    if isinstance(value, (bytes, bytearray, memoryview)):
        view = memoryview(value)
        # `cast` takes neither other orders than C's nor a zero among the lengths
        flat = view.cast("B") if view.c_contiguous and view.nbytes else memoryview(view.tobytes())
        return Meta.of_bytes(view.nbytes), flat
    if isinstance(value, np.ma.MaskedArray):
        raise TypeError("a masked array would lose its mask: put its data and its mask, or what filled() returns")
    array = np.asarray(value) if _numpy_knows(value) else np.from_dlpack(value)
    meta = Meta.of_array(array)
    if array.dtype.names is not None and array.nbytes:
        # as raw bytes: a copy field by field would leave out what is between the fields, so that equal arrays differed
        array = array.view(f"V{array.dtype.itemsize}")
    contiguous: Any = np.ascontiguousarray(array).reshape(-1)
    return meta, memoryview(contiguous.view(np.uint8)) if array.nbytes else memoryview(b"")


def _numpy_knows(value: Any) -> bool:
    """Whether NumPy can take *value* by itself; what speaks only DLPack, it would wrap as a Python object."""
    return hasattr(value, "__array__") or hasattr(value, "__array_interface__") or not hasattr(value, "__dlpack__")
