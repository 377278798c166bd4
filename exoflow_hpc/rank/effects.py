"""The effects of external tasks: their records before and after, what undoes them, and until when somebody may be at them (R5, R9, R10)."""

from __future__ import annotations

from collections.abc import Collection, Iterable
from typing import Any

from exoflow_hpc import records
from exoflow_hpc import scheduler_events as ev
from exoflow_hpc.errors import ExoFlowError
from exoflow_hpc.history import Facts
from exoflow_hpc.journal import Journal
from exoflow_hpc.rank import messages as ms
from exoflow_hpc.rank.driver import Driver, Which
from exoflow_hpc.rank.leases import GRACE, Leases, unfinished
from exoflow_hpc.rank.references import kept_places
from exoflow_hpc.spec import WorkflowSpec
from hoplite_mpi.testing import fault

__all__ = ["Effects"]

#: seconds of a wait that the user is told of
_TOLD_FROM = 2.0


class Effects:
    """The effects of one workflow, as the journal has them and this epoch changes them.

    lease: seconds, see `Settings.lease`; without external tasks nobody needs one. seen: attempts of older epochs of which it is known
    what became of them.
    """

    def __init__(
        self,
        spec: WorkflowSpec,
        facts: Facts[int],
        journal: Journal,
        lease: float,
        driver: Driver,
        seen: Collection[Which] = (),
    ) -> None:
        self._spec = spec
        self._driver = driver
        self._epoch = journal.epoch
        self._starts = dict(facts.effects)
        self._results = dict(facts.results)
        self._incarnations = dict(facts.incarnations)
        #: 0: nothing has effects
        self.lease = lease if any(task.external for task in spec.tasks) else 0.0
        self._leases = Leases(self.lease, journal.check)
        #: rank → `heartbeat.identity` of its process
        self._processes: dict[int, dict[str, Any]] = {}
        #: what older epochs have begun and nobody knows the end of
        self._unfinished = [(task, start) for task, start in unfinished(facts) if (task, start.attempt) not in seen]
        #: attempts that wait for the record of their start
        self._starting: set[Which] = set()
        #: rollbacks that were begun and have not ended
        self._rolling: set[Which] = set()

    @property
    def unseen(self) -> list[Which]:
        """What older epochs have begun, and somebody may still be at."""
        return [(task, start.attempt) for task, start in self._unfinished]

    def incarnation(self, task: int) -> int:
        """Return how often the effect of a task was undone."""
        return self._incarnations.get(task, 0)

    # -- starts

    def start(
        self, what: ev.Dispatch, message: ms.Run, inputs: list[Any], consumed: list[Any], stand: list[Any] | None
    ) -> None:
        """Send an external task, once the journal durably says so, and the epoch is still ours after that (R10a).

        inputs, consumed, stand: as in `records.TaskStarted`.
        """
        task, which = self._spec.tasks[what.task], (what.task, what.attempt)
        process = self._processes.get(what.rank, {})
        record = records.TaskStarted(
            task.name, what.attempt, self.incarnation(what.task), what.rank, process, inputs, consumed, stand
        )
        self._starts[what.task] = record
        self._starting.add(which)

        def durable() -> None:
            fault.point("controller.started")
            if which in self._starting:  # else it was canceled meanwhile
                self._starting.discard(which)
                if self._driver.is_running(which, what.rank):
                    self._driver.send(what.rank, message)

        self._driver.append(record, durable)

    def take_back(self, which: Which) -> bool:
        """Forget an attempt that was not sent yet; return whether it was one."""
        if which not in self._starting:
            return False
        self._starting.discard(which)
        return True

    def committed(self, task: int, record: records.TaskCommitted) -> None:
        """The output of a task is durable."""
        if task in self._starts:
            self._results[task] = record

    # -- rollbacks

    def roll_back(self, what: ev.Rollback) -> None:
        """Have an effect undone, once the journal durably says that somebody is at it."""
        fault.point("controller.roll_back")
        which, name = (what.task, what.attempt), self._spec.tasks[what.task].name
        self._driver.say(f"what task {name} did is undone")
        self._rolling.add(which)
        message = ms.Run(self._epoch, *which, self.incarnation(what.task), True, [], *self._given(what.task))

        def durable() -> None:
            fault.point("controller.rollback_started")
            if self._driver.is_running(which, what.rank):
                self._driver.send(what.rank, message)

        process = self._processes.get(what.rank, {})
        self._driver.append(records.RollbackStarted(name, what.attempt, process), durable)

    def _given(self, task: int) -> tuple[list[ms.InputPlace], list[ms.InputPlace]]:
        """Return what a rollback is given: what the task was given, and its output, if that is known; and what all that refers to."""
        places: list[ms.InputPlace] = []
        references: list[ms.InputPlace] = []
        kept = [records.kept_input(wire) for wire in self._starts[task].inputs]
        sources = [*self._spec.tasks[task].data]
        result = self._results.get(task)
        if result is not None and not result.continued:
            kept.append((result.location, result.meta, result.checksum, result.references))
            sources.append(task)
        for source, (where, meta, checksum, refers) in zip(sources, kept, strict=True):
            first = len(references)
            references += kept_places(refers, first, self._spec.index)
            places.append(_kept(source, where, meta, checksum, list(range(first, len(references)))))
        return places, references

    def is_rollback(self, which: Which) -> bool:
        """Whether that attempt is a rollback that is under way."""
        return which in self._rolling

    def rolled_back(self, which: Which) -> None:
        """A rollback has done its work: from here on the task is in another life."""
        task = which[0]
        self._rolling.discard(which)
        self._driver.tell(ev.RollbackEnded(*which))
        self._incarnations[task] = self.incarnation(task) + 1
        self._starts.pop(task, None)
        self._results.pop(task, None)
        record = records.TaskRolledBack(self._spec.tasks[task].name, self._incarnations[task])

        def durable() -> None:
            fault.point("controller.rolled_back")
            self._driver.tell(ev.RolledBack(*which))

        self._driver.append(record, durable)

    def stopped(self, which: Which) -> None:
        """An attempt has ended without success, a rollback perhaps."""
        self._rolling.discard(which)

    # -- who may be at it

    def begin(self) -> None:
        """Wait for what older epochs have begun."""
        if self._unfinished:
            self._let_end(self._leases.seconds_left_of(start for _, start in self._unfinished), self.unseen)

    def joined(self, rank: int, process: dict[str, Any], sent: float) -> None:
        """A rank has begun with this epoch, and has stopped what it ran in older ones; it asks for a lease."""
        self._processes[rank] = process
        stopped = [(task, start.attempt) for task, start in self._unfinished if start.process == process]
        if stopped:
            self._let_end(GRACE, stopped)
        self.renew(rank, sent)

    def renew(self, rank: int, sent: float) -> None:
        """Grant a rank the lease that it asked for at *sent*, on its clock, if this epoch is still ours."""
        if not self.lease:
            return
        try:
            self._leases.grant(rank)
        except ExoFlowError as error:
            self._driver.broken(error)
        else:
            self._driver.send(rank, ms.Renewed(self._epoch, sent))

    def lost(self, rank: int, dead: bool, attempts: Iterable[Which]) -> bool:
        """A rank is lost with these attempts; dead: there is proof. Return whether one of them may have effects still."""
        unseen = [which for which in attempts if self._spec.tasks[which[0]].external]
        if unseen:
            # dead workers of a dead rank, too, may be a moment behind it
            self._let_end(self._leases.seconds_left(rank, dead), unseen)
        return bool(unseen)

    def _let_end(self, seconds: float, attempts: list[Which]) -> None:
        """Take attempts that were lost from sight for over, once they must be."""
        if seconds > _TOLD_FROM:
            names = ", ".join(sorted({self._spec.tasks[task].name for task, _ in attempts}))
            self._driver.say(f"waiting {seconds:.1f} s until nobody can be at {names} any more")
        self._driver.after(seconds, lambda: self._driver.tell(ev.AttemptsOver(tuple(attempts))))


def _kept(task: int, where: records.Location, meta: list[Any], checksum: str, refers: list[int]) -> ms.InputPlace:
    if isinstance(where, records.Inline):
        return ms.InputPlace(task, "inline", -1, meta, where.data, refers=refers)
    return ms.InputPlace(task, "kept", -1, file=where.file, entry=where.entry, checksum=checksum, refers=refers)
