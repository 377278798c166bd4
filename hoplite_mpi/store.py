"""The object store: the calls of its users."""

from __future__ import annotations

import dataclasses
import hashlib
import itertools
import threading
from collections.abc import Callable, Iterable, Sequence
from typing import Any

from hoplite_mpi import ending
from hoplite_mpi.collectives import Collectives, Rounds
from hoplite_mpi.config import DEFAULT, Config
from hoplite_mpi.errors import (
    ClosedError,
    ReduceError,
)
from hoplite_mpi.futures import Future
from hoplite_mpi.ids import ObjectID
from hoplite_mpi.memory import SUM, ReduceOp, SpillStatistics, as_op
from hoplite_mpi.meta import Meta
from hoplite_mpi.objects import Ready
from hoplite_mpi.protocol import cost
from hoplite_mpi.protocol import events as ev
from hoplite_mpi.protocol.links import ReduceExplanation, explain
from hoplite_mpi.protocol.view import Member, View
from hoplite_mpi.putting import Putter
from hoplite_mpi.runtime import Runtime
from hoplite_mpi.statistics import Statistics
from hoplite_mpi.trace import TraceEvent
from hoplite_mpi.transport.modes import FaultMode
from hoplite_mpi.values import as_bytes
from hoplite_mpi.waiting import Waiting

__all__ = ["ObjectStore", "Statistics"]


