"""Where each task of a run stands: the scheduler's tables, and the transitions between their states.

Whether an output counts is decided by its checkpoint mode: *usable* means committed, or in memory and not ``"sync"``.
A task is READY when all its inputs are usable, its control edges are met, and nothing holds it back.
"""

from __future__ import annotations

import heapq
from collections.abc import Collection, Iterable, Mapping
from enum import Enum
from typing import NamedTuple, Protocol

from .semantics import Plan, descendants, must_run_again
from .spec import WorkflowSpec

__all__ = ["Held", "TableListener", "TaskState", "TaskTable"]


class TaskState(Enum):
    """Where a task stands. Committed is apart: a committed task is DONE while its output is in memory, else IDLE."""

    #: nothing to do: not wanted, or committed, or its output was released or lost and nobody needs it
    IDLE = "idle"
    #: some input is not usable, or some control edge not met
    WAITING = "waiting"
    #: as soon as a rank has room
    READY = "ready"
    #: its latest attempt was dispatched
    RUNNING = "running"
    #: its output is in memory
    DONE = "done"


#: states of tasks that have not been dispatched and will be
_PENDING = (TaskState.WAITING, TaskState.READY)


class Held(NamedTuple):
    """An output in memory."""

    attempt: int
    rank: int
    incarnation: int
    nbytes: int


class TableListener(Protocol):
    """Who hears of what a change in the table leads to. Called in the middle of it: to be written down, and acted on later."""

    def released(self, task: int, attempt: int) -> None:
        """An output in memory is needed by nobody any more."""

    def voided(self, task: int, running: bool, committed: bool) -> None:
        """What was computed from a lost value is void; running: while its latest attempt was; committed: the journal names it."""

    def redone(self, task: int) -> None:
        """What the task made, or did outside, will be another one: nothing that is still on its way may count."""

    def held_back(self, tasks: Iterable[int]) -> None:
        """Tasks must not start before all that is void is undone; `TaskTable.let_go` ends that, once for each."""


