"""The objects of this rank: carries out what the protocol says about transfers, mappings and deliveries."""

from __future__ import annotations

import logging
import struct
import weakref
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from hoplite_mpi.checksums import Retries, Sums
from hoplite_mpi.errors import CorruptObjectError, HopliteError
from hoplite_mpi.ids import ObjectID
from hoplite_mpi.memory import Memory, Pinned, Region
from hoplite_mpi.meta import Meta
from hoplite_mpi.protocol import events as ev
from hoplite_mpi.reserving import Reserver
from hoplite_mpi.transport.engine import Engine
from hoplite_mpi.transport.fabric import Fabric
from hoplite_mpi.transport.streams import CORRUPT, REFUSE, Incoming, Stream
from hoplite_mpi.transport.transfer import Transfers
from hoplite_mpi.values import equal

__all__ = ["Copy", "Objects", "Ready", "object_key", "object_of"]

log = logging.getLogger("hoplite_mpi.objects")

_KEY = struct.Struct(">c16sQ")


def object_key(oid: ObjectID, version: int) -> bytes:
    """Return the name of an object's stream."""
    return _KEY.pack(b"o", bytes(oid), version)


def object_of(key: bytes) -> dict[str, Any]:
    """Return which object's stream has that name, for logs and traces."""
    _, raw, version = _KEY.unpack(key)
    return {"oid": ObjectID(raw), "version": version}


@dataclass(eq=False)
class Copy:
    """This rank's copy of one version of an object, complete or not."""

    oid: ObjectID
    version: int
    meta: Meta
    #: the bytes while they grow; None once all are there
    stream: Stream | None = None
    #: where it is being received; None once it is sealed
    region: Region | None = None
    #: the bytes of a complete copy, while somebody pulls them: nothing else of this class pins them, so they may go to disk
    opened: Callable[[], Stream | None] = lambda: None
    #: of the bytes of a complete copy, if any are known
    sums: Sums | None = None
    #: what has just been read back, until who asked for it comes for it
    held: Stream | None = None
    #: attempt → transfer under way
    incoming: dict[int, Incoming] = field(default_factory=dict)
    #: new memory is being got for it: until then it may not be received into
    reserving: bool = False
    #: the transfer to be started then
    waiting: ev.StartTransfer | None = None
    retries: Retries = field(default_factory=Retries)

    @property
    def complete(self) -> bool:
        """Whether all bytes are there: in the arena, or on this node's disk."""
        return self.stream is None

    def let_go(self) -> None:
        """Nobody came for it."""
        self.held = None

    @property
    def empty(self) -> bool:
        """Whether it has no memory yet."""
        return self.reserving and self.region is None


@dataclass(frozen=True, slots=True)
class Ready:
    """An object that can be had here without asking anybody."""

    meta: Meta
    #: the bytes of a small object
    inline: bytes | None
    version: int
    #: ids that went into a reduced object
    sources: frozenset[ObjectID] | None


