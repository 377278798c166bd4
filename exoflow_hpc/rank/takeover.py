"""Taking over a run whose controller is lost (E16): what the ranks still have of it is asked for, and what of that counts."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from exoflow_hpc import history, serialize
from exoflow_hpc.rank import messages as ms
from exoflow_hpc.rank.naming import output_id
from exoflow_hpc.rank.outputs import Output
from exoflow_hpc.spec import WorkflowSpec
from exoflow_hpc.succession import Survivor, agreeing, stand_of
from hoplite_mpi.meta import Meta
from hoplite_mpi.protocol.view import Member, View

if TYPE_CHECKING:  # importing it initialises MPI
    from hoplite_mpi.store import ObjectStore

__all__ = ["Found", "Takeover"]

log = logging.getLogger("exoflow_hpc.takeover")


@dataclass
class Found:
    """What a controller goes on with: nothing but the name of its run, if it does not take over."""

    #: as in `messages.Begin`
    run: str
    #: rank → its incarnation and worker processes, of those that have reported
    ranks: dict[int, tuple[int, int]] = field(default_factory=dict)
    #: task → what is left of it and counts
    survivors: dict[int, Survivor] = field(default_factory=dict)
    #: task → output in memory, of those that do not run
    outputs: dict[int, Output] = field(default_factory=dict)

    @property
    def running(self) -> dict[int, tuple[int, int]]:
        """Task → (attempt, rank) of what runs."""
        return {task: (one.attempt, one.rank) for task, one in self.survivors.items() if one.running}


class Takeover:
    """Stands in for the controller of a new epoch until each rank of the view has reported. All methods run inside of the loop."""

    def __init__(self, epoch: int, directory: str, run: str, send: Callable[[int, ms.Message], None]) -> None:
        self._question = ms.Survey(epoch, directory, run)
        self._send = send
        #: rank → incarnation, of those that were asked
        self._asked: dict[int, int] = {}
        self._reports: dict[int, ms.Report] = {}

    def start(self, view: View) -> None:
        """Ask the ranks of a view."""
        self.on_view(view, ())

    def on_view(self, view: View, lost: tuple[Member, ...]) -> None:
        """Take a new view: who is out of it is not waited for."""
        self._asked = {rank: known for rank, known in self._asked.items() if view.has(rank, known)}
        self._reports = {rank: report for rank, report in self._reports.items() if rank in self._asked}
        for member in view.members.values():
            if member.rank not in self._asked:
                self._asked[member.rank] = member.incarnation
                self._send(member.rank, self._question)

    def greet(self, rank: int, incarnation: int) -> None:
        """Ask a rank again, that may not have been listening."""
        if self._asked.get(rank) == incarnation and rank not in self._reports:
            self._send(rank, self._question)

    def handle(self, rank: int, incarnation: int, message: ms.Message) -> None:
        """Take a message of an agent."""
        known = message.epoch == self._question.epoch and self._asked.get(rank) == incarnation
        if known and isinstance(message, ms.Report):
            self._reports[rank] = message
        else:  # what else a rank has to say, it keeps until it has been told what counts
            log.info("a late %s from rank %d.%d was dropped", type(message).__name__, rank, incarnation)

    @property
    def is_complete(self) -> bool:
        """Whether all have reported."""
        return bool(self._asked) and self._reports.keys() == self._asked.keys()

    def found(self, spec: WorkflowSpec, past: Iterable[dict[str, Any]], store: ObjectStore) -> Found:
        """Return what counts of the reports, and have the store delete the rest; blocks on the other ranks."""
        facts = history.facts_of(spec, past)
        run = self._question.run
        named = {task.name: task.index for task in spec.tasks}
        outputs = {
            (task, attempt): Output(attempt, Meta.from_wire(meta), data, rank)
            for rank, report in self._reports.items()
            for task, attempt, meta, _, data, _ in report.made
        }
        ids = {which: output_id(run, *which) for which in outputs}
        stored = [ids[which] for which, output in outputs.items() if output.data is None]
        present = store.located(stored) if stored else frozenset()
        gone = {which for which, output in outputs.items() if output.data is None and ids[which] not in present}
        survivors = [
            Survivor(named[row[0]], row[1], rank, running, stand_of(row[-1], named))
            for rank, report in self._reports.items()
            for running, rows in ((False, report.made), (True, report.running))
            for row in rows
            if row[0] in named and (running or (row[0], row[1]) not in gone)
        ]
        standing = [stand_of(record.stand, named) for record in facts.committed.values()]
        standing += [stand_of(start.stand, named) for start in facts.effects.values()]
        kept = agreeing(
            spec.tasks,
            {task: record.attempt for task, record in facts.committed.items()},
            {task: start.attempt for task, start in facts.effects.items() if task not in facts.rollbacks},
            standing,
            facts.deviant,
            survivors,
        )
        for (task, attempt), output in outputs.items():
            one = kept.get(named.get(task, -1))
            if output.data is None and (one is None or one.running or one.attempt != attempt):
                store.delete(ids[task, attempt])
        ranks = {rank: (self._asked[rank], report.slots) for rank, report in self._reports.items() if report.slots}
        return Found(run, ranks, kept, _chosen(spec, kept, outputs))


def _chosen(
    spec: WorkflowSpec, kept: Mapping[int, Survivor], outputs: Mapping[tuple[str, int], Output]
) -> dict[int, Output]:
    found = {}
    for task, one in kept.items():
        if one.running:
            continue
        output = outputs[spec.tasks[task].name, one.attempt]
        checksum = "" if output.data is None else serialize.checksum(output.meta, output.data)
        found[task] = Output(output.attempt, output.meta, output.data, one.rank, checksum)
    return found
