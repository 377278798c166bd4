"""The event loop of a rank's workflow side: callables posted from any thread, run one by one in the thread that drives it."""

from __future__ import annotations

import heapq
import itertools
import threading
import time
from collections import deque
from collections.abc import Callable

__all__ = ["Loop"]

#: seconds of a wait at most, so that signals are handled between two calls
_LONGEST_WAIT = 1.0
#: calls that are made at most before what the loop waits for is looked at again
_BATCH = 64


class Loop:
    """Runs what is posted. `post` and `after` are for any thread, `run_until` for one."""

    def __init__(self) -> None:
        self._calls: deque[Callable[[], None]] = deque()
        self._timers: list[tuple[float, int, Callable[[], None]]] = []
        self._serial = itertools.count()
        self._wakeup = threading.Event()
        #: whether the loop's thread waits, or is about to: who posts in another thread then has to wake it
        self._waiting = False
        self._thread = 0
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
        if self._waiting and threading.get_ident() != self._thread:
            self._waiting = False  # one of those who post now is enough
            self._wakeup.set()
            if self._wake is not None:
                self._wake()

    def after(self, seconds: float, call: Callable[[], None]) -> None:
        """Have *call* run once, in so many seconds."""
        self.post(lambda: heapq.heappush(self._timers, (time.monotonic() + seconds, next(self._serial), call)))

    def run_until(self, done: Callable[[], bool], timeout: float | None = None) -> bool:
        """Run what is posted until *done()*; return whether it is, False when the time is over."""
        deadline = None if timeout is None else time.monotonic() + timeout
        calls = self._calls
        self._thread = threading.get_ident()
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
        return True

    def _wait(self, now: float, deadline: float | None) -> None:
        """Wait until there is something to do; not at all if there is, but do the I/O that can be done."""
        until = now + _LONGEST_WAIT if deadline is None else min(now + _LONGEST_WAIT, deadline)
        if self._timers:
            until = min(until, self._timers[0][0])
        self._waiting = True
        try:
            seconds = 0.0 if self._calls else max(0.0, until - now)
            if (self._drive is None or not self._drive(seconds)) and seconds:
                self._wakeup.wait(seconds)
        finally:
            self._waiting = False
            if self._wakeup.is_set():
                self._wakeup.clear()
