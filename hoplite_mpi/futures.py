"""Futures that drive the engine while somebody waits for them."""

from __future__ import annotations

import asyncio
import concurrent.futures
import logging
import queue
import threading
from collections.abc import Callable, Generator
from typing import Any

from hoplite_mpi.config import DEFAULT
from hoplite_mpi.errors import GetTimeoutError
from hoplite_mpi.transport.engine import Engine

__all__ = ["Future"]

log = logging.getLogger("hoplite_mpi")


class _Caller:
    """Runs users' callbacks in a thread of their own: one that waits for the store must not hold up who drives it."""

    def __init__(self) -> None:
        self._queue: queue.SimpleQueue[tuple[Callable[[Any], object], Any]] = queue.SimpleQueue()
        self._lock = threading.Lock()
        self._thread: threading.Thread | None = None

    def call(self, function: Callable[[Any], object], future: Any) -> None:
        """Call *function(future)* soon, after those that were posted before."""
        self._queue.put((function, future))
        with self._lock:
            if self._thread is None:
                self._thread = threading.Thread(target=self._run, name="hoplite-callbacks", daemon=True)
                self._thread.start()

    def _run(self) -> None:
        while True:
            function, future = self._queue.get()
            try:
                function(future)
            except Exception:
                log.exception("a callback of %r raised", future)
            del function, future  # an idle thread keeps no object alive


_caller = _Caller()


class Future(concurrent.futures.Future):
    """Result of an asynchronous call: works with `concurrent.futures.wait`, `await`, and callbacks.

    Callbacks run one after the other in a thread of their own, and may wait for the store.
    `cancel` gives up waiting; the object itself is not touched.
    """

    def __init__(self, engine: Engine, what: str, on_cancel: Callable[[Future], None] | None = None) -> None:
        super().__init__()
        self._engine = engine
        self._what = what
        #: told this future; one that knew it already would keep it, and with it the object, until a garbage collection
        self._on_cancel = on_cancel

    def result(self, timeout: Any = DEFAULT) -> Any:
        """Return the result; wait up to *timeout* seconds (DEFAULT: `Config.default_timeout`), then GetTimeoutError."""
        self._wait(timeout)
        return super().result(0)

    def exception(self, timeout: Any = DEFAULT) -> BaseException | None:
        """Return the error, or None; wait like `result`."""
        self._wait(timeout)
        return super().exception(0)

    def add_done_callback(self, fn: Callable[[Any], object]) -> None:
        """Call *fn(future)* in the thread of the callbacks when this has ended; at once if it has."""
        if self.done():
            super().add_done_callback(fn)
        else:
            super().add_done_callback(lambda future: _caller.call(fn, future))

    def when_done(self, fn: Callable[[Any], object]) -> None:
        """Call *fn(future)* from whichever thread ends this; it may not wait."""
        super().add_done_callback(fn)

    def cancel(self) -> bool:
        """Give up waiting; return whether it was not too late for that."""
        cancelled = super().cancel()
        if cancelled and self._on_cancel is not None:
            self._on_cancel(self)
        return cancelled

    def __await__(self) -> Generator[Any, None, Any]:
        return asyncio.wrap_future(self).__await__()

    def _wait(self, timeout: Any) -> None:
        seconds = self._engine.config.deadline(timeout)
        if not self._engine.wait(self.done, self._block, seconds):
            raise GetTimeoutError(f"{self._what}: not there after {seconds:g} s")

    def _block(self, seconds: float | None) -> None:
        concurrent.futures.wait([self], seconds)
