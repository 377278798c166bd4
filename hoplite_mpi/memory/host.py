"""Host memory: the arena, and NumPy's kernels."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np

from ..errors import StoreFullError
from ..ids import ObjectID
from ..meta import Meta
from .arena import Arena
from .interface import Event, Made
from .kernels import ReduceOp, reduce_into
from .region import ObjectInfo, Pinned, Region
from .spill import Spill

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

    def __init__(self, arena: Arena, spill: Spill | None = None) -> None:
        self.arena = arena
        #: where to and from what does not fit in goes; None: nowhere
        self.spill = spill

    def allocate(
        self, oid: ObjectID, meta: Meta, version: int = 0, digest: bytes | None = None, provisional: bool = False
    ) -> Region:
        return self.arena.allocate(oid, meta, version, digest, provisional)

    def allocate_private(self, nbytes: int) -> Region:
        return self.arena.allocate_private(nbytes)

    def with_room(self, nbytes: int, work: Callable[[], Made]) -> Made:
        while True:
            try:
                return work()
            except StoreFullError:
                if self.spill is None or not self.spill.make_room(nbytes):
                    raise

    def map(self, oid: ObjectID, version: int = 0) -> Pinned | None:
        return self.arena.map(oid, version)

    def spilled(self, oid: ObjectID, version: int = 0) -> bool:
        return self.spill is not None and self.spill.has((oid, version))

    def fetch(self, oid: ObjectID, version: int = 0) -> Pinned | None:
        pinned = self.arena.map(oid, version)
        if pinned is None and self.spill is not None:
            pinned = self.spill.restore(oid, version)
        return pinned

    def objects(self) -> Iterator[ObjectInfo]:
        found = set()
        for one in itertools.chain(self.arena.objects(), () if self.spill is None else self.spill.objects()):
            if (one.oid, one.version) not in found:
                found.add((one.oid, one.version))
                yield one

    def delete(self, oid: ObjectID, version: int = 0) -> bool:
        in_memory = self.arena.delete(
            oid, version
        )  # first: what is being spilled meanwhile is on disk after that, or nowhere
        return (self.spill is not None and self.spill.remove((oid, version))) or in_memory

    def copy(self, target: np.ndarray[Any, Any], source: np.ndarray[Any, Any]) -> Event:
        np.copyto(target, source, casting="no")
        return _DONE

    def reduce(
        self, op: ReduceOp | str | bytes, out: np.ndarray[Any, Any], a: np.ndarray[Any, Any], b: np.ndarray[Any, Any]
    ) -> Event:
        reduce_into(op, out, a, b)
        return _DONE
