"""Side channel: a TCP connection between each two processes that talk, for liveness, doorbell and joining.

The kernel says who is dead: a reset or an end without goodbye proves it; keepalive and TCP_USER_TIMEOUT report silence, without any
code running on the other side, so a process that holds the GIL for a minute is not dead.

Keepalive stops while something is unacknowledged, and TCP_USER_TIMEOUT counts from when that was sent: a message sent just before
keepalive gives up would double the time. So whoever sends looks again when the last acknowledgement is `Config.keepalive_timeout` old.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import hashlib
import hmac
import logging
import os
import select
import socket
import struct
import termios
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import msgpack

from hoplite_mpi.transport.engine import Engine
from hoplite_mpi.transport.primitives import Timer

__all__ = ["PeerKey", "SideChannel", "own_address"]

log = logging.getLogger("hoplite_mpi.sidechannel")

#: (rank, incarnation)
PeerKey = tuple[int, int]

_HEADER = struct.Struct("<IB")
_HELLO, _CHALLENGE, _PROOF, _BYE, _USER = range(5)
_MAX_FRAME = 64 << 20
#: Linux's struct tcp_info up to last_ack_recv, the milliseconds since the last acknowledgement
_TCP_INFO = struct.Struct("=8B13I")
#: what SIOCOUTQ tells: bytes that are not acknowledged, those included that the kernel has not sent yet since its device is down
_QUEUED = struct.Struct("=i")
#: seconds between two looks that have to find the same: this process itself may have been stopped
_SECOND_LOOK = 0.1
#: errors by which the kernel says that the process at the other end is gone
_RESET = {errno.ECONNRESET, errno.EPIPE, errno.ECONNREFUSED, errno.ECONNABORTED}


def own_address() -> str:
    """Return the IPv4 address that other hosts reach this one by: HOPLITE_HOST, else the first interface that isn't loopback."""
    given = os.environ.get("HOPLITE_HOST")
    if given:
        return given
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        for _, name in socket.if_nameindex():
            if name == "lo" or name.startswith(("docker", "virbr")):
                continue
            with contextlib.suppress(OSError):
                raw = fcntl.ioctl(probe, 0x8915, struct.pack("256s", name.encode()[:15]))  # SIOCGIFADDR
                return socket.inet_ntoa(raw[20:24])
    return "127.0.0.1"


@dataclass(eq=False)
class _Connection:
    sock: socket.socket
    #: who is at the other end; None until it has said so
    peer: PeerKey | None = None
    #: the secret was proven by both sides
    trusted: bool = False
    initiator: bool = False
    nonce: bytes = b""
    inbox: bytearray = None  # type: ignore[assignment]
    outbox: bytearray = None  # type: ignore[assignment]
    said_bye: bool = False
    connecting: bool = False
    deadline: Timer | None = None
    #: looks whether what was sent has been acknowledged
    look: Timer | None = None
    #: the last look found an acknowledgement overdue
    overdue: bool = False

    def __post_init__(self) -> None:
        self.inbox, self.outbox = bytearray(), bytearray()
        self.nonce = os.urandom(16)


