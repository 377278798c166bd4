"""What collectives do with their callers' buffers."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from hoplite_mpi.collectives.rounds import Process
from hoplite_mpi.values import as_bytes

__all__ = ["as_array", "check_out", "fill", "items_for", "stack"]


def as_array(value: Any) -> np.ndarray[Any, Any]:
    """Return *value* as an array, without a copy where it can be had; bytes-like is uint8."""
    if isinstance(value, np.ndarray):
        return value
    meta, data = as_bytes(value)
    return np.frombuffer(data, np.uint8) if meta.dtype is None else np.asarray(meta.view(data))


def check_out(what: str, out: Any, like: np.ndarray[Any, Any]) -> None:
    """ValueError unless *out* is None or a writable array of the shape and dtype of *like*."""
    if out is None:
        return
    if not isinstance(out, np.ndarray) or not out.flags.writeable:
        raise ValueError(f"{what}: out has to be a writable NumPy array, not {type(out).__name__}")
    if (out.shape, out.dtype) != (like.shape, like.dtype):
        raise ValueError(
            f"{what}: out is {out.dtype} of shape {out.shape}, but the result is {like.dtype} of shape {like.shape}"
        )


def fill(what: str, out: Any, value: Any) -> Any:
    """Return *value*, or *out* with its contents. ValueError if they don't fit."""
    if out is None:
        return value
    array = as_array(value)
    check_out(what, out, array)
    np.copyto(out, array)
    return out


def stack(what: str, out: Any, values: Sequence[Any]) -> Any:
    """Return *values* along a new first axis, or as a list if they differ in dtype or shape or are bytes.

    With *out* the first ``len(values)`` rows of it are filled, and returned.
    """
    uniform = len({(v.dtype, v.shape) if isinstance(v, np.ndarray) else None for v in values}) == 1
    uniform = uniform and isinstance(values[0], np.ndarray)
    if out is None:
        return np.stack(values) if uniform else list(values)
    if not uniform:
        raise ValueError(f"{what}: out can't be filled with arrays that differ in dtype or shape; leave it out")
    first = values[0]
    fits = isinstance(out, np.ndarray) and out.flags.writeable and out.dtype == first.dtype
    if not fits or out.shape[1:] != first.shape or len(out) < len(values):
        shape = (len(values), *first.shape)
        raise ValueError(
            f"{what}: out has to be a writable array of {first.dtype} and of shape {shape} or with more rows"
        )
    for row, value in enumerate(values):
        out[row] = value
    return out[: len(values)]


def items_for(what: str, value: Any, processes: Sequence[Process]) -> dict[Process, Any]:
    """Return process → its item of *value*, a sequence or an array with one item for each along its first axis.

    Either by rank, from 0 to the highest that takes part or beyond, since who was the highest may have died meanwhile; or one for each
    process that takes part, in their order. ValueError for another number.
    """
    count = len(value)
    if count > processes[-1][0]:
        return {process: value[process[0]] for process in processes}
    if count == len(processes):
        return dict(zip(processes, value, strict=True))
    ranks = [rank for rank, _ in processes]
    raise ValueError(f"{what}: {count} items were given for ranks {ranks}: give one for each of them")
