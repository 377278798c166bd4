"""Transfers: the bytes of a stream, chunk by chunk, from a process that has or gets them to one that asked.

Receiver-driven: the receiver posts its first receives, then asks for (key, offset) by control message; the sender sends each
chunk as soon as its own copy has it. When a transfer is given up while both live, the sender says how many chunks it had
posted, so that the receiver can take exactly those and nothing is left under way.

Who owns a buffer: only an unmatched receive can be cancelled. A matched one from a peer that has died or stopped may go on
writing, so its region is quarantined and the prefix that had arrived moves to a new one (*tainted* in `Incoming.on_end`).

Checksums: see `hoplite_mpi.transport.verifying`.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import msgpack
from mpi4py import MPI

from hoplite_mpi.checksums import Sums
from hoplite_mpi.testing import fault
from hoplite_mpi.trace import Recorder
from hoplite_mpi.transport.engine import Engine
from hoplite_mpi.transport.fabric import Fabric, Link, cancelled
from hoplite_mpi.transport.primitives import Signal
from hoplite_mpi.transport.sidechannel import PeerKey
from hoplite_mpi.transport.streams import PROBE, REFUSE, Incoming, Outgoing, Stream
from hoplite_mpi.transport.verifying import Verifier, sums_of

if TYPE_CHECKING:
    from hoplite_mpi.transport.gauge import Gauge

__all__ = ["Transfers"]

log = logging.getLogger("hoplite_mpi.transfer")

_PULL, _STOP, _STOPPED, _SUMS = range(4)


class Transfers:
    """All transfers of a process. Called under the engine's lock."""

    def __init__(
        self,
        engine: Engine,
        fabric: Fabric,
        channel: int,
        find: Callable[[bytes], Any],
        name_of: Callable[[bytes], dict[str, Any]],
        trace: Recorder,
    ) -> None:
        self._engine = engine
        self._fabric = fabric
        self._channel = channel
        #: returns the Stream of a key, REFUSE, or None: it isn't here yet
        self._find = find
        #: returns what a stream is, by its key, for logs and traces
        self._name_of = name_of
        self.trace = trace
        #: fire it when a stream has come that was not here
        self.appeared = Signal(engine)
        self._incoming: dict[int, Incoming] = {}
        self._outgoing: dict[tuple[PeerKey, int], Outgoing] = {}
        self._last_number = 0
        #: matched receives of dead peers and their buffers: MPI may write there until the process ends
        self._quarantine: list[Any] = []
        self.gauge: Gauge | None = None
        #: bytes per message
        self.chunk_size = 256 * 1024
        #: probes under way, of this process and at it
        self.probes = 0
        self.bytes_received = 0
        self.bytes_sent = 0
        self.started = 0
        #: those that began behind what an earlier one had brought
        self.resumed = 0
        self.completed = 0
        #: those that ended before all was there
        self.failed = 0
        self.stalled = 0
        self.corrupt = 0
        self._verifier = Verifier(self, engine)

    @property
    def busy(self) -> bool:
        """Whether anything is under way."""
        return bool(self._incoming or self._outgoing)

    # -- receiver ----------------------------------------------------------------------------------------------------------

    def pull(
        self,
        link: Link,
        key: bytes,
        offset: int,
        end: int,
        chunk: int,
        buffer_of: Callable[[int, int], memoryview],
        on_progress: Callable[[int], None],
        on_end: Callable[[str | None, bool], None],
        watch: bool = True,
        allowed: int | None = None,
        sums: Sums | None = None,
    ) -> Incoming:
        """Ask the peer for bytes [offset, end) of a stream.

        watch: give up after `Config.stall_timeout` without progress; allowed: chunks to take before `allow` says more.
        sums: verify what comes, and put its sums there; *offset* and *chunk* are whole blocks then, or *chunk* reaches to the end.
        """
        self._last_number += 1
        incoming = Incoming(
            self._last_number, link, self._fabric.new_tag(link), key, offset, end, chunk, buffer_of, on_progress, on_end
        )
        incoming.progress, incoming.allowed, incoming.probe, incoming.sums = offset, allowed, key == PROBE, sums
        if sums is not None:
            sums.forget(offset)  # those of an older sender
        if incoming.probe:
            self.probes += 1
        else:
            self.started += 1
            self.resumed += offset > 0
            if self.trace.on:
                self.note("transfer.begin", incoming, end=end)
            if self.gauge is not None:
                self.gauge.began(link)
        self._incoming[incoming.number] = incoming
        if link.down:
            self._engine.after(0, lambda: self._finish(incoming, "peer lost"))
            return incoming
        self._refill(incoming)
        request = [_PULL, incoming.number, incoming.tag, key, offset, end, chunk, sums is not None]
        self._fabric.send(link.peer, self._channel, msgpack.packb(request))
        if not incoming.probe:
            fault.point("transfer.pulled")
        if offset >= end:
            self._engine.after(0, lambda: self._finish(incoming, None))
        elif watch:
            self._watch(incoming)
        return incoming

    def link_up(self, link: Link) -> None:
        """Receive what was asked for while the link was not up."""
        for incoming in [t for t in self._incoming.values() if t.link is link and not t.ended]:
            self._refill(incoming)

    def allow(self, incoming: Incoming, chunks: int) -> None:
        """Let the first so many chunks in."""
        incoming.allowed = chunks
        if not incoming.ended:
            self._refill(incoming)

    def stop(self, incoming: Incoming, reason: str = "stopped") -> None:
        """Give a transfer up, without a report; what the sender has posted is still taken, into the same buffers."""
        if incoming.ended or incoming.draining:
            return
        incoming.draining = True
        self.give_up(incoming, reason)

    def give_up(self, incoming: Incoming, reason: str) -> None:
        """Take what the sender has posted, and nothing more."""
        if incoming.stopping is not None:
            return
        incoming.stopping = reason
        incoming.unverified.clear()
        self._fabric.send(incoming.link.peer, self._channel, msgpack.packb([_STOP, incoming.number]))
        for repair in incoming.repairs.values():
            self.give_up(repair, reason)
        if not incoming.probe:
            fault.point("transfer.stop")

    def _refill(self, incoming: Incoming) -> None:
        link = incoming.link
        if link.comm is None:
            return
        limit = incoming.chunks if incoming.limit is None else incoming.limit
        if incoming.allowed is not None and not incoming.stopping:
            limit = min(limit, incoming.allowed)
        while len(incoming.pending) < self._engine.config.window and incoming.posted < limit:
            index = incoming.posted
            incoming.posted += 1
            start, stop = incoming.span(index)
            # what still comes of a transfer that was given up must be taken, but not kept
            buffer = memoryview(bytearray(stop - start)) if incoming.stopping else incoming.buffer_of(start, stop)

            def arrived(error: BaseException | None, index: int = index, buffer: memoryview = buffer) -> None:
                self._arrived(incoming, index, buffer, error)

            incoming.pending[index] = arrived
            self._fabric.irecv(link, buffer, incoming.tag, arrived)

    def _arrived(self, incoming: Incoming, index: int, buffer: memoryview, error: BaseException | None) -> None:
        if error is not None:  # it stays among the pending ones: what it means is for the membership to say
            self._fabric.failed(incoming.link, error)
            return
        incoming.pending.pop(index, None)
        if incoming.ended:
            return
        if not incoming.probe:
            self.bytes_received += len(buffer)
            if self.gauge is not None:
                self.gauge.received(incoming.link, len(buffer))
            fault.point("transfer.chunk_received")
            fault.corrupt("transfer.chunk_corrupt", buffer)
        if incoming.stopping is None and incoming.sums is not None:
            incoming.unverified[index] = buffer
            self._verifier.verify(incoming, incoming.sums)
        elif incoming.stopping is None:
            incoming.arrived.add(index)
            self.advance(incoming)
        self.proceed(incoming)

    def advance(self, incoming: Incoming) -> None:
        """Say how far the bytes are here, and right, without a gap."""
        first = (incoming.progress - incoming.offset) // incoming.chunk
        before = incoming.progress
        while first in incoming.arrived:
            incoming.arrived.discard(first)
            incoming.progress = incoming.span(first)[1]
            first += 1
        if incoming.progress > before:
            incoming.on_progress(incoming.progress)
            if self.trace.on and before == incoming.offset and not incoming.probe:
                self.note("transfer.first", incoming)

    def proceed(self, incoming: Incoming) -> None:
        """Go on after a chunk or what was said about chunks: receive more, or end."""
        limit = incoming.chunks if incoming.limit is None else incoming.limit
        taken = not incoming.pending and not incoming.repairs and incoming.posted >= limit
        if incoming.stopping is None and incoming.progress >= incoming.end:
            self._finish(incoming, None)
        elif taken and (incoming.stopping is not None or incoming.limit is not None):
            self._finish(incoming, incoming.stopping or "the sender stopped")
        else:
            self._refill(incoming)

    def _watch(self, incoming: Incoming) -> None:
        def check() -> None:
            if incoming.ended or incoming.stopping is not None:
                return
            if incoming.progress == incoming.seen and incoming.link.comm is not None:
                self.stalled += not incoming.probe
                if self.trace.on and not incoming.probe:
                    self.note("transfer.stalled", incoming)
                self._route_around(incoming)
                return
            incoming.seen = incoming.progress if incoming.link.comm is not None else -1
            self._watch(incoming)

        incoming.watchdog = self._engine.after(self._engine.config.stall_timeout, check)

    def _route_around(self, incoming: Incoming) -> None:
        """Give up on a sender that lives but does not send: its chunks are taken, and thrown away, when it wakes."""
        self.stop(incoming, "stalled")
        incoming.on_end("stalled", incoming.written)

    def _sender_died(self, incoming: Incoming) -> None:
        """Cancel the receives from a dead peer. A matched one stays, and may go on writing if the peer was only stopped."""
        for repair in list(incoming.repairs.values()):
            self._sender_died(repair)
        tainted = incoming.tainted
        for callback in list(incoming.pending.values()):
            request = self._engine.unwatch(callback)
            if request is not None and cancelled(request):
                continue
            tainted = True  # also where it has failed: MPI does not say whether it had been matched
            self._quarantine.append((request, callback))
        incoming.pending.clear()
        self._finish(incoming, "peer lost", tainted)

    def _finish(self, incoming: Incoming, reason: str | None, tainted: bool = False) -> None:
        if incoming.ended:
            return
        incoming.ended = True
        if incoming.watchdog is not None:
            incoming.watchdog.cancel()
        self._incoming.pop(incoming.number, None)
        if incoming.probe:
            self.probes -= 1
        else:
            self._ended(incoming, reason)
        if incoming.draining:
            if not incoming.probe:
                fault.point("transfer.drained")
        else:
            incoming.on_end(reason, tainted)

    def _ended(self, incoming: Incoming, reason: str | None) -> None:
        self.completed += reason is None
        self.failed += reason is not None
        if self.trace.on:
            self.note("transfer.end", incoming, progress=incoming.progress, why=reason or "complete")
        if self.gauge is not None:
            self.gauge.ended(incoming.link)

    def name(self, incoming: Incoming) -> str:
        """Return what it brings, for logs."""
        return ", ".join(f"{one} {value}" for one, value in self._name_of(incoming.key).items())

    def note(self, name: str, incoming: Incoming, **fields: Any) -> None:
        """Trace something about a transfer."""
        peer, offset = incoming.link.peer[0], incoming.offset
        self.trace.event(name, id=incoming.number, peer=peer, offset=offset, **self._name_of(incoming.key), **fields)

    # -- sender ------------------------------------------------------------------------------------------------------------

    def on_message(self, peer: PeerKey, payload: bytes) -> None:
        """Take a control message about a transfer."""
        kind, number, *rest = msgpack.unpackb(payload)
        link = self._fabric.link(peer)
        if kind == _PULL:
            tag, key, offset, end, chunk, summed = rest
            self._end_older(peer, key)
            outgoing = self._outgoing[peer, number] = Outgoing(link, number, key, Signal(self._engine), summed)
            if key != PROBE and summed != self._engine.config.checksums:
                self._verifier.say_that_they_differ(peer, summed)
            self._engine.spawn(self._serve(outgoing, tag, key, offset, end, chunk))
        elif kind == _STOP:
            stopped = self._outgoing.get((peer, number))
            if stopped is not None:
                stopped.stop()
        elif kind == _STOPPED:
            incoming = self._incoming.get(number)
            if incoming is not None and not incoming.ended:
                self._sender_stopped(incoming, rest[0])
        elif kind == _SUMS:
            incoming = self._incoming.get(number)
            if incoming is not None and not incoming.ended:
                self._verifier.take(incoming, *rest)

    def _end_older(self, peer: PeerKey, key: bytes) -> None:
        """An object goes to one receiver at a time: whoever was receiving it is taken to be stopped, or this one were not here."""
        for (other, _), outgoing in self._outgoing.items():
            if other != peer and outgoing.key == key != PROBE:
                outgoing.stop()

    def _sender_stopped(self, incoming: Incoming, posted: int) -> None:
        """Take the chunks that are under way, cancel the receives for those that aren't."""
        incoming.limit = posted
        for index in sorted((i for i in incoming.pending if i >= posted), reverse=True):
            request = self._engine.unwatch(incoming.pending[index])
            if request is None:  # it has failed: the transfer ends when its sender is out of the view
                return
            try:
                request.Cancel()
                request.Wait()
            except MPI.Exception as error:
                self._fabric.failed(incoming.link, error)
                return
            del incoming.pending[index]
            incoming.posted -= 1
        self.proceed(incoming)

    async def _serve(self, outgoing: Outgoing, tag: int, key: bytes, offset: int, end: int, chunk: int) -> None:
        link, number = outgoing.link, outgoing.number
        self.probes += key == PROBE
        try:
            complete = await self._send_all(outgoing, tag, key, offset, end, chunk)
        finally:
            self.probes -= key == PROBE
            self._outgoing.pop((link.peer, number), None)
            if outgoing.began and self.trace.on:
                name = self._name_of(key)
                self.trace.event("serve.end", id=number, peer=link.peer[0], posted=outgoing.posted, **name)
        if not complete and not link.down:
            if key != PROBE:
                fault.point("transfer.stopped")
            self._fabric.send(link.peer, self._channel, msgpack.packb([_STOPPED, number, outgoing.posted]))

    async def _send_all(self, outgoing: Outgoing, tag: int, key: bytes, offset: int, end: int, chunk: int) -> bool:
        """Send [offset, end); return whether all of it was posted."""
        link, changed = outgoing.link, outgoing.changed

        def over() -> bool:
            return outgoing.stopped or link.down

        while (stream := self._find(key)) is None and not over():
            self.appeared.relay(changed)
            await changed
        if stream is None or stream is REFUSE or len(stream.data) < end:
            return False
        if self.trace.on and key != PROBE:
            outgoing.began = True
            self._serving(outgoing, key, stream, offset, end)
        in_flight = 0

        def sent() -> None:
            nonlocal in_flight
            in_flight -= 1
            changed.fire()

        position = told = offset
        while position < end:
            stop = min(position + chunk, end)
            while stream.progress < stop and not (stream.broken or over()):
                stream.changed.relay(changed)
                await changed
            while in_flight >= self._engine.config.window and not (stream.broken or over()):
                await changed
            if stream.broken or over():
                return False
            while outgoing.summed and told < stop:
                packed, end_of_sums = sums_of(stream, told, stop)
                self._fabric.send(link.peer, self._channel, msgpack.packb([_SUMS, outgoing.number, told, packed]))
                told = end_of_sums
            if key != PROBE:
                fault.point("transfer.chunk_sent")
                if stream.progress < len(stream.data):
                    fault.point("transfer.chunk_relayed")
                self.bytes_sent += stop - position
            in_flight += 1
            # `keep` holds the stream's bytes in place while MPI reads them
            self._fabric.isend(link, stream.data[position:stop], tag, sent, keep=stream.keep)
            outgoing.posted += 1
            position = stop
        return True

    def _serving(self, outgoing: Outgoing, key: bytes, stream: Stream, offset: int, end: int) -> None:
        """Trace that a stream is being sent, and how much of it is here now."""
        self.trace.event(
            "serve.begin",
            id=outgoing.number,
            peer=outgoing.link.peer[0],
            offset=offset,
            end=end,
            had=stream.progress,
            nbytes=len(stream.data),
            complete=stream.progress >= len(stream.data),
            **self._name_of(key),
        )

    def peer_lost(self, peer: PeerKey) -> None:
        """End all transfers with a process that is gone."""
        for incoming in [t for t in self._incoming.values() if t.link.peer == peer]:
            self._sender_died(incoming)
        for outgoing in [o for (p, _), o in self._outgoing.items() if p == peer]:
            outgoing.stop()
