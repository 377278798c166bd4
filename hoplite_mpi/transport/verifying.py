"""Verifying what transfers bring, where `Config.checksums` asks for it.

The sums come in control messages, ahead of the chunks: a stream whose sums are known needs one for 256 MiB, and what is counted, stopped
and drained stays the chunks alone. A chunk counts as received when it is verified. A corrupt one is fetched again from the same sender, by
a transfer of its own, its *repair*, while the others go on: it may have been the way. If that is corrupt, too, it is the sender: the
transfer ends, once what it has posted is taken, so that the next one has the buffers for itself.
"""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING

from hoplite_mpi.checksums import BLOCK, Sums
from hoplite_mpi.testing import fault
from hoplite_mpi.transport.engine import Engine
from hoplite_mpi.transport.sidechannel import PeerKey
from hoplite_mpi.transport.streams import CORRUPT, Incoming, Stream

if TYPE_CHECKING:
    from hoplite_mpi.transport.transfer import Transfers

__all__ = ["Verifier", "sums_of"]

log = logging.getLogger("hoplite_mpi.transfer")

#: most blocks whose sums one message has
_SUMS_AT_ONCE = 4096


def sums_of(stream: Stream, start: int, stop: int) -> tuple[bytes, int]:
    """Return the sums of bytes [start, stop), those behind it that are known already, and where they end."""
    if stream.sums is None:
        stream.sums = Sums(len(stream.data))
    stream.sums.make(stream.data, start, stop)  # what no producer has made
    return stream.sums.pack(start, _SUMS_AT_ONCE)


class Verifier:
    """Of the transfers of one process. Called under the engine's lock."""

    def __init__(self, transfers: Transfers, engine: Engine) -> None:
        self._transfers = transfers
        self._engine = engine
        #: peers that have another setting, and were told of
        self._differ: set[PeerKey] = set()

    def take(self, incoming: Incoming, start: int, packed: bytes) -> None:
        """Take in what the sender says of the bytes from *start* on."""
        if incoming.sums is not None and incoming.stopping is None:
            incoming.sums.take(start, packed)
            self.verify(incoming, incoming.sums)
            self._transfers.proceed(incoming)

    def verify(self, incoming: Incoming, sums: Sums) -> None:
        """Look at the chunks that have come and whose sums are here."""
        for index in sorted(incoming.unverified):
            start, stop = incoming.span(index)
            if not sums.known(start, stop):
                continue
            buffer = incoming.unverified.pop(index)
            wrong = sums.wrong(buffer, start)
            if wrong is None:
                fault.corrupt("transfer.verified", buffer)
                incoming.arrived.add(index)
                self._transfers.advance(incoming)
                continue
            self._tell(incoming, wrong)
            if incoming.is_repair:
                self._transfers.give_up(incoming, CORRUPT)
                return
            self._repair(incoming, index, sums)

    def _tell(self, incoming: Incoming, offset: int) -> None:
        transfers = self._transfers
        transfers.corrupt += 1
        log.warning(
            "bytes of %s from rank %d.%d have a wrong checksum at offset %d",
            transfers.name(incoming),
            *incoming.link.peer,
            offset,
        )
        if transfers.trace.on:
            transfers.note("transfer.corrupt", incoming, at=offset)

    def _repair(self, incoming: Incoming, index: int, sums: Sums) -> None:
        """Fetch a corrupt chunk again from the same sender."""
        start, stop = incoming.span(index)
        again = Sums(incoming.end)  # what the sender says of it then: it may be the sum that was wrong

        def ended(reason: str | None, tainted: bool) -> None:
            del incoming.repairs[index]
            incoming.tainted = incoming.tainted or tainted
            if incoming.ended or incoming.link.down:
                return
            if reason is None and incoming.stopping is None:
                sums.take(start, again.pack(start, -(-(stop - start) // BLOCK))[0])
                incoming.arrived.add(index)
                self._transfers.advance(incoming)
            elif reason is not None and incoming.stopping is None:
                self._transfers.give_up(incoming, reason)
                self._engine.after(self._engine.config.stall_timeout, lambda: self._stuck(incoming))
            self._transfers.proceed(incoming)

        repair = self._transfers.pull(
            *(incoming.link, incoming.key, start, stop, incoming.chunk, incoming.buffer_of),
            on_progress=lambda progress: None,
            on_end=ended,
            watch=False,  # the other one is watched
            sums=again,
        )
        repair.is_repair = True
        incoming.repairs[index] = repair

    def _stuck(self, incoming: Incoming) -> None:
        """The sender should have said by now what it had posted."""
        if not (incoming.ended or incoming.draining):
            incoming.draining = True
            incoming.on_end(incoming.stopping, incoming.written)

    def say_that_they_differ(self, peer: PeerKey, summed: bool) -> None:
        """Say, once for each peer, that it has another setting; it is served as it asks."""
        if peer not in self._differ:
            self._differ.add(peer)
            log.warning(
                "rank %d.%d verifies what it receives: %s, and this rank: %s. Give all ranks the same Config.checksums: "
                "sums that are not made where the bytes are made don't cover all of their way",
                *peer,
                *("yes" if one else "no" for one in (summed, not summed)),
            )
