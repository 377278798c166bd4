"""The same world with tasks that continue: which tasks there are changes from epoch to epoch, and facts go by name."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any, TypeVar

from exoflow_hpc.expansion import expand
from exoflow_hpc.spec import WorkflowSpec
from exoflow_hpc.succession import Stand

from .world import Attempt, Commitment, Value, World

__all__ = ["ContinuingWorld"]

V = TypeVar("V")


class ContinuingWorld(World):
    """One workflow, without references.

    will: returns what a task continues with that has made a value, or None; keeps: whether the next epoch, which begins when a
    continuation is committed, goes on with what is in memory and runs.
    """

    def __init__(
        self,
        base: WorkflowSpec,
        choose: Callable[[list[Callable[[], None]]], Callable[[], None]],
        will: Callable[[str, Value], WorkflowSpec | None],
        keeps: Callable[[], bool],
        ranks: int,
    ) -> None:
        self.base = base
        self.will = will
        self.keeps = keeps
        #: in the journal
        self.continued: dict[str, WorkflowSpec] = {}
        #: (name, attempt) → what it has continued with, of those that have
        self.made: dict[tuple[str, int], WorkflowSpec] = {}
        self.identities: dict[str, int] = {}
        #: name → highest attempt, incarnation, of tasks that there are not now
        self.elsewhere: dict[str, tuple[int, int]] = {}
        #: how many epochs have begun with other tasks
        self.changes = 0
        super().__init__(base, choose, ranks=ranks, slots=2)

    def name(self, task: int) -> str:
        return self.spec.tasks[task].name

    def identity(self, task: int) -> int:
        return self.identities.setdefault(self.name(task), len(self.identities))

    def continues(self, run: Attempt, value: Value) -> bool:
        found = self.will(self.name(run.task), value)
        if found is not None:
            self.made[self.name(run.task), run.attempt] = found
        return found is not None

    def record_commit(self, commit: Commitment) -> None:
        task, attempt, _, _ = commit
        if task not in self.facts.committed:
            found = self.made.get((self.name(task), attempt))
            if found is not None:
                self.continued[self.name(task)] = found
            else:
                self.continued.pop(self.name(task), None)
        super().record_commit(commit)

    def end_commit(self, commit: Commitment) -> None:
        task, attempt, _, _ = commit
        if (self.name(task), attempt) not in self.made and task not in self.spec.ends:
            super().end_commit(commit)
            return
        self.commits.remove(commit)
        self.record_commit(commit)
        if self.keeps():
            self.lose_controller(-1, True, lambda: True)
        else:
            self.crash(ghosts=True)

    def renumber(self) -> None:
        # what is to be continued with is not taken over
        for task, attempt in self.memory:
            if (self.name(task), attempt) in self.made:
                self.stands[task, attempt] = None
        before, after = self.spec, expand(self.base, self.continued)
        where = [after.find(task.name) for task in before.tasks]
        names = [task.name for task in before.tasks]
        if names == [task.name for task in after.tasks] and before == after:
            return
        self.changes += 1
        facts = self.facts

        def index(task: int) -> int:
            found = where[task]
            assert found is not None, f"{names[task]} is to count, and there is no such task now"
            return found

        def moved(table: dict[int, V]) -> dict[int, V]:
            return {found: value for task, value in table.items() if (found := where[task]) is not None}

        def stand(known: Stand) -> Stand:
            if known is None or any(where[task] is None for task, _, _ in known):
                return None
            return frozenset((index(task), attempt, committed) for task, attempt, committed in known)

        for task, found in enumerate(where):
            if found is None:
                self.elsewhere[names[task]] = (facts.attempts.get(task, -1), facts.incarnations.get(task, 0))
        facts.committed = {index(task): value for task, value in facts.committed.items()}
        facts.effects = {index(task): None for task in facts.effects}
        facts.outside = {(index(task), life): value for (task, life), value in facts.outside.items()}
        facts.undoing = {index(task) for task in facts.undoing}
        facts.owed = set(moved(dict.fromkeys(facts.owed)))
        facts.incarnations, facts.attempts = moved(facts.incarnations), moved(facts.attempts)
        facts.stands = {task: stand(known) for task, known in moved(facts.stands).items()}
        facts.starts = {task: (attempt, stand(known)) for task, (attempt, known) in moved(facts.starts).items()}
        facts.references = moved(facts.references)
        for one in after.tasks:
            attempt, life = self.elsewhere.pop(one.name, (-1, 0))
            if attempt >= 0:
                facts.attempts[one.index] = attempt
            if life:
                facts.incarnations[one.index] = life

        def pairs(table: dict[tuple[int, int], Any]) -> dict[tuple[int, int], Any]:
            return {
                (found, attempt): value
                for (task, attempt), value in table.items()
                if (found := where[task]) is not None
            }

        self.memory = pairs(self.memory)
        self.stands = {which: stand(known) for which, known in pairs(self.stands).items()}
        self.running = [run for run in self.running if where[run.task] is not None]
        for run in {*self.running, *self.ghosts}:
            run.task = index(run.task)
            if not run.rollback:
                inputs = tuple(dataclasses.replace(one, task=index(one.task)) for one in run.order.inputs)
                run.order = dataclasses.replace(run.order, task=run.task, inputs=inputs)
        self.spec = after
