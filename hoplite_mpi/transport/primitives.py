"""What coroutines and threads wait for: signals, requests, timers, ordered callbacks."""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable, Coroutine, Generator
from typing import TYPE_CHECKING, Any

from mpi4py import MPI

if TYPE_CHECKING:
    from hoplite_mpi.transport.engine import Engine

__all__ = ["Ordered", "RequestFailedError", "Signal", "Task", "Timer", "Waiter", "completed"]


class RequestFailedError(Exception):
    """An MPI request ended with an error; its cause is chained."""


class Signal:
    """Something coroutines wait for, again and again: ``await signal`` resumes at the next `fire`."""

    __slots__ = ("_engine", "_relays", "_waiting")

    def __init__(self, engine: Engine) -> None:
        self._engine = engine
        self._waiting: list[Task] = []
        self._relays: list[Signal] = []

    def relay(self, other: Signal) -> None:
        """Fire *other* at the next `fire`, so that one can wait for several."""
        if other not in self._relays:
            self._relays.append(other)

    def fire(self) -> None:
        """Resume all who wait now."""
        if self._relays:
            relays, self._relays = self._relays, []
            for other in relays:
                other.fire()
        if self._waiting:
            waiting, self._waiting = self._waiting, []
            for task in waiting:
                self._engine.resume(task)

    def __await__(self) -> Generator[Any, Any, None]:
        yield self._waiting.append


class Waiter:
    """What a thread blocks on in `Engine.wait`; whatever makes its condition true calls `wake`. For one thread at a time."""

    __slots__ = ("_lock",)

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._lock.acquire()

    def wake(self) -> None:
        """End the block, or the next one."""
        if self._lock.locked():
            try:
                self._lock.release()
            except RuntimeError:  # somebody else was quicker
                return

    def block(self, seconds: float | None) -> None:
        """Wait for `wake`, at most so long."""
        self._lock.acquire(timeout=-1 if seconds is None else seconds)


class Ordered:
    """Callbacks that run outside of the engine's lock, one at a time and in order, whichever threads come by. They may not block."""

    __slots__ = ("_engine", "_queue", "_running")

    def __init__(self, engine: Engine) -> None:
        self._engine = engine
        self._queue: deque[Callable[[], None]] = deque()
        self._running = threading.Lock()

    def post(self, callback: Callable[[], None]) -> None:
        """Have *callback* run after those posted before."""
        self._queue.append(callback)
        self._engine.outside(self._run)

    def _run(self) -> None:
        while self._queue and self._running.acquire(blocking=False):  # who holds it takes ours, too
            try:
                while self._queue:
                    self._queue.popleft()()
            finally:
                self._running.release()


class Timer:
    """A callback at a time; `cancel` it if it is no longer wanted."""

    __slots__ = ("callback",)

    def __init__(self, callback: Callable[[], None]) -> None:
        self.callback: Callable[[], None] | None = callback

    def cancel(self) -> None:
        self.callback = None


class Task:
    """A coroutine that the engine runs."""

    __slots__ = ("coroutine", "on_end")

    def __init__(
        self, coroutine: Coroutine[Any, Any, Any], on_end: Callable[[BaseException | None], None] | None
    ) -> None:
        self.coroutine = coroutine
        self.on_end = on_end


class completed:
    """Await an MPI request; RequestFailedError if it fails."""

    __slots__ = ("_engine", "_request")

    def __init__(self, engine: Engine, request: MPI.Request) -> None:
        self._engine = engine
        self._request = request

    def __await__(self) -> Generator[Any, Any, None]:
        engine = self._engine

        def park(task: Task) -> None:
            engine.watch(self._request, lambda error: engine.resume(task, error))

        yield park
