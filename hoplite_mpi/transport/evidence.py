"""What this process sees of the life and death of others, as the membership is told it.

A reset connection proves a death only if the address does not answer either; silence proves nothing, and is told again while it lasts.
"""

from __future__ import annotations

from collections.abc import Callable

from hoplite_mpi.protocol import membership_messages as ms
from hoplite_mpi.transport.engine import Engine
from hoplite_mpi.transport.primitives import Timer
from hoplite_mpi.transport.sidechannel import PeerKey, SideChannel

__all__ = ["Evidence"]

#: seconds for a new member to call this process; then this process calls it
_CALL_AFTER = 0.2


class Evidence:
    """Of all peers of a process. Called under the engine's lock.

    address_of: where a member can be called, None for who is none; tell: the membership.
    """

    def __init__(
        self,
        engine: Engine,
        side: SideChannel,
        address_of: Callable[[PeerKey], tuple[str, int] | None],
        tell: Callable[[ms.Event], None],
    ) -> None:
        self._engine = engine
        self._side = side
        self._address_of = address_of
        self._tell = tell
        #: processes whose connection broke and are called once more, to see whether they are really gone
        self._redialed: set[PeerKey] = set()
        #: those that are down → when their silence is told again
        self._silences: dict[PeerKey, Timer] = {}

    def connected(self, peer: PeerKey) -> None:
        """There is a connection to it."""
        self._redialed.discard(peer)
        self.back(peer)

    def disconnected(self, peer: PeerKey, proof: str) -> None:
        """The connection to it has ended; proof: "reset", "bye" (it said so) or "silence"."""
        address = self._address_of(peer)
        if proof == "reset" and address is not None and peer not in self._redialed:
            # a live peer, too, resets an old connection after a cut: only its address can say that it is gone
            self._redialed.add(peer)
            self._side.connect(peer, address)
            return
        self._redialed.discard(peer)
        self.down(peer, "reset" if proof in ("reset", "bye") else "silence")

    def expect(self, peer: PeerKey) -> None:
        """It is to call this process, unless it has died since it asked to be let in: that has to come out."""

        def call() -> None:
            address = self._address_of(peer)
            if address is not None and not self._side.connected(peer):
                self._side.connect(peer, address)

        self._engine.after(_CALL_AFTER, call)

    def back(self, peer: PeerKey) -> None:
        """It was heard."""
        waiting = self._silences.pop(peer, None)
        if waiting is not None:
            waiting.cancel()
        self._tell(ms.PeerUp(*peer))

    def down(self, peer: PeerKey, proof: ms.Proof) -> None:
        """It is dead, or silent."""

        def lasts() -> None:
            del self._silences[peer]
            if self._address_of(peer) is not None:
                wait()
                self._tell(ms.SilenceLasts(*peer))

        def wait() -> None:
            self._silences[peer] = self._engine.after(self._engine.config.cut_margin, lasts)

        if peer not in self._silences:
            wait()
        self._tell(ms.PeerDown(*peer, proof))
