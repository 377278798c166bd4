"""Where each task of a run stands: the scheduler's tables, and the transitions between their states.

Whether an output counts is decided by its checkpoint mode: *usable* means committed, or in memory and not ``"sync"``.
A task is READY when all its inputs are usable and its control edges have been met once.
"""

from __future__ import annotations

import heapq
from collections.abc import Callable, Iterable
from enum import Enum
from typing import NamedTuple

from .recovery import must_run_again, wanted
from .spec import WorkflowSpec

__all__ = ["Held", "TaskState", "TaskTable"]


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


class TaskTable:
    """The state of all tasks. Costs are proportional to the edges that a change touches.

    release: called with (task, attempt) when an output in memory is needed by nobody any more.
    """

    def __init__(self, spec: WorkflowSpec, committed: Iterable[int], release: Callable[[int, int], None]) -> None:
        count = len(spec.tasks)
        self.tasks = spec.tasks
        self.output = spec.output
        self._release = release
        #: only ever grows: a committed task never runs again
        self.committed = set(committed)
        self.state = [TaskState.IDLE] * count
        #: not None exactly for DONE tasks
        self.held: list[Held | None] = [None] * count
        #: tasks that this run executes, in topological order
        self.wanted: list[int] = []
        #: those of `wanted` that are promised to be committed and are not yet; the run is over when it is empty
        self.due: set[int] = set()
        #: for pending tasks: data dependencies that are not usable
        self.missing = [0] * count
        #: control edges not met yet; once met they stay met. One more for a task that is held (`hold`)
        self.blocked = [0] * count
        #: consumers (wanted, by data) that are pending or RUNNING: who may still read the output
        self.readers = [0] * count
        #: whether the task has finished once, in this run or before
        self.happened = [index in self.committed for index in range(count)]
        self._consumers: list[list[int]] = [[] for _ in range(count)]
        self._followers: list[list[int]] = [[] for _ in range(count)]
        self._barred: list[list[int]] = [[] for _ in range(count)]
        #: heaps of ready tasks, by whether they take a worker; entries whose task is no longer READY are skipped
        self._ready: dict[bool, list[int]] = {True: [], False: []}

    def begin(self) -> None:
        """Find out what is wanted, and make what can start READY."""
        self.wanted = wanted(self.tasks, self.output, self.committed)
        for index in self.wanted:
            task = self.tasks[index]
            if task.checkpoint != "skip" or index == self.output:
                self.due.add(index)
            for upstream in task.data:
                self._consumers[upstream].append(index)
            for upstream in task.after:
                if not self.happened[upstream]:
                    self._followers[upstream].append(index)
                    self.blocked[index] += 1
            for upstream in task.barriers:
                if upstream not in self.committed:
                    self._barred[upstream].append(index)
                    self.blocked[index] += 1
        self._await_inputs(self.wanted)

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

    def requeue(self, task: int) -> None:
        """A RUNNING task has to run again, and so has any input lost while it ran."""
        self.state[task] = TaskState.WAITING
        self.missing[task] = self._count_missing(task)
        self._make_ready(task)
        self._run_again(self.tasks[task].data)

    def finish(self, task: int, held: Held) -> None:
        """The output of a RUNNING task is in memory."""
        self.state[task] = TaskState.DONE
        self.held[task] = held
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
                for consumer in self._consumers[task]:
                    if self.state[consumer] in _PENDING:
                        self.state[consumer] = TaskState.WAITING
                        self.missing[consumer] += 1
        self._run_again(news)
        return news

    # ------------------------------------------------------------------------------------------------------- pieces
    def is_usable(self, task: int) -> bool:
        """Whether consumers may start on the output."""
        return task in self.committed or (self.held[task] is not None and self.tasks[task].checkpoint != "sync")

    def _count_missing(self, task: int) -> int:
        return sum(not self.is_usable(upstream) for upstream in self.tasks[task].data)

    def _await_inputs(self, tasks: list[int]) -> None:
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

    def _mark_happened(self, task: int) -> None:
        if not self.happened[task]:
            self.happened[task] = True
            self._unblock(self._followers[task])

    def _unblock(self, tasks: list[int]) -> None:
        for task in tasks:
            self.blocked[task] -= 1
            self._make_ready(task)
        tasks.clear()

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
            self._release(task, held.attempt)

    def _run_again(self, lost: Iterable[int]) -> None:
        self._await_inputs(must_run_again(self.tasks, lost, self._is_needed, self._is_gone))

    def _is_needed(self, task: int) -> bool:
        # a RUNNING consumer may have read the lost output already; if not it comes back with "lost-input"
        return task in self.due or any(self.state[consumer] in _PENDING for consumer in self._consumers[task])

    def _is_gone(self, task: int) -> bool:
        return self.state[task] is TaskState.IDLE and task not in self.committed

    def hold(self, task: int) -> None:
        """Keep a task from being READY, also if its inputs are lost and made anew meanwhile, until `let_go`."""
        self.blocked[task] += 1

    def let_go(self, task: int) -> None:
        """End a `hold`."""
        self._unblock([task])
