"""Streams of bytes that others can pull, and one transfer of one, at either end."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from hoplite_mpi.checksums import Sums
from hoplite_mpi.transport.engine import Engine
from hoplite_mpi.transport.fabric import Link
from hoplite_mpi.transport.primitives import Signal, Timer

__all__ = ["CORRUPT", "PROBE", "REFUSE", "Incoming", "Outgoing", "Stream"]

#: why a transfer ended that brought bytes with a wrong checksum
CORRUPT = "corrupt"

#: what is answered for a stream that will not be here (again)
REFUSE = object()

#: name of the stream that measures a link: no fault point, and no counter but `Transfers.probes`, knows of it
PROBE = b"p"


class Stream:
    """Bytes that others can pull while they grow: an object, or a partial result of a reduce.

    `keep` holds what keeps the bytes in place (a pin, a region).
    """

    def __init__(
        self,
        engine: Engine,
        key: bytes,
        data: memoryview,
        progress: int = 0,
        keep: Any = None,
        sums: Sums | None = None,
    ) -> None:
        self.key = key
        #: of its bytes, made where they were; None: nobody has asked for them
        self.sums = sums
        self.data = data
        self.keep = keep
        #: bytes [0, progress) are valid; only grows
        self.progress = progress
        #: the stream ended before its end: what was pulled from it is void
        self.broken = False
        self.changed = Signal(engine)

    def advance(self, progress: int) -> None:
        """Say that more bytes are valid."""
        if progress > self.progress:
            self.progress = progress
            self.changed.fire()

    def fail(self) -> None:
        """Say that no more bytes are coming."""
        self.broken = True
        self.changed.fire()


@dataclass(eq=False)
class Incoming:
    """One transfer at its receiver. Bytes [offset, offset + n) of the stream go where *buffer_of* says."""

    number: int
    link: Link
    tag: int
    key: bytes
    offset: int
    end: int
    chunk: int
    #: returns where the chunk at that offset goes
    buffer_of: Callable[[int, int], memoryview]
    #: told how far the stream is here, in order
    on_progress: Callable[[int], None]
    #: told (None, False) when all is there, else (why not, tainted): a tainted buffer may still be written to by MPI
    on_end: Callable[[str | None, bool], None]
    #: what the bytes have to agree with; None: they are not verified
    sums: Sums | None = None
    #: chunks that have come before their sums
    unverified: dict[int, memoryview] = field(default_factory=dict)
    #: chunk → the transfer that fetches it again; it writes where this one does
    repairs: dict[int, Incoming] = field(default_factory=dict)
    #: this is one
    is_repair: bool = False
    #: MPI may go on writing for one of them that has ended
    tainted: bool = False
    posted: int = 0
    progress: int = 0
    arrived: set[int] = field(default_factory=set)
    pending: dict[int, Callable[[BaseException | None], None]] = field(default_factory=dict)
    #: chunks that may be received now (None: all): what bounds the buffers of a reader slower than the sender
    allowed: int | None = None
    #: chunks that the sender said it had posted when it stopped
    limit: int | None = None
    ended: bool = False
    #: given up here, and why: what still arrives is not wanted
    stopping: str | None = None
    #: `on_end` has been told; what the sender has posted is taken so that nothing stays under way
    draining: bool = False
    watchdog: Timer | None = None
    seen: int = -1
    probe: bool = False

    @property
    def chunks(self) -> int:
        return -(-(self.end - self.offset) // self.chunk)

    @property
    def written(self) -> bool:
        """Whether receives are posted that write where it was told to."""
        return bool(self.pending) or any(repair.pending for repair in self.repairs.values())

    def span(self, index: int) -> tuple[int, int]:
        start = self.offset + index * self.chunk
        return start, min(start + self.chunk, self.end)


@dataclass(eq=False)
class Outgoing:
    """One transfer at its sender."""

    link: Link
    number: int
    key: bytes
    changed: Signal
    #: the receiver wants checksums
    summed: bool
    stopped: bool = False
    posted: int = 0
    #: its stream was found, and the trace told
    began: bool = False

    def stop(self) -> None:
        self.stopped = True
        self.changed.fire()
