"""What a workflow has become by the continuations of its tasks: pure.

A task that returns `continuation(node)` has the output of the DAG that ends in *node*. Its tasks are put into the workflow behind it,
under names ``parent/name``; whoever took the parent's output, or waited for it, takes that of the DAG, or waits for that, instead. Each of
them is computed from the parent's output, though it is given nothing of it: so all that is true of what comes of a value that varies (R5)
is true of them. Facts of the journal go by name, so that the index of a task may be another one in the next epoch.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

from .spec import SEPARATOR, TaskSpec, WorkflowSpec

__all__ = ["expand"]


@dataclass
class _Level:
    """A DAG that is being put into the workflow."""

    spec: WorkflowSpec
    prefix: str
    #: the task that has continued with it; -1: it is the workflow's own
    parent: int
    #: checkpoint mode of tasks that say nothing
    checkpoint: str
    #: how many of its tasks are there
    done: int = 0
    #: index in `spec` → the task whose output that task's output is
    ends: list[int] = field(default_factory=list)


def expand(base: WorkflowSpec, continued: Mapping[str, WorkflowSpec]) -> WorkflowSpec:
    """Return *base* with what its tasks have *continued* with, by name of the task; tasks that there are not (any more) are left out.

    A task that has continued is ``"sync"``: what comes of it counts only once the journal names it. Those that it has continued with have
    the mode that it had, if their checkpoint is ``"auto"``.
    """
    if not continued:
        return base
    tasks: list[TaskSpec] = []
    blobs = dict(base.blobs)
    paths = dict.fromkeys(base.sys_path)
    ends: dict[int, int] = {}
    levels = [_Level(base, "", -1, "auto")]
    while True:
        level = levels[-1]
        if level.done == len(level.spec.tasks):
            end = level.ends[level.spec.output]
            levels.pop()
            if not levels:
                break
            ends[level.parent] = end
            levels[-1].ends.append(end)
            continue
        task = _placed(level, len(tasks))
        level.done += 1
        more = continued.get(task.name)
        if more is None:
            level.ends.append(task.index)
        else:
            blobs.update(more.blobs)
            paths.update(dict.fromkeys(more.sys_path))
            levels.append(_Level(more, task.name + SEPARATOR, task.index, task.checkpoint))
            task = dataclasses.replace(task, checkpoint="sync")
        tasks.append(task)
    return dataclasses.replace(base, tasks=tuple(tasks), output=end, blobs=blobs, sys_path=tuple(paths), ends=ends)


def _placed(level: _Level, index: int) -> TaskSpec:
    """Return the next task of a level as the workflow's task *index*."""
    task = level.spec.tasks[level.done]
    # one that takes the output of another one of its DAG is computed from the parent's by way of that
    data = _unique(level.ends[one] for one in task.data) or (() if level.parent < 0 else (level.parent,))
    return dataclasses.replace(
        task,
        index=index,
        name=level.prefix + task.name,
        data=data,
        after=_unique(level.ends[one] for one in task.after),
        barriers=_unique(level.ends[one] for one in task.barriers),
        checkpoint=level.checkpoint if task.checkpoint == "auto" else task.checkpoint,
    )


def _unique(indices: Iterable[int]) -> tuple[int, ...]:
    return tuple(dict.fromkeys(indices))
