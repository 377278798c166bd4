"""A worker process after its fork: reads requests from its socket, runs them, replies."""

from __future__ import annotations

import contextlib
import faulthandler
import os
import random
import socket
import sys
import threading
from collections.abc import Iterator
from typing import Any

from .execute import Executor
from .frames import FrameReader, encode
from .protocol import Progress, Reply, TaskRequest

__all__ = ["run_worker"]

#: bytes at once; more would make malloc map and unmap memory for every short frame
_CHUNK = 1 << 16


class _Connection:
    """The worker's end of its socket. Any thread of the task may send; only the main loop receives."""

    def __init__(self, sock: socket.socket) -> None:
        self._socket = sock
        self._lock = threading.Lock()
        self._reader = FrameReader()
        self._inode = os.fstat(sock.fileno()).st_ino
        self.pid = os.getpid()

    def messages(self) -> Iterator[Any]:
        """Yield what the rank sends, until it closes its end."""
        while data := self._socket.recv(_CHUNK):
            yield from self._reader.feed(data)

    def send(self, reply: Reply) -> None:
        """Send *reply*. Does nothing in a child that the task has forked: there is one voice on this socket."""
        if os.getpid() != self.pid:
            return
        frame = encode(reply.to_wire())
        with self._lock:
            # a task can close every descriptor, and then open a file of its own under this number
            if os.fstat(self._socket.fileno()).st_ino != self._inode:
                raise OSError("the task closed the worker's socket")
            self._socket.sendall(frame)


def run_worker(sock: socket.socket) -> None:
    """Serve requests from *sock* until the rank closes it. Never returns: the process ends here."""
    status = 1
    try:
        _prepare()
        _serve(_Connection(sock))
        status = 0
    except OSError:
        status = 1  # the rank is gone, or the task closed the socket: nobody to tell
    finally:
        _flush()
        os._exit(status)


def _prepare() -> None:
    if sys.stdout is not None:
        # whole lines, into a pipe or file as well, so that those of several workers do not mix
        sys.stdout.reconfigure(line_buffering=True, write_through=False)  # type: ignore[union-attr]
    if sys.stderr is not None:
        faulthandler.enable()  # a crash in C says where the task was
    random.seed()
    numpy_random = sys.modules.get("numpy.random")
    if numpy_random is not None:
        numpy_random.seed()  # else every fork draws the same numbers


def _serve(connection: _Connection) -> None:
    messages = connection.messages()
    arena = next(messages, None)
    executor = Executor(arena)
    connection.send(Reply(0))
    for seq, forget, wire in messages:
        if forget:
            executor.forget()
        _answer(connection, executor, seq, TaskRequest.from_wire(wire))


def _answer(connection: _Connection, executor: Executor, seq: int, request: TaskRequest) -> None:
    def report(fraction: float, text: str) -> None:
        connection.send(Reply(seq, Progress(fraction, text)))

    result = executor.run(request, report)
    _flush()
    if os.getpid() != connection.pid:
        os._exit(0)  # a child that the task forked came back from the task's function: the worker itself replies
    connection.send(Reply(seq, result))
    executor.rest()


def _flush() -> None:
    for stream in (sys.stdout, sys.stderr):
        # a task may have closed, replaced or removed it, or the reader of the rank's output may be gone
        with contextlib.suppress(OSError, ValueError, AttributeError):
            stream.flush()