class SideChannel:
    """The connections of one process. All methods are called under the engine's lock."""

    def __init__(
        self,
        engine: Engine,
        me: PeerKey,
        secret: bytes,
        *,
        on_up: Callable[[PeerKey], None],
        on_down: Callable[[PeerKey, str], None],
        on_message: Callable[[PeerKey, int, Any], None],
    ) -> None:
        self._engine = engine
        self._me = me
        self._secret = secret
        self._on_up = on_up
        #: told (peer, "reset" | "silence" | "bye")
        self._on_down = on_down
        self._on_message = on_message
        self._connections: dict[int, _Connection] = {}
        self._peers: dict[PeerKey, _Connection] = {}
        self._dialing: set[PeerKey] = set()
        self._listener = socket.socket(socket.AF_INET, socket.SOCK_STREAM)
        self._listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        self._listener.bind(("0.0.0.0", 0))  # other hosts connect; the secret guards it
        self._listener.listen(512)
        self._listener.setblocking(False)
        #: (host, port) for the others
        self.address: tuple[str, int] = (own_address(), self._listener.getsockname()[1])
        engine.add_socket(self._listener.fileno(), self._accept)

    def connected(self, peer: PeerKey) -> bool:
        """Return whether there is a trusted connection to that process."""
        return peer in self._peers

    def connect(self, peer: PeerKey, address: tuple[str, int]) -> None:
        """Start a connection; `on_up` or `on_down` will tell. Nothing to do if there is one or one is on its way."""
        if peer in self._peers or peer in self._dialing:
            return
        sock = socket.socket(socket.AF_INET, socket.SOCK_STREAM)
        self._tune(sock)
        connection = _Connection(sock, peer=peer, initiator=True, connecting=True)
        self._dialing.add(peer)
        error = sock.connect_ex(address)
        if error not in (0, errno.EINPROGRESS):
            self._dialing.discard(peer)
            sock.close()
            proof = "reset" if error in _RESET else "silence"
            self._engine.after(0, lambda: self._on_down(peer, proof))
            return
        self._register(connection, select.EPOLLIN | select.EPOLLOUT)

    def send(self, peer: PeerKey, kind: int, body: Any) -> bool:
        """Send a message (msgpack-able body); return whether there is a connection to send it by."""
        connection = self._peers.get(peer)
        if connection is None:
            return False
        self._write(connection, _USER, msgpack.packb([kind, body]))
        return True

    def hang_up(self, peer: PeerKey) -> None:
        """Close the connection to a process that is no longer a member, without a report."""
        connection = self._peers.get(peer)
        if connection is not None:
            self._drop(connection)

    def close(self) -> None:
        """Say goodbye to all and close."""
        for connection in list(self._connections.values()):
            if connection.trusted:
                self._write(connection, _BYE, b"")
            self._drop(connection)
        self._engine.remove_socket(self._listener.fileno())
        self._listener.close()

    # -- sockets ---------------------------------------------------------------------------------------------------------

    def _tune(self, sock: socket.socket) -> None:
        timeout = self._engine.config.keepalive_timeout
        sock.setblocking(False)
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPIDLE, 1)
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPINTVL, 1)
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPCNT, max(1, round(timeout) - 1))
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, int(timeout * 1000))

    def _register(self, connection: _Connection, events: int) -> None:
        fd = connection.sock.fileno()
        self._connections[fd] = connection
        connection.deadline = self._engine.after(
            self._engine.config.join_timeout, lambda: self._lost(connection, "silence")
        )
        self._engine.add_socket(fd, lambda mask: self._ready(connection, mask), events)

    def _accept(self, mask: int) -> None:
        while True:
            try:
                sock, _ = self._listener.accept()
            except BlockingIOError:
                return
            except OSError as error:
                log.warning("side channel: accept failed: %s", error)
                return
            self._tune(sock)
            self._register(_Connection(sock), select.EPOLLIN)

    def _ready(self, connection: _Connection, mask: int) -> None:
        if connection.connecting:
            error = connection.sock.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR)
            if error:
                self._lost(connection, "reset" if error in _RESET else "silence")
                return
            if not mask & select.EPOLLOUT:
                return
            connection.connecting = False
            self._engine.modify_socket(connection.sock.fileno(), select.EPOLLIN)
            assert connection.peer is not None
            self._write(connection, _HELLO, msgpack.packb([*self._me, *connection.peer, connection.nonce]))
            return
        if mask & select.EPOLLOUT:
            self._flush(connection)
        if mask & ~select.EPOLLOUT and connection.sock.fileno() >= 0:
            self._read(connection)

    def _read(self, connection: _Connection) -> None:
        try:
            while data := connection.sock.recv(1 << 16):
                connection.inbox += data
                if len(data) < 1 << 16:
                    break
            ended = not data
        except BlockingIOError:
            ended = False
        except OSError as error:
            # what came before the error still counts: a goodbye may be in it
            self._parse(connection)
            self._lost(connection, "reset" if error.errno in _RESET else "silence")
            return
        self._parse(connection)
        if ended:
            self._lost(connection, "reset")

    def _parse(self, connection: _Connection) -> None:
        inbox = connection.inbox
        while len(inbox) >= _HEADER.size and connection.sock.fileno() >= 0:
            length, kind = _HEADER.unpack_from(inbox)
            if length > (_MAX_FRAME if connection.trusted else 4096):
                self._reject(connection, f"a frame of {length} bytes")
                return
            if len(inbox) < _HEADER.size + length:
                return
            body = bytes(inbox[_HEADER.size : _HEADER.size + length])
            del inbox[: _HEADER.size + length]
            self._frame(connection, kind, body)

    def _frame(self, connection: _Connection, kind: int, body: bytes) -> None:
        if connection.trusted:
            assert connection.peer is not None
            if kind == _BYE:
                connection.said_bye = True
            elif kind == _USER:
                number, payload = msgpack.unpackb(body, strict_map_key=False)
                self._on_message(connection.peer, number, payload)
            return
        try:
            self._handshake(connection, kind, body)
        except (ValueError, TypeError, msgpack.UnpackException) as error:
            self._reject(connection, f"a malformed greeting ({error})")

    def _handshake(self, connection: _Connection, kind: int, body: bytes) -> None:
        """Both sides prove that they know the run's secret: hello(nonce) / challenge(nonce, proof) / proof."""
        if kind == _HELLO and not connection.initiator and connection.peer is None:
            rank, incarnation, to_rank, to_incarnation, nonce = msgpack.unpackb(body)
            if (to_rank, to_incarnation) != self._me:
                self._reject(connection, f"a call for rank {to_rank}.{to_incarnation}, who is not here")
                return
            connection.peer = (int(rank), int(incarnation))
            answer = [connection.nonce, self._proof(b"accept", self._me, nonce)]
            self._write(connection, _CHALLENGE, msgpack.packb(answer))
        elif kind == _CHALLENGE and connection.initiator:
            nonce, proof = msgpack.unpackb(body)
            assert connection.peer is not None
            if not hmac.compare_digest(proof, self._proof(b"accept", connection.peer, connection.nonce)):
                self._reject(connection, "a wrong secret")
                return
            self._write(connection, _PROOF, self._proof(b"connect", self._me, nonce))
            self._trust(connection)
        elif kind == _PROOF and connection.peer is not None and not connection.initiator:
            if not hmac.compare_digest(body, self._proof(b"connect", connection.peer, connection.nonce)):
                self._reject(connection, "a wrong secret")
                return
            self._trust(connection)
        else:
            self._reject(connection, f"message {kind} in a greeting")

    def _proof(self, role: bytes, who: PeerKey, nonce: bytes) -> bytes:
        return hmac.digest(self._secret, b"%s %d.%d " % (role, *who) + nonce, hashlib.sha256)

    def _trust(self, connection: _Connection) -> None:
        assert connection.peer is not None
        connection.trusted = True
        if connection.deadline is not None:
            connection.deadline.cancel()
        self._dialing.discard(connection.peer)
        self._peers[connection.peer] = connection
        self._on_up(connection.peer)

    def _write(self, connection: _Connection, kind: int, body: bytes) -> None:
        connection.outbox += _HEADER.pack(len(body), kind) + body
        self._flush(connection)

    def _flush(self, connection: _Connection) -> None:
        if connection.connecting or connection.sock.fileno() < 0:
            return
        try:
            while connection.outbox:
                del connection.outbox[: connection.sock.send(connection.outbox)]
        except BlockingIOError:
            self._engine.modify_socket(connection.sock.fileno(), select.EPOLLIN | select.EPOLLOUT)
            return
        except OSError as error:
            proof = "reset" if error.errno in _RESET else "silence"
            # not from inside of a caller's step: it may be in the middle of sending to all
            self._engine.after(0, lambda: self._lost(connection, proof))
            return
        self._engine.modify_socket(connection.sock.fileno(), select.EPOLLIN)
        if connection.trusted and connection.look is None:
            self._look(connection)

    def _look(self, connection: _Connection) -> None:
        """Find out whether the peer's kernel still answers, and look again when it will be silent for too long."""
        connection.look = None
        if connection.sock.fileno() < 0:
            return
        queued = fcntl.ioctl(connection.sock.fileno(), termios.TIOCOUTQ, bytes(_QUEUED.size))
        if not _QUEUED.unpack(queued)[0]:
            connection.overdue = False
            return
        info = _TCP_INFO.unpack(connection.sock.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, _TCP_INFO.size))
        left = self._engine.config.keepalive_timeout - info[-1] / 1000
        if left <= 0 and connection.overdue:
            self._lost(connection, "silence")
            return
        connection.overdue = left <= 0
        connection.look = self._engine.after(max(left, _SECOND_LOOK), lambda: self._look(connection))

    def _reject(self, connection: _Connection, what: str) -> None:
        log.warning("side channel: connection from %s refused: %s", connection.peer or "a stranger", what)
        self._lost(connection, "silence")

    def _lost(self, connection: _Connection, proof: str) -> None:
        if connection.sock.fileno() < 0:
            return
        peer, known = connection.peer, connection.trusted or connection.initiator
        self._drop(connection)
        if peer in self._peers:  # there is a newer connection to it
            return
        if known and peer is not None:
            self._on_down(peer, "bye" if connection.said_bye else proof)

    def _drop(self, connection: _Connection) -> None:
        if connection.sock.fileno() < 0:
            return
        self._engine.remove_socket(connection.sock.fileno())
        self._connections.pop(connection.sock.fileno(), None)
        for timer in (connection.deadline, connection.look):
            if timer is not None:
                timer.cancel()
        if connection.peer is not None:
            self._dialing.discard(connection.peer)
            if self._peers.get(connection.peer) is connection:
                del self._peers[connection.peer]
        connection.sock.close()
