"""How the runs of a rank share its workers."""

from __future__ import annotations

from collections.abc import Callable

__all__ = ["Share", "Shares"]


class Shares:
    """How many tasks each run has given to the pool. All methods run inside of the loop."""

    def __init__(self) -> None:
        self._shares: dict[Share, None] = {}
        self.total = 0
        #: runs that have any
        self.active = 0

    def join(self, on_change: Callable[[], None]) -> Share:
        """Return the share of one more run, which has none; *on_change*: what others have has changed."""
        share = Share(self, on_change)
        self._shares[share] = None
        return share

    def leave(self, share: Share) -> None:
        """Forget a share, whatever it has."""
        if share in self._shares:
            share.add(-share.tasks)
            del self._shares[share]

    def changed(self, share: Share, before: int) -> None:
        """Take that a share has changed, and tell the others."""
        if share not in self._shares:  # what comes late of a run that is over
            return
        self.total += share.tasks - before
        self.active += bool(share.tasks) - bool(before)
        for other in self._shares:
            if other is not share:
                other.on_change()


class Share:
    """Of one run."""

    def __init__(self, shares: Shares, on_change: Callable[[], None]) -> None:
        self._shares = shares
        self.on_change = on_change
        self.tasks = 0

    def add(self, tasks: int) -> None:
        """This run has more tasks there, or fewer."""
        before, self.tasks = self.tasks, self.tasks + tasks
        self._shares.changed(self, before)

    @property
    def besides(self) -> tuple[int, int]:
        """How many tasks the others have, and how many runs have any, this one included."""
        shares = self._shares
        return shares.total - self.tasks, 1 + shares.active - bool(self.tasks)

    def leave(self) -> None:
        """The run is over here. May be called twice."""
        self._shares.leave(self)
