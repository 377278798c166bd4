"""What has to run: the recovery planner. It knows what is committed and what was lost, nothing of ranks or time.

Rule R6: what runs (again) is the backward closure from what is still wanted, stopping at committed tasks. All
functions are pure and iterative: a chain of 10,000 tasks is no deeper for them than one of 2.
"""

from __future__ import annotations

from collections.abc import Callable, Container, Iterable, Sequence

from .spec import TaskSpec

__all__ = ["descendants", "must_run_again", "wanted"]


def descendants(tasks: Sequence[TaskSpec], source: int) -> list[int]:
    """Return, in topological order, the tasks whose outputs were computed from that of *source*, itself left out."""
    found = {source}
    for task in tasks[source + 1 :]:
        if not found.isdisjoint(task.data):
            found.add(task.index)
    return sorted(found - {source})


def wanted(tasks: Sequence[TaskSpec], output: int, committed: Container[int]) -> list[int]:
    """Return, in topological order, the tasks that a run has to execute, given those *committed* by earlier ones.

    Control edges count like data: what an uncommitted task waits for, and what nobody has a record of, happens (again)
    first.
    """
    found: set[int] = set()
    pending = [output]
    while pending:
        index = pending.pop()
        if index in found or index in committed:
            continue
        found.add(index)
        task = tasks[index]
        pending.extend(task.data)
        pending.extend(task.after)
        pending.extend(task.barriers)
    return sorted(found)


def must_run_again(
    tasks: Sequence[TaskSpec], lost: Iterable[int], is_needed: Callable[[int], bool], is_gone: Callable[[int], bool]
) -> list[int]:
    """Return, in topological order, what has to run again after outputs were *lost*.

    is_needed: whether a task has a consumer that still has to start, or a promise to be committed. is_gone: whether
    its output is
    neither committed, nor in memory, nor being made. Control edges do not count: what they wait for has happened in
    this run.
    """
    found: set[int] = set()
    pending = [index for index in lost if is_needed(index)]
    while pending:
        index = pending.pop()
        if index in found or not is_gone(index):
            continue
        found.add(index)
        pending.extend(tasks[index].data)
    return sorted(found)
