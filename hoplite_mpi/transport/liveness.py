"""Who has not answered for too long: a process that is stopped, or whose engine hangs, keeps its connections alive.

Four pings to `Config.evict_timeout`; an idle process sends and answers one to each peer in that quarter, no more. Missed
pings are counted, not seconds: a suspension of this process itself, or of the whole machine, counts as one.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable

from hoplite_mpi.transport.engine import Engine
from hoplite_mpi.transport.sidechannel import PeerKey, SideChannel

__all__ = ["KINDS", "Liveness"]

#: kinds of side-channel messages that are ours
_PING, _PONG = 21, 22
KINDS = (_PING, _PONG)

#: pings without an answer that make a peer silent
_PINGS = 4


class Liveness:
    """Pings the peers of a process. Called under the engine's lock."""

    def __init__(
        self,
        engine: Engine,
        side: SideChannel,
        *,
        peers: Callable[[], Iterable[PeerKey]],
        on_silence: Callable[[PeerKey], None],
        on_return: Callable[[PeerKey], None],
    ) -> None:
        self._engine = engine
        self._side = side
        #: returns those that have to answer
        self._peers = peers
        self._on_silence = on_silence
        #: told of a silent one that speaks again
        self._on_return = on_return
        #: peer → pings since it was heard last
        self._missed: dict[PeerKey, int] = {}

    def start(self) -> None:
        """Ping from now on."""
        self._engine.after(self._engine.config.evict_timeout / _PINGS, self._tick)

    def heard(self, peer: PeerKey) -> None:
        """Take note that any message has come from a peer."""
        if self._missed.pop(peer, 0) > _PINGS:
            self._on_return(peer)

    def on_side_message(self, peer: PeerKey, kind: int) -> None:
        """Answer a ping; `heard` has been told."""
        if kind == _PING:
            self._side.send(peer, _PONG, None)

    def _tick(self) -> None:
        peers = [peer for peer in self._peers() if self._side.connected(peer)]
        self._missed = {peer: self._missed.get(peer, 0) + 1 for peer in peers}
        for peer in peers:
            if self._missed[peer] <= _PINGS:  # no more of them: nobody may read them
                self._side.send(peer, _PING, None)
        self.start()
        for peer in peers:
            if self._missed.get(peer) == _PINGS + 1:
                self._on_silence(peer)
