"""A barrier over the members of the view, whoever dies in it."""

from __future__ import annotations

import threading
import time
from typing import TYPE_CHECKING, Any

from hoplite_mpi.errors import GetTimeoutError
from hoplite_mpi.futures import Future
from hoplite_mpi.ids import ObjectID
from hoplite_mpi.runtime import Runtime

if TYPE_CHECKING:
    from hoplite_mpi.store import ObjectStore

__all__ = ["Barrier"]


class Barrier:
    """The barriers of one store: whoever comes puts an empty object, and waits for those of the others."""

    def __init__(self, runtime: Runtime, store: ObjectStore) -> None:
        self._runtime = runtime
        self._store = store
        #: calls of this rank
        self._number = 0

    def wait(self, timeout: Any) -> None:
        """See `ObjectStore.barrier`."""
        self._runtime.check()
        store, engine = self._store, self._runtime.engine
        self._number += 1
        number = self._number
        seconds = self._runtime.config.deadline(timeout)
        end = None if seconds is None else time.monotonic() + seconds
        store.put(b"", _name(number, store.rank))
        #: rank → future of its coming
        coming: dict[int, Future] = {}
        changed = threading.Event()

        def look(*_: Any) -> None:
            changed.set()

        engine.run(lambda: self._runtime.view_listeners.append(look))
        try:
            while True:
                changed.clear()
                for rank in store.ranks:
                    if rank not in coming:
                        coming[rank] = store.watch(_name(number, rank))
                        coming[rank].when_done(look)
                missing = [rank for rank in store.ranks if rank not in coming or not coming[rank].done()]
                self._runtime.check()
                if not missing:
                    break
                left = None if end is None else max(0.0, end - time.monotonic())
                if not engine.wait(changed.is_set, changed.wait, left):
                    raise GetTimeoutError(f"barrier {number}: ranks {missing} have not come after {seconds:g} s")
        finally:
            engine.run(lambda: self._runtime.view_listeners.remove(look))
            for future in coming.values():
                future.cancel()
        if number > 1:  # everybody has come here, so everybody has left the one before
            store.delete(_name(number - 1, store.rank))


def _name(number: int, rank: int) -> ObjectID:
    return ObjectID.from_name(f"hoplite/barrier/{number}/{rank}")
