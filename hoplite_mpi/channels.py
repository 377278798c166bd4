"""Messages between users of the store, a channel for each kind; they and views come in the order in which they came to this rank."""

from __future__ import annotations

import logging
from collections.abc import Callable

from hoplite_mpi.transport.engine import Engine
from hoplite_mpi.transport.primitives import Ordered
from hoplite_mpi.transport.sidechannel import PeerKey

__all__ = ["Channels"]

log = logging.getLogger("hoplite_mpi")

#: messages kept for a channel that is not open yet
_MAX_UNCLAIMED = 10_000


class Channels:
    """Who listens to which channel. Called under the engine's lock, without which the listeners are called."""

    def __init__(self, engine: Engine) -> None:
        self._receivers: dict[int, Callable[[PeerKey, bytes], None]] = {}
        #: messages on channels that are not open here yet: the other rank may be quicker
        self._unclaimed: dict[int, list[tuple[PeerKey, bytes]]] = {}
        self._ordered = Ordered(engine)

    def post(self, callback: Callable[[], None]) -> None:
        """Call *callback* after all messages that have come before."""
        self._ordered.post(callback)

    def open(self, channel: int, receiver: Callable[[PeerKey, bytes], None]) -> None:
        """Give messages on a channel to *receiver*, those first that have come already."""
        self._receivers[channel] = receiver
        for peer, payload in self._unclaimed.pop(channel, ()):
            self.deliver(peer, channel, payload)

    def deliver(self, peer: PeerKey, channel: int, payload: bytes) -> None:
        """A message has come."""
        receiver = self._receivers.get(channel)
        if receiver is not None:
            self._ordered.post(lambda: receiver(peer, payload))
            return
        waiting = self._unclaimed.setdefault(channel, [])
        if len(waiting) < _MAX_UNCLAIMED:
            waiting.append((peer, payload))
        else:
            log.error(
                "a message of rank %d on channel %d is lost: %d wait, and nobody listens",
                peer[0],
                channel,
                len(waiting),
            )
