"""Reduce slots of this rank: output = own source (op) the outputs of the children, chunk by chunk as they arrive.

A child's chunks go to private buffers, a window of them for each child; the output is kept from its beginning until the slot is
stopped, so that a parent that has to start again can. Hoplite, SIGCOMM 2021, section 4.3.
"""

from __future__ import annotations

import logging
import struct
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from hoplite_mpi.checksums import Retries, Sums, whole_blocks
from hoplite_mpi.errors import HopliteError
from hoplite_mpi.ids import ObjectID
from hoplite_mpi.memory import Event, Memory, Region, kernels
from hoplite_mpi.objects import Objects
from hoplite_mpi.protocol import events as ev
from hoplite_mpi.reserving import Reserver
from hoplite_mpi.testing import fault
from hoplite_mpi.transport.engine import Engine
from hoplite_mpi.transport.fabric import Fabric
from hoplite_mpi.transport.primitives import Signal
from hoplite_mpi.transport.sidechannel import PeerKey
from hoplite_mpi.transport.streams import CORRUPT, REFUSE, Incoming, Stream
from hoplite_mpi.transport.transfer import Transfers

__all__ = ["Slots", "slot_key", "slot_of"]

log = logging.getLogger("hoplite_mpi.slots")

_KEY = struct.Struct(">c16sIQ")


def slot_key(rid: ObjectID, slot: int, generation: int) -> bytes:
    """Return the name of a slot's output stream."""
    return _KEY.pack(b"s", bytes(rid), slot, generation)


def slot_of(key: bytes) -> dict[str, Any]:
    """Return which slot's stream has that name, for logs and traces."""
    _, raw, slot, generation = _KEY.unpack(key)
    return {"oid": ObjectID(raw), "slot": slot, "generation": generation}


@dataclass(eq=False)
class _Child:
    """A child's stream at its parent. A leaf's is its source; all others flow in the dtype in which the operation accumulates."""

    slot: int
    generation: int
    dtype: np.dtype[Any]
    buffers: list[memoryview]
    incoming: Incoming | None = None
    #: the child's output itself, if it is a slot of this rank: then nothing is received
    local: Stream | None = None
    #: chunks received, in order
    arrived: int = 0
    #: receives may still write to the buffers: a new stream gets new ones
    tainted: bool = False

    def has(self, index: int, stop: int) -> bool:
        """Return whether chunk *index*, which ends at element *stop*, is here."""
        return self.arrived > index if self.local is None else self.local.progress >= stop * self.dtype.itemsize

    def chunk(self, index: int, start: int, stop: int) -> np.ndarray[Any, Any]:
        """Return the elements [start, stop), which are those of chunk *index*."""
        if self.local is not None:
            return _elements(self.local, self.dtype, start, stop)
        return np.frombuffer(self.buffers[index % len(self.buffers)], self.dtype, stop - start)


@dataclass(eq=False)
class _Slot:
    what: ev.StartSlot
    source: Stream
    output: Stream
    region: Region | None
    #: of the source and of the result
    dtype: np.dtype[Any]
    #: of what flows between slots; float32 for halves, so that they are rounded once
    flow: np.dtype[Any]
    #: elements of the whole, and of one chunk
    length: int
    step: int
    #: slot number → child
    children: dict[int, _Child] = field(default_factory=dict)
    #: chunks done
    done: int = 0
    stopped: bool = False


@dataclass(eq=False)
class _Starting:
    """A slot whose memory is being got."""

    what: ev.StartSlot
    pulls: list[ev.PullChild] = field(default_factory=list)


