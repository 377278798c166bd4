"""How long checkpoints take here, from those that were written: what ``checkpoint="auto"`` goes by."""

from __future__ import annotations

import time

__all__ = ["Writes"]

#: bytes per second, until something else is known: a disk, or one node's share of a file system
_BANDWIDTH = 500e6
#: seconds for the smallest one: a file made, two fsyncs and a rename
_LATENCY = 0.002
#: how much one write counts against all before it
_WEIGHT = 0.2
#: a smaller one tells of the latency
_MIN_BYTES = 1 << 20


class Writes:
    """Bandwidth of checkpoints in one run, with all that waits beside them."""

    def __init__(self) -> None:
        self._bandwidth = _BANDWIDTH
        self._began: dict[int, float] = {}

    def began(self, task: int) -> None:
        """The output of a task is on its way."""
        self._began[task] = time.monotonic()

    def ended(self, task: int, nbytes: int) -> None:
        """It is durable."""
        began = self._began.pop(task, None)
        if began is not None and nbytes >= _MIN_BYTES:
            measured = nbytes / max(1e-6, time.monotonic() - began)
            self._bandwidth += _WEIGHT * (measured - self._bandwidth)

    def seconds(self, nbytes: int) -> float:
        """Return how long an output of so many bytes will take."""
        return _LATENCY + nbytes / self._bandwidth
