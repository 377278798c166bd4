"""A worker process after its fork: reads requests from its letter box and its socket, runs them, replies."""

from __future__ import annotations

import faulthandler
import os
import random
import select
import signal
import socket
import sys
import threading
from collections.abc import Iterator
from typing import Any

from .execute import Executor, flush_output
from .frames import FrameReader, decode, encode
from .memory import mark_for_oom, private_memory
from .protocol import LETTER_LIMIT, Began, Progress, Reply, TaskRequest
from .tree import end_children, has_children

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
        """Yield what the rank sends, until it closes its end: its hello, then requests.

        Each small request is a letter in a socket of its own, taken out only when it is its turn: the rank may take it back
        until then. What is too large for a letter comes by itself, through the stream.
        """
        data, descriptors, _, _ = socket.recv_fds(self._socket, _CHUNK, 1, socket.MSG_CMSG_CLOEXEC)
        if not descriptors:
            return
        yield from self._reader.feed(data)
        box = socket.socket(fileno=descriptors[0])
        waiting = select.poll()
        waiting.register(self._socket, select.POLLIN)
        waiting.register(box, select.POLLIN)
        while True:
            try:
                letter = box.recv(LETTER_LIMIT, socket.MSG_DONTWAIT)
            except BlockingIOError:
                letter = b""
            if letter:
                yield decode(letter)
            elif any(number == self._socket.fileno() for number, _ in waiting.poll()):
                data = self._socket.recv(_CHUNK)
                if not data:
                    return
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
        mark_for_oom()
        _prepare()
        _serve(_Connection(sock))
        status = 0
    except OSError:
        status = 1  # the rank is gone, or the task closed the socket: nobody to tell
    finally:
        flush_output()
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
        if not _answer(connection, executor, seq, TaskRequest.from_wire(wire)):
            return


def _answer(connection: _Connection, executor: Executor, seq: int, request: TaskRequest) -> bool:
    """Run *request* and reply. Return whether this process can run another one."""

    def report(fraction: float, text: str) -> None:
        connection.send(Reply(seq, Progress(fraction, text)))

    if request.timeout is not None or request.memory is not None:
        connection.send(Reply(seq, Began(0 if request.memory is None else private_memory())))
    result = executor.run(request, report)
    flush_output()
    # an attempt is over when all of its processes are. What the task left in this one may count on those that are killed
    # here (the pool of a library, a server), so it runs no other task
    last = has_children() and end_children()
    _calm()
    connection.send(Reply(seq, result, last))
    executor.rest()
    return not last


def _calm() -> None:
    """Undo what would hit the next task: blocked signals, which all that it starts inherits, and an alarm."""
    signal.setitimer(signal.ITIMER_REAL, 0)
    if signal.getsignal(signal.SIGALRM) is signal.SIG_DFL and not signal.pthread_sigmask(signal.SIG_BLOCK, ()):
        return  # nothing is blocked, so nothing can be pending
    signal.signal(signal.SIGALRM, signal.SIG_IGN)  # one that has gone off while it was blocked is forgotten
    signal.pthread_sigmask(signal.SIG_SETMASK, [])
    signal.signal(signal.SIGALRM, signal.SIG_DFL)
