"""One call of a collective on this rank: its names, its deadline, and what it is put together from."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Sequence
from types import TracebackType
from typing import TYPE_CHECKING, Any

import numpy as np

from hoplite_mpi.collectives.rounds import Process
from hoplite_mpi.errors import GetTimeoutError, HopliteError, ObjectExistsError, ObjectLostError, PeerLostError
from hoplite_mpi.futures import Future
from hoplite_mpi.ids import ObjectID
from hoplite_mpi.memory import ReduceOp
from hoplite_mpi.testing import fault
from hoplite_mpi.values import as_bytes

if TYPE_CHECKING:
    from hoplite_mpi.store import ObjectStore

__all__ = ["Call", "Op", "processes_of", "round_key"]

Op = ReduceOp | str | Callable[[Any, Any], Any]

#: seconds to find out who is missing, once a call is out of time
_LOOK = 2.0


def round_key(key: str | None) -> str:
    """Return what stands for a user's key, None included, in tables and names. TypeError."""
    if key is not None and not isinstance(key, str):
        raise TypeError(f"key is a str or None, not {type(key).__name__}")
    return "" if key is None else f"/{key}"


class Call:
    """A context: while it is open, the objects of the call stay. Used by one thread.

    The parts of a call carry the process that puts them in their ids, so that those of the dead are known to be lost; whatever more
    than one rank makes, such as the result of a reduce, has a name that all of them know.
    """

    def __init__(self, store: ObjectStore, what: str, key: str | None, timeout: Any) -> None:
        self._store = store
        self.config = store.runtime.config
        self._seconds = self.config.deadline(timeout)
        self._deadline = None if self._seconds is None else time.monotonic() + self._seconds
        self.round = store.rounds.begin(round_key(key), self._seconds)
        self._what = what
        self.title = f"{what}, call {self.round.number}" + ("" if key is None else f" with key {key!r}")
        #: parts that this rank has waited for: who has not put one is missing
        self._asked: set[ObjectID] = set()
        #: what this call has begun to wait for; whatever of it has not ended with the call is given up
        self._waits: list[Future] = []
        #: who took part, once that is known
        self.took: frozenset[int] | None = None
        #: what this call waits for after it has returned, and what it says then
        self._later: Future | None = None
        self._ranks_of: Callable[[Any], Iterable[int]] = tuple
        self._trace = store.runtime.trace
        self._called = {"call": what, "key": key, "number": self.round.number}
        if self._trace.on:
            self._trace.event("call.begin", **self._called)

    @property
    def processes(self) -> list[Process]:
        """Who takes part, as far as this rank knows, by rank."""
        return self.round.processes

    @property
    def me(self) -> Process:
        return self.round.me

    def left(self) -> float | None:
        """Return the seconds that are left; None: no limit."""
        return None if self._deadline is None else max(0.0, self._deadline - time.monotonic())

    def root(self, rank: int) -> Process | None:
        """Return the process that is root: the one that takes part, or the last one of that rank that did; None if none is known."""
        return next((p for p in self.processes if p[0] == rank), self.round.gone.get(rank))

    # -- objects -------------------------------------------------------------------------------------------------------------

    def part(self, label: str, process: Process) -> ObjectID:
        """Return the id of what a process puts in this call."""
        return ObjectID.from_name(self._name(label), process)

    def common(self, label: str) -> ObjectID:
        """Return the id of what several ranks make in this call."""
        oid = ObjectID.from_name(self._name(label))
        self.round.objects.append(oid)
        return oid

    def _name(self, label: str) -> str:
        return f"hoplite/{self.round.key}/{self.round.number}/{self._what}/{label}"

    def put(self, label: str, array: Any) -> ObjectID:
        """Put this rank's part."""
        oid = self.part(label, self.me)
        meta, source = as_bytes(array)
        self.round.urgent = self.round.urgent or meta.nbytes > self.config.inline_limit
        self.round.objects.append(oid)
        self._store.put_bytes(oid, meta, source)
        fault.point("collective.put")
        return oid

    def begin_get(self, label: str, process: Process) -> Future:
        """Begin to get a part."""
        oid = self.part(label, process)
        self.round.objects.append(oid)
        self._asked.add(oid)
        return self._begun(self._store.get_async(oid))

    def _begun(self, future: Future) -> Future:
        self._waits.append(future)
        return future

    def wait(self, future: Future) -> Any:
        """Return what a future gives within the time of the call."""
        fault.point("collective.wait")
        value = future.result(self.left())
        self.round.urgent = self.round.urgent or getattr(value, "nbytes", 0) > self.config.inline_limit
        return value

    def gather(self, label: str, processes: Sequence[Process], futures: dict[Process, Future]) -> dict[Process, Any]:
        """Return the parts of those processes whose part is not lost; *futures*: gets that have begun."""
        found: dict[Process, Any] = {}
        for process in processes:
            future = futures.get(process) or self.begin_get(label, process)
            try:
                found[process] = self.wait(future)
            except ObjectLostError:
                continue
        return found

    def reduce(
        self,
        label: str,
        parts: str,
        op: Op,
        deterministic: bool = False,
        shape: str | None = None,
        order: Sequence[Process] | None = None,
    ) -> ObjectID:
        """Begin to reduce the parts of all who take part; *order*: of the parts. All who take part ask for it."""
        sources = [self.part(parts, process) for process in order or self.processes]
        self._asked.update(sources)
        rid = self.common(label)
        self._store.reduce(sources, op, object_id=rid, deterministic=deterministic, shape=shape, skip_lost=True)
        return rid

    def begin_result(self, rid: ObjectID) -> Future:
        """Begin to get the result of a reduce."""
        return self._begun(self._store.get_async(rid))

    def result(self, rid: ObjectID) -> tuple[Any, list[Process]]:
        """Return the result of a reduce and whose parts are in it."""
        value = self.wait(self.begin_result(rid))
        return value, self.sources(rid)

    def sources(self, rid: ObjectID) -> list[Process]:
        """Return whose parts are in a reduce, once it is final."""
        return processes_of(self._store.reduced_from(rid, self.left()))

    def roll_call(self) -> Future:
        """Begin to find out who takes part; `present` says it. Ends when all have come, or have died."""
        self.put("here", b"")
        return self._begun(self._store.watch(self.reduce("roll", "here", "or")))

    def present(self, roll: Future) -> list[Process]:
        """Return who takes part: the same on all ranks."""
        return processes_of(self.wait(roll))

    def took_part(self, processes: Iterable[Process]) -> None:
        """Say who took part."""
        self.took = frozenset(rank for rank, _ in processes)

    def take_part_later(self, future: Future, ranks_of: Callable[[Any], Iterable[int]]) -> None:
        """Say it once *future* has ended, from its result, and keep the objects of the call until then."""
        self._later, self._ranks_of = future, ranks_of

    def all_have(self, present: Sequence[Process], found: Iterable[Process]) -> list[Process]:
        """Return those of *present* whose parts all of them have found."""
        here = set(found)
        self.put("found", np.array([process in here for process in present]))
        everywhere, _ = self.result(self.reduce("found by all", "found", "and", order=present))
        return [process for process, both in zip(present, everywhere, strict=True) if both]

    def decide(self, label: str, choice: bytes) -> bytes:
        """Propose what all are to do and return what they do: the first proposal counts."""
        oid = self.common(label)
        try:
            self._store.put(choice, oid)
        except ObjectExistsError:
            return bytes(self.wait(self._begun(self._store.get_async(oid))))
        return choice

    # -- the call as a whole ---------------------------------------------------------------------------------------------------

    def __enter__(self) -> Call:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None) -> None:
        fault.point("collective.finished")
        if self._trace.on:
            failed = {} if error is None else {"error": repr(error)}
            self._trace.event("call.end", **self._called, **failed)
        later = self._later if error is None else None
        self.round.failed = error is not None
        while self._waits:  # and none is kept: it would keep the memory of its object
            future = self._waits.pop()
            if future is not later:
                future.cancel()
        if later is None:
            self._store.rounds.finish(self.round)
        else:
            later.when_done(self._finish)
        if isinstance(error, GetTimeoutError):
            raise GetTimeoutError(f"{self.title}: not over after {self._seconds:g} s; {self._missing()}") from error

    def _finish(self, future: Any) -> None:
        failed = future.cancelled() or future.exception() is not None
        self.took = frozenset() if failed else frozenset(self._ranks_of(future.result()))
        self._store.rounds.finish(self.round)

    def who(self, timeout: Any) -> frozenset[int]:
        """Return the ranks that took part; waits until that is known. PeerLostError if who knew it is gone."""
        if self._later is not None:
            try:
                self.took = frozenset(self._ranks_of(self._later.result(timeout)))
            except ObjectLostError as error:
                raise PeerLostError(f"{self.title}: the root is gone, and nobody else knows who took part") from error
        return self.took or frozenset()

    def _missing(self) -> str:
        """Return who has not put what this rank waits for."""
        try:
            there = self._store.located(sorted(self._asked), _LOOK)
        except HopliteError as error:
            return f"and who is missing can't be found out: {error}"
        ranks = sorted({oid.origin[0] for oid in self._asked - there if oid.origin is not None})
        return f"ranks {ranks} have not come" if ranks else "all ranks have come"


def processes_of(parts: Iterable[ObjectID]) -> list[Process]:
    """Return the processes that put these, by rank."""
    return sorted(oid.origin for oid in parts if oid.origin is not None)
