"""What takes too long for the engine: a GiB of fresh memory takes about a second, and so does making room on disk for less."""

from __future__ import annotations

import logging
import queue
import threading
from collections.abc import Callable
from typing import Any

from hoplite_mpi.errors import HopliteError, StoreFullError
from hoplite_mpi.memory import Memory
from hoplite_mpi.transport.engine import Engine

__all__ = ["Reserver"]

log = logging.getLogger("hoplite_mpi")

#: from so many bytes on, a helper thread allocates
_LARGE = 32 << 20

Work = Callable[[], Any]
#: told what the work returned, or why there is nothing
Then = Callable[[Any], None]


class Reserver:
    """Gets memory: a little at once, where there is room; else in a helper thread, one after the other."""

    def __init__(self, engine: Engine, memory: Memory) -> None:
        self._engine = engine
        self._memory = memory
        self._queue: queue.SimpleQueue[tuple[Work, Then] | None] = queue.SimpleQueue()
        self._thread: threading.Thread | None = None

    def get(self, nbytes: int, work: Work, then: Then) -> None:
        """Call *work*, which allocates *nbytes* bytes, and *then* with what it returns or the HopliteError that it raises.

        Under the engine's lock, under which *then* is called, too; *work* may be called without it, and more than once.
        """
        if nbytes < _LARGE:
            result = _result(work)
            if not isinstance(result, StoreFullError):
                then(result)
                return
        self.later(lambda: self._memory.with_room(nbytes, work), then)

    def later(self, work: Work, then: Then) -> None:
        """As `get`, for work that blocks."""
        self._queue.put((work, then))
        if self._thread is None:
            self._thread = threading.Thread(target=self._run, name="hoplite-reserve", daemon=True)
            self._thread.start()

    def stop(self) -> None:
        """End the helper thread when it is done with what was asked for."""
        self._queue.put(None)

    def _run(self) -> None:
        while (job := self._queue.get()) is not None:
            work, then = job
            result = _result(work)
            try:
                self._engine.run(lambda: then(result))  # noqa: B023  (called at once)
            except BaseException:  # the engine has failed, and says so to all who wait for it
                log.debug("memory came for an engine that has failed", exc_info=True)
                return
            del job, work, then, result  # an idle thread keeps no memory alive


def _result(work: Work) -> Any:
    try:
        return work()
    except HopliteError as error:
        # with it would live, in a cycle, the frames of all who called, and the bytes that they know
        return error.with_traceback(None)
    except Exception as error:  # whatever it is, it must not end the engine
        return HopliteError(f"no memory could be had: {error!r}")
