"""What a rank and its writer process say to each other: msgpack frames and file descriptors over a Unix socket."""

from __future__ import annotations

import os
import select
import socket
import struct
from collections import deque
from dataclasses import dataclass, field
from typing import Any

import msgpack

from hoplite_mpi.meta import Meta

__all__ = ["INLINE_COPY", "Channel", "FileSource", "WriteRequest", "Written"]

_LENGTH = struct.Struct("<I")
#: sources up to this many bytes are copied when submitted; larger ones hold a file descriptor until they are written
INLINE_COPY = 256 * 1024


@dataclass(frozen=True, slots=True)
class FileSource:
    """Bytes [offset, offset + nbytes) of a file, such as a sealed object of the arena. Unchanged until the callback."""

    path: str
    offset: int
    nbytes: int


@dataclass(frozen=True, slots=True)
class WriteRequest:
    """One output to be made durable."""

    #: directory of the workflow; the file goes to its checkpoints/
    workflow_dir: str
    #: of the controller that asked; part of the file's name
    epoch: int
    task_id: str
    #: wished name in the file; `Written.entry` has the one it got
    entry: str
    meta: Meta
    source: FileSource | bytes


@dataclass(frozen=True, slots=True)
class Written:
    """Where an output is. Durable; named in the journal it is committed."""

    file: str
    entry: str
    #: `serialize.checksum` of meta and bytes
    checksum: str
    nbytes: int


@dataclass(slots=True)
class Channel:
    """One end of the socket. One thread may send while another receives."""

    sock: socket.socket
    _received: bytearray = field(default_factory=bytearray)
    #: descriptors that came; each belongs to the next message that has "fd" set, since both keep their order
    _fds: deque[int] = field(default_factory=deque)

    def send(self, message: dict[str, Any], fd: int | None = None) -> None:
        """Send one message; blocks while the other end doesn't read. OSError once it is gone."""
        if fd is not None:
            message = {**message, "fd": True}
        body: bytes = msgpack.packb(message)
        head = _LENGTH.pack(len(body))
        if fd is None:
            self.sock.sendall(head + body)
        else:
            sent = socket.send_fds(self.sock, [head], [fd])
            self.sock.sendall(head[sent:] + body)

    def poll(self, timeout: float) -> bool:
        """Return whether `receive` has something to go on with; waits up to *timeout* seconds for it."""
        return self._whole() is not None or bool(select.select([self.sock], [], [], timeout)[0])

    def _whole(self) -> int | None:
        """Return the length of the next message if all of it is here."""
        if len(self._received) < _LENGTH.size:
            return None
        (length,) = _LENGTH.unpack_from(self._received)
        return length if len(self._received) >= _LENGTH.size + length else None

    def receive(self) -> tuple[dict[str, Any], int | None] | None:
        """Return the next message and its descriptor (now the caller's), or None at the end; blocks. OSError."""
        while (length := self._whole()) is None:
            data, fds, _, _ = socket.recv_fds(self.sock, 1 << 20, 16)
            self._fds.extend(fds)
            if not data:
                return None
            self._received += data
        message = msgpack.unpackb(bytes(self._received[_LENGTH.size : _LENGTH.size + length]))
        del self._received[: _LENGTH.size + length]
        return message, self._fds.popleft() if message.get("fd") else None

    def close(self) -> None:
        """Close the socket and what came over it unclaimed."""
        self.sock.close()
        while self._fds:
            os.close(self._fds.popleft())