class TaskTable:
    """The state of all tasks. Costs are proportional to the edges that a change touches.

    varying: tasks that may give another output when they run again. effects: external tasks that were started and not undone; the
    caller keeps it.
    """

    def __init__(
        self, spec: WorkflowSpec, varying: Collection[int], effects: Collection[int], listener: TableListener
    ) -> None:
        count = len(spec.tasks)
        self.tasks = spec.tasks
        self.output = spec.output
        self._varying = varying
        self._effects = effects
        self._listener = listener
        #: tasks whose outputs are durable, and not void
        self.committed: set[int] = set()
        self.state = [TaskState.IDLE] * count
        #: not None exactly for DONE tasks
        self.held: list[Held | None] = [None] * count
        #: tasks that this run executes, in topological order
        self.wanted: tuple[int, ...] = ()
        #: those of `wanted` that are to be committed, by their options or by the rules (R3)
        self.promised: set[int] = set()
        #: those of `promised` that are committed whatever it costs
        self._forced: set[int] = set()
        #: those of `promised` that are not committed yet; the run is over when it is empty
        self.due: set[int] = set()
        #: those whose latest output is a DAG to be continued with: nobody can use that
        self._continued: set[int] = set()
        #: for pending tasks: data dependencies that are not usable
        self.missing = [0] * count
        #: for wanted tasks: control edges that are not met, and reasons to hold them back
        self.blocked = [0] * count
        #: consumers (wanted, by data) that are pending or RUNNING: who may still read the output
        self.readers = [0] * count
        #: whether the task has finished once, in this run or before, and was not voided since
        self.happened = [False] * count
        self._consumers: list[list[int]] = [[] for _ in range(count)]
        #: wanted tasks that wait until it has happened, and until it is committed
        self._followers: list[list[int]] = [[] for _ in range(count)]
        self._barred: list[list[int]] = [[] for _ in range(count)]
        #: heaps of ready tasks, by whether they take a worker; entries whose task is no longer READY are skipped
        self._ready: dict[bool, list[int]] = {True: [], False: []}

    def begin(self, plan: Plan, held: Mapping[int, Held] | None = None) -> None:
        """Take what stands and what is wanted, and make what can start READY.

        held: outputs in memory, of those that `Plan.kept` names; the others of these are RUNNING.
        """
        self.committed = set(plan.committed)
        self.wanted = plan.wanted
        for index in plan.happened:
            self.happened[index] = True
        waited_for = {barrier for index in plan.reach for barrier in self.tasks[index].barriers}
        # an effect that must come again: its end must be known for good
        self._forced = waited_for.union({self.output}, *plan.gates.values(), plan.undo, plan.owed)
        for index in plan.reach:
            task = self.tasks[index]
            for upstream in task.data:
                self._consumers[upstream].append(index)
            for upstream in task.after:
                self._followers[upstream].append(index)
                self.blocked[index] += not self.happened[upstream]
            for upstream in {*task.barriers, *plan.gates.get(index, ())}:
                self._barred[upstream].append(index)
                self.blocked[index] += upstream not in self.committed
        for index in {*self.wanted, *plan.kept, *self.committed.intersection(plan.reach)}:
            if self.tasks[index].checkpoint != "skip" or index in self._forced:
                self.promised.add(index)
        self.due = self.promised - self.committed
        self._keep(plan.kept, held or {})
        self.hold_back(plan.hold)
        self._await_inputs(self.wanted)
        for index in held or ():
            self._release_if_unneeded(index)

    def _keep(self, kept: Collection[int], held: Mapping[int, Held]) -> None:
        for index in kept:
            if index in held:
                self.held[index] = held[index]
                self.state[index] = TaskState.DONE
            else:
                self.state[index] = TaskState.RUNNING
                for upstream in self.tasks[index].data:
                    self.readers[upstream] += 1

    # ------------------------------------------------------------------------------------------------- transitions
    def pop_ready(self, takes_worker: bool) -> int | None:
        """Return the READY task that comes first in topological order and make it RUNNING; None if there is none."""
        queue = self._ready[takes_worker]
        while queue:
            task = heapq.heappop(queue)
            if self.state[task] is TaskState.READY:
                self.state[task] = TaskState.RUNNING
                return task
        return None

    def next_ready(self, takes_worker: bool) -> int | None:
        """Return the task that `pop_ready` would return."""
        queue = self._ready[takes_worker]
        while queue and self.state[queue[0]] is not TaskState.READY:
            heapq.heappop(queue)
        return queue[0] if queue else None

    def requeue(self, task: int, *, begun: bool = True) -> None:
        """A RUNNING task has to run again, and so has any input lost while it ran. begun: something may have come of it already."""
        self.state[task] = TaskState.WAITING
        if begun and task in self._effects:
            self._redo((task,))
        self.missing[task] = self._count_missing(task)
        self._make_ready(task)
        spec = self.tasks[task]
        open_edges = [index for index in (*spec.after, *spec.barriers) if not self.happened[index]]
        self._run_again([*spec.data, *open_edges])

    def await_commit(self, task: int, upstream: int) -> None:
        """A RUNNING task, which was not sent anywhere, waits until the output of *upstream* is committed."""
        self._forced.add(upstream)
        self.promised.add(upstream)
        self.due.add(upstream)
        self._barred[upstream].append(task)
        self.blocked[task] += 1
        self.state[task] = TaskState.WAITING

    def let_off(self, task: int) -> None:
        """The output need not be committed, unless the rules or another task ask for it."""
        if task not in self._forced:
            self.promised.discard(task)
            self.due.discard(task)

    def must_come_again(self, task: int) -> None:
        """What the task did is undone: it has not happened, and has to be done again whoever needs its output."""
        self._forced.add(task)
        self.promised.add(task)
        self.due.add(task)
        if self.happened[task]:
            self.happened[task] = False
            self._block(self._followers[task])

    def consumers(self, task: int) -> int:
        """Return how many wanted tasks take the output."""
        return len(self._consumers[task])

    def finish(self, task: int, held: Held, continued: bool = False) -> None:
        """The output of a RUNNING task is in memory; continued: it is a DAG to be continued with, once it is committed."""
        self.state[task] = TaskState.DONE
        self.held[task] = held
        if continued:
            self._continued.add(task)
            for tasks in (self._forced, self.promised, self.due):
                tasks.add(task)
        else:
            self._continued.discard(task)
            if self.is_usable(task):
                self._tell_consumers(task)
            self._mark_happened(task)
        self._stop_reading(task)
        self._release_if_unneeded(task)

    def commit(self, task: int) -> None:
        """The output is durable; if the task is running again or going to, that is over."""
        was_usable = self.is_usable(task)
        self.committed.add(task)
        self.due.discard(task)
        if self.state[task] in (*_PENDING, TaskState.RUNNING):
            self.state[task] = TaskState.IDLE
            self._stop_reading(task)
        if not was_usable:
            self._tell_consumers(task)
        self._mark_happened(task)
        self._unblock(self._barred[task])
        self._release_if_unneeded(task)

    def lose(self, outputs: Iterable[tuple[int, int]]) -> list[int]:
        """Outputs (task, attempt) in memory are gone; what is needed runs again. Return those that were in memory."""
        news = []
        for task, attempt in outputs:
            held = self.held[task]
            if held is None or held.attempt != attempt:
                continue  # already known, or made anew meanwhile
            was_usable = self.is_usable(task)
            news.append(task)
            self.held[task] = None
            self.state[task] = TaskState.IDLE
            if was_usable and task not in self.committed:
                self._withdraw(task)
        self._run_again(news)
        return news

    def hold(self, tasks: Iterable[int]) -> None:
        """Keep tasks from being READY, also if their inputs are lost and made anew meanwhile, until `let_go`."""
        self._block(tasks)

    def hold_back(self, tasks: Collection[int]) -> None:
        """Hold tasks, and tell the listener, who lets them go when nothing is left to be undone."""
        self._block(tasks)
        self._listener.held_back(tasks)

    def let_go(self, task: int) -> None:
        """End one `hold`."""
        self._unblock((task,))

    # ------------------------------------------------------------------------------------------------------- pieces
    def is_usable(self, task: int) -> bool:
        """Whether consumers may start on the output."""
        if task in self.committed:
            return True
        return self.held[task] is not None and self.tasks[task].checkpoint != "sync" and task not in self._continued

    def _count_missing(self, task: int) -> int:
        return sum(not self.is_usable(upstream) for upstream in self.tasks[task].data)

    def _await_inputs(self, tasks: Collection[int]) -> None:
        """Make IDLE *tasks* WAITING for their inputs, or READY."""
        for task in tasks:
            self.state[task] = TaskState.WAITING
            for upstream in self.tasks[task].data:
                self.readers[upstream] += 1
        for task in tasks:
            self.missing[task] = self._count_missing(task)
            self._make_ready(task)

    def _make_ready(self, task: int) -> None:
        if self.state[task] is TaskState.WAITING and not self.missing[task] and not self.blocked[task]:
            self.state[task] = TaskState.READY
            heapq.heappush(self._ready[self.tasks[task].kind != "reduce"], task)

    def _tell_consumers(self, task: int) -> None:
        """The output has become usable."""
        for consumer in self._consumers[task]:
            if self.state[consumer] is TaskState.WAITING:
                self.missing[consumer] -= 1
                self._make_ready(consumer)

    def _withdraw(self, task: int) -> None:
        """The output is not usable any more."""
        for consumer in self._consumers[task]:
            if self.state[consumer] in _PENDING:
                self.state[consumer] = TaskState.WAITING
                self.missing[consumer] += 1

    def _mark_happened(self, task: int) -> None:
        if not self.happened[task]:
            self.happened[task] = True
            self._unblock(self._followers[task])

    def _block(self, tasks: Iterable[int]) -> None:
        for task in tasks:
            self.blocked[task] += 1
            if self.state[task] is TaskState.READY:
                self.state[task] = TaskState.WAITING

    def _unblock(self, tasks: Iterable[int]) -> None:
        for task in tasks:
            self.blocked[task] -= 1
            self._make_ready(task)

    def _stop_reading(self, task: int) -> None:
        """The task reads its inputs no more: free what nobody else reads, do not make again what nobody waits for."""
        pending = [task]
        while pending:
            for upstream in self.tasks[pending.pop()].data:
                self.readers[upstream] -= 1
                self._release_if_unneeded(upstream)
                again = self.state[upstream] in _PENDING and self.happened[upstream]
                if again and not self.readers[upstream] and upstream not in self.due:
                    self.state[upstream] = TaskState.IDLE
                    pending.append(upstream)

    def _release_if_unneeded(self, task: int) -> None:
        held = self.held[task]
        # the workflow's output stays: whoever asked for it reads it from memory
        if held and not self.readers[task] and task not in self.due and task != self.output:
            self.held[task] = None
            self.state[task] = TaskState.IDLE
            self._listener.released(task, held.attempt)

    # ------------------------------------------------------------------------------------------ what runs again (R5, R6)
    def _run_again(self, lost: Iterable[int]) -> None:
        seeds, void = list(lost), set[int]()
        while True:
            again = must_run_again(self.tasks, seeds, self._is_needed, self._is_gone)
            sources = [index for index in again if index in self._varying]
            stale = descendants(self.tasks, sources) if sources else []
            fresh = [index for index in stale if index not in void and self._is_touched(index)]
            if not fresh:
                break
            void.update(fresh)
            for index in fresh:
                seeds.append(index)
                if self.state[index] is TaskState.RUNNING:
                    seeds.extend(self.tasks[index].data)
                self._void(index)
        for index in stale:
            if index not in void:  # all that is left of it is perhaps on its way into the journal
                self._listener.redone(index)
        if void:
            self.hold_back({*sources, *(index for index in void if index in self._effects)})
        self._redo([index for index in again if index not in void])
        self._await_inputs(again)
        for index in void:
            if self.state[index] is TaskState.WAITING and index not in again:  # it was RUNNING, or about to run again
                self.missing[index] = self._count_missing(index)
                self._make_ready(index)

    def _redo(self, tasks: Iterable[int]) -> None:
        """What had been started outside must not start again before that is over, and undone where it isn't harmless."""
        for index in tasks:
            if index in self._effects:
                self.hold_back((index,))
            if index in self._effects or index in self._varying:
                self._listener.redone(index)

    def _is_needed(self, task: int) -> bool:
        # a RUNNING consumer may have read the lost output already; if not it comes back with "lost-input"
        if task in self.due or any(self.state[consumer] in _PENDING for consumer in self._consumers[task]):
            return True
        # only what was voided has followers that wait for it although it had happened
        return not self.happened[task] and any(self.state[other] in _PENDING for other in self._followers[task])

    def _is_gone(self, task: int) -> bool:
        return self.state[task] is TaskState.IDLE and task not in self.committed

    def _is_touched(self, task: int) -> bool:
        """Whether anything came of a value that the task was given."""
        present = task in self.committed or self.held[task] is not None or self.state[task] is TaskState.RUNNING
        return present or task in self._effects

    def _void(self, task: int) -> None:
        """Take back what the task has made of a value that is lost."""
        was_usable, was_committed = self.is_usable(task), task in self.committed
        running, held = self.state[task] is TaskState.RUNNING, self.held[task]
        self.committed.discard(task)
        self.held[task] = None
        if running:
            self.state[task] = TaskState.WAITING
        elif held is not None:
            self.state[task] = TaskState.IDLE
        if was_usable:
            self._withdraw(task)
        if was_committed:
            self._block(self._barred[task])
        if task in self._effects:
            self.must_come_again(task)
        elif self.happened[task]:
            self.happened[task] = False
            self._block(self._followers[task])
        if task in self.promised:
            self.due.add(task)
        if held is not None:
            self._listener.released(task, held.attempt)
        self._listener.voided(task, running, was_committed)
