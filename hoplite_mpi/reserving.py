"""Allocating without holding up the engine: a GiB of fresh memory takes about a second."""

from __future__ import annotations

import logging
import queue
import threading
from collections.abc import Callable

from hoplite_mpi.errors import HopliteError
from hoplite_mpi.memory import Region
from hoplite_mpi.transport.engine import Engine

__all__ = ["Reserver"]

log = logging.getLogger("hoplite_mpi")

#: from so many bytes on, a helper thread allocates
_LARGE = 32 << 20

Work = Callable[[], Region]
Then = Callable[[Region | HopliteError], None]


class Reserver:
    """Gets regions, small ones at once, large ones in a helper thread, one after the other."""

    def __init__(self, engine: Engine) -> None:
        self._engine = engine
        self._queue: queue.SimpleQueue[tuple[Work, Then] | None] = queue.SimpleQueue()
        self._thread: threading.Thread | None = None

    def get(self, nbytes: int, work: Work, then: Then) -> None:
        """Call *work*, and *then* with what it returns or raises; both belong to a region of *nbytes* bytes.

        Under the engine's lock, under which *then* is called, too; *work* may be called without it.
        """
        if nbytes < _LARGE:
            then(_result(work))
            return
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


def _result(work: Work) -> Region | HopliteError:
    try:
        return work()
    except HopliteError as error:
        return error
    except Exception as error:  # whatever it is, it must not end the engine
        return HopliteError(f"no memory could be had: {error!r}")
