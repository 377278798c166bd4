"""Host memory: the arena, and NumPy's kernels."""

from __future__ import annotations

from typing import Any

import numpy as np

from ..ids import ObjectID
from ..meta import Meta
from .arena import Arena
from .interface import Event
from .kernels import ReduceOp, reduce_into
from .region import Pinned, Region

__all__ = ["HostMemory"]


class _Done:
    """The event of an operation that was complete when it returned."""

    def done(self) -> bool:
        return True

    def wait(self, timeout: float | None = None) -> bool:
        return True


_DONE = _Done()


class HostMemory:
    """`Memory` in the node's arena.

    Operations run in the calling thread, without the GIL, and are done when they return.
    """

    def __init__(self, arena: Arena) -> None:
        self.arena = arena

    def allocate(
        self, oid: ObjectID, meta: Meta, version: int = 0, digest: bytes | None = None, provisional: bool = False
    ) -> Region:
        return self.arena.allocate(oid, meta, version, digest, provisional)

    def allocate_private(self, nbytes: int) -> Region:
        return self.arena.allocate_private(nbytes)

    def map(self, oid: ObjectID, version: int = 0) -> Pinned | None:
        return self.arena.map(oid, version)

    def delete(self, oid: ObjectID, version: int = 0) -> bool:
        return self.arena.delete(oid, version)

    def copy(self, target: np.ndarray[Any, Any], source: np.ndarray[Any, Any]) -> Event:
        np.copyto(target, source, casting="no")
        return _DONE

    def reduce(
        self, op: ReduceOp | str | bytes, out: np.ndarray[Any, Any], a: np.ndarray[Any, Any], b: np.ndarray[Any, Any]
    ) -> Event:
        reduce_into(op, out, a, b)
        return _DONE