class Slots:
    """All reduce slots of this rank. Called under the engine's lock."""

    def __init__(
        self,
        engine: Engine,
        fabric: Fabric,
        transfers: Transfers,
        memory: Memory,
        reserver: Reserver,
        objects: Objects,
        handle: Callable[[ev.Event], None],
        me: PeerKey,
    ) -> None:
        self._me = me
        self._engine = engine
        self._fabric = fabric
        self._transfers = transfers
        self._memory = memory
        self._reserver = reserver
        self._objects = objects
        self._handle = handle
        self._starting: dict[tuple[ObjectID, int], _Starting] = {}
        self._slots: dict[tuple[ObjectID, int], _Slot] = {}
        #: newest generation of each slot that was stopped here: its streams are refused
        self._stopped: dict[ObjectID, dict[int, int]] = {}
        #: of slots that got corrupt bytes, over all their generations
        self._retries: dict[ObjectID, dict[int, Retries]] = {}
        self._checksums = engine.config.checksums

    def find(self, key: bytes) -> Any:
        """Return the output stream of that name, REFUSE, or None if it may still come."""
        _, raw, number, generation = _KEY.unpack(key)
        name = (ObjectID(raw), number)
        slot = self._slots.get(name)
        if slot is not None and slot.what.generation == generation:
            return slot.output
        if (slot is not None and slot.what.generation > generation) or self._stopped.get(name[0], {}).get(
            number, -1
        ) >= generation:
            return REFUSE
        return None

    def start(self, what: ev.StartSlot) -> None:
        """Begin a slot; see `StartSlot`."""
        name = (what.rid, what.slot)
        self._stop(name)
        starting = self._starting[name] = _Starting(what)

        dtype = what.meta.dtype if what.meta.dtype is not None else np.dtype(np.uint8)
        try:
            op = kernels.op_of(what.op)
            op.check(dtype)
            flow = op.accumulator(dtype)
        except HopliteError as error:
            self._reserved(starting, error, dtype)
            return
        nbytes = what.meta.nbytes if what.is_root else what.meta.nbytes // dtype.itemsize * flow.itemsize

        def allocate() -> Region:
            if what.is_root:
                return self._memory.allocate(what.rid, what.meta, what.generation)
            return self._memory.allocate_private(nbytes)

        if what.is_root or what.num_children:
            self._reserver.get(nbytes, allocate, lambda region: self._reserved(starting, region, flow))
        else:
            self._reserved(starting, None, flow)

    def _reserved(self, starting: _Starting, region: Region | HopliteError | None, flow: np.dtype[Any]) -> None:
        if isinstance(region, HopliteError):
            if self._begun(starting):
                self._fail(starting.what, "reduce", str(region))
            return
        # it may have to be read from disk first
        self._objects.fetch(starting.what.source, lambda source: self._source_is_here(starting, source, region, flow))

    def _begun(self, starting: _Starting) -> bool:
        """Take a slot out of those that are starting; return whether it was still to be started."""
        name = (starting.what.rid, starting.what.slot)
        current = self._starting.get(name) is starting
        if current:
            del self._starting[name]
        return current

    def _source_is_here(
        self,
        starting: _Starting,
        source: Stream | HopliteError | None,
        region: Region | None,
        flow: np.dtype[Any],
    ) -> None:
        what, name = starting.what, (starting.what.rid, starting.what.slot)
        current = self._begun(starting)
        if not current or not isinstance(source, Stream):
            if region is not None:
                region.abandon()
            if current and isinstance(source, HopliteError):
                self._fail(what, "reduce", str(source))
            elif current:
                self._handle(ev.ForgetObject(what.source))
                self._fail(what, "source", f"{what.source} is not on this rank")
            return
        dtype = what.meta.dtype if what.meta.dtype is not None else np.dtype(np.uint8)
        length = what.meta.nbytes // dtype.itemsize
        step = self._transfers.chunk_size // flow.itemsize
        if self._checksums:
            step = whole_blocks(step, dtype.itemsize, flow.itemsize)
        step = max(1, min(length, step))
        key = slot_key(*name, what.generation)
        if region is None:  # a leaf's output is its source
            if self._checksums and source.sums is None:
                source.sums = Sums(len(source.data))
            output = Stream(self._engine, key, source.data, source.progress, source.keep, source.sums)
        else:
            sums = Sums(len(region.data)) if self._checksums else None
            output = Stream(self._engine, key, memoryview(region.data), keep=region, sums=sums)
        slot = _Slot(what, source, output, region, dtype, flow, length, step)
        self._slots[name] = slot
        if what.is_root:
            self._objects.publish(what.rid, what.generation, what.meta, output)
        self._transfers.appeared.fire()
        if region is not None:
            self._engine.spawn(self._run(slot), lambda error: self._run_ended(slot, error))
        for pull in starting.pulls:
            self.pull_child(pull)

    def pull_child(self, what: ev.PullChild) -> None:
        """Take a child's stream into the slot; see `PullChild`."""
        starting = self._starting.get((what.rid, what.slot))
        if starting is not None and starting.what.generation == what.generation:
            starting.pulls.append(what)
            return
        slot = self._slots.get((what.rid, what.slot))
        if slot is None or slot.what.generation != what.generation:
            return
        child = slot.children.get(what.child_slot)
        if child is not None and child.generation == what.child_generation and child.incoming is not None:
            return
        if (what.rank, what.incarnation) == self._me:
            self._engine.spawn(self._take_local(slot, what))
            return
        window = self._engine.config.window
        dtype = slot.dtype if what.leaf else slot.flow
        chunk = slot.step * dtype.itemsize
        if child is None or child.tainted or child.generation != what.child_generation:
            arrived = 0 if child is None or child.generation != what.child_generation else child.arrived
            if child is not None and child.incoming is not None:
                self._transfers.stop(child.incoming)
            child = _Child(what.child_slot, what.child_generation, dtype, [_buffer(chunk) for _ in range(window)])
            # chunks that were received and not yet used would be in the tainted buffers: ask for them again
            child.arrived = min(arrived, slot.done)
            slot.children[what.child_slot] = child
        here, first = child, child.arrived

        def buffer_of(start: int, stop: int) -> memoryview:
            return here.buffers[(start // chunk) % window][: stop - start]

        def progressed(position: int) -> None:
            here.arrived = -(-position // chunk)
            slot.output.changed.fire()
            slot.source.changed.fire()

        def ended(reason: str | None, tainted: bool) -> None:
            here.incoming, here.tainted = None, here.tainted or tainted
            if reason is not None and not slot.stopped:
                log.info("slot %d of %s: child %d ended: %s", what.slot, what.rid, what.child_slot, reason)
                if reason == CORRUPT:
                    self._child_corrupt(slot, what, here.arrived * chunk)
                else:
                    self._child_failed(slot, what.child_slot, what.child_generation)

        child.incoming = self._transfers.pull(
            self._fabric.link((what.rank, what.incarnation)),
            slot_key(what.rid, what.child_slot, what.child_generation),
            first * chunk,
            slot.length * dtype.itemsize,
            chunk,
            buffer_of,
            progressed,
            ended,
            watch=False,  # a child may wait for its own children as long as it takes
            allowed=slot.done + window - first,
            sums=Sums(slot.length * dtype.itemsize) if self._checksums else None,
        )

    async def _take_local(self, slot: _Slot, what: ev.PullChild) -> None:
        """Use the output of a slot of this rank as a child, as soon as that slot is there."""
        key = slot_key(what.rid, what.child_slot, what.child_generation)
        while (stream := self.find(key)) is None and not slot.stopped:
            await self._transfers.appeared
        if slot.stopped:
            return
        if stream is REFUSE:
            self._child_failed(slot, what.child_slot, what.child_generation)
            return
        known = slot.children.get(what.child_slot)
        if known is not None and known.incoming is not None:
            self._transfers.stop(known.incoming)
        dtype = slot.dtype if what.leaf else slot.flow
        slot.children[what.child_slot] = _Child(what.child_slot, what.child_generation, dtype, [], local=stream)
        slot.output.changed.fire()

    def _child_failed(self, slot: _Slot, child_slot: int, child_generation: int) -> None:
        what = slot.what
        self._handle(ev.ChildFailed(what.rid, what.slot, what.generation, child_slot, child_generation))

    def _child_corrupt(self, slot: _Slot, pull: ev.PullChild, position: int) -> None:
        """Have corrupt bytes of a child sent again; end the reduce if that has been in vain for too long."""
        what, timeout = slot.what, self._engine.config.corrupt_timeout
        retries = self._retries.setdefault(what.rid, {}).setdefault(what.slot, Retries())
        delay = retries.delay(position, timeout)
        if delay is None:
            text = (
                f"the bytes from offset {position} on of slot {pull.child_slot}, rank {pull.rank}, "
                f"have come to slot {what.slot} with a wrong checksum for {timeout:g} s"
            )
            self._fail(what, "reduce", text)
            return
        self._engine.after(delay, lambda: self._child_failed(slot, pull.child_slot, pull.child_generation))

    def stop(self, what: ev.StopSlot) -> None:
        """End a slot; see `StopSlot`."""
        name = (what.rid, what.slot)
        slot = self._slots.get(name) or self._starting.get(name)
        if slot is not None and slot.what.generation <= what.generation:
            self._stop(name)
        stopped = self._stopped.setdefault(what.rid, {})
        stopped[what.slot] = max(what.generation, stopped.get(what.slot, -1))

    def retire(self, rid: ObjectID) -> None:
        """Forget that there were slots of that reduce."""
        self._stopped.pop(rid, None)
        self._retries.pop(rid, None)

    async def _run(self, slot: _Slot) -> None:
        what, step = slot.what, slot.step
        wake = slot.output.changed
        out_dtype = slot.dtype if what.is_root else slot.flow
        # where a root rounds, the sum of a chunk is kept beside the result
        rounds = out_dtype != slot.flow and what.num_children > 0
        sums = np.empty(min(step, slot.length), slot.flow) if rounds else None
        while slot.done * step < slot.length:
            start, stop = slot.done * step, min((slot.done + 1) * step, slot.length)
            while not slot.stopped and not self._has(slot, stop):
                slot.source.changed.relay(wake)
                for child in slot.children.values():
                    if child.local is not None:
                        child.local.changed.relay(wake)
                await wake
                for child in [c for c in slot.children.values() if c.local is not None and c.local.broken]:
                    del slot.children[child.slot]
                    self._child_failed(slot, child.slot, child.generation)
            if slot.stopped:
                return
            fault.point("reduce.chunk")
            output = _elements(slot.output, out_dtype, start, stop)
            total = output if sums is None else sums[: stop - start]
            # in the order of the slots, which is that of the sources in an ordered reduce: an operation need not commute
            parts = {number: child.chunk(slot.done, start, stop) for number, child in slot.children.items()}
            parts[what.slot] = _elements(slot.source, slot.dtype, start, stop)
            left, *others = (parts[number] for number in sorted(parts))
            for right in others:
                await self._done(self._memory.reduce(what.op, total, left, right))
                left = total
            if not others:
                await self._done(self._memory.copy(total, left))
            if slot.stopped:
                return
            if what.is_root:
                kernels.finish(what.op, total, what.num_objects, output)
            slot.done += 1
            if slot.output.sums is not None:
                slot.output.sums.make(slot.output.data, start * out_dtype.itemsize, stop * out_dtype.itemsize)
            slot.output.advance(stop * out_dtype.itemsize)
            if slot.done == 1 and self._transfers.trace.on:
                self._transfers.trace.event("slot.first", **slot_of(slot.output.key))
            for child in slot.children.values():
                if child.incoming is not None:
                    first = child.incoming.offset // (step * child.dtype.itemsize)
                    self._transfers.allow(child.incoming, slot.done + len(child.buffers) - first)

    async def _done(self, event: Event) -> None:
        """Wait for an operation on memory; one on host memory is done when it returns."""
        while not event.done():
            tick = Signal(self._engine)
            self._engine.after(0.0, tick.fire)
            await tick

    @staticmethod
    def _has(slot: _Slot, stop: int) -> bool:
        return (
            slot.source.progress >= stop * slot.dtype.itemsize
            and len(slot.children) == slot.what.num_children
            and all(child.has(slot.done, stop) for child in slot.children.values())
        )

    def _run_ended(self, slot: _Slot, error: BaseException | None) -> None:
        what = slot.what
        if slot.stopped:
            return
        if error is not None:
            log.error("slot %d of %s failed: %s", what.slot, what.rid, error)
            self._handle(ev.SlotFailed(what.rid, what.slot, what.generation, "reduce", str(error)))
        elif what.is_root:
            assert slot.region is not None
            if self._objects.written(what.rid, what.generation, slot.region):
                slot.region = None
                self._handle(ev.SlotDone(what.rid, what.slot, what.generation))
            else:
                self._fail(what, "reduce", f"{what.rid} was deleted while it was being reduced")

    def _fail(self, what: ev.StartSlot, kind: str, text: str) -> None:
        self._handle(ev.SlotFailed(what.rid, what.slot, what.generation, kind, text))

    def _stop(self, name: tuple[ObjectID, int]) -> None:
        self._starting.pop(name, None)
        slot = self._slots.pop(name, None)
        if slot is None:
            return
        slot.stopped = True
        if not slot.what.is_root or slot.region is not None:
            slot.output.fail()
        for child in slot.children.values():
            if child.incoming is not None:
                self._transfers.stop(child.incoming)
        if slot.region is not None:
            slot.region.abandon()
            slot.region = None
        slot.output.changed.fire()


def _elements(stream: Stream, dtype: np.dtype[Any], start: int, stop: int) -> np.ndarray[Any, Any]:
    return np.frombuffer(stream.data[start * dtype.itemsize : stop * dtype.itemsize], dtype)


def _buffer(nbytes: int) -> memoryview:
    return memoryview(bytearray(nbytes))
