"""Links: MPI point-to-point between this process and each peer, control messages in order, and the doorbell.

Doorbell rule: post the MPI send first, then ring with the number of messages posted so far; a process does not block while it has
received fewer than rung. A peer that has said it is awake needs no ring until it says that it goes to sleep.

With `Config.checksums` each control message has a sum. One that is wrong can't be had again: the protocol counts on getting all of them,
in order, so the process that got it can't go on.
"""

from __future__ import annotations

import logging
import struct
import zlib
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from mpi4py import MPI

from hoplite_mpi.testing import fault
from hoplite_mpi.transport.engine import Engine
from hoplite_mpi.transport.sidechannel import PeerKey, SideChannel

__all__ = ["ASLEEP", "AWAKE", "CONTROL_SLOT", "RING", "Fabric", "Link", "cancelled"]

log = logging.getLogger("hoplite_mpi.fabric")

#: kinds of side-channel messages that are ours
RING, AWAKE, ASLEEP = 1, 2, 3

_CONTROL_TAG = 1
#: tags of transfers; the standard guarantees 32767
_FIRST_TAG = 16
#: bytes of one control message on the wire: an inline object with its envelope fits into one
CONTROL_SLOT = 72 * 1024
_MORE, _SUMMED = 1, 2
#: bytes up to which MPI sends without a handshake
_EAGER = 4096
#: channel, flags, length: a length of its own spares a Status for each receive
_HEAD = struct.Struct("<BBI")
#: CRC-32 of all that comes before it
_SUM = struct.Struct("<I")
#: bytes of the payload in one message
_ROOM = CONTROL_SLOT - _HEAD.size - _SUM.size


def cancelled(request: MPI.Request) -> bool:
    """Cancel a receive; return whether it is, so that MPI will not write to its buffer: a matched one stays."""
    status = MPI.Status()
    try:
        request.Cancel()
        return request.Test(status) and status.Is_cancelled()
    except MPI.Exception:  # it has failed, as those on a dead process do under ULFM
        return False


@dataclass(eq=False)
class Link:
    """MPI connection to one incarnation of a rank."""

    peer: PeerKey
    comm: MPI.Comm | None = None
    dest: int = 0
    #: the process is gone or evicted: nothing is sent any more, and what is pending stays with MPI
    down: bool = False
    #: MPI has reported an error: nothing is posted any more, what failed counts as pending until the membership has decided
    broken: bool = False
    #: control messages that wait for the connection
    backlog: deque[bytes] = field(default_factory=deque)
    #: control messages posted, and received, since the connection came up
    sent: int = 0
    received: int = 0
    #: what the peer's last ring said that it had posted
    rung: int = 0
    peer_awake: bool = False
    ring_out: bool = False
    told_awake: bool = False
    partial: bytearray | None = None
    receive: Callable[[BaseException | None], None] | None = None
    #: buffer of each send that MPI has not completed
    unfinished: dict[Callable[[BaseException | None], None], Any] = field(default_factory=dict)
    next_tag: int = _FIRST_TAG


