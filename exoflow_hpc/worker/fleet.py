"""Keeps a number of worker processes alive: starts them, watches their sockets, notices each way in which one ends."""

from __future__ import annotations

import contextlib
import os
import selectors
import signal
import socket
import time
from collections.abc import Mapping
from typing import Any, Protocol

from .protocol import Began, Progress, TaskDone, TaskFailed, describe_exit
from .remote import RemoteWorker
from .spawner import Spawner, WorkerExited, WorkerStarted

__all__ = ["Fleet", "FleetListener"]

#: seconds in which a new worker has to be ready, and a killed one gone; else the forkserver is stuck, and is replaced
STUCK_TIMEOUT = 60.0
#: seconds between the end of a worker's connection and its exit status; later, it is alive without a connection: killed
GRACE = 0.2
#: starts that may fail in a row before those who wait are told
MAX_FAILED_STARTS = 5


class FleetListener(Protocol):
    """Who hears of workers. Called from inside of the fleet's methods, so with the same lock held."""

    def worker_ready(self, worker: RemoteWorker) -> None:
        """Take a new worker."""

    def worker_said(self, worker: RemoteWorker, seq: int, body: TaskDone | TaskFailed | Progress | Began) -> None:
        """Take what a worker says about the task of request *seq*, which is its first one."""

    def worker_gone(self, worker: RemoteWorker, text: str, exitcode: int | None) -> None:
        """Take that the process of a worker is gone; *text* says how."""


