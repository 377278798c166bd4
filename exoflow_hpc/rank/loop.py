"""The event loop of a rank's workflow side: callables posted from any thread, run one by one."""

from __future__ import annotations

import contextlib
import heapq
import itertools
import logging
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator
from functools import partial
from types import TracebackType
from typing import Any

__all__ = ["Loop", "Strand"]

log = logging.getLogger("exoflow_hpc")

#: seconds of a wait at most, so that signals are handled between two calls, and a hand-over that a signal has prevented is made up for
_LONGEST_WAIT = 1.0
#: calls that are made at most before what the loop waits for is looked at again
_BATCH = 64
#: seconds for which the thread that makes the calls steps aside for one that wants in
_STEP_ASIDE = 0.0001


class _Waiter:
    """A thread that waits inside, while another one makes the calls."""

    def __init__(self, done: Callable[[], bool]) -> None:
        self.done = done
        self.wake = threading.Event()


class Loop:
    """Runs what is posted; a monitor: one thread at a time is inside (``with loop:``), and no call is made but by that one.

    `post` and `after` are for any thread. Those that are inside wait by `run_until`, which lets others in meanwhile; one of those that
    wait makes the calls.
    """

    def __init__(self) -> None:
        self._calls: deque[Callable[[], None]] = deque()
        self._timers: list[tuple[float, int, Callable[[], None]]] = []
        self._serial = itertools.count()
        self._wakeup = threading.Event()
        self._inside = threading.Lock()
        #: identity of the thread that is inside
        self._owner = 0
        #: threads that want in
        self._wanting = 0
        self._waiters: list[_Waiter] = []
        #: identity of the thread that makes the calls, 0: none does
        self._driver = 0
        #: whether that thread waits, or is about to: who posts in another thread then has to wake it
        self._waiting = False
        self._drive: Callable[[float], bool] | None = None
        self._wake: Callable[[], None] | None = None

    def drive(self, drive: Callable[[float], bool], wake: Callable[[], None]) -> None:
        """Wait inside of *drive(seconds)*, which does I/O meanwhile, and returns after *wake()*; False: it can't any more.

        So what comes of that I/O needs no other thread, which costs more than most of the calls.
        """
        self._drive, self._wake = drive, wake

    def post(self, call: Callable[[], None]) -> None:
        """Have *call* run as soon as possible, after what was posted before."""
        self._calls.append(call)
        if self._waiting and threading.get_ident() != self._driver:
            self._waiting = False  # one of those who post now is enough
            self._wakeup.set()
            if self._wake is not None:
                self._wake()

    def after(self, seconds: float, call: Callable[[], None]) -> None:
        """Have *call* run once, in so many seconds."""
        self.post(lambda: heapq.heappush(self._timers, (time.monotonic() + seconds, next(self._serial), call)))

    # -- the monitor -----------------------------------------------------------------------------------------------------------

    def __enter__(self) -> Loop:
        self._enter()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, where: TracebackType | None
    ) -> None:
        self._leave()

    def _enter(self) -> None:
        if not self._inside.acquire(blocking=False):
            self._wanting += 1
            try:
                self._inside.acquire()
            finally:
                self._wanting -= 1
        self._owner = threading.get_ident()

    def _leave(self) -> None:
        if self._owner == threading.get_ident():  # else a signal has ended its wait for the others to leave
            self._owner = 0
            self._inside.release()

    @contextlib.contextmanager
    def outside(self) -> Iterator[None]:
        """Let others in while this thread, which is inside, does what takes long."""
        self._leave()
        try:
            yield
        finally:
            self._enter()

    def run_until(self, done: Callable[[], bool], timeout: float | None = None) -> bool:
        """Run what is posted until *done()*; return whether it is, False when the time is over."""
        if self._owner == threading.get_ident():
            return self._run_until(done, timeout)
        with self:
            return self._run_until(done, timeout)

    def _run_until(self, done: Callable[[], bool], timeout: float | None) -> bool:
        deadline = None if timeout is None else time.monotonic() + timeout
        if not self._driver:
            return self._make_calls(done, deadline)
        waiter = _Waiter(done)
        self._waiters.append(waiter)
        try:
            while not done():
                if not self._driver:
                    return self._make_calls(done, deadline)
                rest = _LONGEST_WAIT if deadline is None else min(_LONGEST_WAIT, deadline - time.monotonic())
                if rest <= 0:
                    return False
                with self.outside():
                    waiter.wake.wait(rest)
                waiter.wake.clear()
            return True
        finally:
            self._waiters.remove(waiter)
            self._hand_on()  # it may have been asked to make the calls

    def _hand_on(self) -> None:
        """Have one that waits make the calls, if nobody does."""
        if not self._driver and self._waiters:
            self._waiters[0].wake.set()

    def _make_calls(self, done: Callable[[], bool], deadline: float | None) -> bool:
        calls = self._calls
        self._driver = threading.get_ident()
        try:
            while not done():
                now = time.monotonic()
                if deadline is not None and now >= deadline:
                    return False
                while self._timers and self._timers[0][0] <= now:
                    heapq.heappop(self._timers)[2]()
                    if done():
                        return True
                self._wait(now, deadline)
                for _ in range(_BATCH):
                    if not calls:
                        break
                    calls.popleft()()
                    if done():
                        return True
                for waiter in self._waiters:
                    if waiter.done():
                        waiter.wake.set()
            return True
        finally:
            self._driver = 0
            for waiter in self._waiters:
                if waiter.done():
                    waiter.wake.set()
            self._hand_on()

    def _wait(self, now: float, deadline: float | None) -> None:
        """Wait until there is something to do; not at all if there is, but do the I/O that can be done."""
        until = now + _LONGEST_WAIT if deadline is None else min(now + _LONGEST_WAIT, deadline)
        if self._timers:
            until = min(until, self._timers[0][0])
        self._waiting = True
        self._leave()
        try:
            if self._wanting:  # a lock is not fair: this thread would have it again before any other has woken
                time.sleep(_STEP_ASIDE)
            seconds = 0.0 if self._calls else max(0.0, until - now)
            if (self._drive is None or not self._drive(seconds)) and seconds:
                self._wakeup.wait(seconds)
        finally:
            self._waiting = False
            if self._wakeup.is_set():
                self._wakeup.clear()
            self._enter()


class Strand:
    """What one run has the loop do. An error of one of its calls comes out of its own `run_until`, and of no other run's."""

    def __init__(self, loop: Loop) -> None:
        self._loop = loop
        self._error: BaseException | None = None
        self.outside = loop.outside

    def post(self, call: Callable[[], None]) -> None:
        """As `Loop.post`."""
        self._loop.post(partial(self.call, call))

    def after(self, seconds: float, call: Callable[[], None]) -> None:
        """As `Loop.after`."""
        self._loop.after(seconds, partial(self.call, call))

    def call(self, call: Callable[..., None], *args: Any) -> None:
        """Make a call now, in one of the loop's."""
        try:
            call(*args)
        except Exception as error:
            if self._error is None:
                self._error = error
            else:
                log.error("an error after another one", exc_info=error)

    def run_until(self, done: Callable[[], bool], timeout: float | None = None) -> bool:
        """As `Loop.run_until`; raises what a call has raised."""
        ended = self._loop.run_until(lambda: self._error is not None or done(), timeout)
        if self._error is not None:
            error, self._error = self._error, None
            raise error
        return ended
