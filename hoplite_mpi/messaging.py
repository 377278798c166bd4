"""Messages between the user threads of two ranks."""

from __future__ import annotations

from collections import deque
from typing import TYPE_CHECKING, Any

from hoplite_mpi.config import DEFAULT
from hoplite_mpi.errors import GetTimeoutError, PeerLostError

if TYPE_CHECKING:
    from hoplite_mpi.store import ObjectStore

__all__ = ["Mailbox"]


class Mailbox:
    """Small messages from rank to rank, in order for each pair, each delivered to one `receive`.

    Every rank opens it under the same *number* (from 1 to 100; a store has one of each). For one receiving thread at a time.
    """

    def __init__(self, store: ObjectStore, number: int) -> None:
        if not 1 <= number <= 100:
            raise ValueError(f"a mailbox has a number from 1 to 100, not {number}")
        self._store = store
        self._inbox: deque[tuple[int, bytes]] = deque()
        self._engine = store.runtime.engine
        self._waiter = self._engine.waiter()
        self._send = store.channel(number, self._take)

    def _take(self, peer: tuple[int, int], payload: bytes) -> None:
        self._inbox.append((peer[0], payload))
        self._waiter.wake()

    def send(self, rank: int, payload: bytes) -> None:
        """Send bytes to a rank and return at once. PeerLostError if it is no member (any more)."""
        if not self._send(rank, bytes(payload)):
            raise PeerLostError(f"rank {rank} is not a member: the message was not sent")

    def receive(self, timeout: Any = DEFAULT) -> tuple[int, bytes]:
        """Return (rank, bytes) of the next message; waits for it. GetTimeoutError; what closed the store, if it is closed."""
        seconds = self._engine.config.deadline(timeout)
        if not self._engine.wait(self._ready, self._waiter.block, seconds):
            raise GetTimeoutError(f"no message has come in {seconds:g} s")
        if not self._inbox:
            self._store.runtime.check()
        return self._inbox.popleft()

    def _ready(self) -> bool:
        return bool(self._inbox) or self._store.closed
