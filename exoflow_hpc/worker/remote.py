"""What a rank knows about one worker process, and its end of that worker's socket."""

from __future__ import annotations

import socket
from collections import deque
from collections.abc import Callable
from typing import Any

from .frames import FrameReader, encode
from .protocol import Progress, Reply, TaskRequest, TaskResult

__all__ = ["RemoteWorker", "TaskHandle"]

#: bytes at once; more would make malloc map and unmap memory for every short frame
_CHUNK = 1 << 16
#: bytes of pickles that a worker may hold before it is told to drop them all
BLOB_LIMIT = 256 << 20


class TaskHandle:
    """A submitted task. `WorkerPool.cancel` takes it."""

    __slots__ = ("cancelled", "done", "memory_used", "on_done", "on_progress", "overran", "request", "worker")

    def __init__(
        self,
        request: TaskRequest,
        on_done: Callable[[TaskResult], object],
        on_progress: Callable[[Progress], object] | None,
    ) -> None:
        self.request = request
        self.on_done = on_done
        self.on_progress = on_progress
        #: the worker that has it; None while it is queued and when it is done
        self.worker: RemoteWorker | None = None
        self.cancelled = False
        #: set once, when its result is handed over to the callback
        self.done = False
        #: the limit for which it is being killed, ``"timeout"`` or ``"memory"``
        self.overran = ""
        #: the most bytes that it was seen to use; measured only if it has a limit
        self.memory_used = 0


class RemoteWorker:
    """One worker process. All methods are called with the pool's lock held; none blocks."""

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
        #: killed since the lease of its rank was over
        self.lease_ended = False
        #: no more comes from its socket
        self.eof = False
        #: monotonic time at which something is to be done about it, see `Fleet._expire`
        self.deadline: float | None = None
        #: for people: why the pool has it killed, "closed its connection …"
        self.cause: str | None = None
        self.handle: TaskHandle | None = None
        #: number of the request that it has; replies with another one are late
        self.seq = 0
        #: keys of the blobs that it was sent since it was told to forget
        self._known: set[str] = set()
        self._known_bytes = 0
        self._reader = FrameReader()
        self._out: deque[memoryview] = deque()
        self.send(encode(hello))

    @property
    def has_output(self) -> bool:
        """Whether bytes wait until its socket can take them."""
        return bool(self._out)

    def assign(self, handle: TaskHandle) -> None:
        """Give it a task. What msgpack raises for a request that can't be sent, it raises, and nothing has happened."""
        request = handle.request
        forget = self._known_bytes > BLOB_LIMIT
        known: set[str] = set() if forget else self._known
        frame = encode([self.seq + 1, forget, request.to_wire(known)])
        if forget:
            self._known, self._known_bytes = known, 0
        self._known_bytes += sum(len(data) for key, data in request.blobs.items() if key not in self._known)
        self._known.update(request.blobs)
        self.seq += 1
        self.handle, handle.worker = handle, self
        self.send(frame)

    def send(self, frame: bytes) -> None:
        """Send as much as goes at once, keep the rest for `flush`."""
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
