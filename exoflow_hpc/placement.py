"""Which rank gets a task: the ranks, their free workers, and what is running where."""

from __future__ import annotations

import heapq
from collections.abc import Mapping
from dataclasses import dataclass, field

__all__ = ["Ranks"]


@dataclass(slots=True)
class _Rank:
    incarnation: int
    slots: int
    #: workers that no task was given to; below 0: as many tasks wait for one
    free: int
    #: tasks of other workflows that are there, and how many workflows have any, this one included
    others: int = 0
    sharing: int = 1
    #: (task, attempt) → whether it holds a worker
    running: dict[tuple[int, int], bool] = field(default_factory=dict)

    @property
    def ours(self) -> int:
        """Tasks of this workflow that have a worker, or wait for one."""
        return self.slots - self.others - self.free

    @property
    def used(self) -> float:
        """The part of our share of the workers that we have."""
        return self.ours * self.sharing / self.slots


class Ranks:
    """The live ranks of a run. Every operation is O(log ranks) amortised."""

    def __init__(self) -> None:
        self._ranks: dict[int, _Rank] = {}
        #: (-free, rank); an entry is valid if it agrees with the rank's `free`, and each rank has a valid one
        self._heap: list[tuple[int, int]] = []
        #: (used part of our share, rank) of ranks where others are at work, likewise
        self._shares: list[tuple[float, int]] = []
        #: (task, attempt) → rank, for all that runs on a live rank
        self._where: dict[tuple[int, int], int] = {}

    def __len__(self) -> int:
        return len(self._ranks)

    def incarnation(self, rank: int) -> int | None:
        """Return the live incarnation of *rank*, None if there is none."""
        found = self._ranks.get(rank)
        return None if found is None else found.incarnation

    def join(self, rank: int, incarnation: int, slots: int) -> None:
        """Add a rank, which must not be there."""
        self._ranks[rank] = _Rank(incarnation, slots, slots)
        self._changed(rank)

    def share(self, rank: int, others: int, sharing: int) -> None:
        """Note what other workflows have on a rank: so many tasks; *sharing*: workflows that have any, this one included."""
        entry = self._ranks[rank]
        entry.free += entry.others - others
        entry.others, entry.sharing = others, sharing
        self._changed(rank)

    def lose(self, rank: int) -> list[tuple[int, int]]:
        """Remove a rank and return the attempts that ran there, in order."""
        lost = sorted(self._ranks.pop(rank).running)
        for attempt in lost:
            del self._where[attempt]
        return lost

    def start(self, task: int, attempt: int, rank: int, takes_worker: bool) -> None:
        """Note that an attempt runs on *rank*."""
        entry = self._ranks[rank]
        entry.running[task, attempt] = takes_worker
        self._where[task, attempt] = rank
        if takes_worker:
            entry.free -= 1
            self._changed(rank)

    def end(self, task: int, attempt: int) -> bool:
        """Note that an attempt is over; False if it wasn't running on a live rank."""
        rank = self._where.pop((task, attempt), None)
        if rank is None:
            return False
        entry = self._ranks[rank]
        if entry.running.pop((task, attempt)):
            entry.free += 1
            self._changed(rank)
        return True

    def where(self, task: int, attempt: int) -> int | None:
        """Return the rank that an attempt runs on."""
        return self._where.get((task, attempt))

    def running(self) -> list[tuple[int, int, int]]:
        """Return (task, attempt, rank) of all that runs, in order."""
        return sorted((task, attempt, rank) for (task, attempt), rank in self._where.items())

    def has_room(self, takes_worker: bool) -> bool:
        """Whether any rank can start something now: it has a free worker, or others are at work in our share of its workers."""
        top = self._top()
        if top is None or not takes_worker:
            return top is not None
        return self._ranks[top].free > 0 or self._unused() is not None

    def has_more_room(self, rank: int) -> int:
        """Return how many workers are free on another rank, if none is on *rank*."""
        top = self._top()
        if top is None or top == rank or self._ranks[rank].free > 0:
            return 0
        return max(0, self._ranks[top].free)

    def ahead(self, tasks: int) -> int | None:
        """Return the rank where fewest tasks wait for a worker, if those are less than *tasks* for each worker."""
        top = self._top()
        return None if top is None or self._ranks[top].ours >= (1 + tasks) * self._ranks[top].slots else top

    def choose(self, nbytes: Mapping[int, int], takes_worker: bool) -> int | None:
        """Return the rank with room and most of *nbytes* (by rank), then the idlest, then the lowest; or None."""
        able = [
            rank
            for rank in nbytes
            if nbytes[rank] > 0 and rank in self._ranks and (not takes_worker or self._ranks[rank].free > 0)
        ]
        if able:
            return min(able, key=lambda rank: (-nbytes[rank], -self._ranks[rank].free, rank))
        top = self._top()
        return top if top is None or not takes_worker or self._ranks[top].free > 0 else self._unused()

    def _changed(self, rank: int) -> None:
        """Enter a rank anew into the heaps; what is behind valid entries in them is dropped now and then."""
        entry = self._ranks[rank]
        heapq.heappush(self._heap, (-entry.free, rank))
        if entry.sharing > 1:
            heapq.heappush(self._shares, (entry.used, rank))
        limit = 64 + 4 * len(self._ranks)
        if len(self._heap) > limit:
            self._heap = [(-one.free, rank) for rank, one in self._ranks.items()]
            heapq.heapify(self._heap)
        if len(self._shares) > limit:
            self._shares = [(one.used, rank) for rank, one in self._ranks.items() if one.sharing > 1]
            heapq.heapify(self._shares)

    def _unused(self) -> int | None:
        """Return the rank with others at work on which most of our share of the workers is unused; None: we have all of them."""
        while self._shares:
            used, rank = self._shares[0]
            entry = self._ranks.get(rank)
            if entry is not None and entry.sharing > 1 and entry.used == used:
                return rank if used < 1 else None
            heapq.heappop(self._shares)
        return None

    def _top(self) -> int | None:
        """Return the rank with most free workers."""
        while self._heap:
            free, rank = self._heap[0]
            entry = self._ranks.get(rank)
            if entry is not None and entry.free == -free:
                return rank
            heapq.heappop(self._heap)
        return None
