"""The rank's side of its checkpoint writer process."""

from __future__ import annotations

import contextlib
import logging
import os
import queue
import socket
import subprocess
import sys
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from exoflow_hpc.checkpoint.wire import INLINE_COPY, Channel, FileSource, WriteRequest, Written
from exoflow_hpc.durable import storage_errors
from exoflow_hpc.errors import ExoFlowError, StorageError

__all__ = ["Callback", "WriterClient"]

_LOG = logging.getLogger(__name__)
_BOOT = Path(__file__).with_name("_boot.py")
#: deaths of the writer in a row, without one answer between them, after which what it was to write has failed
_MAX_DEATHS = 5
#: sequence numbers that each writer process has to itself, so that its successor never names a file of the same name
_NUMBERS = 1_000_000
#: seconds that a writer that was told to close may take
_CLOSE_TIMEOUT = 5.0

Outcome = Written | ExoFlowError
Callback = Callable[[WriteRequest, Outcome], None]


@dataclass(slots=True)
class _Pending:
    request: WriteRequest
    callback: Callback
    #: copied bytes of a small source
    data: bytes
    #: open file of a large one, held until the answer so that a restarted writer can be given it again
    fd: int | None


class _Sender:
    """Sends to one writer process from a thread of its own, so that nobody waits when that process doesn't read."""

    def __init__(self, channel: Channel) -> None:
        self._channel = channel
        self._queue: queue.SimpleQueue[tuple[dict[str, Any], int | None] | None] = queue.SimpleQueue()
        self._thread = threading.Thread(target=self._send_forever, name="checkpoint-sender", daemon=True)
        self._thread.start()

    def put(self, message: dict[str, Any], fd: int | None = None) -> None:
        # its own descriptor: the original may be closed by the answer to an earlier sending of the same request
        self._queue.put((message, None if fd is None else os.dup(fd)))

    def stop(self) -> None:
        self._queue.put(None)
        self._thread.join()

    def _send_forever(self) -> None:
        gone = False
        while (item := self._queue.get()) is not None:
            message, fd = item
            try:
                if not gone:
                    self._channel.send(message, fd)
            except OSError:  # the process died: whoever receives from it sees that too, and starts another
                gone = True
            finally:
                if fd is not None:
                    os.close(fd)


