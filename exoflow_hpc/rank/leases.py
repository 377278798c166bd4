"""Leases of ranks, as the controller grants them: until when a rank that was lost from sight may still have effects (R10b).

A lease runs on two monotonic clocks: from when it was asked for, on that of whoever holds it; from when it was granted, which is later,
on that of whoever waits. The latter waits `DRIFT` times as long. What time it is on either of them, or on a wall, plays no part.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable

from exoflow_hpc import heartbeat, records
from exoflow_hpc.history import Facts

__all__ = ["DRIFT", "GRACE", "Leases", "unfinished"]

#: seconds for which one look at the epoch counts
_CHECKED_FOR = 1.0
#: how much longer a lease may last for whoever holds it than for whoever waits for its end, since no two clocks run alike
DRIFT = 1.05
#: seconds in which the workers of a rank that is dead, or has been told to kill them, are dead as well: more than the forkserver may wait
#: for what one of them has left
GRACE = 1.5


class Leases:
    """The leases of one epoch.

    lease: seconds; check: raises FencedError if another controller has taken over: then nothing is granted any more.
    """

    def __init__(self, lease: float, check: Callable[[], None]) -> None:
        self._lease = lease
        self._check = check
        self._checked = 0.0
        self._began = time.monotonic()
        #: rank → when its lease was last granted
        self._granted: dict[int, float] = {}

    def grant(self, rank: int) -> None:
        """Renew the lease of a rank from now on. FencedError, StorageError: it must not be told so."""
        now = time.monotonic()
        if now > self._checked + _CHECKED_FOR:
            self._check()
            self._checked = now
        self._granted[rank] = now

    def seconds_left(self, rank: int, dead: bool) -> float:
        """Return for how long a rank that was lost may still have effects; dead: there is proof that its process is."""
        granted = self._granted.pop(rank, self._began)
        return GRACE if dead else max(0.0, granted + self._lease * DRIFT - time.monotonic()) + GRACE

    def seconds_left_of(self, starts: Iterable[records.TaskStarted | records.RollbackStarted]) -> float:
        """Return for how long tasks of an older epoch may still have effects."""
        if all(start.process and heartbeat.is_gone(start.process) for start in starts):
            return GRACE
        # its controller may have granted a lease just before this epoch was taken, after a look that was not new
        return (self._lease + _CHECKED_FOR) * DRIFT + GRACE


def unfinished(facts: Facts[int]) -> list[tuple[int, records.TaskStarted | records.RollbackStarted]]:
    """Return external tasks of older epochs of which no output is known, and rollbacks: somebody may still be at them."""
    found: list[tuple[int, records.TaskStarted | records.RollbackStarted]] = list(facts.rollbacks.items())
    for task, start in facts.effects.items():
        result = facts.results.get(task)
        if result is None or result.attempt < start.attempt:
            found.append((task, start))
    return found
