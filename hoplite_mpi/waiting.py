"""Who waits for what: the futures of a store's users, and how the protocol's answers end them."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from hoplite_mpi.errors import (
    HopliteError,
    ObjectDeletedError,
    ObjectExistsError,
    ObjectLostError,
    ReduceError,
)
from hoplite_mpi.futures import Future
from hoplite_mpi.ids import ObjectID
from hoplite_mpi.protocol import events as ev
from hoplite_mpi.runtime import Runtime

__all__ = ["Waiting"]

_ERRORS: dict[str, type[HopliteError]] = {
    "deleted": ObjectDeletedError,
    "exists": ObjectExistsError,
    "lost": ObjectLostError,
    "reduce": ReduceError,
}


class Waiting:
    """The futures of one store. Used under the engine's lock; the futures end when it has been given back."""

    def __init__(self, runtime: Runtime) -> None:
        self._runtime = runtime
        self.getters: dict[ObjectID, list[Future]] = {}
        self.watchers: dict[ObjectID, list[Future]] = {}
        self.putters: dict[ObjectID, list[Future]] = {}
        #: request number → future of `located`
        self.queries: dict[int, Future] = {}
        runtime.on_answer = self._answer
        runtime.on_no_memory = self._no_memory
        runtime.on_closed = self.fail_all

    def resolve(self, futures: Iterable[Future], value: Any) -> None:
        """Give *value* to all who have not given up."""
        for future in futures:
            self._runtime.engine.outside(lambda future=future: _resolve(future, value))  # type: ignore[misc]

    def give(self, oid: ObjectID, futures: list[Future]) -> None:
        """Give an object that is here to all who have not given up; it may have to be read from disk first."""

        def given(value: Any) -> None:
            if value is None:  # it was there, but its bytes are lost: others may have it
                self.getters.setdefault(oid, []).extend(futures)
                self._runtime.handle(ev.GetRequested(oid))
            elif isinstance(value, HopliteError):
                self._fail(futures, value)
            else:
                self.resolve(futures, value)

        self._runtime.objects.value(oid, self._runtime.objects.ready[oid], given)

    def fail_all(self, error: HopliteError) -> None:
        """End all waits: the store is closed."""
        for table in (self.getters, self.watchers, self.putters):
            while table:
                self._fail(table.popitem()[1], error)
        self._fail(self.queries.values(), error)

    @staticmethod
    def remove(table: dict[ObjectID, list[Future]], oid: ObjectID, future: Future) -> bool:
        """Take a future that was given up out of its table; return whether it was the last one there."""
        waiting = table.get(oid, [])
        if future not in waiting:
            return False
        waiting.remove(future)
        if not waiting:
            del table[oid]
        return not waiting

    def _answer(self, what: ev.Instruction) -> None:
        match what:
            case ev.Stored():
                self.resolve(self.putters.pop(what.oid, ()), None)
            case ev.Deliver():
                getters = self.getters.pop(what.oid, ())
                self._runtime.observer.counts.gets += len(getters)
                for future in getters:
                    self.give(what.oid, [future])
            case ev.Available():
                self.resolve(self.watchers.pop(what.oid, ()), what.sources)
            case ev.Retired():
                waiting = (
                    self.putters.pop(what.oid, []) + self.getters.pop(what.oid, []) + self.watchers.pop(what.oid, [])
                )
                if waiting:
                    self._fail(
                        waiting, ObjectDeletedError(f"{what.oid} was retired: nobody was to ask for it any more")
                    )
            case ev.Locations():
                if what.request_id in self.queries:
                    self.resolve([self.queries[what.request_id]], what.oids)
            case ev.Fail():
                error = _ERRORS[what.kind](what.text)
                waiting = self.putters.pop(what.oid, [])
                if what.kind != "exists" or not waiting:
                    waiting += self.getters.pop(what.oid, []) + self.watchers.pop(what.oid, [])
                self._fail(waiting, error)

    def _no_memory(self, oid: ObjectID, error: HopliteError) -> None:
        self._fail(self.getters.pop(oid, ()), error)
        self._runtime.handle(ev.GetAbandoned(oid))

    def _fail(self, futures: Iterable[Future], error: BaseException) -> None:
        for future in futures:
            self._runtime.engine.outside(lambda future=future: _reject(future, error))  # type: ignore[misc]


def _resolve(future: Future, value: Any) -> None:
    if future.set_running_or_notify_cancel():
        future.set_result(value)


def _reject(future: Future, error: BaseException) -> None:
    if future.set_running_or_notify_cancel():
        future.set_exception(error)
