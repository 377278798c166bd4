"""The pool of worker processes of a rank: a queue of tasks, and who has which."""

from __future__ import annotations

import logging
import threading
import time
from collections import deque
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import TracebackType
from typing import Any

from ..errors import ExoFlowError
from .failure import describe
from .fleet import Fleet
from .limits import Limits, Overrun
from .memory import describe_size
from .protocol import Began, Progress, TaskCancelled, TaskCrashed, TaskDone, TaskFailed, TaskRequest, TaskResult
from .remote import RemoteWorker, TaskHandle
from .spawner import Spawner

__all__ = ["PoolStatistics", "TaskHandle", "WorkerPool"]

_log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class PoolStatistics:
    """State of a pool at one moment, and its counts since the start."""

    #: pids of the workers that are ready or busy
    pids: tuple[int, ...]
    #: pid of the forkserver; None while there is none
    forkserver_pid: int | None
    #: workers that have a task
    busy: int
    #: tasks that no worker has begun, those among them that wait in a worker's letter box too
    queued: int
    #: workers that became ready
    started: int
    #: workers that died without being told to
    crashed: int


#: seconds without a `drive` after which the pool's own thread does the I/O: timeouts hold while the driver is busy
_ABSENT = 0.05
#: tasks that a worker has at most, of which it can have begun one
_DEPTH = 4
#: seconds that a task takes after which another one may wait in its worker's letter box, and that it waits there at most
_QUICK, _LONGEST_WAIT = 0.002, 0.05