class Fabric:
    """All links of a process. Called under the engine's lock."""

    def __init__(
        self,
        engine: Engine,
        side: SideChannel,
        on_message: Callable[[PeerKey, int, bytes], None],
        on_wanted: Callable[[Link], None],
        on_broken: Callable[[Link], None],
    ) -> None:
        self._engine = engine
        self._side = side
        #: told (peer, channel, payload) for each control message, in order for each peer
        self._on_message = on_message
        #: asked to bring up a link that something was sent on
        self._on_wanted = on_wanted
        #: told once of a link on which MPI has reported an error
        self._on_broken = on_broken
        self._links: dict[PeerKey, Link] = {}
        self._tag_limit = min(int(MPI.COMM_WORLD.Get_attr(MPI.TAG_UB) or 32767), 1 << 22)
        #: requests on dead peers and their buffers: MPI may touch these until the process ends
        self._quarantine: list[tuple[MPI.Request | None, Any]] = []
        #: told each link that has come up
        self.on_up: Callable[[Link], None] = lambda link: None
        #: told who sent a message that came with a wrong sum; nothing more is received from it
        self.on_corrupt: Callable[[PeerKey], None] = lambda peer: None
        self._summed = _SUMMED if engine.config.checksums else 0
        self.messages_sent = 0
        self.bytes_sent = 0
        engine.may_sleep = self._may_sleep

    def link(self, peer: PeerKey) -> Link:
        """Return the link to a process, new if there was none."""
        link = self._links.get(peer)
        if link is None:
            link = self._links[peer] = Link(peer)
        return link

    def up(self, link: Link, comm: MPI.Comm, dest: int) -> None:
        """Use *comm* for the link from now on."""
        link.comm, link.dest = comm, dest
        if link.down:
            return
        self._listen(link)
        while link.backlog:
            self._post(link, link.backlog.popleft())
        self.on_up(link)

    def drop(self, peer: PeerKey) -> None:
        """Give a link up: its process is gone."""
        link = self._links.get(peer)
        if link is None or link.down:
            return
        link.down = True
        link.backlog.clear()
        for callback, buffer in link.unfinished.items():
            self._quarantine.append((self._engine.unwatch(callback), buffer))
        link.unfinished.clear()
        if link.receive is not None:
            request = self._engine.unwatch(link.receive)
            if request is not None:
                cancelled(request)  # if it has been matched it stays pending, in a buffer that nobody else uses

    def send(self, peer: PeerKey, channel: int, payload: bytes) -> None:
        """Send a control message; it is dropped if the peer is gone or MPI can't reach it."""
        link = self.link(peer)
        if link.down or link.broken:
            return
        for start in range(0, len(payload) or 1, _ROOM):
            fragment = payload[start : start + _ROOM]
            more = _MORE if start + _ROOM < len(payload) else 0
            message = _HEAD.pack(channel, more | self._summed, len(fragment)) + fragment
            if self._summed:
                message += _SUM.pack(zlib.crc32(message))
            if link.comm is None:
                link.backlog.append(message)
            else:
                self._post(link, message)
        if link.comm is None:
            self._on_wanted(link)

    def _post(self, link: Link, message: bytes) -> None:
        assert link.comm is not None
        self.isend(link, message, _CONTROL_TAG)
        link.sent += 1
        self.messages_sent += 1
        self.bytes_sent += len(message)
        if not link.peer_awake and not link.ring_out:
            link.ring_out = self._side.send(link.peer, RING, link.sent)

    def _listen(self, link: Link) -> None:
        slot = bytearray(CONTROL_SLOT)

        def post() -> None:
            self.irecv(link, slot, _CONTROL_TAG, arrived, passive=True)

        def arrived(error: BaseException | None) -> None:
            if link.down:
                return
            if error is not None:
                self.failed(link, error)
                return
            channel, flags, length = _HEAD.unpack_from(slot)
            fault.corrupt("fabric.message_corrupt", memoryview(slot)[_HEAD.size : _HEAD.size + length])
            if flags & _SUMMED and not _is_right(slot, _HEAD.size + length):
                self.on_corrupt(link.peer)
                return
            payload = bytes(memoryview(slot)[_HEAD.size : _HEAD.size + length])
            post()
            link.received += 1
            self._deliver(link, channel, flags & _MORE, payload)

        link.receive = arrived
        post()

    def _deliver(self, link: Link, channel: int, more: int, payload: bytes) -> None:
        if more or link.partial is not None:
            if link.partial is None:
                link.partial = bytearray()
            link.partial += payload
            if more:
                return
            payload, link.partial = bytes(link.partial), None
        self._on_message(link.peer, channel, payload)

    def isend(
        self, link: Link, buffer: Any, tag: int, callback: Callable[[], None] | None = None, keep: Any = None
    ) -> None:
        """Post a send and keep *buffer* and *keep* alive until MPI is done with them, for ever if the peer dies first.

        *callback* is called when it has succeeded; one that fails stays as it is until the peer is out of the view.
        """
        assert link.comm is not None
        if link.broken:
            return
        try:
            request = link.comm.Isend([buffer, MPI.BYTE], link.dest, tag)
            done = len(buffer) <= _EAGER and request.Test()  # a small message is mostly gone already
        except MPI.Exception as error:
            self._quarantine.append((None, (buffer, keep)))
            self.failed(link, error)
            return
        if done:
            if callback is not None:
                callback()
            return

        def ended(error: BaseException | None) -> None:
            del link.unfinished[ended]
            if error is not None:
                self._quarantine.append((None, (buffer, keep)))  # MPI does not say whether it has let go of it
                self.failed(link, error)
            elif callback is not None:
                callback()

        link.unfinished[ended] = (buffer, keep)
        self._engine.watch(request, ended)

    def irecv(
        self,
        link: Link,
        buffer: Any,
        tag: int,
        callback: Callable[[BaseException | None], None],
        passive: bool = False,
    ) -> None:
        """Post a receive and watch it (see `Engine.watch`); who is told an error has to pass it to `failed`."""
        assert link.comm is not None
        if link.broken:
            return
        try:
            request = link.comm.Irecv([buffer, MPI.BYTE], link.dest, tag)
        except MPI.Exception as error:
            self.failed(link, error)
            return
        self._engine.watch(request, callback, passive)

    def failed(self, link: Link, error: BaseException) -> None:
        """Take note of an error that MPI reports: it proves nothing, but the link is of no use any more."""
        if link.down or link.broken:
            return
        link.broken = True
        log.info("MPI can't reach rank %d.%d: %s", *link.peer, error)
        self._on_broken(link)

    # -- transfers ---------------------------------------------------------------------------------------------------------

    def new_tag(self, link: Link) -> int:
        """Return a tag for a transfer; transfers are drained, so one that comes round again is free."""
        tag = link.next_tag
        link.next_tag = tag + 1 if tag + 1 < self._tag_limit else _FIRST_TAG
        return tag

    # -- doorbell ------------------------------------------------------------------------------------------------------------

    def on_side_message(self, peer: PeerKey, kind: int, count: Any) -> None:
        """Take a RING, AWAKE or ASLEEP."""
        link = self.link(peer)
        if kind == RING:
            link.rung = max(link.rung, count)
            link.told_awake = True
            self._side.send(peer, AWAKE, 0)
        elif kind == AWAKE:
            link.peer_awake, link.ring_out = True, False
        elif kind == ASLEEP:
            link.peer_awake = link.ring_out = False
            if link.sent > count and not link.down:
                link.ring_out = self._side.send(peer, RING, link.sent)

    def side_is_up(self, peer: PeerKey) -> None:
        """Ring for what was posted before there was a connection to ring on."""
        link = self.link(peer)
        if link.sent and not link.peer_awake and not link.ring_out:
            link.ring_out = self._side.send(peer, RING, link.sent)

    def _may_sleep(self) -> bool:
        for link in self._links.values():
            if link.received < link.rung and not link.down:
                return False
        for link in self._links.values():
            if link.told_awake:
                link.told_awake = False
                self._side.send(link.peer, ASLEEP, link.received)
        return True


def _is_right(slot: bytearray, end: int) -> bool:
    """Return whether the sum that stands behind the first *end* bytes is theirs."""
    return end + _SUM.size <= len(slot) and _SUM.unpack_from(slot, end)[0] == zlib.crc32(memoryview(slot)[:end])
