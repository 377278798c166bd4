"""Records on their way from the loop into the journal, in groups."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import Future
from functools import partial
from typing import Any

from exoflow_hpc import records
from exoflow_hpc.errors import ExoFlowError
from exoflow_hpc.journal import Journal
from exoflow_hpc.rank.loop import Strand

__all__ = ["Recorder"]

_Durable = Callable[[], None]
_Failed = Callable[[BaseException], None]


class Recorder:
    """Gives the records of one turn of the loop to the journal together, in order. Called inside of the loop."""

    def __init__(self, journal: Journal, loop: Strand) -> None:
        self._journal = journal
        self._loop = loop
        #: records that the journal has not been given yet, and what is to follow
        self._waiting: list[tuple[dict[str, Any], _Durable, _Failed]] = []

    def append(self, record: records.Record, durable: _Durable, failed: _Failed) -> None:
        """Journal a record when the loop has made the calls that wait now; *durable* or *failed* follows in its thread."""
        if not self._waiting:
            self._loop.post(self.write)
        self._waiting.append((records.encode(record), durable, failed))

    def write(self) -> None:
        """Give the journal what waits."""
        waiting, self._waiting = self._waiting, []
        for record, durable, failed in waiting:
            try:
                future = self._journal.append(record)
            except ExoFlowError as error:
                self._loop.post(partial(failed, error))
            else:
                future.add_done_callback(partial(self._acknowledge, durable, failed))

    def _acknowledge(self, durable: _Durable, failed: _Failed, future: Future[None]) -> None:
        error = future.exception()
        self._loop.post(durable if error is None else partial(failed, error))