class WorkerPool:
    """Worker processes that run tasks for this rank. Callbacks come from one thread at a time: they must not block.

    That is the pool's own I/O thread, or whoever calls `drive`: then a reply needs no hand-over between threads.
    size: tasks at once; spawner: a forkserver that was started before MPI (default: one is started by `start`), and is
    the pool's from now on; arena: arguments of `Arena.attach` for the workers, None: all outputs travel inline;
    on_exit: called with the pid of each worker that is gone, before its task's `on_done`: `Arena.reap`, say.
    """

    def __init__(
        self,
        size: int,
        *,
        spawner: Spawner | None = None,
        arena: Mapping[str, Any] | None = None,
        on_exit: Callable[[int], object] | None = None,
    ) -> None:
        if size < 1:
            raise ValueError(f"a pool of {size} workers can't run anything")
        #: guards all that follows; never held while a callback runs
        self._lock = threading.Lock()
        self._fleet = Fleet(size, spawner, arena, self)
        self._on_exit = on_exit
        #: ready and without a task, some of them condemned meanwhile; the last one first, since its caches are warm
        self._idle: list[RemoteWorker] = []
        self._queue: deque[TaskHandle] = deque()
        #: callbacks and what they are to be given, in order
        self._calls: deque[tuple[Callable[[Any], object], Any]] = deque()
        #: workers with bytes left to send, which the I/O thread has to watch
        self._unsent: set[RemoteWorker] = set()
        #: workers that have more than one task
        self._ahead: set[RemoteWorker] = set()
        self._crashed = 0
        self._limits = Limits()
        #: who has set a lease → its number
        self._holders: dict[object, int] = {}
        self._next_holder = 1
        #: tasks of those whose lease is over
        self._parked: deque[TaskHandle] = deque()
        #: set once; from then on nothing is taken, and every handle gets its result
        self._closing = False
        self._close_timeout = 5.0
        #: held by the one thread that does the I/O
        self._driving = threading.Lock()
        #: whether a driver waits for that lock
        self._wanted = False
        #: whether there is a driver now, and when it was last there (monotonic)
        self._driven, self._left = False, float("-inf")
        #: tells the I/O thread that the driver has left, or that the pool is closing
        self._changed = threading.Event()
        #: the pool is closing
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._run, name="worker-pool", daemon=True)

    def __enter__(self) -> WorkerPool:
        self.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, where: TracebackType | None
    ) -> None:
        self.close()

    def start(self) -> None:
        """Start the workers and return at once. OSError if no forkserver can be started."""
        with self._lock:
            self._fleet.start()
        self._thread.start()

    def submit(
        self,
        request: TaskRequest,
        on_done: Callable[[TaskResult], object],
        on_progress: Callable[[Progress], object] | None = None,
        holder: object = None,
    ) -> TaskHandle:
        """Have *request* run when a worker is free; exactly one result comes to *on_done*. ExoFlowError if closed.

        holder: whose lease it runs under (`set_lease`); None: under none.
        """
        with self._lock:
            handle = TaskHandle(request, on_done, on_progress, 0 if holder is None else self._number_of(holder))
            if self._closing:
                raise ExoFlowError(f"the worker pool is closed: task {request.identity.task_id!r} can't be started")
            self._queue.append(handle)
            self._dispatch()
            if self._queue:
                self._fleet.hope()
            if self._calls or self._unsent or (self._queue and self._fleet.is_short):
                self._fleet.wake()
        return handle

    def cancel(self, handle: TaskHandle) -> bool:
        """Take *handle* out of the queue, or kill its worker. Return False if it is done.

        `TaskCancelled` comes to its `on_done` when the process is gone, or the result of a task that was quicker.
        """
        with self._lock:
            if handle.done or self._closing:
                return False
            if not handle.cancelled:
                handle.cancelled = True
                if handle.worker is not None and handle.worker.handle is not handle:
                    self._take_back(handle.worker)
                if handle.worker is None:
                    self._unqueue(handle)
                    self._finish(handle, TaskCancelled())
                else:
                    self._fleet.kill(handle.worker, "was cancelled")
                self._fleet.wake()
            return True

    def withdraw(self, handle: TaskHandle) -> bool:
        """Forget a task that has not begun: its `on_done` is never called. False if it has, and goes on."""
        with self._lock:
            if handle.done or handle.cancelled or self._closing:
                return False
            if handle.worker is not None and handle.worker.handle is not handle:
                self._take_back(handle.worker)
            if handle.worker is not None:
                return False
            self._unqueue(handle)
            handle.done = True
            return True

    def _unqueue(self, handle: TaskHandle) -> None:
        (self._queue if handle in self._queue else self._parked).remove(handle)

    def _number_of(self, holder: object) -> int:
        if holder not in self._holders:
            self._holders[holder] = self._next_holder
            self._next_holder += 1
        return self._holders[holder]

    def set_lease(self, until: float | None, holder: object) -> None:
        """Have workers killed that have tasks of *holder*, and none of these begun, from *until* (`time.monotonic`) on.

        Unless another one is set in time; None: never, and the holder is forgotten. The forkserver keeps it, if this process is stopped.
        """
        with self._lock:
            if self._closing or (until is None and holder not in self._holders):
                return
            number = self._number_of(holder)
            if until is None:
                del self._holders[holder]
            self._fleet.set_lease(number, until)
            free = [handle for handle in self._parked if handle.holder == number]
            if free:
                self._parked = deque(handle for handle in self._parked if handle.holder != number)
                self._queue.extendleft(reversed(free))
                self._dispatch()
                self._fleet.wake()

    def statistics(self) -> PoolStatistics:
        """Return pids and counts."""
        with self._lock:
            workers = self._fleet.workers.values()
            living = [worker.pid for worker in workers if worker.ready and not worker.condemned]
            return PoolStatistics(
                pids=tuple(pid for pid in living if pid is not None),
                forkserver_pid=self._fleet.forkserver_pid,
                busy=sum(bool(worker.tasks) for worker in workers),
                queued=len(self._queue) + len(self._parked) + sum(max(0, len(worker.tasks) - 1) for worker in workers),
                started=self._fleet.started,
                crashed=self._crashed,
            )

    def close(self, timeout: float = 5.0) -> None:
        """Kill all workers and the forkserver and wait until they are gone; what was not done gets `TaskCancelled`.

        Idempotent; not from a callback. *timeout*: seconds until a forkserver that doesn't end in order is killed.
        """
        with self._lock:
            first, self._closing = not self._closing, True
            if first:
                self._close_timeout = timeout
                running = self._thread.ident is not None
                if running:
                    self._fleet.wake()
                    self._over.set()
                    self._changed.set()
        if first and not running:
            self._shut()
        elif self._thread.ident is not None:
            self._thread.join()

    # ---- the I/O thread

    def drive(self, seconds: float) -> bool:
        """Do the pool's I/O in this thread: until something has been handled, `wake` was called, or the time is over.

        False: the pool is closed. One caller at a time, who may stay away for as long as it likes.
        """
        if not self._driving.acquire(blocking=False):
            self._wanted = True
            self.wake()
            self._driving.acquire()
        self._wanted, self._driven = False, True
        try:
            return self._step(seconds)
        finally:
            self._driven, self._left = False, time.monotonic()
            self._driving.release()
            if not self._changed.is_set():
                self._changed.set()

    def wake(self) -> None:
        """End a `drive` in another thread."""
        with self._lock:
            if not self._closing:
                self._fleet.wake()

    def _run(self) -> None:
        try:
            while self._wait_for_absence():
                with self._driving:
                    while not self._wanted and self._step():
                        pass
        finally:  # also after an error of ours: nobody may wait for ever
            with self._driving:
                self._shut()

    def _wait_for_absence(self) -> bool:
        """Wait until nobody drives the pool. False when it is closing."""
        rest = 0.0
        while not self._over.wait(rest):
            if self._driven or self._wanted:
                self._changed.wait()  # a driver that waits costs nothing here, one that comes and goes a look now and then
                self._changed.clear()
                rest = _ABSENT
            else:
                rest = self._left + _ABSENT - time.monotonic()
                if rest <= 0:
                    return True
        return False

    def _step(self, longest: float | None = None) -> bool:
        """Wait for something, handle it, make the calls it leads to. False when the pool is closing."""
        with self._lock:
            if self._closing:
                return False
            self._fleet.fill()
            if self._fleet.is_hopeless:
                text = f"no worker can be started: {self._fleet.failure}"
                while self._queue:
                    self._finish(self._queue.popleft(), TaskCrashed(text, started=False))
            for worker in self._unsent:
                self._fleet.watch(worker)
            self._unsent.clear()
            timeout = 0.0 if self._calls else self._timeout(longest)
        events = self._fleet.wait(timeout)
        with self._lock:
            self._fleet.handle(events)  # first: a task that has ended in time has, however late this is seen
            looks = []
            if self._limits:
                for overrun in self._limits.late():
                    self._kill_overrun(overrun)
                looks = self._limits.to_look_at()
            if self._ahead:
                self._free_stuck()
            self._dispatch()
        for handle, worker, base in looks:  # without the lock: it can take long for large processes
            measured = self._limits.measure(worker, base, handle.request.memory or 0)
            with self._lock:
                overrun_memory = self._limits.measured(handle, *measured)
                if overrun_memory is not None:
                    self._kill_overrun(overrun_memory)
        self._make_calls()
        return True

    def _timeout(self, longest: float | None) -> float | None:
        due, timeout = self._limits.due() if self._limits else None, self._fleet.timeout()
        if self._ahead:
            first = min(worker.since for worker in self._ahead) + _LONGEST_WAIT
            due = first if due is None else min(due, first)
        if longest is not None:
            timeout = longest if timeout is None else min(timeout, longest)
        if due is None:
            return timeout
        rest = max(0.0, due - time.monotonic())
        return rest if timeout is None else min(rest, timeout)

    def _kill_overrun(self, overrun: Overrun) -> None:
        if not overrun.worker.condemned:
            overrun.handle.overran = overrun.kind
            self._fleet.kill(overrun.worker, f"was killed: {overrun.text}")

    def _make_calls(self) -> None:
        while self._calls:
            call, value = self._calls.popleft()  # only this thread takes
            try:
                call(value)
            except Exception:
                # one broken callback must not stop the tasks of all the others
                _log.exception("the callback %r failed on %r", call, value)

    def _shut(self) -> None:
        """Kill and wait for everything, then give everyone who waits a result."""
        with self._lock:
            self._closing = True
            if not self._fleet.close(self._close_timeout):
                _log.warning("the forkserver of the workers did not end in order")
            for handle in (*self._queue, *self._parked):
                self._finish(handle, TaskCancelled())
            self._queue.clear()
            self._parked.clear()
        self._make_calls()

    def _has_next(self) -> bool:
        """Whether a task may be begun, the first one in the queue."""
        while self._queue and self._fleet.is_over(self._queue[0].holder):
            self._parked.append(self._queue.popleft())
        return bool(self._queue)

    def _dispatch(self) -> None:
        while self._idle and self._has_next():
            worker = self._idle.pop()
            if worker.condemned:
                continue
            handle = self._queue.popleft()
            self._fleet.set_holder(worker, handle.holder)
            try:
                worker.assign(handle)
            except (TypeError, ValueError, OverflowError) as error:  # msgpack can't: 4 GiB in a piece, a foreign type
                self._finish(handle, describe(error, "load"))
                self._idle.append(worker)
                continue
            self._limits.assigned(handle, worker)
            if worker.has_output:
                self._unsent.add(worker)
        while self._has_next() and not self._queue[0].waits:
            workers = self._fleet.workers.values()
            holder = self._queue[0].holder
            able = [
                one
                for one in workers
                if one.quick and not one.condemned and 0 < len(one.tasks) < _DEPTH and one.holder == holder
            ]
            least = min(able, key=lambda one: len(one.tasks), default=None)
            if least is None or not least.assign_next(self._queue[0]):
                break
            self._queue.popleft()
            self._ahead.add(least)

    def _free_stuck(self) -> None:
        """Let tasks that wait for one that takes longer than was thought be run by any worker."""
        limit = time.monotonic() - _LONGEST_WAIT
        for worker in [one for one in self._ahead if one.since <= limit]:
            worker.quick = False
            self._take_back(worker)

    def _take_back(self, worker: RemoteWorker, *, all_of_them: bool = False) -> None:
        """Put the tasks of a worker that it has not begun back to the begin of the queue."""
        self._ahead.discard(worker)
        for handle in reversed(worker.take_back(all_of_them=all_of_them)):
            handle.waits = True
            self._limits.over(handle)
            self._queue.appendleft(handle)

    def _finish(self, handle: TaskHandle, result: TaskResult) -> None:
        handle.worker, handle.done = None, True
        self._limits.over(handle)
        self._calls.append((handle.on_done, result))

    # ---- what the fleet tells, with the lock held

    def worker_ready(self, worker: RemoteWorker) -> None:
        """Take a new worker (`FleetListener`)."""
        self._idle.append(worker)

    def worker_said(self, worker: RemoteWorker, seq: int, body: TaskDone | TaskFailed | Progress | Began) -> None:
        """Take what a worker says about its task (`FleetListener`)."""
        handle = worker.tasks[seq]
        if isinstance(body, Began):
            self._limits.began(handle, body)
            return
        if isinstance(body, Progress):
            if handle.on_progress is not None:
                self._calls.append((handle.on_progress, body))
            return
        worker.over(seq)
        worker.quick = isinstance(body, TaskDone) and body.seconds < _QUICK
        self._finish(handle, body)
        if len(worker.tasks) < 2:
            self._ahead.discard(worker)
        if worker.condemned:
            self._take_back(worker, all_of_them=True)  # it takes no other
        elif not worker.tasks:
            self._idle.append(worker)

    def worker_gone(self, worker: RemoteWorker, text: str, exitcode: int | None) -> None:
        """Take that a worker is gone (`FleetListener`)."""
        self._unsent.discard(worker)
        if worker.pid is not None and self._on_exit is not None:
            self._calls.append((self._on_exit, worker.pid))
        handle = worker.handle
        # its first one as well, if it has never seen it, and wasn't killed for it
        self._take_back(worker, all_of_them=not (self._closing or (handle and (handle.cancelled or handle.overran))))
        handle = worker.handle
        worker.tasks.clear()
        cancelled = self._closing or (handle is not None and handle.cancelled)
        self._crashed += not (cancelled or worker.retired)
        if handle is not None:
            self._finish(handle, TaskCancelled(True) if cancelled else _crash(handle, worker, text, exitcode))


def _crash(handle: TaskHandle, worker: RemoteWorker, text: str, exitcode: int | None) -> TaskCrashed:
    if worker.lease_ended:  # nothing that the task has done
        return TaskCrashed(text, worker.pid, exitcode, kind="rank-lost")
    if handle.overran:
        return TaskCrashed(text, worker.pid, exitcode, kind=handle.overran)
    limit = handle.request.memory
    if limit is not None:  # libraries in C end the process when they get no memory
        used = f"at most {describe_size(handle.memory_used)} were seen in use"
        text = f"{text} (its limit is memory={describe_size(limit)}; {used})"
    return TaskCrashed(text, worker.pid, exitcode)