class ObjectStore(Collectives):
    """Immutable objects that every rank can put and get, and collectives over them. Thread-safe. Made by `hoplite_mpi.init`."""

    def __init__(self, runtime: Runtime, mode: FaultMode) -> None:
        self._runtime = runtime
        self._engine = runtime.engine
        self._config: Config = runtime.config
        #: what this store can survive, and why
        self.fault_mode = mode
        self._waiting = Waiting(runtime)
        self._putter = Putter(runtime, self._waiting, self._locked)
        self._serial = itertools.count(1)
        self._calls = {}
        #: the collective calls of this rank
        self.rounds = Rounds(self)

    # -- who is there --------------------------------------------------------------------------------------------------------

    @property
    def rank(self) -> int:
        """Own rank."""
        return self._runtime.place.rank

    @property
    def size(self) -> int:
        """Number of members known alive."""
        view = self._runtime.view
        return 0 if view is None else len(view)

    @property
    def ranks(self) -> list[int]:
        """Ranks of the members known alive, sorted."""
        view = self._runtime.view
        return [] if view is None else view.ranks

    @property
    def runtime(self) -> Runtime:
        """What the store stands on; for the packages of this distribution and its benchmarks."""
        return self._runtime

    @property
    def closed(self) -> bool:
        """Whether the store was closed, by this process or by the others."""
        return self._runtime.closed is not None

    # -- objects ---------------------------------------------------------------------------------------------------------------

    def put(self, array: Any, object_id: ObjectID | None = None) -> ObjectID:
        """Store a copy of *array* and return its id.

        array: anything NumPy takes without copying (its dtype and shape travel along), or bytes-like. Errors: ObjectExistsError
        (other bytes under that id; the same bytes are fine), ObjectDeletedError, StoreFullError, TypeError for Python objects.
        """
        self._runtime.check()
        oid = ObjectID.random(self._runtime.me) if object_id is None else _checked(object_id)
        meta, source = as_bytes(array)
        digest = bytes(oid) if object_id is None else hashlib.blake2b(source, digest_size=16).digest()
        self._putter.put(oid, meta, digest, source, confirm=object_id is not None)
        return oid

    def put_bytes(self, oid: ObjectID, meta: Meta, data: Any) -> None:
        """Store an object given by its meta and its bytes under an id that nobody else uses. Errors as `put`."""
        self._runtime.check()
        self._putter.put(oid, meta, bytes(oid), memoryview(data), confirm=False)

    def adopt(self, oid: ObjectID) -> Meta:
        """Announce an object that another process of this node (a worker) has sealed in the arena under a fresh id; return its meta."""
        return self._putter.adopt(oid)

    def _locked(self, function: Callable[[], Any]) -> Any:
        """Call *function* under the engine's lock, unless the store is closed: nobody would end what it waits for."""

        def checked() -> Any:
            self._runtime.check()
            return function()

        return self._engine.run(checked)

    def local(self, oid: ObjectID) -> Ready | None:
        """Return how an object that this rank has got is stored here; None if it hasn't."""
        return self._runtime.ready(oid)

    def arena_file(self, oid: ObjectID, version: int) -> tuple[str, int]:
        """Return the file of a sealed object in this node's shared memory, and where in it the bytes begin."""
        return self._runtime.arena.file(oid, version)

    @property
    def inline_limit(self) -> int:
        """Bytes up to which an object lives in the directory and not in shared memory."""
        return self._config.inline_limit

    def retire(self, oids: Iterable[ObjectID], tell: Iterable[ObjectID]) -> None:
        """Forget objects that nobody in the whole run will ever ask for again, without a tombstone; see `RetireRequested`."""
        if not self.closed:
            self._engine.run(lambda: self._runtime.handle(ev.RetireRequested(tuple(oids), tuple(tell))))

    def channel(self, number: int, receive: Callable[[tuple[int, int], bytes], None]) -> Callable[[int, bytes], bool]:
        """Open a channel for messages between ranks; return ``send(rank, bytes) -> is it a member``.

        Messages of one rank to another arrive in order; *receive* is told ((rank, incarnation), bytes), and has to be short.
        """
        self._runtime.open_channel(number, receive)
        return lambda rank, payload: self._runtime.send(rank, number, payload)

    def on_view(self, listener: Callable[[View, tuple[Member, ...]], None]) -> View:
        """Have *listener* told each new view and who was lost; it has to be short. Return the view of now: number 0 before the first."""

        def begin() -> View:
            self._runtime.view_listeners.append(listener)
            return self._runtime.view or View(0)

        view: View = self._engine.run(begin)
        return view

    def is_dead(self, rank: int, incarnation: int) -> bool:
        """Whether there is proof that a member that was lost is dead: its connection was reset. Otherwise it may be cut off, and live."""
        return (rank, incarnation) in self._runtime.dead

    def get(self, object_id: ObjectID, timeout: Any = DEFAULT) -> Any:
        """Return the object as a read-only ndarray, or a read-only memoryview if bytes were put; zero copy on its node.

        Waits until it exists. Errors: GetTimeoutError, ObjectDeletedError, ReduceError, StoreFullError, CorruptObjectError (with
        `Config.checksums`: no rank has right bytes), and ObjectLostError if every copy
        is gone and nobody will put it again: of ids that `put` chose, or that were made for one process (`ObjectID.from_name`).
        """
        return _result(self.get_async(object_id), timeout)

    def get_async(self, object_id: ObjectID) -> Future:
        """Return a future of what `get` returns."""
        oid = _checked(object_id)
        future = Future(self._engine, f"get of {oid}", on_cancel=lambda future: self._abandon(oid, future))

        def begin() -> None:
            ready = self._runtime.ready(oid)
            if ready is not None:
                self._runtime.observer.had(oid, ready.version)
                self._waiting.give(oid, [future])
                return
            self._waiting.getters.setdefault(oid, []).append(future)
            self._runtime.handle(ev.GetRequested(oid))

        self._locked(begin)
        return future

    def _abandon(self, oid: ObjectID, future: Future) -> None:
        def end() -> None:
            if Waiting.remove(self._waiting.getters, oid, future):
                self._runtime.handle(ev.GetAbandoned(oid))

        if not self.closed:
            self._engine.run(end)

    def delete(self, object_id: ObjectID) -> None:
        """Free all copies of the object, everywhere; a later get is ObjectDeletedError, and its id can't be used again."""
        oid = _checked(object_id)
        self._locked(lambda: self._runtime.handle(ev.DeleteRequested(oid)))

    def wait(
        self, object_ids: Iterable[ObjectID], num_returns: int = 1, timeout: Any = DEFAULT
    ) -> tuple[list[ObjectID], list[ObjectID]]:
        """Wait until *num_returns* of the objects exist or the time is over; return (ready, not ready), in the order given.

        A deleted or failed object counts as ready: get says what became of it. Fetches nothing.
        """
        self._runtime.check()
        oids = [_checked(oid) for oid in object_ids]
        if not 0 <= num_returns <= len(oids):
            raise ValueError(f"num_returns is {num_returns}, but {len(oids)} objects were given")
        seconds = self._config.deadline(timeout)
        futures = {oid: self.watch(oid) for oid in dict.fromkeys(oids)}
        enough = threading.Event()

        def count(_: Any) -> None:
            if sum(futures[oid].done() for oid in oids) >= num_returns:
                enough.set()

        try:
            for future in futures.values():
                future.when_done(count)
            count(None)
            self._engine.wait(enough.is_set, enough.wait, seconds)
            ready = [oid for oid in oids if futures[oid].done()]
        finally:
            for future in futures.values():
                future.cancel()
        self._runtime.check()
        return ready, [oid for oid in oids if oid not in set(ready)]

    def watch(self, oid: ObjectID) -> Future:
        """Return a future that ends when the object exists; see `wait`."""
        future = Future(self._engine, f"wait for {oid}", on_cancel=lambda future: self._unwatch(oid, future))

        def begin() -> None:
            self._waiting.watchers.setdefault(oid, []).append(future)
            self._runtime.handle(ev.WatchRequested(oid))

        self._locked(begin)
        return future

    def _unwatch(self, oid: ObjectID, future: Future) -> None:
        def end() -> None:
            if Waiting.remove(self._waiting.watchers, oid, future):
                self._runtime.handle(ev.WatchAbandoned(oid))

        if not self.closed:
            self._engine.run(end)

    def located(self, object_ids: Sequence[ObjectID], timeout: Any = DEFAULT) -> frozenset[ObjectID]:
        """Return those of the objects that have a complete copy on a live rank now."""
        number = next(self._serial)
        future = Future(self._engine, "location of objects")

        def begin() -> None:
            self._waiting.queries[number] = future
            self._runtime.handle(ev.LocationsRequested(number, tuple(object_ids)))

        self._locked(begin)
        try:
            return frozenset(future.result(timeout))
        finally:
            self._engine.run(lambda: self._waiting.queries.pop(number, None))

    # -- reduce ----------------------------------------------------------------------------------------------------------------

    def reduce(
        self,
        object_ids: Sequence[ObjectID],
        op: ReduceOp | str | Callable[[Any, Any], Any] = SUM,
        num_objects: int | None = None,
        object_id: ObjectID | None = None,
        deterministic: bool = False,
        *,
        shape: str | None = None,
        degree: int | None = None,
        skip_lost: bool = False,
    ) -> ObjectID:
        """Reduce arrays of equal dtype and shape into a new object; return its id at once.

        Sources are taken in the order of their arrival, whether they exist already or not. `get` of the result waits for it;
        `reduced_from` says what went in. Errors of the reduce itself are raised by `get`. float16 and bfloat16 are combined in float32.

        op: hm.SUM and its like, or a function of two arrays: associative, element by element, picklable by cloudpickle.
        num_objects: reduce only so many, the first to arrive.
        deterministic: combine in the order of *object_ids*, the same bits whatever the arrivals; an operation need not commute then.
        shape: "chain", "star", "tree_of_chains" or "d_ary" (degree: its children for each node) instead of the one that the cost model
        chooses, see `explain_reduce`; objects of up to `Config.inline_limit` bytes are always combined by one rank. ValueError for others.
        skip_lost: leave out objects that are lost (see `get`), if one is left. Ranks that ask for one result may differ in them then:
        the first request counts.
        """
        self._runtime.check()
        oids = tuple(_checked(oid) for oid in object_ids)
        if not oids:
            raise ValueError("reduce needs at least one object")
        if len(set(oids)) != len(oids):
            raise ValueError("reduce was given an object twice; each counts once")
        if num_objects is not None and not 1 <= num_objects <= len(oids):
            raise ValueError(f"num_objects is {num_objects}, but {len(oids)} objects were given")
        if deterministic and num_objects is not None:
            raise ReduceError("deterministic=True can't be had with num_objects, which takes whatever comes first")
        if shape is None and degree is None:
            shape, degree = self._config.reduce_shape, self._config.reduce_degree
        if (wrong := cost.shape_error(shape, degree)) is not None:
            raise ValueError(wrong)
        token = as_op(op).token
        rid = ObjectID.random() if object_id is None else _checked(object_id)
        if rid in oids:
            raise ValueError(f"the result of a reduce, {rid}, can't be among its sources")
        wanted = ev.ReduceRequested(rid, oids, token, num_objects, shape, deterministic, skip_lost, degree)
        self._locked(lambda: self._runtime.handle(wanted))
        return rid

    def reduced_from(self, object_id: ObjectID, timeout: Any = DEFAULT) -> frozenset[ObjectID]:
        """Return the ids of the objects that went into a reduced one; waits until it is final."""
        self._runtime.check()
        oid = _checked(object_id)
        ready = self._runtime.ready(oid)
        sources = ready.sources if ready is not None else _result(self.watch(oid), timeout)
        if sources is None:
            raise ReduceError(f"{oid} was put, not reduced")
        return frozenset(sources)

    def explain_reduce(
        self,
        n: int,
        nbytes: int,
        *,
        shape: str | None = None,
        degree: int | None = None,
        deterministic: bool = False,
    ) -> ReduceExplanation:
        """Return the shape that a reduce of *n* objects of *nbytes* bytes would have if this rank coordinated it now, and why.

        With the predicted seconds of all shapes and the latency and bandwidth of each class of links. Ranks measure each for
        itself, and the owner of the result's id chooses. Does not block. ValueError for what can't be.
        """
        runtime = self._runtime
        runtime.check()
        if shape is None and degree is None:
            shape, degree = self._config.reduce_shape, self._config.reduce_degree
        assert runtime.view is not None
        return explain(n, nbytes, runtime.gauge.links, runtime.view, self._config, shape, degree, deterministic)

    # -- the store itself --------------------------------------------------------------------------------------------------------

    def statistics(self) -> Statistics:
        """Return counters of this rank."""
        runtime = self._runtime
        disk = SpillStatistics() if runtime.spill is None else runtime.spill.statistics()
        return Statistics(
            rank=self.rank,
            view=0 if runtime.view is None else runtime.view.number,
            members=self.size,
            objects=len(runtime.objects),
            memory_used=runtime.arena.used(),
            messages_sent=runtime.fabric.messages_sent,
            control_bytes_sent=runtime.fabric.bytes_sent,
            bytes_sent=runtime.transfers.bytes_sent,
            bytes_received=runtime.transfers.bytes_received,
            transfers=runtime.transfers.started,
            transfers_completed=runtime.transfers.completed,
            transfers_failed=runtime.transfers.failed,
            transfers_resumed=runtime.transfers.resumed,
            stalled=runtime.transfers.stalled,
            chunks_corrupt=runtime.transfers.corrupt,
            reduces=runtime.protocol.directory.reduces,
            peers_lost=runtime.peers_lost,
            evicted=0 if runtime.room_maker is None else runtime.room_maker.evicted,
            spilled=disk.spilled,
            spilled_bytes=disk.spilled_bytes,
            restored=disk.restored,
            restored_bytes=disk.restored_bytes,
            trace_dropped=runtime.trace.dropped,
            **dataclasses.asdict(runtime.observer.counts),
        )

    def trace(self) -> list[TraceEvent]:
        """Return the last events of this rank, oldest first; none without `Config.trace`. See `hoplite_mpi.trace`."""
        return self._runtime.trace.events()

    def close(self) -> None:
        """Leave the others and free what only this rank uses. Views that were got stay valid. Never hangs on dead peers."""
        if isinstance(self._runtime.closed, ClosedError):
            return
        ending.forget(self)
        self.rounds.leave(self._config.close_timeout)
        self._runtime.leave(self._config.close_timeout)
        self._engine.run(lambda: self._waiting.fail_all(ClosedError("the store was closed while this was waited for")))

    def __enter__(self) -> ObjectStore:
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.close()


def _result(future: Future, timeout: Any) -> Any:
    """Wait for a future of which nobody else knows: however the wait ends, nothing is left waiting."""
    try:
        return future.result(timeout)
    finally:
        future.cancel()


def _checked(oid: Any) -> ObjectID:
    if not isinstance(oid, ObjectID):
        raise TypeError(f"an object id is needed, not {oid!r}: use ObjectID.from_name() or what put() returned")
    return oid
