"""What a rank knows about one worker process, and its end of that worker's socket."""

from __future__ import annotations

import contextlib
import socket
import time
from collections import deque
from collections.abc import Callable
from typing import Any

from .frames import FrameReader, decode, encode
from .protocol import LETTER_LIMIT, Progress, Reply, TaskRequest, TaskResult

__all__ = ["RemoteWorker", "TaskHandle"]

#: bytes at once; more would make malloc map and unmap memory for every short frame
_CHUNK = 1 << 16
#: bytes of pickles that a worker may hold before it is told to drop them all
BLOB_LIMIT = 256 << 20


class TaskHandle:
    """A submitted task. `WorkerPool.cancel` takes it. holder: whose lease it runs under, 0: under none."""

    __slots__ = (
        "cancelled",
        "done",
        "holder",
        "memory_used",
        "on_done",
        "on_progress",
        "overran",
        "request",
        "waits",
        "worker",
    )

    def __init__(
        self,
        request: TaskRequest,
        on_done: Callable[[TaskResult], object],
        on_progress: Callable[[Progress], object] | None,
        holder: int = 0,
    ) -> None:
        self.request = request
        self.holder = holder
        self.on_done = on_done
        self.on_progress = on_progress
        #: it is given to a worker without a task only: there is a limit, which counts from when the worker has it
        self.waits = request.timeout is not None or request.memory is not None
        #: the worker that has it; None while it is queued and when it is done
        self.worker: RemoteWorker | None = None
        self.cancelled = False
        #: set once, when its result is handed over to the callback
        self.done = False
        #: the limit for which it is being killed, ``"timeout"`` or ``"memory"``
        self.overran = ""
        #: the most bytes that it was seen to use; measured only if it has a limit
        self.memory_used = 0

    @property
    def has_begun(self) -> bool:
        """Whether a worker is at it, or was; a moment old."""
        worker = self.worker
        return self.done or (worker is not None and worker.handle is self)


