"""What an attempt of a task puts and was given by reference, in its worker process."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Iterable
from typing import Any

from hoplite_mpi.ids import ObjectID
from hoplite_mpi.testing import fault

from ..errors import ExoFlowError
from ..rank.naming import reference_id
from ..references import Key, Ref, collecting, resolving
from ..serialize import pack, unpack
from .protocol import InlineInput, Input, Put, TaskRequest

__all__ = ["LostObject", "Values"]


class Values:
    """The objects of one attempt (`references.Objects`). Any thread of the task may put and get.

    arena: returns the node's arena, to which this process is attached then.
    """

    def __init__(self, request: TaskRequest, arena: Callable[[], Any]) -> None:
        self._request = request
        self._arena = arena
        self._given = [Ref((one.task, one.attempt, one.index), self) for one in request.references]
        self._inputs = {ref.key: one.input for ref, one in zip(self._given, request.references, strict=True)}
        #: in the order of their indices, without a gap: so whoever has to remove them finds them all
        self._puts: dict[Key, Put] = {}
        self._lock = threading.Lock()
        self._pid = os.getpid()
        #: the attempt runs
        self.is_open = True

    # -- for the task

    def put(self, value: Any) -> Ref:
        """Seal *value* in the arena under the next index."""
        if os.getpid() != self._pid:
            raise ExoFlowError(
                "ef.put() works in the task's own process only: return the value from the child, and put it there"
            )
        request = self._request
        with collecting(self) as found:
            plan = pack(value)
        with self._lock:
            self._check()
            index = len(self._puts)
            key = (request.identity.task_id, request.identity.attempt, index)
            region = self._arena().allocate(self._id(index), plan.meta)
            try:
                plan.write_into(memoryview(region.data))
                fault.point("worker.before_put")
                region.seal()
            except BaseException:
                region.abandon()
                raise
            self._puts[key] = Put(index, plan.meta, found.keys)
        return Ref(key, self)

    def value(self, ref: Ref) -> Any:
        """Return an object."""
        self._check()
        one = self._puts.get(ref.key)
        if one is not None:
            refs = [Ref(key, self) for key in one.refers]
            pinned = self._arena().map(self._id(one.index))
            if pinned is None:
                raise ExoFlowError(f"{ref!r}: its bytes are gone from the node's memory; run the task again")
            with resolving(refs):
                return unpack(pinned.meta, pinned.buffer)
        return self.unpack(self._inputs[ref.key], f"{ref!r}")

    # -- for the executor

    def unpack(self, one: Input, what: str) -> Any:
        """Return the value of an input or a given object. LostObject if it is not in the arena."""
        refs = [self._given[position] for position in one.refers]
        if isinstance(one, InlineInput):
            with resolving(refs):
                return unpack(one.meta, one.data)
        pinned = self._arena().map(one.oid, one.version)
        if pinned is None:
            raise LostObject(f"object {one.oid.hex()} version {one.version}, {what}, is not in the arena")
        with resolving(refs):
            return unpack(pinned.meta, pinned.buffer)

    def keep(self, refers: Iterable[Key]) -> tuple[Put, ...]:
        """Return what was put and *refers* leads to; what was put besides is removed."""
        kept: set[Key] = set()
        pending = list(refers)
        while pending:
            key = pending.pop()
            one = self._puts.get(key)
            if one is not None and key not in kept:
                kept.add(key)
                pending.extend(one.refers)
        for key in [key for key in self._puts if key not in kept]:
            self._arena().delete(self._id(self._puts.pop(key).index))
        return tuple(self._puts.values())

    def close(self) -> None:
        """The attempt is over: nothing can be put or got any more."""
        with self._lock:
            self.is_open = False

    def _id(self, index: int) -> ObjectID:
        return reference_id(self._request.run, self._request.output, index)

    def _check(self) -> None:
        if not self.is_open:
            raise ExoFlowError(
                "this reference belongs to an attempt of a task that is over: hand it on in what the task returns, not in a global variable"
            )


class LostObject(ExoFlowError):
    """An object is not in the arena."""