class Fleet:
    """The worker processes of a pool and their forkserver. One caller at a time; `wait` and `wake` need no lock."""

    def __init__(
        self, size: int, spawner: Spawner | None, arena: Mapping[str, Any] | None, listener: FleetListener
    ) -> None:
        self._size = size
        self._arena = None if arena is None else dict(arena)
        self._listener = listener
        self._spawner = spawner
        #: by number: every process that is not known to be gone, so never more than `_size`
        self.workers: dict[int, RemoteWorker] = {}
        #: workers that became ready, in all
        self.started = 0
        #: for people: the last start that failed
        self.failure = ""
        self._failed_starts = 0
        #: holder → until when its tasks may run
        self._leases: dict[int, float] = {}
        self._next_number = 1
        self._selector = selectors.DefaultSelector()
        self._wake = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)
        self._selector.register(self._wake, selectors.EVENT_READ, self._on_wake)

    @property
    def forkserver_pid(self) -> int | None:
        """Pid of the forkserver; None while there is none."""
        return None if self._spawner is None else self._spawner.pid

    def is_over(self, holder: int) -> bool:
        """Whether no worker may have tasks of *holder*, until it has another lease."""
        until = self._leases.get(holder)
        return until is not None and time.monotonic() >= until

    @property
    def is_short(self) -> bool:
        """Whether workers are missing that `fill` would start."""
        return len(self.workers) < self._size and self._failed_starts < MAX_FAILED_STARTS

    @property
    def is_hopeless(self) -> bool:
        """Whether there is no worker, and so many starts have failed that no more are made."""
        return not self.workers and self._failed_starts >= MAX_FAILED_STARTS

    def hope(self) -> None:
        """Allow one more start after all have failed."""
        self._failed_starts = min(self._failed_starts, MAX_FAILED_STARTS - 1)

    def start(self) -> None:
        """Start the forkserver if it wasn't given. OSError if that can't be done."""
        if self._spawner is None:
            self._spawner = Spawner()
            for holder, until in self._leases.items():
                self._spawner.set_lease(holder, until)
        self._selector.register(self._spawner, selectors.EVENT_READ, self._on_control)

    def fill(self) -> None:
        """Start workers until there are as many as there should be, or too many starts have failed."""
        while self.is_short:
            try:
                if self._spawner is None:
                    self.start()
                assert self._spawner is not None
                self._spawn(self._spawner)
            except OSError as error:  # out of processes, descriptors, memory
                self._failed_starts += 1
                self.failure = str(error)

    def _spawn(self, spawner: Spawner) -> None:
        ours, theirs = socket.socketpair()
        with theirs:
            spawner.fork(self._next_number, theirs)
        worker = RemoteWorker(self._next_number, ours, self._arena)
        worker.deadline = time.monotonic() + STUCK_TIMEOUT
        self._next_number += 1
        self.workers[worker.number] = worker
        self._selector.register(ours, selectors.EVENT_READ, lambda mask: self._on_worker(worker, mask))

    # ---- waiting and being told

    def wake(self) -> None:
        """End a `wait` in another thread."""
        os.eventfd_write(self._wake, 1)

    def timeout(self) -> float | None:
        """Return seconds until something is due; None: nothing is."""
        deadlines = [worker.deadline for worker in self.workers.values() if worker.deadline is not None]
        return max(0.0, min(deadlines) - time.monotonic()) if deadlines else None

    def wait(self, timeout: float | None) -> list[tuple[selectors.SelectorKey, int]]:
        """Block until something happens, and return it for `handle`."""
        return self._selector.select(timeout)

    def handle(self, events: list[tuple[selectors.SelectorKey, int]]) -> None:
        """Act on what `wait` returned, and on what is due."""
        for key, mask in events:
            key.data(mask)
        self._expire()

    def watch(self, worker: RemoteWorker) -> None:
        """Send the rest of a worker's frames when its socket takes it."""
        if worker.number in self.workers and not worker.eof:
            key = self._selector.get_key(worker.socket)
            mask = selectors.EVENT_READ | (selectors.EVENT_WRITE if worker.has_output else 0)
            self._selector.modify(worker.socket, mask, key.data)

    def set_lease(self, holder: int, until: float | None) -> None:
        """See `Spawner.set_lease`; a forkserver that is started later has it as well."""
        self._leases.pop(holder, None)
        if until is not None:
            self._leases[holder] = until
        if self._spawner is not None:
            self._spawner.set_lease(holder, until)

    def set_holder(self, worker: RemoteWorker, holder: int) -> None:
        """Say whose tasks a worker is about to get; before it gets one."""
        if worker.holder != holder and self._spawner is not None:
            self._spawner.set_holder(worker.number, holder)
        worker.holder = holder

    def kill(self, worker: RemoteWorker, cause: str) -> None:
        """Have *worker* killed, with all processes in its group. The listener is told when it is gone."""
        worker.condemned = True
        worker.cause = worker.cause or cause
        worker.deadline = time.monotonic() + STUCK_TIMEOUT
        if self._spawner is not None:
            self._spawner.kill(worker.number)

    def close(self, timeout: float) -> bool:
        """Kill and wait for everything; return whether the forkserver ended in order within *timeout* seconds."""
        in_order = self._spawner is None or self._spawner.close(timeout)
        self._spawner = None
        for worker in list(self.workers.values()):
            self._read(worker, all_of_it=True)
            self._remove(worker, "was killed, since the pool was closed", None)
        self._selector.close()
        os.close(self._wake)
        return in_order

    def _on_wake(self, _mask: int) -> None:
        os.eventfd_read(self._wake)

    def _on_control(self, _mask: int) -> None:
        if self._spawner is None:
            return
        events = self._spawner.receive()
        if events is None:
            self._lose_forkserver(self._spawner)
            return
        for event in events:
            worker = self.workers.get(event.number)
            if worker is None:
                continue
            if isinstance(event, WorkerStarted):
                worker.pid = event.pid
            elif isinstance(event, WorkerExited):
                # a reply that it sent before its end is still in the socket
                self._read(worker, all_of_it=True)
                if self.is_over(worker.holder) and worker.cause is None:
                    worker.cause = "was killed: nothing was heard of the controller for the length of the lease"
                    worker.lease_ended = True
                text = describe_exit(event.exitcode)
                if event.exitcode == -signal.SIGKILL:  # and not by us: that has a cause, which is told instead
                    text += " (out of memory?)"
                self._remove(worker, text, event.exitcode)
            else:
                self._remove(worker, event.text, None)

    def _lose_forkserver(self, spawner: Spawner) -> None:
        """The forkserver is gone, the kernel kills its workers: each has crashed once its connection ends."""
        self._selector.unregister(spawner)
        text = spawner.bury()
        self._spawner = None
        self._failed_starts += 1
        self.failure = f"the forkserver {text}"
        for worker in list(self.workers.values()):
            worker.condemned = worker.orphaned = True
            worker.cause = worker.cause or f"died with its forkserver, which {text}"
            if (
                worker.pid is not None
            ):  # what it has started has nobody else to end it, and it may have got out of its own end
                with contextlib.suppress(ProcessLookupError, PermissionError):
                    os.killpg(worker.pid, signal.SIGKILL)
            self._read(worker, all_of_it=True)
            if worker.eof:
                self._remove(worker, worker.cause, None)
            else:
                worker.deadline = time.monotonic() + GRACE

    def _on_worker(self, worker: RemoteWorker, mask: int) -> None:
        if worker.number not in self.workers or worker.eof:
            return  # another event of the same select was the last one
        if mask & selectors.EVENT_WRITE:
            worker.flush()
            if not worker.has_output:
                self.watch(worker)
        if mask & selectors.EVENT_READ:
            self._read(worker)
        if not worker.eof:
            return
        if worker.orphaned:
            self._remove(worker, "died with its forkserver", None)
            return
        # its exit status follows; if not, it lives on without a connection
        self._selector.unregister(worker.socket)
        worker.condemned = True
        if worker.cause is None:
            worker.deadline = time.monotonic() + GRACE

    def _read(self, worker: RemoteWorker, *, all_of_it: bool = False) -> None:
        try:
            replies = worker.receive(all_of_it=all_of_it)
        except ValueError as error:
            self.kill(worker, f"was killed, since {error}")
            return
        for reply in replies:
            if reply.body is not None:
                if reply.last:
                    worker.condemned = worker.retired = True
                if reply.seq in worker.tasks:  # else it is of a thread that an earlier task left behind
                    self._listener.worker_said(worker, reply.seq, reply.body)
            else:
                worker.ready = True
                self.started += 1
                self._failed_starts = 0
                if not worker.condemned:
                    worker.deadline = None
                    self._listener.worker_ready(worker)

    def _remove(self, worker: RemoteWorker, text: str, exitcode: int | None) -> None:
        """Forget a process that is gone."""
        worker.condemned = True
        del self.workers[worker.number]
        if worker.socket in self._selector.get_map():
            self._selector.unregister(worker.socket)
        text = worker.cause or text
        text = f"a new worker {text}" if worker.pid is None else f"worker pid {worker.pid} {text}"
        if not worker.ready:
            self._failed_starts += 1
            self.failure = text
        self._listener.worker_gone(worker, text, exitcode)
        worker.close()

    def _expire(self) -> None:
        """Do what is due for workers that are late: to be ready, to exit after their connection's end, to be dead."""
        now = time.monotonic()
        for worker in list(self.workers.values()):
            if worker.deadline is None or now < worker.deadline:
                continue
            if worker.orphaned:
                self._remove(worker, "died with its forkserver", None)
            elif worker.eof and worker.cause is None:
                self.kill(worker, "closed its connection to the rank, and was killed for it")
            elif self._spawner is not None:
                worker.deadline = None
                self._spawner.abort()
