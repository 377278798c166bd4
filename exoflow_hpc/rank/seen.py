"""Which outputs somebody has seen: a task that is taken to be deterministic has to make the same ones again (R12)."""

from __future__ import annotations

from collections.abc import Container, Iterable
from typing import Any

from exoflow_hpc import checksums
from exoflow_hpc.history import Facts
from exoflow_hpc.semantics import descendants
from exoflow_hpc.spec import WorkflowSpec

__all__ = ["Seen"]


class Seen:
    """Checksums of outputs that were made, in older epochs or in this one, and are not committed."""

    def __init__(self, spec: WorkflowSpec, facts: Facts[int]) -> None:
        self._tasks = spec.tasks
        self._checksums = dict(facts.seen)
        self._varying = {task.index for task in spec.tasks if not task.deterministic} | facts.deviant
        #: tasks that were dispatched in this epoch
        self._began: set[int] = set()

    def begin(self, wanted: Iterable[int]) -> None:
        """The epoch runs the tasks *wanted*: what is computed from those of them that vary may come out another one."""
        if self._checksums:
            self._forget_below(index for index in wanted if index in self._varying)

    def dispatched(self, task: int) -> None:
        """A task is run, for the first time or again."""
        if task in self._began and task in self._varying:
            self._forget_below((task,))
        self._began.add(task)

    def _forget_below(self, varying: Iterable[int]) -> None:
        for index in descendants(self._tasks, varying):
            self._checksums.pop(index, None)

    def deviation(self, task: int, checksum: str) -> str | None:
        """Take the checksum of an output; return that of an earlier one if the task should have made that again, and has not."""
        before = self._checksums.setdefault(task, checksum)
        if before == checksum or task in self._varying or not checksums.are_comparable(before, checksum):
            self._checksums[task] = checksum
            return None
        return before

    def committed(self, task: int) -> None:
        """The output stands in a record now."""
        self._checksums.pop(task, None)

    def voided(self, task: int, checksum: str) -> None:
        """It did, and does not any more."""
        self._checksums.setdefault(task, checksum)

    def by(self, task: int, committed: Container[int]) -> list[Any]:
        """Return [name, checksum] of what *task* has seen that is not committed, as far as it is known, for its record."""
        data = [index for index in self._tasks[task].data if index not in committed and index in self._checksums]
        return [[self._tasks[index].name, self._checksums[index]] for index in data]