class RemoteWorker:
    """One worker process. All methods are called with the pool's lock held; none blocks.

    Small requests go into its letter box, so that it finds the next one when it has done one. Those that it has not
    taken out can be taken back: so what waits there has not begun.
    """

    def __init__(self, number: int, sock: socket.socket, hello: Any) -> None:
        sock.setblocking(False)
        self.number = number
        self.socket = sock
        #: None until the forkserver has told it
        self.pid: int | None = None
        #: it has said that its main loop runs
        self.ready = False
        #: it is being killed, or dead: never gets another task
        self.condemned = False
        #: it ends by itself after its last reply
        self.retired = False
        #: its forkserver is gone: there will be no exit status, and the kernel has killed it
        self.orphaned = False
        #: whose tasks it has, or had last; 0: nobody's that has a lease
        self.holder = 0
        #: killed since the lease of that one was over
        self.lease_ended = False
        #: no more comes from its socket
        self.eof = False
        #: monotonic time at which something is to be done about it, see `Fleet._expire`
        self.deadline: float | None = None
        #: for people: why the pool has it killed, "closed its connection …"
        self.cause: str | None = None
        #: number of the request → task, in the order in which it takes them; all but the first may not have been taken out
        self.tasks: dict[int, TaskHandle] = {}
        #: monotonic time since which the first of them is the first
        self.since = 0.0
        #: its last task was so quick that the next one shall wait for it
        self.quick = False
        #: number of the latest request
        self._seq = 0
        #: keys of the blobs that it was sent since it was told to forget
        self._known: set[str] = set()
        self._known_bytes = 0
        self._reader = FrameReader()
        self._out: deque[memoryview] = deque()
        #: both ends of its letter box
        self._post, self._box = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        with contextlib.suppress(OSError):  # it is gone: its exit status says so
            socket.send_fds(sock, [encode(hello)], [self._box.fileno()])

    @property
    def handle(self) -> TaskHandle | None:
        """The task that it has begun, or is about to; None: it has nothing to do."""
        return next(iter(self.tasks.values()), None)

    @property
    def has_output(self) -> bool:
        """Whether bytes wait until its socket can take them."""
        return bool(self._out)

    def assign(self, handle: TaskHandle) -> None:
        """Give a task to a worker without one. Raises what msgpack does for a request that can't be sent: then nothing has happened."""
        request = handle.request
        forget = self._known_bytes > BLOB_LIMIT
        known: set[str] = set() if forget else self._known
        frame = encode([self._seq + 1, forget, request.to_wire(known)])
        if forget:
            self._known, self._known_bytes = known, 0
        if not known.issuperset(request.blobs):
            self._known_bytes += sum(len(data) for key, data in request.blobs.items() if key not in known)
            known.update(request.blobs)
        self._take(handle)
        self.since = time.monotonic()
        if len(frame) > LETTER_LIMIT or not self._write(frame):
            self.send(frame)

    def assign_next(self, handle: TaskHandle) -> bool:
        """Give another task to a worker that has one; False if that can't be: then nothing has happened."""
        request = handle.request
        # what it may be told to give back must not be what it has a blob from
        if not self._known.issuperset(request.blobs) or self._known_bytes > BLOB_LIMIT or self._out:
            return False
        try:
            frame = encode([self._seq + 1, False, request.to_wire(self._known)])
        except (TypeError, ValueError, OverflowError):  # `assign` tells
            return False
        if len(frame) > LETTER_LIMIT or not self._write(frame):
            return False
        self._take(handle)
        return True

    def take_back(self, *, all_of_them: bool = False) -> list[TaskHandle]:
        """Return the tasks that it has not begun and won't, in their order; its first one only if *all_of_them*."""
        first = next(iter(self.tasks), None)
        kept, found = b"", []
        while True:
            try:
                letter = self._box.recv(LETTER_LIMIT, socket.MSG_DONTWAIT)
            except OSError:  # there is none, or no box
                break
            if not letter:
                break
            seq = decode(letter)[0]
            if seq == first and not all_of_them:  # may be the one with the blobs
                kept = letter
                continue
            handle = self.tasks.pop(seq, None)
            if handle is not None:
                handle.worker = None
                found.append(handle)
        if kept:
            self._write(kept)
        return found

    def over(self, seq: int) -> TaskHandle | None:
        """Return the task that request *seq* was for, which has ended."""
        handle = self.tasks.pop(seq, None)
        if self.tasks:
            self.since = time.monotonic()
        return handle

    def close(self) -> None:
        """Close its socket and its letter box."""
        self.socket.close()
        self._post.close()
        self._box.close()

    def _take(self, handle: TaskHandle) -> None:
        self._seq += 1
        self.tasks[self._seq] = handle
        handle.worker = self

    def _write(self, letter: bytes) -> bool:
        try:
            self._post.send(letter, socket.MSG_DONTWAIT)
        except BlockingIOError:
            return False
        except OSError:
            return True  # as in `flush`
        return True

    def send(self, frame: bytes) -> None:
        """Send as much as goes at once, keep the rest for `flush`."""
        if not self._out:
            try:
                sent = self.socket.send(frame)
            except BlockingIOError:
                sent = 0
            except OSError:
                return  # as in `flush`
            if sent == len(frame):
                return
            self._out.append(memoryview(frame)[sent:])
        else:
            self._out.append(memoryview(frame))
            self.flush()

    def flush(self) -> None:
        """Send what waits, as far as the socket takes it."""
        try:
            while self._out:
                sent = self.socket.send(self._out[0])
                if sent == len(self._out[0]):
                    self._out.popleft()
                else:
                    self._out[0] = self._out[0][sent:]
        except BlockingIOError:
            return
        except OSError:
            self._out.clear()  # it is gone: its end of file or its exit status says so to the pool

    def receive(self, *, all_of_it: bool = False) -> list[Reply]:
        """Return the replies that are there; ValueError if it sent something else. Sets `eof`."""
        found: list[Reply] = []
        while not self.eof:
            try:
                data = self.socket.recv(_CHUNK)
            except BlockingIOError:
                break
            except OSError:
                data = b""
            if not data:
                self.eof = True
                break
            try:
                found.extend(Reply.from_wire(message) for message in self._reader.feed(data))
            except (ValueError, TypeError, LookupError) as error:
                self.eof = True  # where its next frame begins can't be known
                raise ValueError(f"a task wrote into its worker's socket: {error}") from error
            if not all_of_it and len(data) < _CHUNK:
                break
        return found
