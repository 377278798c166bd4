"""The event loop of a rank's workflow side: callables posted from any thread, run one by one in the thread that drives it."""

from __future__ import annotations

import heapq
import itertools
import queue
import time
from collections.abc import Callable

__all__ = ["Loop"]


class Loop:
    """Runs what is posted. `post` and `after` are for any thread, `run_until` for one."""

    def __init__(self) -> None:
        self._queue: queue.SimpleQueue[Callable[[], None]] = queue.SimpleQueue()
        self._timers: list[tuple[float, int, Callable[[], None]]] = []
        self._serial = itertools.count()

    def post(self, call: Callable[[], None]) -> None:
        """Have *call* run as soon as possible, after what was posted before."""
        self._queue.put(call)

    def after(self, seconds: float, call: Callable[[], None]) -> None:
        """Have *call* run once, in so many seconds."""
        self._queue.put(lambda: heapq.heappush(self._timers, (time.monotonic() + seconds, next(self._serial), call)))

    def run_until(self, done: Callable[[], bool], timeout: float | None = None) -> bool:
        """Run what is posted until *done()*; return whether it is, False when the time is over."""
        deadline = None if timeout is None else time.monotonic() + timeout
        while not done():
            now = time.monotonic()
            if deadline is not None and now >= deadline:
                return False
            while self._timers and self._timers[0][0] <= now:
                heapq.heappop(self._timers)[2]()
                if done():
                    return True
            ends = [self._timers[0][0]] if self._timers else []
            if deadline is not None:
                ends.append(deadline)
            try:
                # bounded, so that signals are handled between two calls
                call = self._queue.get(timeout=min([1.0, *(max(0.0, end - now) for end in ends)]))
            except queue.Empty:
                continue
            call()
        return True