class Objects:
    """Copies, their streams and their transfers. Called under the engine's lock."""

    def __init__(
        self,
        engine: Engine,
        fabric: Fabric,
        transfers: Transfers,
        memory: Memory,
        reserver: Reserver,
        handle: Callable[[ev.Event], None],
        out_of_memory: Callable[[ObjectID, HopliteError], None],
    ) -> None:
        self._engine = engine
        self._fabric = fabric
        self._transfers = transfers
        self._memory = memory
        self._reserver = reserver
        self._handle = handle
        #: told when an object can't be received: there is no room, or its bytes come corrupt from everywhere
        self._out_of_memory = out_of_memory
        self._copies: dict[ObjectID, Copy] = {}
        #: copies that are being read back from disk → who waits for that
        self._restoring: dict[Copy, list[Callable[[Stream | HopliteError | None], None]]] = {}
        #: attempts to map what is on disk
        self._mapping: dict[ObjectID, int] = {}
        #: newest version of each object that was dropped here: its streams are refused
        self._dropped: dict[ObjectID, int] = {}
        self.ready: dict[ObjectID, Ready] = {}

    def __len__(self) -> int:
        return len(self.ready)

    def find(self, key: bytes) -> Any:
        """Return the stream of that name, REFUSE, or None if it may still come."""
        _, raw, version = _KEY.unpack(key)
        oid = ObjectID(raw)
        copy = self._copies.get(oid)
        if copy is not None and copy.version == version:
            return None if copy.empty else self._open(copy)
        if (copy is not None and copy.version > version) or self._dropped.get(oid, -1) >= version:
            return REFUSE
        return None

    def stored(self, oid: ObjectID, meta: Meta, version: int = 0, sums: Sums | None = None) -> None:
        """Take a sealed object of this node as a complete copy. sums: of its bytes; None: made when somebody asks for them."""
        self._drop_other(oid, version)
        self._copies[oid] = Copy(oid, version, meta, sums=sums)
        self._transfers.appeared.fire()

    def has(self, oid: ObjectID) -> bool:
        """Whether a copy is here, complete or not."""
        copy = self._copies.get(oid)
        return copy is not None and not copy.empty

    def holds(self, oid: ObjectID, version: int) -> bool:
        """Whether a complete copy of that version is here."""
        copy = self._copies.get(oid)
        return copy is not None and copy.version == version and copy.complete

    def fetch(self, oid: ObjectID, then: Callable[[Stream | HopliteError | None], None]) -> None:
        """Call *then* with the stream of the copy that is here, now or when it has been read back from disk; None: there is none."""
        copy = self._copies.get(oid)
        if copy is None or copy.empty:
            then(None)
        elif (stream := self._open(copy, then)) is not None:
            then(stream)

    def publish(self, oid: ObjectID, version: int, meta: Meta, stream: Stream) -> None:
        """Offer bytes that are being written here, by the root of a reduce or by a put, as a partial copy."""
        self._drop_other(oid, version)
        self._copies[oid] = Copy(oid, version, meta, stream)
        self._transfers.appeared.fire()

    def written(self, oid: ObjectID, version: int, region: Region) -> bool:
        """Seal what was published; return whether it is a complete copy now, and not deleted meanwhile."""
        copy = self._copies.get(oid)
        return copy is not None and copy.version == version and self._sealed(copy, region)

    # -- complete copies -----------------------------------------------------------------------------------------------------

    def _open(self, copy: Copy, then: Callable[[Stream | HopliteError | None], None] | None = None) -> Stream | None:
        """Return the stream of a copy; None if it is on disk: it is being read back then, and *then* told."""
        if copy.stream is not None:
            return copy.stream
        stream, copy.held = copy.opened(), None
        if stream is None:
            pinned = self._memory.map(copy.oid, copy.version)
            if pinned is None:
                self._restore(copy, then)
                return None
            stream = self._stream_of(copy, pinned)
        return stream

    def _stream_of(self, copy: Copy, pinned: Pinned) -> Stream:
        key = object_key(copy.oid, copy.version)
        stream = Stream(self._engine, key, pinned.buffer, copy.meta.nbytes, keep=pinned, sums=copy.sums)
        copy.opened = weakref.ref(stream)
        return stream

    def _restore(self, copy: Copy, then: Callable[[Stream | HopliteError | None], None] | None) -> None:
        waiting = self._restoring.get(copy)
        if waiting is None:
            waiting = self._restoring[copy] = []
            self._reserver.later(
                lambda: self._memory.fetch(copy.oid, copy.version), lambda found: self._restored(copy, found)
            )
        if then is not None:
            waiting.append(then)

    def _restored(self, copy: Copy, found: Pinned | HopliteError | None) -> None:
        waiting, stream = self._restoring.pop(copy), None
        current = self._copies.get(copy.oid)
        if current is not copy:
            if isinstance(found, Pinned) and (current is None or current.version != copy.version):
                self._memory.delete(copy.oid, copy.version)  # it was dropped while it was being read
        elif isinstance(found, Pinned):
            stream = self._stream_of(copy, found)
            if not waiting:  # a peer pulls it
                copy.held = stream
                self._engine.after(2 * self._engine.config.stall_timeout, copy.let_go)
                self._transfers.appeared.fire()
        elif isinstance(found, HopliteError):
            log.warning("%s stays on disk: %s", copy.oid, found)  # a peer that pulls it will ask elsewhere, or again
        elif found is None:
            log.error("%s is neither in memory nor on disk any more", copy.oid)
            self._lost(copy)
        for then in waiting:
            then(found if isinstance(found, HopliteError) else stream)

    def _lost(self, copy: Copy) -> None:
        """The bytes of a complete copy are gone, through no fault of the protocol's."""
        ready = self.ready.get(copy.oid)
        if ready is not None and ready.version == copy.version:
            del self.ready[copy.oid]
        self._forget(copy)
        self._handle(ev.ForgetObject(copy.oid))

    # -- instructions --------------------------------------------------------------------------------------------------------

    def start_transfer(self, what: ev.StartTransfer) -> None:
        copy = self._copies.get(what.oid)
        if copy is None or copy.version != what.version:
            self._drop_other(what.oid, what.version)
            stream = Stream(self._engine, object_key(what.oid, what.version), memoryview(b""))
            stream.sums = Sums(what.meta.nbytes) if self._engine.config.checksums else None
            copy = self._copies[what.oid] = Copy(what.oid, what.version, what.meta, stream)
            self._reserve(copy)
        if copy.stream is None:  # it was completed just when the protocol had given up waiting for it
            self._handle(ev.TransferDone(what.oid, what.version, what.attempt))
            return
        old = copy.incoming.values()
        if copy.stream.sums is not None and not copy.reserving and any(incoming.written for incoming in old):
            # what still comes of transfers that were given up is not verified: it may not end up here
            self._reserve(copy)
        if copy.reserving:
            copy.waiting = what
        elif self._copies.get(what.oid) is copy:
            self._pull(copy, what)
        else:  # there was no room
            self._handle(ev.TransferFailed(what.oid, what.version, what.attempt))

    def _reserve(self, copy: Copy, failed: ev.StartTransfer | None = None) -> None:
        """Get memory for a copy; *failed*: in place of what it has, since MPI may still write there for that transfer."""
        copy.reserving = True
        stream = copy.stream
        assert stream is not None
        old, valid = copy.region, stream.data[: stream.progress]

        def work() -> Region:
            region = self._memory.allocate(copy.oid, copy.meta, copy.version)
            region.data[: len(valid)] = valid
            return region

        def then(region: Region | HopliteError) -> None:
            copy.reserving = False
            what, copy.waiting = copy.waiting, None
            if self._copies.get(copy.oid) is not copy:
                if isinstance(region, Region):
                    region.abandon()
                return
            if isinstance(region, HopliteError):
                self._forget(copy)
                self._out_of_memory(copy.oid, region)
            else:
                if old is not None:
                    old.abandon()  # its memory is free when the last receive into it has ended
                copy.region = stream.keep = region
                stream.data = memoryview(region.data)
                self._transfers.appeared.fire()
            if failed is not None:
                self._handle(ev.TransferFailed(failed.oid, failed.version, failed.attempt))
            if what is not None and self._copies.get(copy.oid) is copy:
                self._pull(copy, what)
            elif what is not None:
                self._handle(ev.TransferFailed(what.oid, what.version, what.attempt))

        self._reserver.get(copy.meta.nbytes, work, then)

    def _pull(self, copy: Copy, what: ev.StartTransfer) -> None:
        stream = copy.stream
        assert stream is not None

        def buffer_of(start: int, stop: int) -> memoryview:
            return stream.data[start:stop]

        def ended(reason: str | None, tainted: bool) -> None:
            self._transfer_ended(copy, what, reason, tainted)

        copy.incoming[what.attempt] = self._transfers.pull(
            self._fabric.link((what.sender, what.sender_incarnation)),
            stream.key,
            stream.progress,
            copy.meta.nbytes,
            self._transfers.chunk_size,
            buffer_of,
            stream.advance,
            ended,
            sums=stream.sums,
        )

    def _transfer_ended(self, copy: Copy, what: ev.StartTransfer, reason: str | None, tainted: bool) -> None:
        incoming = copy.incoming.pop(what.attempt, None)
        if self._copies.get(copy.oid) is not copy:
            return
        if reason is None:
            if copy.region is None or self._sealed(copy, copy.region):
                self._handle(ev.TransferDone(what.oid, what.version, what.attempt))
                return
            # the node has other bytes: those of a put that is about to be refused
            self._forget(copy)
        else:
            log.info("transfer of %s from rank %d ended: %s", what.oid, what.sender, reason)
            delay = 0.0 if reason != CORRUPT else self._retry(copy, what)
            if tainted and copy.region is not None:
                # what has arrived moves to a new region
                if incoming is None or not incoming.draining:
                    copy.region.quarantine()
                self._reserve(copy, what)
                return
            if delay:
                failed = ev.TransferFailed(what.oid, what.version, what.attempt)
                self._engine.after(delay, lambda: self._handle(failed))
                return
        self._handle(ev.TransferFailed(what.oid, what.version, what.attempt))

    def _retry(self, copy: Copy, what: ev.StartTransfer) -> float:
        """Return after how many seconds to ask again for bytes that came corrupt; whoever gets the object is told if it is in vain."""
        timeout, stream = self._engine.config.corrupt_timeout, copy.stream
        assert stream is not None, "it is complete"
        delay = copy.retries.delay(stream.progress, timeout)
        if delay is None:
            text = (
                f"{what.oid}: its bytes from offset {stream.progress} on have a wrong checksum whoever is asked for them, "
                f"for {timeout:g} s; rank {what.sender} was the last"
            )
            self._out_of_memory(what.oid, CorruptObjectError(text))
        return delay or 0.0

    def _sealed(self, copy: Copy, region: Region) -> bool:
        """Publish the bytes on this node; return whether the copy has them now, be it from another process of the node."""
        fresh = region.seal()
        pinned = self._memory.map(copy.oid, copy.version)
        if pinned is None or not (fresh or equal(pinned.buffer, region.data)):
            return False
        if copy.stream is not None:
            copy.stream.keep = pinned
            copy.sums = copy.stream.sums
            copy.opened = weakref.ref(copy.stream)
        copy.region = copy.stream = None
        return True

    def map_local(self, what: ev.MapLocal) -> None:
        def mapped(found: Pinned | HopliteError | None) -> None:
            if self._mapping.get(what.oid) != what.attempt:
                return  # aborted
            del self._mapping[what.oid]
            if isinstance(found, Pinned):
                self.stored(what.oid, what.meta, what.version)
                self._handle(ev.TransferDone(what.oid, what.version, what.attempt))
            elif found is None:
                self._handle(ev.TransferFailed(what.oid, what.version, what.attempt))
            else:
                self._out_of_memory(what.oid, found)

        self._mapping[what.oid] = what.attempt
        pinned = self._memory.map(what.oid, what.version)
        if pinned is None and self._memory.spilled(what.oid, what.version):
            self._reserver.later(lambda: self._memory.fetch(what.oid, what.version), mapped)
        else:
            mapped(pinned)

    def abort_transfer(self, what: ev.AbortTransfer) -> None:
        if self._mapping.get(what.oid) == what.attempt:
            del self._mapping[what.oid]
        copy = self._copies.get(what.oid)
        if copy is None:
            return
        if copy.waiting is not None and copy.waiting.attempt == what.attempt:
            copy.waiting = None
        incoming = copy.incoming.get(what.attempt)
        if incoming is not None:
            self._transfers.stop(incoming)

    def deliver(self, what: ev.Deliver) -> Ready:
        ready = Ready(what.meta, what.inline, what.version, what.sources)
        self.ready[what.oid] = ready
        return ready

    def value(self, oid: ObjectID, ready: Ready, then: Callable[[Any], None]) -> None:
        """Call *then* with what `get` returns: a read-only array or memoryview; zero copy, and pinned as long as it lives.

        Or with a HopliteError; or with None if the bytes are gone, and somebody else is to be asked for them. At once, unless they have
        to be read from disk.
        """
        if ready.inline is not None:
            then(ready.meta.view(ready.inline))
            return
        copy = self._copies[oid]
        assert copy.complete, f"{oid} was delivered before it was complete"
        self.fetch(oid, lambda found: then(found.keep.value() if isinstance(found, Stream) else found))

    def drop(self, oid: ObjectID, version: int) -> None:
        ready = self.ready.get(oid)
        if ready is not None and ready.version <= version:
            del self.ready[oid]
        self._dropped[oid] = max(version, self._dropped.get(oid, -1))
        copy = self._copies.get(oid)
        if copy is not None and copy.version <= version:
            if copy.complete:  # else what the node has is another rank's
                self._memory.delete(oid, copy.version)
            self._forget(copy)

    def retire(self, oid: ObjectID) -> None:
        """Forget that it was ever here."""
        self.ready.pop(oid, None)
        self._dropped.pop(oid, None)

    def _drop_other(self, oid: ObjectID, version: int) -> None:
        copy = self._copies.get(oid)
        if copy is not None and copy.version != version:
            self.drop(oid, copy.version)
        elif copy is not None:
            self._forget(copy)

    def _forget(self, copy: Copy) -> None:
        self._copies.pop(copy.oid, None)
        stream = copy.stream or copy.opened()
        if stream is not None:
            stream.fail()
        for incoming in list(copy.incoming.values()):
            self._transfers.stop(incoming)
        # receives that are posted until the transfers are drained hold views of it, so it is not used again before
        if copy.region is not None:
            copy.region.abandon()
            copy.region = None
