"""Puts: the user's bytes into this node's memory, and the owner of the id told of them."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np

from hoplite_mpi.checksums import Sums
from hoplite_mpi.errors import GetTimeoutError, ObjectDeletedError, ObjectExistsError, ObjectLostError
from hoplite_mpi.futures import Future
from hoplite_mpi.ids import ObjectID
from hoplite_mpi.memory import Pinned, Region
from hoplite_mpi.meta import Meta
from hoplite_mpi.objects import object_key
from hoplite_mpi.protocol import events as ev
from hoplite_mpi.runtime import Runtime
from hoplite_mpi.testing import fault
from hoplite_mpi.transport.streams import Stream
from hoplite_mpi.values import equal
from hoplite_mpi.waiting import Waiting

__all__ = ["Putter"]

#: how often a put begins again because somebody took away what was sealed under its id
_SEAL_ATTEMPTS = 20
#: bytes copied at once while others may already receive them (Hoplite's code copies 2 MiB at most)
_PIECE = 2 << 20
#: from so many bytes on it pays
_OVERLAP = 2 * _PIECE
#: seconds between looks whether bytes that were put on this node at the same time, and refused, have gone
_LOOK = 0.001


class Putter:
    """The puts of one store. Called by the user's threads.

    locked: calls a function under the engine's lock, unless the store is closed.
    """

    def __init__(self, runtime: Runtime, waiting: Waiting, locked: Callable[[Callable[[], Any]], Any]) -> None:
        self._runtime = runtime
        self._engine = runtime.engine
        self._memory = runtime.memory
        self._waiting = waiting
        self._locked = locked
        self._counts = runtime.observer.counts
        #: ids that a thread is putting in pieces; another that puts the same one waits until that is over
        self._under_way: set[ObjectID] = set()
        self._ended = threading.Condition()

    def put(self, oid: ObjectID, meta: Meta, digest: bytes, source: memoryview, confirm: bool) -> None:
        """Store a copy of *source*; confirm: somebody else may have put under that id. Errors as `ObjectStore.put`."""
        # of the user's bytes, not of what became of them
        sums = Sums(meta.nbytes) if self._runtime.config.checksums else None
        with self._alone(oid):
            if meta.nbytes <= self._runtime.config.inline_limit:
                self._announce(oid, meta, digest, bytes(source), None, confirm)
            elif meta.nbytes < _OVERLAP or not self._put_in_pieces(oid, meta, digest, source, confirm, sums):
                pinned, fresh = self._seal(oid, meta, source, digest, confirm)
                if sums is not None:
                    sums.make(source, 0, meta.nbytes)
                fault.point("put.sealed")
                self._announce(oid, meta, digest, None, pinned, confirm, fresh, sums)

    def adopt(self, oid: ObjectID) -> Meta:
        """Announce an object that another process of this node has sealed in the arena under a fresh id; return its meta."""
        pinned = self._memory.fetch(oid)
        if pinned is None:
            raise ObjectLostError(f"{oid} is not in this node's arena")
        with self._alone(oid):
            self._announce(oid, pinned.meta, bytes(oid), None, pinned, confirm=False)
        return pinned.meta

    @contextmanager
    def _alone(self, oid: ObjectID) -> Iterator[None]:
        """One put of an id at a time: the owner's answers say which id they are about, and not whose put."""
        timeout = self._runtime.config.default_timeout
        with self._ended:
            if not self._ended.wait_for(lambda: oid not in self._under_way, timeout):
                raise GetTimeoutError(f"put of {oid}: another thread's put of it is not over after {timeout:g} s")
            self._under_way.add(oid)
        try:
            yield
        finally:
            with self._ended:
                self._under_way.discard(oid)
                self._ended.notify_all()

    # -- while others receive it already

    def _put_in_pieces(
        self, oid: ObjectID, meta: Meta, digest: bytes, source: memoryview, confirm: bool, sums: Sums | None
    ) -> bool:
        """Announce the object, then copy it, so that others receive it while it grows; False if it has to go the other way.

        It is sealed only when the owner has accepted it, so of two that put other bytes on one node only one is ever seen.
        """
        region = self._allocate(oid, meta, digest, provisional=False)
        stream = Stream(self._engine, object_key(oid, 0), memoryview(region.data), keep=region, sums=sums)
        client, accepted, stored = self._runtime.protocol.client, self._future(oid), self._future(oid)

        def begin() -> bool:
            if not client.takes(oid) or self._memory.map(oid) is not None:
                return False
            self._waiting.putters.setdefault(oid, []).append(accepted)
            self._runtime.handle(ev.PutStarted(oid, meta, digest, confirm))
            if client.writes(oid):
                self._runtime.objects.publish(oid, 0, meta, stream)
            return True

        def end() -> bool | None:
            """Return whether it is over; None: the bytes that are copied will not be what the id stands for here."""
            known = self._memory.map(oid)
            if known is not None and known.meta != meta:
                return False
            if known is not None or not client.writes(oid) or not self._runtime.objects.written(oid, 0, region):
                self._runtime.handle(ev.PutFailed(oid))
                return None
            self._waiting.putters.setdefault(oid, []).append(stored)
            self._runtime.handle(ev.ObjectStored(oid, meta, digest, None, confirm))
            return True

        def grow(start: int, stop: int) -> None:
            if sums is not None:
                sums.make(source, start, stop)
            self._locked(lambda: stream.advance(stop))

        started = False
        try:
            started = self._locked(begin)
            if not started:
                return False
            self._copy(region, source, grow, accepted)
            self._settle(oid, accepted)
            fault.point("put.copied")
            deadline = time.monotonic() + self._runtime.config.join_timeout
            while (over := self._locked(end)) is False:
                # bytes that another process of this node has put at the same time: the owner refuses them, and they go
                if time.monotonic() > deadline:
                    raise ObjectExistsError(f"{oid} has other bytes already: objects are immutable, use a new id")
                time.sleep(_LOOK)
            if over is None:
                return False
            self._settle(oid, stored)
            self._counts.puts += 1
        except BaseException:
            if started and self._runtime.closed is None:
                self._engine.run(lambda: self._runtime.handle(ev.PutFailed(oid)))
            raise
        finally:
            region.abandon()  # of no effect once it is sealed
        return True

    def _copy(self, region: Region, source: memoryview, grow: Callable[[int, int], None], accepted: Future) -> None:
        target, data = np.frombuffer(region.data, np.uint8), np.frombuffer(source, np.uint8)
        for start in range(0, len(data), _PIECE):
            stop = min(start + _PIECE, len(data))
            self._memory.copy(target[start:stop], data[start:stop]).wait()
            fault.point("put.piece")
            grow(start, stop)
            if accepted.done() and accepted.exception() is not None:
                return  # refused, or deleted

    # -- all of it, and then tell

    def _seal(
        self, oid: ObjectID, meta: Meta, source: memoryview, digest: bytes, provisional: bool
    ) -> tuple[Pinned, bool]:
        """Return the sealed bytes, and whether it was this call that sealed them."""
        memory = self._memory
        for _ in range(_SEAL_ATTEMPTS):
            known, fresh = memory.fetch(oid), False
            if known is None:
                region = self._allocate(oid, meta, digest, provisional)
                try:
                    memory.copy(np.frombuffer(region.data, np.uint8), np.frombuffer(source, np.uint8)).wait()
                    fresh = region.seal()
                except BaseException:
                    region.abandon()
                    raise
                known = memory.map(oid)
            if known is not None:
                break
            # another rank of this node put under the same id at the same time, was refused, and took its bytes away
        else:
            raise ObjectDeletedError(f"{oid} was deleted again and again while it was being put")
        if not fresh and not (known.meta == meta and equal(known.buffer, source)):
            raise ObjectExistsError(f"{oid} has other bytes already: objects are immutable, use a new id")
        return known, fresh

    def _allocate(self, oid: ObjectID, meta: Meta, digest: bytes, provisional: bool) -> Region:
        return self._memory.with_room(meta.nbytes, lambda: self._memory.allocate(oid, meta, 0, digest, provisional))

    def _announce(
        self,
        oid: ObjectID,
        meta: Meta,
        digest: bytes,
        inline: bytes | None,
        pinned: Pinned | None,
        confirm: bool,
        fresh: bool = False,
        sums: Sums | None = None,
    ) -> None:
        """Announce an object and wait until the owner has taken it. fresh: its bytes were sealed for this alone."""
        future, runtime = self._future(oid), self._runtime

        def begin() -> None:
            self._waiting.putters.setdefault(oid, []).append(future)
            taken = runtime.protocol.client.takes(oid)
            if taken and pinned is not None:
                runtime.objects.stored(oid, meta, sums=sums)
            runtime.handle(ev.ObjectStored(oid, meta, digest, inline, confirm))
            if fresh and not taken:  # something else is known here under that id
                runtime.memory.delete(oid)

        self._locked(begin)
        fault.point("put.announced")
        self._settle(oid, future)
        self._counts.puts += 1

    def _settle(self, oid: ObjectID, future: Future) -> None:
        """Wait for the owner's answer; if that takes too long, nobody waits for it any more."""
        try:
            future.result()
        except GetTimeoutError:
            self._engine.run(lambda: Waiting.remove(self._waiting.putters, oid, future))
            raise

    def _future(self, oid: ObjectID) -> Future:
        return Future(self._engine, f"put of {oid}")
