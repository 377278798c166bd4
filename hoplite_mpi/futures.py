"""Futures that drive the engine while somebody waits for them."""

from __future__ import annotations

import asyncio
import concurrent.futures
from collections.abc import Callable, Generator
from typing import Any

from hoplite_mpi.config import DEFAULT
from hoplite_mpi.errors import GetTimeoutError
from hoplite_mpi.transport.engine import Engine

__all__ = ["Future"]


class Future(concurrent.futures.Future):
    """Result of an asynchronous call: works with `concurrent.futures.wait`, `await`, and callbacks.

    `cancel` gives up waiting; the object itself is not touched.
    """

    def __init__(self, engine: Engine, what: str, on_cancel: Callable[[], None] | None = None) -> None:
        super().__init__()
        self._engine = engine
        self._what = what
        self._on_cancel = on_cancel

    def result(self, timeout: Any = DEFAULT) -> Any:
        """Return the result; wait up to *timeout* seconds (DEFAULT: `Config.default_timeout`), then GetTimeoutError."""
        self._wait(timeout)
        return super().result(0)

    def exception(self, timeout: Any = DEFAULT) -> BaseException | None:
        """Return the error, or None; wait like `result`."""
        self._wait(timeout)
        return super().exception(0)

    def cancel(self) -> bool:
        """Give up waiting; return whether it was not too late for that."""
        cancelled = super().cancel()
        if cancelled and self._on_cancel is not None:
            self._on_cancel()
        return cancelled

    def __await__(self) -> Generator[Any, None, Any]:
        return asyncio.wrap_future(self).__await__()

    def _wait(self, timeout: Any) -> None:
        seconds = self._engine.config.deadline(timeout)
        if not self._engine.wait(self.done, self._block, seconds):
            raise GetTimeoutError(f"{self._what}: not there after {seconds:g} s")

    def _block(self, seconds: float | None) -> None:
        concurrent.futures.wait([self], seconds)
