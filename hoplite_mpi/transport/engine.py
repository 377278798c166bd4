"""The engine: every MPI call of a process, made under one lock.

A request is completed by `Request.Test` or `Testany`; whoever waits for one is a coroutine or a callback. The lock is held by the progress
thread or, while it waits for something, by the user's own thread, which then drives the engine itself: that saves the two changes
of thread that a hand-over to the progress thread costs. An engine without traffic blocks on its sockets.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import heapq
import itertools
import logging
import os
import select
import threading
import time
from collections import deque
from collections.abc import Callable, Coroutine
from typing import Any

from mpi4py import MPI

from hoplite_mpi.config import Config
from hoplite_mpi.transport.interrupt import InterruptGuard
from hoplite_mpi.transport.primitives import RequestFailedError, Task, Timer, Waiter

__all__ = ["Engine"]

log = logging.getLogger("hoplite_mpi.engine")

#: seconds of unsuccessful polling after which a poller starts to nap
_SPIN = 100e-6
#: length of a nap between polls; what the kernel adds to it makes about 60 µs
_NAP = 5e-6
#: the longest nap while requests are pending without any traffic
_LONG_NAP = 1e-3
#: seconds after which a blocked user thread looks whether the engine still runs
_LONGEST_BLOCK = 1.0
#: number of requests up to which each is tested by itself
_FEW = 3
#: seconds between looks at the sockets while there is MPI traffic
_SOCKET_PERIOD = 200e-6


def _shorten_naps() -> None:
    """Let this thread's naps end when they are over, and not up to 50 µs later (the kernel's default timer slack)."""
    pr_set_timerslack = 29
    ctypes.CDLL(None).prctl(pr_set_timerslack, 1000, 0, 0, 0)


def _failure(error: MPI.Exception) -> RequestFailedError:
    failure = RequestFailedError(str(error))
    failure.__cause__ = error
    return failure


def _nap(quiet: float) -> float:
    """Return how long to nap: a tenth of what it has been quiet for costs little latency, and leaves the cores to those who have data."""
    return max(_NAP, quiet / 10)


class Engine:
    """Drives requests, coroutines, timers and sockets of one process. Thread-safe where it says so."""

    def __init__(self, config: Config) -> None:
        self.config = config
        #: held by whoever makes an MPI call or touches state that the engine drives
        self.lock = threading.RLock()
        self._requests: list[MPI.Request] = []
        #: callback of the request at the same index
        self._callbacks: list[Callable[[BaseException | None], None]] = []
        #: those of `_requests` whose completion needs our polling (not the receives that wait for what may never come)
        self._pending = 0
        self._passive: set[int] = set()
        self._ready: deque[tuple[Task, BaseException | None]] = deque()
        self._timers: list[tuple[float, int, Timer]] = []
        self._serial = itertools.count()
        self._epoll = select.epoll()
        self._sockets: dict[int, Callable[[int], None]] = {}
        self._wake_fd = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)
        self._epoll.register(self._wake_fd, select.EPOLLIN)
        #: what to call when the lock is free again: users' callbacks must not run inside of the engine
        self._after: deque[Callable[[], None]] = deque()
        #: asked before the engine blocks; a False keeps it polling
        self.may_sleep: Callable[[], bool] = lambda: True
        self._blocked = False
        self._waiters = 0
        #: threads that drive the engine while they wait; the progress thread leaves it to them
        self._steering: set[int] = set()
        self._last_traffic = time.monotonic()
        self._next_sockets = 0.0
        self._closing = False
        #: the error that broke the engine; every later wait raises it
        self.failure: BaseException | None = None
        self._thread: threading.Thread | None = None
        self._guard = InterruptGuard()
        self._main_thread = threading.main_thread().ident

    # -- life ---------------------------------------------------------------------------------------------------------

    def start(self) -> None:
        """Start the progress thread."""
        self._thread = threading.Thread(target=self._run, name="hoplite-progress", daemon=True)
        self._thread.start()

    @property
    def thread_ident(self) -> int:
        """Identifier of the progress thread, which another thread may have after it."""
        assert self._thread is not None and self._thread.ident is not None, "the engine was not started"
        return self._thread.ident

    @property
    def running(self) -> bool:
        """Whether the progress thread is there. Any thread."""
        return self._thread is not None and self._thread.is_alive()

    def stop(self) -> None:
        """Stop the progress thread; requests that are still pending stay with MPI."""
        self._closing = True
        self.wake()
        if self._thread is not None and self._thread is not threading.current_thread():
            self._thread.join(self.config.close_timeout)
        self._guard.remove()

    # -- for the coroutines and the drivers, under the lock ------------------------------------------------------------------

    def watch(
        self, request: MPI.Request, callback: Callable[[BaseException | None], None], passive: bool = False
    ) -> None:
        """Call *callback(error or None)* when the request has ended. *passive*: don't poll hard for it."""
        if passive:
            self._passive.add(id(callback))
        else:
            self._pending += 1
        self._requests.append(request)
        self._callbacks.append(callback)

    def unwatch(self, callback: Callable[[BaseException | None], None]) -> MPI.Request | None:
        """Stop watching the request of that callback and return it (it may be None: it has ended)."""
        for index, known in enumerate(self._callbacks):
            if known is callback:
                request = self._requests[index]
                self._forget(index)
                return request
        return None

    def spawn(
        self, coroutine: Coroutine[Any, Any, Any], on_end: Callable[[BaseException | None], None] | None = None
    ) -> None:
        """Run a coroutine; *on_end(error or None)* is called when it has ended."""
        self._ready.append((Task(coroutine, on_end), None))

    def resume(self, task: Task, error: BaseException | None = None) -> None:
        """Let a coroutine go on, with *error* raised in it if there is one; for what it awaits."""
        self._ready.append((task, error))

    def after(self, seconds: float, callback: Callable[[], None]) -> Timer:
        """Call *callback* after so many seconds, unless the timer is cancelled."""
        timer = Timer(callback)
        heapq.heappush(self._timers, (time.monotonic() + seconds, next(self._serial), timer))
        if self._blocked:
            self.wake()
        return timer

    def outside(self, callback: Callable[[], None]) -> None:
        """Call *callback* when the lock has been given back."""
        self._after.append(callback)

    def add_socket(self, fd: int, callback: Callable[[int], None], events: int = select.EPOLLIN) -> None:
        """Call *callback(events)* when the file descriptor is ready, or was: another thread may have been quicker to read it."""
        self._sockets[fd] = callback
        self._epoll.register(fd, events)

    def modify_socket(self, fd: int, events: int) -> None:
        self._epoll.modify(fd, events)

    def remove_socket(self, fd: int) -> None:
        if self._sockets.pop(fd, None) is not None:
            with contextlib.suppress(OSError):
                self._epoll.unregister(fd)

    # -- for any thread ---------------------------------------------------------------------------------------------------

    def run(self, function: Callable[[], Any]) -> Any:
        """Call *function* under the engine's lock, see to what it started, and return its result."""
        self._waiters += 1
        try:
            self.lock.acquire()
        finally:
            self._waiters -= 1
        try:
            if self.failure is not None:
                raise self.failure
            result = function()
            self._run_ready()
            if self._pending:
                self._last_traffic = time.monotonic()
                if self._blocked:
                    self.wake()
        finally:
            self.lock.release()
            self._run_outside()
        return result

    def wake(self) -> None:
        """End a block of the progress thread."""
        with contextlib.suppress(OSError):
            os.eventfd_write(self._wake_fd, 1)

    def waiter(self) -> Waiter:
        """Return something for a thread to block on."""
        return Waiter()

    def wait(self, done: Callable[[], bool], block: Callable[[float | None], Any], timeout: float | None) -> bool:
        """Wait until *done()*; return whether it is.

        Drives the engine while there is traffic, then leaves that to the progress thread and calls *block(seconds)*, which has to
        return early when done.
        """
        if done():
            return True
        deadline = None if timeout is None else time.monotonic() + timeout
        self._steer(done, deadline)
        while not done():
            left = None if deadline is None else deadline - time.monotonic()
            if left is not None and left <= 0:
                return False
            # in pieces: nobody wakes those who wait for an engine that has failed
            block(_LONGEST_BLOCK if left is None else min(left, _LONGEST_BLOCK))
            if self.failure is not None and not done():
                raise self.failure
        return True

    # -- driving ------------------------------------------------------------------------------------------------------------

    def _steer(self, done: Callable[[], bool], deadline: float | None) -> None:
        """Drive the engine from a waiting user thread while there is traffic."""
        guard = self._guard
        me = threading.get_ident()
        in_main = me == self._main_thread
        self._steering.add(me)
        guard.driving = guard.driving or in_main
        try:
            self._last_traffic = max(self._last_traffic, time.monotonic())
            spin_time = self.config.spin_time
            while self.failure is None and not (in_main and guard.pending):
                if self.lock.acquire(blocking=False):
                    try:
                        now = self._step()
                    except BaseException as error:
                        self._fail(error)
                        raise
                    finally:
                        self.lock.release()
                        if self._after:
                            self._steering.discard(me)  # a callback may block: then the progress thread drives
                            self._run_outside()
                            self._steering.add(me)
                else:
                    time.sleep(_NAP)
                    now = time.monotonic()
                if done() or (deadline is not None and now > deadline):
                    return
                quiet = now - self._last_traffic
                if quiet > spin_time:
                    return
                if quiet > _SPIN:
                    time.sleep(_nap(quiet))
                elif quiet > 0:
                    os.sched_yield()
        finally:
            self._steering.discard(me)
            if in_main:
                guard.leave()

    def _run(self) -> None:
        """Body of the progress thread."""
        _shorten_naps()
        try:
            while not self._closing:
                if self._steering:
                    time.sleep(_LONG_NAP / 2)
                    continue
                if self._waiters:
                    time.sleep(_NAP)
                with self.lock:
                    self._step()
                    sleep = self._sleep_time()
                    if sleep > _LONG_NAP and self.may_sleep():
                        self._blocked = True
                self._run_outside()
                if self._blocked:
                    self._block(sleep)
                else:  # never without a nap: a user thread that was just woken needs the GIL
                    time.sleep(max(_NAP, min(sleep, _LONG_NAP)))
        except BaseException as error:  # whatever it is: nobody may wait for ever for an engine that is gone
            log.exception("the progress thread failed")
            self._fail(error)

    def _sleep_time(self) -> float:
        """Return seconds to sleep now: 0 to poll on, up to `_LONG_NAP` for a nap, more to block."""
        if self._ready or self._waiters:
            return 0.0
        now = time.monotonic()
        quiet = now - self._last_traffic
        if quiet < _SPIN:
            return 0.0
        if quiet < self.config.spin_time:
            return _nap(quiet)
        if self._pending and quiet < self.config.evict_timeout:
            return min(_LONG_NAP, quiet / 20)
        limit = self.config.idle_poll
        if self._timers:
            limit = min(limit, max(self._timers[0][0] - now, 2 * _LONG_NAP))
        return limit

    def _block(self, seconds: float) -> None:
        try:
            events = self._epoll.poll(seconds)
        except OSError as error:
            if error.errno != errno.EINTR:
                raise
            events = []
        finally:
            self._blocked = False
        with self.lock:
            self._handle_sockets(events)
            self._run_ready()
        self._run_outside()

    def _step(self) -> float:
        """Look at everything once; return the time."""
        traffic = self._test()
        now = time.monotonic()
        if now >= self._next_sockets:
            self._next_sockets = now + _SOCKET_PERIOD
            events = self._epoll.poll(0)
            if events:
                self._handle_sockets(events)
            if self._timers:
                self._run_timers(now)
        if self._ready:
            traffic = True
            self._run_ready()
        if traffic:
            self._last_traffic = now
        return now

    def _test(self) -> bool:
        requests = self._requests
        if not requests:
            return False
        # one by one is quicker for few: a call for all costs as much as three of them
        ended = self._test_each() if len(requests) <= _FEW else self._test_any()
        if not ended:
            return False
        callbacks = [(self._callbacks[index], error) for index, error in ended.items()]
        for index in sorted(ended, reverse=True):
            self._forget(index)
        for callback, error in callbacks:
            callback(error)
        return True

    def _test_each(self) -> dict[int, BaseException | None]:
        """Return index → error of the requests that have ended."""
        ended: dict[int, BaseException | None] = {}
        for index, request in enumerate(self._requests):
            try:
                if request.Test():
                    ended[index] = None
            except MPI.Exception as error:
                ended[index] = _failure(error)
        return ended

    def _test_any(self) -> dict[int, BaseException | None]:
        """Return index → error of the requests that have ended, by as many calls as there are of these, and one.

        Not by Testsome: when it reports an error Open MPI has freed what succeeded and what failed alike. Testany
        completes one request, so what it frees with an error has failed.
        """
        requests, ended = self._requests, dict[int, BaseException | None]()
        while True:
            try:
                index, flag = MPI.Request.Testany(requests)
            except MPI.Exception as error:
                failed = [i for i, request in enumerate(requests) if request == MPI.REQUEST_NULL and i not in ended]
                if not failed:
                    log.warning("MPI reported an error that belongs to no request: %s", error)
                    return ended
                ended |= dict.fromkeys(failed, _failure(error))
                continue
            if not flag or index == MPI.UNDEFINED:
                return ended
            ended[index] = None

    def _forget(self, index: int) -> None:
        callback = self._callbacks[index]
        if id(callback) in self._passive:
            self._passive.discard(id(callback))
        else:
            self._pending -= 1
        last_request, last_callback = self._requests.pop(), self._callbacks.pop()
        if index < len(self._requests):
            self._requests[index], self._callbacks[index] = last_request, last_callback

    def _run_ready(self) -> None:
        ready = self._ready
        while ready:
            task, error = ready.popleft()
            try:
                park = task.coroutine.send(None) if error is None else task.coroutine.throw(error)
            except StopIteration:
                if task.on_end is not None:
                    task.on_end(None)
            except Exception as failure:
                if task.on_end is None:
                    raise
                task.on_end(failure)
            else:
                park(task)

    def _run_timers(self, now: float) -> None:
        while self._timers and self._timers[0][0] <= now:
            timer = heapq.heappop(self._timers)[2]
            if timer.callback is not None:
                timer.callback()

    def _handle_sockets(self, events: list[tuple[int, int]]) -> None:
        for fd, mask in events:
            if fd == self._wake_fd:
                with contextlib.suppress(BlockingIOError):
                    os.eventfd_read(fd)
                continue
            callback = self._sockets.get(fd)
            if callback is not None:
                self._last_traffic = time.monotonic()
                callback(mask)

    def _run_outside(self) -> None:
        while self._after:
            try:
                callback = self._after.popleft()
            except IndexError:  # another thread took it
                return
            callback()

    def _fail(self, error: BaseException) -> None:
        if self.failure is None:
            self.failure = error