class WriterClient:
    """A checkpoint writer process for this rank. Thread-safe. `start` it before MPI is initialised.

    If the process dies it is started again and given all that it hadn't answered: a file that was written and never
    answered for is named by nobody, so writing it twice is harmless.
    """

    def __init__(self, rank: int, incarnation: int) -> None:
        self._name = f"{rank}.{incarnation}"
        self._lock = threading.Condition()
        #: by number, in the order of submission: everything that has no answer yet
        self._pending: dict[int, _Pending] = {}
        self._number = 0
        #: writer processes started so far
        self._started = 0
        self._deaths = 0
        self._process: subprocess.Popen[bytes] | None = None
        self._channel: Channel | None = None
        #: None: no writer process is at work
        self._sender: _Sender | None = None
        self._closed = False
        self._thread = threading.Thread(target=self._receive_forever, name="checkpoint-client", daemon=True)

    @property
    def pid(self) -> int | None:
        """Process id of the writer, None if it is being restarted."""
        process = self._process
        return process.pid if process is not None and process.poll() is None else None

    @property
    def restarts(self) -> int:
        """How many times the writer process was started again."""
        return max(0, self._started - 1)

    def start(self) -> None:
        """Start the process; doesn't wait for it to be ready. StorageError if it can't be started."""
        with self._lock:
            self._spawn()
        self._thread.start()

    def submit(self, requests: Sequence[WriteRequest], callback: Callback) -> None:
        """Have *requests* written; doesn't wait. For each, *callback* gets it and a Written or the error, once.

        That is from a thread of the client: the callback has to be short and may not raise. A source may be unlinked
        after this call, but its bytes may not change before the callback. ExoFlowError if a source can't be opened or
        the client is closed; nothing is written then.
        """
        opened: list[_Pending] = []
        try:
            for request in requests:
                opened.append(_open(request, callback))
            with self._lock:
                if self._closed:
                    raise ExoFlowError("the checkpoint writer was closed, so nothing more can be saved by it")
                for pending in opened:
                    self._number += 1
                    self._pending[self._number] = pending
                    if self._sender is not None:
                        self._send(self._number, pending)
                self._lock.notify_all()
        except BaseException:
            for pending in opened:
                _release(pending)
            raise

    def flush(self, timeout: float | None = None) -> None:
        """Wait until everything submitted so far has been answered. TimeoutError after *timeout* seconds."""
        with self._lock:
            last = self._number
            if not self._lock.wait_for(lambda: not self._pending or min(self._pending) > last, timeout):
                raise TimeoutError(f"the checkpoint writer didn't finish within {timeout} s")

    def close(self, timeout: float | None = 60.0) -> None:
        """Finish what was submitted, within *timeout* seconds, then stop. What is left fails with ExoFlowError."""
        if not self._thread.is_alive():
            self._closed = True
            return
        with contextlib.suppress(TimeoutError):
            self.flush(timeout)
        with self._lock:
            self._closed = True
            clean = not self._pending
            if self._sender is not None and clean:
                self._sender.put({"close": True})
            self._lock.notify_all()
        process = self._process
        if process is not None:
            try:
                process.wait(_CLOSE_TIMEOUT if clean else 0)
            except subprocess.TimeoutExpired:
                process.kill()
        self._thread.join()

    def __enter__(self) -> WriterClient:
        self.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _spawn(self) -> None:
        """Start a process and give it all that is pending. Caller holds the lock."""
        ours, theirs = socket.socketpair()
        first = self._started * _NUMBERS
        try:
            with storage_errors("start the checkpoint writer", _BOOT):
                self._process = subprocess.Popen(
                    [sys.executable, str(_BOOT), str(theirs.fileno()), self._name, str(first), str(os.getpid())],
                    pass_fds=[theirs.fileno()],
                    stdin=subprocess.DEVNULL,
                )
        except BaseException:
            ours.close()
            raise
        finally:
            theirs.close()
        self._started += 1
        self._channel = Channel(ours)
        self._sender = _Sender(self._channel)
        for number, pending in self._pending.items():
            self._send(number, pending)

    def _send(self, number: int, pending: _Pending) -> None:
        assert self._sender is not None
        request = pending.request
        message: dict[str, Any] = {
            "id": number,
            "workflow_dir": request.workflow_dir,
            "epoch": request.epoch,
            "task_id": request.task_id,
            "entry": request.entry,
            "meta": request.meta.to_wire(),
        }
        if pending.fd is None:
            message["data"] = pending.data
        elif isinstance(request.source, FileSource):
            message["offset"] = request.source.offset
        self._sender.put(message, pending.fd)

    def _receive_forever(self) -> None:
        while True:
            with self._lock:
                channel, sender, process = self._channel, self._sender, self._process
            assert channel is not None
            assert sender is not None
            assert process is not None
            self._receive(channel)
            with self._lock:
                self._sender = None
            process.kill()  # it may live on without its socket; two writers must not have the same pending work
            status = process.wait()
            channel.sock.shutdown(socket.SHUT_RDWR)  # frees the sender, should it be stuck
            sender.stop()
            channel.close()
            if not self._restart(status):
                return

    def _receive(self, channel: Channel) -> None:
        """Answer callers until the process is gone."""
        while True:
            try:
                arrived = channel.receive()
            except OSError:
                return
            if arrived is None:
                return
            message, _ = arrived
            with self._lock:
                self._deaths = 0
            if "error" in message:
                self._finish(message["id"], StorageError(message["error"], message["errno"]))
            else:
                self._finish(
                    message["id"], Written(message["file"], message["entry"], message["checksum"], message["nbytes"])
                )

    def _restart(self, status: int) -> bool:
        """Start the next process once there is work for it; return False when the client is closed."""
        with self._lock:
            self._deaths += 1
            # what keeps killing it would go on doing so: give up what is pending, and wait until somebody wants
            # something else
            hopeless = self._deaths >= _MAX_DEATHS
        problem: ExoFlowError = StorageError(
            f"the checkpoint writer died {_MAX_DEATHS} times in a row (status {status}); what it printed says why"
        )
        while True:
            if hopeless:
                self._fail_all(problem)
            with self._lock:
                if hopeless:
                    self._deaths = 0
                    self._lock.wait_for(lambda: self._pending or self._closed)
                if not self._closed:
                    _LOG.warning("checkpoint writer %s ended with status %s; starting it again", self._name, status)
                    try:
                        self._spawn()
                        return True
                    except StorageError as error:
                        problem, hopeless = error, True
                        continue
            self._fail_all(ExoFlowError("the checkpoint writer was closed before this was written"))
            return False

    def _fail_all(self, error: ExoFlowError) -> None:
        with self._lock:
            numbers = list(self._pending)
        for number in numbers:
            self._finish(number, error)

    def _finish(self, number: int, outcome: Outcome) -> None:
        with self._lock:
            pending = self._pending.get(number)
        if pending is None:
            return
        _release(pending)
        try:
            pending.callback(pending.request, outcome)
        except Exception:
            _LOG.exception("the callback of checkpoint request %s of task %s raised", number, pending.request.task_id)
        with self._lock:  # after the callback, so that flush() and close() wait for it too
            del self._pending[number]
            self._lock.notify_all()


def _open(request: WriteRequest, callback: Callback) -> _Pending:
    """Take hold of the source's bytes, whatever becomes of its name."""
    source = request.source
    if not isinstance(source, FileSource):
        data = bytes(source)
        if len(data) != request.meta.nbytes:
            raise ValueError(f"task {request.task_id}: {len(data)} bytes are given, {request.meta.nbytes} are meant")
        return _Pending(request, callback, data, None)
    if source.nbytes != request.meta.nbytes:
        raise ValueError(f"task {request.task_id}: {source.nbytes} bytes are given, {request.meta.nbytes} are meant")
    with storage_errors("read", source.path):
        fd = os.open(source.path, os.O_RDONLY | os.O_CLOEXEC)
        if source.nbytes > INLINE_COPY:
            return _Pending(request, callback, b"", fd)
        try:
            data = os.pread(fd, source.nbytes, source.offset)
        finally:
            os.close(fd)
    if len(data) != source.nbytes:
        raise StorageError(
            f"{source.path} has only {len(data)} of {source.nbytes} bytes at {source.offset}", None, source.path
        )
    return _Pending(request, callback, data, None)


def _release(pending: _Pending) -> None:
    if pending.fd is not None:
        os.close(pending.fd)
        pending.fd = None
