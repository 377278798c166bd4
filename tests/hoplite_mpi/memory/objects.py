"""Objects that the tests of the arena put and get."""

from __future__ import annotations

from typing import Any

import numpy as np

from hoplite_mpi.ids import ObjectID
from hoplite_mpi.memory import Arena
from hoplite_mpi.meta import Meta

A, B = ObjectID.from_name("a"), ObjectID.from_name("b")
MIB = 1 << 20


__all__ = ["MIB", "A", "B", "get", "numbers", "put"]


def put(arena: Arena, oid: ObjectID, value: Any, version: int = 0) -> bool:
    array = np.asarray(value)
    region = arena.allocate(oid, Meta.of_array(array), version)
    region.array()[...] = array
    return region.seal()


def numbers(n: int = MIB, first: int = 0) -> np.ndarray[Any, Any]:
    return np.arange(first, first + n, dtype=np.int64)


def get(arena: Arena, oid: ObjectID, version: int = 0) -> np.ndarray[Any, Any]:
    pinned = arena.map(oid, version)
    assert pinned is not None
    return pinned.array()
