"""How the runs of a rank share its workers."""

from __future__ import annotations

from collections.abc import Callable, Sized

__all__ = ["Share", "Shares"]


class Shares:
    """What each run has given to the pool. All methods run inside of the loop."""

    def __init__(self) -> None:
        self._shares: dict[Share, None] = {}

    def join(self, tasks: Sized, on_change: Callable[[], None]) -> Share:
        """Return the share of one more run: *tasks* that the pool has of it; *on_change*: what others have has changed."""
        share = Share(self, tasks, on_change)
        self._shares[share] = None
        return share

    def leave(self, share: Share) -> None:
        """Forget a share."""
        del self._shares[share]
        self.changed(share)

    def changed(self, share: Share) -> None:
        """Tell the others."""
        for other in self._shares:
            if other is not share:
                other.on_change()

    def besides(self, share: Share) -> tuple[int, int]:
        """Return how many tasks the others have, and how many runs have any, this one included."""
        counts = [len(other.tasks) for other in self._shares if other is not share]
        return sum(counts), 1 + sum(map(bool, counts))


class Share:
    """Of one run."""

    def __init__(self, shares: Shares, tasks: Sized, on_change: Callable[[], None]) -> None:
        self._shares = shares
        self.tasks = tasks
        self.on_change = on_change

    def changed(self) -> None:
        """This one has more tasks there, or fewer."""
        self._shares.changed(self)

    @property
    def besides(self) -> tuple[int, int]:
        """How many tasks the others have, and how many runs have any, this one included."""
        return self._shares.besides(self)

    def leave(self) -> None:
        """The run is over here."""
        self._shares.leave(self)
