"""Counts of one run, over all epochs that it takes."""

from __future__ import annotations

import time
from collections.abc import Collection
from dataclasses import dataclass, field

from exoflow_hpc.errors import ExoFlowError
from exoflow_hpc.history import Ran
from exoflow_hpc.outcome import Outcome
from exoflow_hpc.scheduler import Scheduler
from exoflow_hpc.scheduler_events import Counters
from hoplite_mpi.protocol.view import View

__all__ = ["Tally"]


@dataclass
class Tally:
    """What the controllers of one run count together."""

    #: tasks that were dispatched at least once
    ran: set[str] = field(default_factory=set)
    dispatches: int = 0
    #: (rank, incarnation) of the processes that were ranks of the run
    known: set[tuple[int, int]] = field(default_factory=set)
    #: effects that were undone
    rolled_back: int = 0
    lost: int = 0
    rejoined: int = 0
    began: float = field(default_factory=time.monotonic)

    def begin(self, view: View) -> None:
        """Take the ranks that are there at the start."""
        self.known.update((member.rank, member.incarnation) for member in view.members.values())

    def take_over(self, before: Ran, met: Collection[tuple[int, int]], view: View) -> None:
        """Count what the controllers before this one have done. met: (rank, incarnation) of all that this one has seen in a view."""
        self.ran, self.rolled_back, self.dispatches = before.tasks, before.rolled_back, len(before.tasks)
        self.began -= max(0.0, time.time() - before.began) if before.began else 0.0
        self.known.update((rank, one) for rank, incarnation in met for one in range(incarnation + 1))
        self.lost = sum(not view.has(rank, incarnation) for rank, incarnation in self.known)
        self.rejoined = sum(incarnation > 0 for _, incarnation in self.known)

    def go_on(self, kept: Collection[int]) -> None:
        """Take what was counted already, and is counted again, since the next controller goes on with it."""
        self.dispatches -= len(kept)

    def joins(self, rank: int, incarnation: int) -> bool:
        """Take a rank that has come; return whether it takes the place of one that was lost."""
        new = (rank, incarnation) not in self.known
        self.known.add((rank, incarnation))
        back = new and incarnation > 0
        self.rejoined += back
        return back

    def add(self, scheduler: Scheduler) -> None:
        """Take what one epoch has run, at its end."""
        self.ran.update(scheduler.spec.tasks[task].name for task in scheduler.ran)
        counters = scheduler.counters
        self.dispatches += counters.run + counters.rerun
        self.rolled_back += counters.rolled_back

    def outcome(self, status: str, error: ExoFlowError | None, tasks: int) -> Outcome:
        """Return how the run ended; *tasks*: how many the workflow has."""
        counters = Counters(
            len(self.ran), max(0, tasks - len(self.ran)), max(0, self.dispatches - len(self.ran)), self.rolled_back
        )
        return Outcome(
            status,
            error,
            counters,
            len(self.known),
            self.lost,
            self.rejoined,
            time.monotonic() - self.began,
        )
