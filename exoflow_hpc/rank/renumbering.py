"""What a rank goes on with when its tasks get other indices: one has continued, and a controller begins with what the workflow is now."""

from __future__ import annotations

import dataclasses
from collections.abc import Collection, Iterable, Sequence

from exoflow_hpc.rank import messages as ms
from exoflow_hpc.spec import WorkflowSpec

__all__ = ["Renumbering"]


class Renumbering:
    """From the indices of one spec to those of another one of the same workflow: a task keeps its name."""

    def __init__(self, before: WorkflowSpec, after: WorkflowSpec) -> None:
        self._names = [task.name for task in before.tasks]
        self._after = after

    def task(self, index: int) -> int:
        """Return the new index of a task that the workflow still has."""
        return self._after.index(self._names[index])

    def run(self, run: ms.Run) -> ms.Run:
        """Return what an attempt was told."""
        return dataclasses.replace(
            run, task=self.task(run.task), inputs=self._places(run.inputs), references=self._places(run.references)
        )

    def _places(self, places: Iterable[ms.InputPlace]) -> list[ms.InputPlace]:
        return [dataclasses.replace(place, task=self.task(place.task)) for place in places]

    def said(self, message: ms.Message, epoch: int, kept: Collection[tuple[str, int]]) -> ms.Message | None:
        """Return what to say instead in *epoch* of an attempt that is *kept*; None: nothing, since what it is about is over."""
        if not isinstance(message, (ms.Finished, ms.Failed, ms.Progress, ms.Corrupt)):
            return None  # who asks for a lease asks again, and what is written is written again
        if not isinstance(message, ms.Corrupt) and (self._names[message.task], message.attempt) not in kept:
            return None
        task = self._after.find(self._names[message.task])
        if task is None:
            return None
        if isinstance(message, ms.Finished):
            refers = self._keys(message.refers)
            puts = [[index, meta, self._keys(inner)] for index, meta, inner in message.puts]
            return dataclasses.replace(message, epoch=epoch, task=task, refers=refers, puts=puts)
        if isinstance(message, ms.Failed):
            return dataclasses.replace(message, epoch=epoch, task=task, missing=self._keys(message.missing))
        return dataclasses.replace(message, epoch=epoch, task=task)

    def _keys(self, keys: Iterable[Sequence[int]]) -> list[list[int]]:
        return [[self.task(task), *rest] for task, *rest in keys]
