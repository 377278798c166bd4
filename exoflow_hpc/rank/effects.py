"""What a controller knows of the effects of external tasks: which life each is in, what it was given, and what is needed to undo it."""

from __future__ import annotations

from typing import Any

from exoflow_hpc import records
from exoflow_hpc.history import Facts
from exoflow_hpc.rank.messages import InputPlace
from exoflow_hpc.spec import WorkflowSpec

__all__ = ["Effects"]


class Effects:
    """The effects of one workflow, as the journal has them and this epoch changes them."""

    def __init__(self, spec: WorkflowSpec, facts: Facts) -> None:
        self._spec = spec
        self._starts = dict(facts.effects)
        self._results = dict(facts.results)
        self._incarnations = dict(facts.incarnations)
        #: rollbacks that were sent and have not ended
        self._rolling: set[tuple[int, int]] = set()

    def incarnation(self, task: int) -> int:
        """Return how often the effect of a task was undone."""
        return self._incarnations.get(task, 0)

    def started(
        self, task: int, attempt: int, rank: int, process: dict[str, Any], inputs: list[Any], consumed: list[Any]
    ) -> records.TaskStarted:
        """Return the record to write before an external task is dispatched."""
        name = self._spec.tasks[task].name
        record = records.TaskStarted(name, attempt, self.incarnation(task), rank, process, inputs, consumed)
        self._starts[task] = record
        return record

    def committed(self, task: int, record: records.TaskCommitted) -> None:
        """The output of a task is durable."""
        if task in self._starts:
            self._results[task] = record

    def roll_back(self, task: int, attempt: int) -> list[InputPlace]:
        """Return what its rollback is given: what the task was given, and its output, if that is known."""
        self._rolling.add((task, attempt))
        sources = zip(self._spec.tasks[task].data, self._starts[task].inputs, strict=True)
        places = [
            _kept(source, records.location_of(place), meta, checksum) for source, (place, meta, checksum) in sources
        ]
        result = self._results.get(task)
        if result is not None:
            places.append(_kept(task, result.location, result.meta, result.checksum))
        return places

    def is_rollback(self, task: int, attempt: int) -> bool:
        """Whether that attempt is a rollback that is under way."""
        return (task, attempt) in self._rolling

    def stopped(self, task: int, attempt: int) -> None:
        """A rollback has ended without success, if it was one."""
        self._rolling.discard((task, attempt))

    def rolled_back(self, task: int, attempt: int) -> records.TaskRolledBack:
        """Return the record that says so; from its writing on the task is in another life."""
        self._rolling.discard((task, attempt))
        self._incarnations[task] = self.incarnation(task) + 1
        self._starts.pop(task, None)
        self._results.pop(task, None)
        return records.TaskRolledBack(self._spec.tasks[task].name, self._incarnations[task])


def _kept(task: int, where: records.Location, meta: list[Any], checksum: str) -> InputPlace:
    if isinstance(where, records.Inline):
        return InputPlace(task, "inline", -1, meta, where.data)
    return InputPlace(task, "kept", -1, file=where.file, entry=where.entry, checksum=checksum)
